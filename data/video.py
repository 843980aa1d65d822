"""Clips for training and files for people: read_clip, write_video, and the way to [-1, 1] and back.

Tensors are imported where they are needed: world-rendering workers write files with numpy alone.
"""

from __future__ import annotations

import math
import os
import re
from typing import TYPE_CHECKING

import numpy as np

from data.video_file import VideoInfo, VideoReadError
from data.video_read import Backend, VideoReader, probe
from data.video_write import write_video

if TYPE_CHECKING:
    import torch

__all__ = [
    "Backend",
    "VideoInfo",
    "VideoReadError",
    "VideoReader",
    "clip_times",
    "parse_size",
    "probe",
    "read_clip",
    "to_float",
    "to_uint8",
    "write_video",
]

# Full-size frames held at once while they are made smaller.
_MAX_BYTES = 64 * 2**20


def parse_size(text: str) -> tuple[int, int]:
    """Height and width in pixels from what a user types, `32` or `32x48` (height first).

    Raises:
        ValueError: neither form, or nothing to see.
    """
    match = re.fullmatch(r"([0-9]+)(?:x([0-9]+))?", text.strip().lower())
    if match is None or int(match[1]) == 0 or int(match[2] or 1) == 0:
        raise ValueError(f"--size {text}: expected pixels, as 32 or HEIGHTxWIDTH, such as 32x48")
    return int(match[1]), int(match[2] or match[1])


def to_float(video: torch.Tensor) -> torch.Tensor:
    """uint8 [0, 255] -> float32 [-1, 1], any shape."""
    return video.float() / 127.5 - 1


def to_uint8(video: torch.Tensor) -> torch.Tensor:
    """float [-1, 1] -> uint8 [0, 255], any shape; clamped, rounded to nearest."""
    return ((video.detach().float() + 1) * 127.5).round().clamp(0, 255).byte()


def clip_times(
    info: VideoInfo,
    *,
    num_frames: int,
    fps: float,
    start: float = 0.0,
    end: float | None = None,
    position: float = 0.0,
) -> np.ndarray:
    """The times, in seconds, at which `read_clip` looks at a file.

    Args:
        info: the file.
        num_frames, fps, start, end, position: as `read_clip`.
    Returns:
        (num_frames,) float64, the k-th at first + k / fps.
    Raises:
        VideoReadError: the piece from `start` to `end` is too short, or an image is to move.
    """
    if num_frames < 1 or not 0 < fps < math.inf:
        raise ValueError(f"a clip needs num_frames >= 1 and fps > 0, got {num_frames} and {fps}")
    if not 0 <= position <= 1 or start < 0:
        raise ValueError(f"position={position} must be in [0, 1] and start={start} not negative")
    if info.is_image and num_frames > 1:
        raise VideoReadError(info.path, f"an image, but {num_frames} frames are wanted")
    stop = info.duration if end is None else min(end, info.duration)
    span = (num_frames - 1) / fps
    slack = stop - start - span  # the last frame must appear before the piece stops
    if slack <= 1e-6:
        piece = f"the piece from {start:.3f} s" if start or end is not None else "the file"
        fits = int(max(0.0, stop - start - 1e-6) * fps) + 1 if stop > start else 0
        hint = f"it has room for {fits} at that rate" if fits else "it has no frame there"
        raise VideoReadError(
            info.path,
            f"{num_frames} frames at {fps:g} fps need more than {span:.3f} s, "
            f"but {piece} ends at {stop:.3f} s: {hint}",
        )
    # Never the very end of the slack: at that moment the last frame is just gone.
    return start + position * 0.999 * slack + np.arange(num_frames) / fps


def read_clip(
    path: str | os.PathLike[str],
    *,
    num_frames: int,
    fps: float,
    height: int,
    width: int,
    start: float = 0.0,
    end: float | None = None,
    position: float = 0.0,
    crop: tuple[int, int, int, int] | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """A clip of `num_frames` frames at `fps`, resized to cover (height, width), centre cropped.

    Frames are those shown at first + k / fps by the file's own timestamps. Pictures keep their
    aspect (non-square pixels are squared first); shrinking is antialiased; a picture that has the
    size already is returned as decoded.

    Args:
        path: a local path, or a URL that fsspec opens.
        num_frames: frames to return; a still image has one.
        fps: their rate; any, independent of the file's own.
        height, width: pixels to return.
        start, end: the piece of the file to read from, in seconds; default the whole file.
        position: in [0, 1], where the clip lies within that piece: 0 at its start, 1 at its end.
        crop: the part of the picture that is meant, (x, y, width, height) in pixels of the upright
            picture as it is stored; default all of it.
        backend: as VideoReader.
    Returns:
        uint8 RGB (3 f h w); `to_float` takes it to [-1, 1].
    Raises:
        VideoReadError: the file cannot be read, the piece is too short, an image is to move, or the
            part of the picture lies outside it.
        ValueError: an argument makes no sense.
    """
    import torch

    if height < 1 or width < 1:
        raise ValueError(f"a clip needs a positive height and width, got {height}x{width}")
    with VideoReader(path, backend) as reader:
        info = reader.info
        times = clip_times(
            info, num_frames=num_frames, fps=fps, start=start, end=end, position=position
        )
        rows, columns = _within(info, crop)
        clip = torch.empty(3, num_frames, height, width, dtype=torch.uint8)
        chunk = max(1, _MAX_BYTES // (info.width * info.height * 3))
        for first in range(0, num_frames, chunk):
            frames = torch.from_numpy(reader.read_at(times[first : first + chunk]))
            frames = frames[:, rows, columns].permute(0, 3, 1, 2)
            frames = _cover(frames, height, width, info.pixel_aspect)
            clip[:, first : first + chunk] = frames.transpose(0, 1)
    return clip


def _within(info: VideoInfo, crop: tuple[int, int, int, int] | None) -> tuple[slice, slice]:
    """The rows and columns of the picture that are meant."""
    x, y, width, height = crop or (0, 0, info.width, info.height)
    if x + width > info.width or y + height > info.height:
        raise VideoReadError(
            info.path,
            f"crop {x},{y} {width}x{height} lies outside its picture of {info.width}x{info.height}",
        )
    return slice(y, y + height), slice(x, x + width)


def _cover(frames: torch.Tensor, height: int, width: int, pixel_aspect: float) -> torch.Tensor:
    """uint8 (f c h w) resized to just cover (height, width), cropped around the centre."""
    import torch.nn.functional as F

    shown_height, shown_width = frames.shape[2], frames.shape[3] * pixel_aspect
    scale = max(height / shown_height, width / shown_width)
    size = (max(height, round(shown_height * scale)), max(width, round(shown_width * scale)))
    if size != tuple(frames.shape[2:]):
        frames = F.interpolate(frames, size, mode="bilinear", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return frames[:, :, top : top + height, left : left + width]
