"""Embeddings of clips by an open_clip image tower, for finding those that show the same."""

from __future__ import annotations

import base64
import functools
from typing import Any

import numpy as np

from data.ingest_config import Clip

Record = dict[str, Any]


@functools.cache
def _tower(model: str, weights: str) -> tuple[Any, Any, str]:
    """The image tower, what prepares a picture for it, and its device."""
    import open_clip
    import torch

    if model not in open_clip.list_models():
        raise ValueError(
            f"duplicates.clip.model={model!r} is not an open_clip model; "
            "open_clip.list_models() names them"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tower, _, prepare = open_clip.create_model_and_transforms(
            model, pretrained=weights, device=device
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of every kind, and many lines, where it is no checkpoint
        first = (str(error).strip().splitlines() or ["it is empty"])[0]
        raise ValueError(
            f"duplicates.clip.weights={weights} is no checkpoint of {model}: {first:.200}"
        ) from error
    return tower.eval(), prepare, device


def check_clip(settings: Clip) -> None:
    """Raises FileNotFoundError where there are no such weights."""
    if not settings.weights.is_file():
        raise FileNotFoundError(
            f"duplicates.clip.weights={settings.weights} does not exist; expected a local file"
        )


def embed(tasks: list[Record], settings: Clip) -> list[list[Record]]:
    """The embedding of each clip: the mean over four frames, of length 1, float16 in base64."""
    import torch
    from PIL import Image

    from data.ingest_steps import clip_frames, reason_of

    tower, prepare, device = _tower(settings.model, str(settings.weights))
    results: list[list[Record]] = [[] for _ in tasks]
    pictures, owners = [], []
    for index, task in enumerate(tasks):
        try:
            frames = clip_frames(task, 4)
        except Exception as error:  # as any step: the clip is at fault, not the run
            results[index] = [{"error": reason_of(error)}]
            continue
        pictures += [prepare(Image.fromarray(frame)) for frame in frames]
        owners += [index] * len(frames)
    if not pictures:
        return results
    with torch.inference_mode():
        features = tower.encode_image(torch.stack(pictures).to(device)).float()
        features = torch.nn.functional.normalize(features, dim=-1).cpu().numpy()
    for index in sorted(set(owners)):
        mean = features[np.array(owners) == index].mean(axis=0)
        mean /= max(float(np.linalg.norm(mean)), 1e-12)
        results[index] = [
            {"embedding": base64.b64encode(mean.astype(np.float16).tobytes()).decode()}
        ]
    return results


def decode_embedding(text: str) -> np.ndarray:
    """float32 (d,), of length 1, from a record's text."""
    vector = np.frombuffer(base64.b64decode(text), np.float16).astype(np.float32)
    return vector / max(float(np.linalg.norm(vector)), 1e-12)
