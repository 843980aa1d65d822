"""Pretrained CLIP text towers from a local open_clip checkpoint."""

from __future__ import annotations

from pathlib import Path

from dit.text import TextEncoder
from sample.weights import read_weights


def load_text_weights(text: TextEncoder, path: Path) -> None:
    """Fills `text` from a whole CLIP model, or a text tower alone, saved by open_clip.

    Keys may carry the prefixes `module.` and `text.`; the picture tower and the projection to the
    shared embedding are left out, and longer position tables are cut to the context length.

    Args:
        path: .safetensors, or a file of tensors alone that torch.load reads with weights_only.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or is not a text tower of this shape.
    """
    weights = {_plain(key): value for key, value in read_weights(path).items()}
    wanted = text.transformer.state_dict()
    positions = weights.get("positional_embedding")
    if positions is not None:
        weights["positional_embedding"] = positions[: text.config.context_length]
    missing = sorted(wanted.keys() - weights.keys())
    if missing:
        raise ValueError(
            f"{path} lacks {missing[0]} ({len(missing)} of {len(wanted)} tensors missing); "
            "is it an open_clip text tower with recipe.text.num_layers layers?"
        )
    for key, value in wanted.items():
        if weights[key].shape != value.shape:
            raise ValueError(
                f"{path}: {key} is {tuple(weights[key].shape)} but recipe.text makes it "
                f"{tuple(value.shape)}; set its width and context_length to the checkpoint's"
            )
    deeper = f"transformer.resblocks.{text.config.num_layers}."
    if any(key.startswith(deeper) for key in weights):
        raise ValueError(f"{path} has more than recipe.text.num_layers layers; use all of them")
    text.transformer.load_state_dict({key: weights[key].float() for key in wanted})


def _plain(key: str) -> str:
    return key.removeprefix("module.").removeprefix("text.")
