"""A minute and more: windows of frames, each of which begins with the last ones of the window before.

Latents go on from window to window, so that nothing passes through the VAE twice; each window is
written to disk when it is done, and the same call goes on where one was cut short. The video is decoded
at the end, a window at a time, by a decoder that remembers the frames before: memory does not grow.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.files import replacing
from data.randomness import stream_seed
from data.video import to_uint8, write_video
from data.video_write import write_chunks
from sample.given import known_frames, require_references, require_task
from sample.lora import weights_of
from sample.pipeline import TextToVideo
from sample.schedule import Schedule

NOISE_LEVEL = 0.0  # of the frames that a window is given
_CLAIM, _PREVIEW = "roll.json", "preview.mp4"


@dataclass(frozen=True)
class Plan:
    """The windows of a long video, in latent frames.

    Attributes:
        first: that the first window makes; length: that every later window works on, of which it is
            given the first `given`.
        num_windows: in all.
    """

    first: int
    length: int
    given: int
    num_windows: int

    def begins(self, window: int) -> int:
        """How many latent frames there are before a window's new ones."""
        return 0 if window == 0 else self.first + (window - 1) * (self.length - self.given)


def plan_windows(pipeline: TextToVideo, num_frames: int, given: int | None = None) -> Plan:
    """Windows for a video of so many frames.

    Args:
        given: latent frames that each window is given; None: half of it.
    Raises:
        ValueError: the model was not trained for that, its VAE cannot decode in pieces, or a window
            would have nothing given or nothing new.
    """
    require_task(pipeline.info, "window", "a video in windows")
    pipeline.vae.new_stream()  # raises where the VAE has none
    info, factor = pipeline.info, pipeline.vae.temporal_factor
    first = pipeline.latent_shape(info.num_frames, info.height, info.width)[1]
    length = first - 1
    shown = max(1, length // 2) if given is None else given
    if not 1 <= shown < length:
        raise ValueError(
            f"given={shown} of windows of {length} latent frames; use 1 to {length - 1}"
            if length > 1
            else f"clips of {info.num_frames} frames are too short for windows"
        )
    total = 1 + -(-(num_frames - 1) // factor)
    more = max(0, total - first)
    return Plan(first, length, shown, 1 + -(-more // (length - shown)))


def _second(pipeline: TextToVideo, plan: Plan, window: int) -> float:
    """When a window's first new frame is shown."""
    factor = pipeline.vae.temporal_factor
    return max(0, (plan.begins(window) - 1) * factor + 1) / pipeline.info.fps


def check_schedule(pipeline: TextToVideo, schedule: Schedule, plan: Plan) -> None:
    """Raises ValueError: a prompt of the schedule holds at the beginning of no window."""
    begins = [_second(pipeline, plan, window) for window in range(plan.num_windows)]
    used = {schedule.at(begin) for begin in begins}
    for start, prompt in zip(schedule.starts, schedule.prompts):
        if prompt not in used:
            before = max(begin for begin in begins if begin <= start)
            raise ValueError(
                f"prompt schedule: no window begins while {prompt!r} holds, from {start:g}s; the last "
                f"one before that begins at {before:g}s; move it there, or have it hold for longer"
            )


def roll(
    pipeline: TextToVideo,
    schedule: Schedule,
    plan: Plan,
    folder: Path,
    *,
    seed: int = 0,
    noise_level: float = NOISE_LEVEL,
    image: Tensor | None = None,
    references: Sequence[Tensor] = (),
    height: int | None = None,
    width: int | None = None,
    **options: Any,
) -> Iterator[int]:
    """Makes the windows that a folder has not yet, one after the other; yields how many there are.

    A window depends on its number, the seed and the window before alone.

    Args:
        folder: made when missing; for `decoded`.
        noise_level: of the frames that a window is given, as t: against drift.
        image: (3 h w) in [-1, 1], the first frame; references: pictures of subjects, for all windows.
        options: as `TextToVideo.__call__`.
    Raises:
        ValueError: the folder holds windows of something else, or a window is damaged.
    """
    if not 0 <= noise_level < 1:
        raise ValueError(
            f"noise level {noise_level:g} of given frames; use 0 to below 1, such as 0.05"
        )
    require_references(pipeline.info, len(references))
    check_schedule(pipeline, schedule, plan)
    if image is not None:
        require_task(pipeline.info, "first", "a given first frame")
    factor = pipeline.vae.temporal_factor
    size = {"height": height or pipeline.info.height, "width": width or pipeline.info.width}
    claim = {**_made_by(pipeline), **vars(plan), **vars(schedule), "seed": seed, **size}
    claim |= {"noise_level": noise_level, "image": _hash(image)}
    claim["references"] = [_hash(picture) for picture in references]
    _claim(folder, {**claim, **{k: str(v) for k, v in options.items()}})
    before = None
    for window in range(plan.num_windows):
        path = _window(folder, window)
        if not path.exists():
            prompt = schedule.at(_second(pipeline, plan, window))
            length = plan.first if window == 0 else plan.length
            given = None
            if before is not None:
                held = before[:, :, before.shape[2] - plan.given :].to(pipeline.device)
                given = known_frames(held, length, slice(0, plan.given), noise_level)
            made = pipeline(
                [prompt],
                frames=1 + (length - 1) * factor,
                seeds=[stream_seed(seed, "roll", window)],
                given=given,
                image=image if window == 0 else None,
                references=references,
                output="latents",
                **size,
                **options,
            )
            new = made if window == 0 else made[:, :, plan.given :]
            try:
                with replacing(path) as partial:
                    save_file({"latents": new.contiguous()}, partial)
            except SafetensorError as error:
                raise OSError(f"{path}: cannot be written ({error})") from None
        # A window may be made of frames of several before it.
        part = _read(path, pipeline, plan, window)
        if before is not None and part.shape[3:] != before.shape[3:]:
            raise _damaged(path, f"latents of {part.shape[3]}x{part.shape[4]}")
        before = part if before is None else torch.cat([before, part], dim=2)
        before = before[:, :, -plan.given :]
        yield window + 1


def decoded(
    pipeline: TextToVideo, plan: Plan, folder: Path, num_frames: int
) -> Iterator[np.ndarray]:
    """The frames of the windows, uint8 (n h w 3), window by window."""
    stream, left = pipeline.vae.new_stream(), num_frames
    for window in range(plan.num_windows):
        latents = _read(_window(folder, window), pipeline, plan, window).to(pipeline.device)
        with torch.no_grad():
            video = pipeline.vae.decode(latents, stream)[0].clamp(-1, 1)
        frames = to_uint8(video.cpu()).permute(1, 2, 3, 0).contiguous().numpy()[:left]
        left -= len(frames)
        if len(frames):
            yield frames


def write_rolled(
    path: Path, pipeline: TextToVideo, plan: Plan, folder: Path, num_frames: int
) -> None:
    """The video of all windows; its folder is no more needed then, and removed."""
    write_chunks(path, decoded(pipeline, plan, folder, num_frames), pipeline.info.fps)
    windows = [_window(folder, window) for window in range(plan.num_windows)]
    for made in (*windows, folder / _CLAIM, folder / _PREVIEW):
        made.unlink(missing_ok=True)
    with suppress(OSError):  # somebody put something else there
        folder.rmdir()


def write_preview(pipeline: TextToVideo, folder: Path, window: int) -> None:
    """The new frames of the latest window, decoded by themselves, as a short video in the folder."""
    with torch.no_grad():
        latents = load_file(_window(folder, window))["latents"]
        video = pipeline.vae.decode(latents.to(pipeline.device))[0]
    write_video(folder / _PREVIEW, to_uint8(video.clamp(-1, 1).cpu()), pipeline.info.fps)


def _window(folder: Path, window: int) -> Path:
    return folder / f"window-{window:05d}.safetensors"


def _read(path: Path, pipeline: TextToVideo, plan: Plan, window: int) -> Tensor:
    """A window's new latents (1 c f h w)."""
    try:
        latents = load_file(path)["latents"]
    except (OSError, KeyError, SafetensorError) as error:
        raise _damaged(path, error) from None
    frames = plan.first if window == 0 else plan.length - plan.given
    if latents.ndim != 5 or latents.shape[:3] != (1, pipeline.vae.latent_channels, frames):
        raise _damaged(path, f"its shape is {tuple(latents.shape)}")
    if latents.dtype != torch.float32 or not latents.isfinite().all():
        raise _damaged(path, "not all of it are finite float32 numbers")
    return latents


def _damaged(path: Path, what: object) -> ValueError:
    return ValueError(f"{path}: damaged ({what}); remove it, and it is made anew")


def _made_by(pipeline: TextToVideo) -> dict[str, Any]:
    """What tells one model from another: what it says of itself, its LoRAs, and its precision."""
    loras = []
    for path, scale in pipeline.loras:
        with weights_of(path).open("rb") as file:
            loras.append([hashlib.file_digest(file, "sha256").hexdigest()[:16], scale])
    model = hashlib.sha256(pipeline.info.model_dump_json().encode()).hexdigest()[:16]
    defaults = pipeline.sampling.model_dump_json()
    return {"model": model, "loras": loras, "dtype": str(pipeline.dtype), "sampling": defaults}


def _hash(tensor: Tensor | None) -> str:
    if tensor is None:
        return ""
    return hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest()[:16]


def _is_partial(path: Path) -> bool:
    """Whether a killed run left it; see `data.files.replacing`."""
    return path.name.startswith(".") and path.suffix == ".partial"


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Notes down what windows are made with, or compares it with what was noted down.

    Raises:
        ValueError: they are of other settings; the first that differs is named.
    """
    path, wanted = folder / _CLAIM, json.loads(json.dumps(settings))
    if path.exists():
        try:
            found = dict(json.loads(path.read_text()))
        except (ValueError, TypeError):
            raise ValueError(f"{path}: damaged; remove {folder}, and it is begun anew") from None
        for key in sorted(wanted.keys() | found.keys()):
            if wanted.get(key) != found.get(key):
                raise ValueError(
                    f"{folder} holds windows made with {key}={found.get(key)}, not {wanted.get(key)}; "
                    "give the same, or remove the folder"
                )
        return
    if folder.exists() and not (folder.is_dir() and all(map(_is_partial, folder.iterdir()))):
        raise ValueError(
            f"{folder} is to hold windows, and is there with something else; rename it, or give the "
            "video another name"
        )
    os.makedirs(folder, exist_ok=True)
    with replacing(path) as partial:
        Path(partial).write_text(json.dumps(wanted, indent=2))
