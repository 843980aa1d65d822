"""Pictures and videos that `zoetrope sample` is given, as tensors of the size to make."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from data.video import VideoInfo


def read_image(path: Path, height: int, width: int, flag: str = "--image") -> Tensor:
    """A picture as a frame (3 h w) in [-1, 1]: scaled to cover the size, cut at the middle, which is
    said where it loses much.

    Of 8 or 16 bits a value; what is transparent shows white paper behind it.

    Raises:
        FileNotFoundError, ValueError: no such file, or not a picture, or one of more bits.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    from data.images import eight_bits
    from data.video import to_float

    _require_file(flag, path)
    try:
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            opened = Image.open(path)
        with opened:
            if (count := getattr(opened, "n_frames", 1)) > 1:
                print(
                    f"warning: {flag} {path} has {count} pictures; the first is used",
                    file=sys.stderr,
                )
            ImageOps.exif_transpose(opened, in_place=True)
            picture = eight_bits(opened)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{flag} {path}: too large; make it smaller ({error})") from error
    except (OSError, ValueError, SyntaxError, RuntimeError) as error:  # PIL's, by format
        raise ValueError(f"{flag} {path}: not a picture that can be read ({error})") from error
    _say_what_is_cut(f"{flag} {path}", picture.height, picture.width, height, width)
    picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    return to_float(torch.from_numpy(np.array(picture)).permute(2, 0, 1))


def _say_what_is_cut(
    what: str, source_height: float, source_width: float, height: int, width: int
) -> None:
    """A warning where a good part of a picture is left out, as it has another aspect."""
    scale = max(height / source_height, width / source_width)
    lost = 1 - height * width / (scale * scale * source_height * source_width)
    if lost > 0.05:
        print(
            f"warning: {what} is {source_height:.0f}x{source_width:.0f}, of another aspect than "
            f"{height}x{width}: {lost:.0%} of it is cut off",
            file=sys.stderr,
        )


def read_keyframes(
    last: Path | None,
    keyframes: Sequence[str],
    frames: int,
    height: int,
    width: int,
    fps: float,
) -> dict[int, Tensor]:
    """Pictures by frame: of --last, and of --keyframe SECONDS:PATH.

    Raises:
        FileNotFoundError, ValueError: a time that is none or not in the clip, two pictures for one
            frame, or what `read_image` refuses.
    """
    found: dict[int, Tensor] = {}
    for text in keyframes:
        time, colon, path = text.partition(":")
        try:
            frame = round(float(time) * fps) if float(time) >= 0 else -1
        except (ValueError, OverflowError):
            colon, frame = "", 0
        if not colon or not path:
            raise ValueError(f"--keyframe {text}: expected SECONDS:PATH, such as 0.5:middle.png")
        if not 0 <= frame < frames:
            end = (frames - 1) / fps
            raise ValueError(f"--keyframe {text}: the clip's frames are at 0 to {end:g} seconds")
        if frame in found:
            raise ValueError(f"--keyframe {text}: there is another picture for that frame")
        found[frame] = read_image(Path(path), height, width, "--keyframe")
    if last is not None:
        if frames - 1 in found:
            raise ValueError(f"--last {last}: a --keyframe is at the last frame too; leave one out")
        found[frames - 1] = read_image(last, height, width, "--last")
    return found


def _require_file(flag: str, path: Path) -> None:
    if path.exists() and not path.is_file():
        raise ValueError(f"{flag} {path}: is no file")
    if not path.is_file():
        raise FileNotFoundError(f"{flag} {path}: no such file")


def _refuse_animated(flag: str, path: Path) -> None:
    """Of pictures that move, the video reader has the first alone."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            count = getattr(opened, "n_frames", 1)
    except OSError:  # a picture that PIL does not know
        return
    if count > 1:
        raise ValueError(
            f"{flag} {path}: an animated picture of {count} frames; make a video of it, such as .mp4"
        )


def video_info(flag: str, path: Path) -> VideoInfo:
    """What a video is.

    Raises:
        FileNotFoundError, ValueError: there is none, or it cannot be read.
    """
    from data.video import VideoReader, VideoReadError

    _require_file(flag, path)
    try:
        with VideoReader(path) as reader:
            return reader.info
    except VideoReadError as error:
        raise ValueError(f"{flag} {path}: {error.reason}") from None


def read_video(flag: str, path: Path, height: int, width: int, fps: float) -> Tensor:
    """All of a video (3 f h w) in [-1, 1], at a rate, scaled to cover a size and cut at the middle.

    What is left out of its pictures, or of its frames as it has more of them in a second, is said.

    Raises:
        FileNotFoundError, ValueError: there is none, or it cannot be read.
    """
    from data.video import VideoReadError, read_clip, to_float

    info = video_info(flag, path)
    if info.is_image:
        _refuse_animated(flag, path)
    frames = max(1, int(info.duration * fps + 1e-3))
    try:
        clip = read_clip(path, num_frames=frames, fps=fps, height=height, width=width)
    except VideoReadError as error:
        raise ValueError(f"{flag} {path}: {error.reason}") from None
    _say_what_is_cut(f"{flag} {path}", info.height, info.width * info.pixel_aspect, height, width)
    if not info.is_image and abs(info.fps - fps) > 0.01 * fps:
        print(
            f"warning: {flag} {path} has {info.fps:g} frames a second, and the model's clips have "
            f"{fps:g}: it is read at that rate, as {frames} frames",
            file=sys.stderr,
        )
    return to_float(clip)


def read_mask(path: Path, video: Path, like: Tensor, fps: float) -> Tensor:
    """Where a mask video or picture is white, (f h w), for a video (3 f h w); a shorter one's last
    frame holds on.

    Args:
        video: the file that `like` was read from.
    Raises:
        FileNotFoundError, ValueError: there is none, or it cannot be read, or it has another aspect.
    """
    import torch

    mask, source = video_info("--mask", path), video_info("--edit", video)
    ours, theirs = (each.width * each.pixel_aspect / each.height for each in (mask, source))
    if abs(ours / theirs - 1) > 0.03:
        raise ValueError(
            f"--mask {path} is {mask.height}x{mask.width}, and {video} is {source.height}x"
            f"{source.width}; give a mask of the video's aspect"
        )
    _, frames, height, width = like.shape
    white = read_video("--mask", path, height, width, fps).mean(dim=0) > 0
    if len(white) < frames:
        white = torch.cat([white, white[-1:].expand(frames - len(white), -1, -1)])
    return white[:frames]
