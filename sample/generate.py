"""One call for all that can be asked of a model: from text, pictures and videos to a video."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.randomness import stream_seed
from data.video import to_float
from sample import extend as extending
from sample.edit import edit as edited
from sample.model import ModelInfo
from sample.options import OutsideTraining, outside_trained
from sample.pipeline import TextToVideo
from sample.roll import NOISE_LEVEL, decoded, plan_windows, roll
from sample.schedule import Schedule

# What each of these changes; "text" is a clip without any of the others.
_GOES_WITH = {
    "mask": ("edit",),
    "strength": ("edit",),
    "seconds": ("extend",),
    "noise_level": ("minutes",),
    "backward": ("extend",),
    "both": ("extend",),
    "given_latents": ("extend", "connect", "loop", "minutes"),
    "image": ("text", "loop", "minutes"),
    "keyframes": ("text", "loop"),
    "frames": ("text", "extend", "connect", "loop"),
}


def generate(
    pipeline: TextToVideo,
    prompt: str,
    *,
    extend: Tensor | None = None,
    seconds: float | None = None,
    backward: bool = False,
    both: bool = False,
    connect: tuple[Tensor, Tensor] | None = None,
    loop: bool = False,
    edit: Tensor | None = None,
    strength: float | None = None,
    mask: Tensor | None = None,
    minutes: float | None = None,
    noise_level: float | None = None,
    given_latents: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Tensor:
    """A video (3 f h w) in [-1, 1], as `zoetrope sample` makes it.

    Videos that are given are (3 f h w) in [-1, 1], at the model's rate and of the size to make; one
    thing at a time is asked of them. Without any it is what `TextToVideo.__call__` makes.

    Args:
        extend: a video that goes on for `seconds` (1) more; backward: in front of it; both: so long on
            either side. Its own frames are in the result.
        connect: two videos, from one of which to lead into the other.
        loop: what is made leads back to its own beginning.
        edit: a video to change by the prompt, from the noise level `strength` (0.6) on; mask: (f h w),
            True where it may change.
        minutes: so long, in windows; the prompt may be a schedule (`sample.schedule`), and an image
            and references can be given. All of it is in memory at the end; `sample.roll` writes what
            is longer to a file.
        noise_level: of what each of these windows is given.
        given_latents: latent frames that a window is given of a video; None: see
            `sample.extend.window_of`, and of `minutes` half a window.
        seed: the sample depends on it alone.
        options: as `TextToVideo.__call__`: image, keyframes, references, frames, height, width,
            guidance, steps and others.
    Warns:
        OutsideTraining: of sizes, pictures or noise that the model was not trained with.
    Raises:
        ValueError: several of these at once, or what `sample.extend`, `sample.edit`, `sample.roll` and
            the pipeline refuse.
    """
    asked = {"extend": extend, "connect": connect, "loop": loop or None, "edit": edit}
    names = [name for name, value in (*asked.items(), ("minutes", minutes)) if value is not None]
    if len(names) > 1:
        raise ValueError(f"{names[0]} and {names[1]}: use one at a time")
    others = {"mask": mask, "backward": backward or None, "both": both or None}
    others |= {"seconds": seconds, "strength": strength, "noise_level": noise_level}
    others |= {"given_latents": given_latents, "keyframes": options.get("keyframes") or None}
    others |= {name: options.get(name) for name in ("image", "frames")}
    for name, value in others.items():
        if value is not None and not set(_GOES_WITH[name]) & set(names or ["text"]):
            raise ValueError(
                f"{name} goes with {', '.join(_GOES_WITH[name])}, and not with "
                f"{names[0] if names else 'text'}; leave one of them out"
            )
    if backward and both:
        raise ValueError("backward and both: use one of them")
    for name, value in (("seconds", seconds), ("minutes", minutes)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name}={value:g}; use a number above 0")
    for name in ("seeds", "output", "given", "noise"):
        if options.pop(name, None) is not None:
            raise ValueError(f"{name} is for TextToVideo itself, which makes batches; leave it out")
    if connect is not None and len(connect) != 2:
        raise ValueError(f"connect: got {len(connect)} videos; give two")
    extend, edit = _checked("extend", extend, options), _checked("edit", edit, options)
    first, second = (_checked("connect", video, options) for video in connect or (None, None))
    given = next((video for video in (edit, extend, first) if video is not None), None)
    frames = options.get("frames") if edit is None else edit.shape[1]
    _warn(pipeline.info, frames, given, noise_level or 0.0, options)
    if edit is not None:
        strength = 0.6 if strength is None else strength
        return edited(pipeline, prompt, edit, strength, mask, seeds=[seed], **options)
    if extend is not None:
        sides = (True, False) if both else (backward,)
        return _extended(
            pipeline, prompt, extend, seconds or 1.0, sides, given_latents, seed, options
        )
    if minutes is not None:
        level = NOISE_LEVEL if noise_level is None else noise_level
        return _minutes(pipeline, prompt, minutes, level, given_latents, seed, options)
    if first is None and not loop:
        return pipeline([prompt], seeds=[seed], **options)[0]
    frames = options.get("frames") or pipeline.info.num_frames
    there = min((v.shape[1] for v in (first, second) if v is not None), default=None)
    window = extending.window_of(pipeline, frames, given_latents, sides=2, there=there)
    if first is not None and second is not None:
        if first.shape[2:] != second.shape[2:]:
            sizes = " and ".join(f"{v.shape[2]}x{v.shape[3]}" for v in (first, second))
            raise ValueError(f"connect: videos of {sizes}; give two of one size")
        new = extending.connect(pipeline, prompt, first, second, window, seeds=[seed], **options)
        return torch.cat([first, new, second], dim=1)
    video = pipeline([prompt], seeds=[seed], **options)[0]
    back = {**options, "image": None, "keyframes": None, "seeds": [stream_seed(seed, "loop", 0)]}
    return torch.cat([video, extending.loop(pipeline, prompt, video, window, **back)], dim=1)


def _warn(
    info: ModelInfo,
    frames: int | None,
    video: Tensor | None,
    noise_level: float,
    options: Mapping[str, Any],
) -> None:
    """Says what the model was not trained for.

    Args:
        frames: of a clip that is made; video: that is given, of its height and width.
    """
    frames = frames or info.num_frames
    height, width = (None, None) if video is None else video.shape[2:]
    pictures = {key % frames for key in options.get("keyframes") or ()}
    pictures |= {0} if options.get("image") is not None else set()
    for text in outside_trained(
        info,
        frames,
        height or options.get("height") or info.height,
        width or options.get("width") or info.width,
        pictures=pictures,
        noise_level=noise_level,
    ):
        warnings.warn(text, OutsideTraining, stacklevel=3)


def _checked(name: str, video: Tensor | None, options: Mapping[str, Any]) -> Tensor | None:
    """A given video in float32; its height and width are those to make.

    Raises:
        ValueError: it is no video (3 f h w), or options ask for another size.
    """
    if video is None:
        return None
    shape = tuple(getattr(video, "shape", ()))
    if not isinstance(video, Tensor) or len(shape) != 4 or shape[0] != 3:
        raise ValueError(
            f"{name}: got {type(video).__name__} of shape {shape}; expected a tensor (3 f h w)"
        )
    for side, length in (("height", shape[2]), ("width", shape[3])):
        if options.get(side) not in (None, length):
            raise ValueError(
                f"{side}={options[side]}, and the video to {name} has {length}; scale it before"
            )
    return video.float()


def _extended(
    pipeline: TextToVideo,
    prompt: str,
    video: Tensor,
    seconds: float,
    sides: tuple[bool, ...],
    given_latents: int | None,
    seed: int,
    options: dict[str, Any],
) -> Tensor:
    """The video with so many seconds more; in as many windows as that takes.

    Args:
        sides: True for in front of it.
    """
    frames = options.get("frames") or pipeline.info.num_frames
    wanted = max(1, round(seconds * pipeline.info.fps))
    seeds = (stream_seed(seed, "extend", number) for number in count())
    for backward in sides:
        window = extending.window_of(
            pipeline, frames, given_latents, backward=backward, there=video.shape[1]
        )
        video = extending.lengthen(
            *(pipeline, prompt, video, window, wanted, seeds), backward=backward, **options
        )
    return video


def _minutes(
    pipeline: TextToVideo,
    prompt: str,
    minutes: float,
    noise_level: float,
    given_latents: int | None,
    seed: int,
    options: dict[str, Any],
) -> Tensor:
    num_frames = num_frames_of(minutes, pipeline.info.fps)
    schedule = Schedule.parse(prompt, 60 * minutes)
    plan = plan_windows(pipeline, num_frames, given_latents)
    rest = {k: v for k, v in options.items() if k not in ("frames", "keyframes")}  # that are None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in roll(pipeline, schedule, plan, folder, seed=seed, noise_level=noise_level, **rest):
            pass
        frames = np.concatenate(list(decoded(pipeline, plan, folder, num_frames)))
    return to_float(torch.from_numpy(frames).permute(3, 0, 1, 2))


def num_frames_of(minutes: float, fps: float) -> int:
    """Frames of a video that lasts so long; at least one."""
    return max(1, round(minutes * 60 * fps))
