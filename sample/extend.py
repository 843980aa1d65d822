"""Longer videos from given ones: forwards, backwards, from one into another, round in a loop.

What is given goes through the VAE once, as the known latent frames of the clip that is generated, and
comes out as its own frames. What the VAE makes of them is compared with what they are, so that colours
do not jump where the new part begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sample.given import Given, joined, known_frames, require_task
from sample.pipeline import TextToVideo


@dataclass(frozen=True)
class Window:
    """How much of a given video is shown, and how much is made, in latent frames."""

    given: int
    new: int


def window_of(
    pipeline: TextToVideo,
    frames: int,
    given: int | None,
    sides: int = 1,
    backward: bool = False,
    there: int | None = None,
) -> Window:
    """The latent frames of a clip of `frames`: those given on each of its sides, and the new ones.

    Args:
        given: on each side; None: of a side three quarters of the clip, since how things move shows
            better the longer they are seen, and of two sides a quarter each; two where that leaves
            something new, since the first is of one frame, in which nothing moves.
        backward: the end is given.
        there: frames that the video, or the shorter one, has; without `given`, no more are asked of it,
            if it has a few.
    Raises:
        ValueError: nothing would be new, or nothing given.
    """
    info, factor = pipeline.info, pipeline.vae.temporal_factor
    total = pipeline.latent_shape(frames, info.height, info.width)[1]
    if given is not None:
        shown = given
    else:
        least = 1 if backward or sides == 2 else 2
        if sides == 2:
            shown = max(1, min(max(2, total // 4), (total - 1) // 2))
        else:
            # In front, the first new one is of the one frame that the video itself begins with.
            shown = max(1, total - max(3 - least, total // 4))
        if there is not None:
            shown = min(shown, max(least, (there - 1) // factor + least - 1))
    if total <= sides:
        raise ValueError(
            f"clips of {frames} frames, {total} latent ones, are too short to be given something on "
            f"{sides} side(s); ask for longer ones with --frames"
        )
    if shown < 1 or total - sides * shown < 1:
        raise ValueError(
            f"given={shown} of a clip of {total} latent frames; use 1 to {(total - 1) // sides}"
        )
    return Window(shown, total - sides * shown)


def leading_frames(pipeline: TextToVideo, video: Tensor, window: Window) -> Tensor:
    """Latents (1 c k h w) of the end of a video (3 f h w), to begin a clip with.

    Raises:
        ValueError: the video is too short.
    """
    factor = pipeline.vae.temporal_factor
    needed = 1 + (window.given - 1) * factor
    _check_length(video, needed)
    return pipeline.encode(video[:, -needed:])


def trailing_frames(pipeline: TextToVideo, video: Tensor, window: Window) -> Tensor:
    """Latents (1 c k h w) of the beginning of a video (3 f h w), to end a clip with.

    A clip's first latent frame is of one frame, and its others of several; so the video's first frame
    only shows the VAE what was before, and belongs to what is made.

    Raises:
        ValueError: the video is too short.
    """
    needed = 1 + window.given * pipeline.vae.temporal_factor
    _check_length(video, needed)
    return pipeline.encode(video[:, :needed])[:, :, 1:]


def _check_length(video: Tensor, needed: int) -> None:
    if video.shape[1] < needed:
        raise ValueError(
            f"the given video has {video.shape[1]} frames, and {needed} are needed; give a longer one, "
            "or have the model be given less of it (--given)"
        )


def _offset(made: Tensor, true: Tensor) -> Tensor:
    """What to add to the colours of a decoded part, (3 1 1 1), that it shows as (3 f h w) and that is
    known to be `true`."""
    return (true.to(made) - made).mean(dim=(1, 2, 3), keepdim=True)


def extend_forward(
    pipeline: TextToVideo, prompt: str, video: Tensor, window: Window, **options: Any
) -> Tensor:
    """The frames that follow a video, (3 f h w) in [-1, 1]: as many as the window has new ones.

    Args:
        video: (3 f h w) in [-1, 1], at the model's rate and of the size to make.
        options: as `TextToVideo.__call__`.
    Raises:
        ValueError: the model was not trained for that, or the video is too short.
    """
    require_task(pipeline.info, "leading", "extending a video")
    known = leading_frames(pipeline, video, window)
    made = _sample(pipeline, prompt, video, window.given + window.new, known, None, options)
    shown = 1 + (window.given - 1) * pipeline.vae.temporal_factor
    return _matched(made[:, shown:], _offset(made[:, :shown], video[:, -shown:]))


def extend_backward(
    pipeline: TextToVideo, prompt: str, video: Tensor, window: Window, **options: Any
) -> Tensor:
    """The frames that come before a video: as `extend_forward`."""
    require_task(pipeline.info, "trailing", "extending a video backwards")
    if window.new < 2:  # the first one is of one frame, and the video's own first frame is another
        raise ValueError(
            f"given={window.given} of a clip of {window.given + 1} latent frames leaves nothing to "
            "make in front of the video; use a smaller one, or a longer clip"
        )
    known = trailing_frames(pipeline, video, window)
    made = _sample(pipeline, prompt, video, window.given + window.new, None, known, options)
    shown = window.given * pipeline.vae.temporal_factor
    offset = _offset(made[:, -shown:], video[:, 1 : 1 + shown])
    return _matched(made[:, : -shown - 1], offset)


def lengthen(
    pipeline: TextToVideo,
    prompt: str,
    video: Tensor,
    window: Window,
    more: int,
    seeds: Iterator[int],
    *,
    backward: bool = False,
    **options: Any,
) -> Tensor:
    """A video (3 f h w) with more frames behind it, or before it; in as many windows as that takes.

    The video's own frames are in it as they are. Each window has the next of the seeds. Forwards, a
    model that was trained with the task `window` goes on from its own latents, so that what it made
    does not pass through the VAE again; otherwise each is given the end of what is there by then.

    Args:
        more: how many frames.
    Raises:
        ValueError: as `extend_forward` and `extend_backward`.
    """
    in_latents = not backward and "window" in pipeline.info.tasks and window.given + window.new > 2
    if in_latents and more > window.new * pipeline.vae.temporal_factor:
        new = _gone_on(pipeline, prompt, video, window, more, seeds, **options)
        return torch.cat([video, new], dim=1)
    longer, left = extend_backward if backward else extend_forward, more
    while left > 0:
        new = longer(pipeline, prompt, video, window, seeds=[next(seeds)], **options)
        parts = (new[:, -left:], video) if backward else (video, new[:, :left])
        video, left = torch.cat(parts, dim=1), left - new.shape[1]
    return video


def _gone_on(
    pipeline: TextToVideo,
    prompt: str,
    video: Tensor,
    window: Window,
    more: int,
    seeds: Iterator[int],
    **options: Any,
) -> Tensor:
    """The `more` frames that follow a video (3 f h w), latents going on from window to window.

    The first window is `extend_forward`'s. Later ones are as `sample.roll` has them: without a first
    latent frame, which is of one frame, and given as much, if that leaves something to make.
    """
    require_task(pipeline.info, "leading", "extending a video")
    factor, held, length = pipeline.vae.temporal_factor, window.given, window.given + window.new
    every = leading_frames(pipeline, video, window)
    shown, wanted = 1 + (held - 1) * factor, held + -(-more // factor)
    later = length - 1, min(held, length - 2)
    while every.shape[2] < wanted:
        known = known_frames(every[:, :, -held:].to(pipeline.device), length, slice(0, held))
        set_here = {**_size(video), "frames": 1 + (length - 1) * factor, "seeds": [next(seeds)]}
        made = pipeline([prompt], given=known, **{**options, **set_here}, output="latents")
        every = torch.cat([every.to(made), made[:, :, held:]], dim=2)
        length, held = later
    frames = pipeline.decode(every)[0]
    offset = _offset(frames[:, :shown], video[:, -shown:])
    return _matched(frames[:, shown : shown + more], offset).to(video)


def connect(
    pipeline: TextToVideo,
    prompt: str,
    first: Tensor,
    second: Tensor,
    window: Window,
    **options: Any,
) -> Tensor:
    """The frames that lead from the end of one video to the beginning of another.

    Args:
        first, second: (3 f h w) in [-1, 1], of one size.
        window: what is given of each.
    Raises:
        ValueError: the model was not trained for that, or a video is too short.
    """
    require_task(pipeline.info, "sides", "connecting videos")
    begin = leading_frames(pipeline, first, window)
    end = trailing_frames(pipeline, second, window)
    length = 2 * window.given + window.new
    made = _sample(pipeline, prompt, first, length, begin, end, options)
    factor = pipeline.vae.temporal_factor
    head, tail = 1 + (window.given - 1) * factor, window.given * factor
    begins = _offset(made[:, :head], first[:, -head:])
    ends = _offset(made[:, -tail:], second[:, 1 : 1 + tail])
    new = made[:, head : made.shape[1] - tail - 1]
    share = torch.linspace(0, 1, new.shape[1] + 2, device=new.device)[1:-1].view(1, -1, 1, 1)
    return _matched(new, begins + share * (ends - begins))


def _sample(
    pipeline: TextToVideo,
    prompt: str,
    like: Tensor,
    length: int,
    begin: Tensor | None,
    end: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """A clip (3 f h w) of `length` latent frames, of which the first and the last are known."""
    given = Given()
    if begin is not None:
        given = joined(given, known_frames(begin, length, slice(0, begin.shape[2])))
    if end is not None:
        given = joined(given, known_frames(end, length, slice(length - end.shape[2], length)))
    frames = 1 + (length - 1) * pipeline.vae.temporal_factor
    return pipeline([prompt], given=given, **{**options, **_size(like), "frames": frames})[0]


def _size(video: Tensor) -> dict[str, int]:
    return {"height": video.shape[2], "width": video.shape[3]}


def _matched(video: Tensor, offset: Tensor) -> Tensor:
    return (video + offset.to(video)).clamp(-1, 1)


def loop(
    pipeline: TextToVideo, prompt: str, video: Tensor, window: Window, **options: Any
) -> Tensor:
    """The frames that lead from a video's end to its own beginning, so that it can be repeated."""
    return connect(pipeline, prompt, video, video, window, **options)
