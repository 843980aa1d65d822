"""Writing uint8 frames to an H.264 .mp4 that every player and both of our readers show alike.

Needs numpy and PyAV only, so that world-rendering workers start without importing torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation

from data.files import replacing

if TYPE_CHECKING:
    import torch

# Up to this many pixels x264's threads cost more than they save, and bits are cheap.
_TINY = 160 * 160
_BT709, _LIMITED_RANGE = 1, 1


def write_video(
    path: str | os.PathLike[str],
    video: np.ndarray | torch.Tensor,
    fps: float,
    crf: int | None = None,
) -> None:
    """Writes an H.264 yuv420p .mp4, index first (faststart), appearing under its name only when
    complete.

    Colours are BT.709, limited range, and tagged so. A flat colour comes back within 3 of 255;
    edges between colours are as blurred as half-resolution chroma makes them. There are no
    B-frames, so frame k is shown at exactly k / fps.

    Args:
        path: the file to write; its folder must exist.
        video: uint8 RGB, a numpy array (f h w 3) or a torch tensor (3 f h w); h and w even.
        fps: frames per second, > 0.
        crf: x264's constant rate factor, 0 (lossless) to 51. Default: 10 for frames of up to
            160 x 160 pixels, where every pixel counts and files are tiny anyway, 17 above.
    Raises:
        ValueError: not uint8, not of that shape, no frames, odd height or width, bad fps or crf.
        FileNotFoundError: the folder does not exist.
    """
    write_chunks(path, [video], fps, crf)


def write_chunks(
    path: str | os.PathLike[str],
    chunks: Iterable[np.ndarray | torch.Tensor],
    fps: float,
    crf: int | None = None,
) -> None:
    """`write_video` of a video that comes piece by piece, of which one at a time is in memory.

    Raises:
        ValueError, FileNotFoundError: as `write_video`; or there is no piece, or one of another size.
    """
    parts = map(_as_frames, chunks)
    first = next(parts, None)
    if first is None:
        raise ValueError("got no piece of a video to write")
    tiny = first.shape[1] * first.shape[2] <= _TINY
    if crf is None:
        crf = 10 if tiny else 17
    if not 0 <= crf <= 51:
        raise ValueError(f"crf={crf} is not an x264 rate factor: use 0 (lossless) to 51, say 10")
    if not 0 < fps <= 1000:
        raise ValueError(f"fps={fps} cannot be written: use a number in (0, 1000]")
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} does not exist")

    frames = chain(first, chain.from_iterable(_of_size(parts, first.shape[1:])))
    with replacing(path) as partial:
        size = first.shape[1], first.shape[2]
        _encode(partial, frames, size, Fraction(fps).limit_denominator(1001), crf, 1 if tiny else 0)


def _of_size(parts: Iterable[np.ndarray], size: tuple[int, ...]) -> Iterator[np.ndarray]:
    for part in parts:
        if part.shape[1:] != size:
            raise ValueError(
                f"a piece of {part.shape[1]}x{part.shape[2]} frames after one of {size[0]}x{size[1]}"
            )
        yield part


def _as_frames(video: np.ndarray | torch.Tensor) -> np.ndarray:
    """`video` as a contiguous uint8 (f h w 3) array, checked."""
    expected = "write_video takes uint8, a numpy array (f h w 3) or a torch tensor (3 f h w)"
    if len(video.shape) != 4:
        raise ValueError(f"got a video of shape {tuple(video.shape)}: {expected}")
    if isinstance(video, np.ndarray):
        frames = video
    else:
        frames = video.detach().permute(1, 2, 3, 0).cpu().numpy()
    if frames.dtype != np.uint8:
        raise ValueError(f"got a video of {video.dtype}: {expected}")
    num_frames, height, width, channels = frames.shape
    if channels != 3 or num_frames == 0 or height == 0 or width == 0:
        raise ValueError(f"got a video of shape {tuple(video.shape)}: {expected}")
    if height % 2 or width % 2:
        raise ValueError(
            f"cannot write {height}x{width} frames: yuv420p needs an even height and width; "
            f"use {height + height % 2}x{width + width % 2}"
        )
    return np.ascontiguousarray(frames)


def _encode(
    path: Path,
    frames: Iterable[np.ndarray],
    size: tuple[int, int],
    fps: Fraction,
    crf: int,
    num_threads: int,
) -> None:
    height, width = size
    options = {"movflags": "+faststart"}
    # An absolute path, or ffmpeg takes what stands before a colon for a protocol.
    with av.open(str(path.absolute()), "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        codec = stream.codec_context
        codec.thread_count = num_threads
        codec.options = {"crf": str(crf), "preset": "veryfast", "bf": "0"}
        if height * width <= _TINY:
            # With AVX-512, x264's macroblock tree reads memory that it never wrote where a frame has
            # few macroblocks: the same video then gives other bytes from one call to the next. What it
            # saves, 5 % of bytes, does not matter here.
            codec.options |= {"x264-params": "mbtree=0"}
        codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
        codec.color_range = _LIMITED_RANGE
        for index, array in enumerate(frames):
            # AREA averages each 2x2 block of chroma: measured nearest to the input when the reader
            # (like decord's and swscale's default) repeats the chroma of a block.
            frame = av.VideoFrame.from_ndarray(array, format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=Interpolation.AREA,
                threads=1,
            )
            frame.pts, frame.time_base = index, 1 / fps
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
