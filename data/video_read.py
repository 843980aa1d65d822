"""Frames of a video file by time, upright, from decord or PyAV.

PyAV (ffmpeg's libraries) opens every file first: it finds the stream, the orientation, the exact
length and the exact timestamps, and it notices files that are cut off. In `auto` mode decord then
decodes the files that it shows exactly like PyAV (see `_DecordSource`); PyAV decodes the others.
decord alone would not do: it cannot open AV1, ignores mirrored display matrices, shows 10-bit
video with other colours at edges, reports times as float32 and has no notion of a cut-off file.

Still images, known by the endings of their paths, are read with Pillow (see data/images.py).

A reader holds open files: make it in the process that uses it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any, BinaryIO, Literal, NoReturn

import av
import numpy as np
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from data.images import ImageSource, is_image_path
from data.video_file import (
    Orientation,
    VideoInfo,
    VideoReadError,
    check_complete,
    last_frame,
    open_video,
    open_with,
    reporting,
)

Backend = Literal["auto", "decord", "pyav"]

# Decoding this much further is quicker than a seek, which starts over from a keyframe.
_SEEK_AHEAD = 2.0
_MAX_FRAMES = 2 * 10**7  # a week of video


class _PyAVSource:
    """Frames by time through PyAV: seeks to the keyframe before, then decodes forward."""

    def __init__(self, path: str) -> None:
        self._path = path
        with reporting(path):
            container, stream = open_video(path)
            with container:
                check_complete(path, container, stream)
                self._last_pts, end = last_frame(path, container, stream)
            self._rewind()
            if self._shown is None:
                raise VideoReadError(path, "no frame in it can be decoded")
        first, stream = self._shown, self._stream
        self.pix_fmt = first.format.name
        self.container_format = self._container.format.name
        self._tick = float(stream.time_base or 0)
        self._start = first.pts
        # Half a tick, because containers round times to it: 1/15 s is 0.067 in a .mkv.
        self.tolerance = min(0.51 * self._tick, 1e-3) + 1e-6
        with reporting(path):  # PyAV raises ValueError on side data newer than itself
            self.orientation = Orientation.of(first)
        self._reformatter = VideoReformatter()
        self._size = (first.width, first.height)
        self.info = self._describe(stream, duration=(end - self._start) * self._tick)

    def _describe(self, stream: VideoStream, duration: float) -> VideoInfo:
        width, height = self._size
        pixel_aspect = float(stream.sample_aspect_ratio or 1)
        if self.orientation.transpose:
            width, height, pixel_aspect = height, width, 1 / pixel_aspect
        return VideoInfo(
            path=self._path,
            num_frames=stream.frames or None,
            width=width,
            height=height,
            fps=float(stream.average_rate or 1 / duration),
            duration=duration,
            rotation=self.orientation.rotation,
            codec=stream.codec_context.codec.canonical_name,
            pixel_aspect=pixel_aspect,
        )

    def close(self) -> None:
        self._container.close()

    def read_at(self, times: np.ndarray) -> np.ndarray:
        width, height = self.info.width, self.info.height
        frames = np.empty((len(times), height, width, 3), np.uint8)
        shown, picture = None, None
        with reporting(self._path):
            for index in np.argsort(times, kind="stable"):
                frame = self._frame_at(float(times[index]))
                if picture is None or frame is not shown:
                    shown, picture = frame, self._picture(frame)
                frames[index] = picture
        return frames

    def verify(self, start: float, end: float) -> int:
        stop = self._start + (end - 1e-6) / self._tick
        num_frames = 0
        with reporting(self._path):
            frame = self._frame_at(start)
            while frame is not None and (frame.pts < stop or not num_frames):
                self._check(frame)
                num_frames += 1
                frame = self._following
                if frame is not None:
                    self._shown, self._following = frame, self._next_frame()
            if frame is None and self._shown.pts < min(self._last_pts, int(stop)):
                raise self._stuck()
        return num_frames

    def packet_times(self) -> np.ndarray | None:
        """Seconds at which each frame appears; None unless packets and frames are one to one."""
        with reporting(self._path):
            container, stream = open_video(self._path)
            with container:
                packets = [(p.pts, p.is_discard) for p in container.demux(stream) if p.size]
        if any(pts is None or discarded for pts, discarded in packets):
            return None
        pts = np.sort(np.array([pts for pts, _ in packets], np.int64))
        return (pts - self._start) * self._tick

    def _rewind(self) -> None:
        """Back to the first frame. Reopening works for every format; seeking does not."""
        if hasattr(self, "_container"):
            self._container.close()
        self._container, self._stream = open_video(self._path)
        self._start_decoding()

    def _start_decoding(self) -> None:
        self._decoder = self._container.decode(self._stream)
        self._shown = self._next_frame()
        self._following = self._next_frame() if self._shown is not None else None

    def _next_frame(self) -> Any:  # PyAV's stubs do not know that pts is an integer here
        for frame in self._decoder:
            if frame.pts is not None:
                return frame
        return None

    def _frame_at(self, time: float) -> av.VideoFrame:
        """The last frame that appears at `time` or before."""
        wanted = self._start + (time + self.tolerance) / self._tick
        here = (self._shown.pts - self._start) * self._tick
        if self._shown.pts > wanted or time > here + _SEEK_AHEAD:
            self._seek(time, wanted)
        while self._following is not None and self._following.pts <= wanted:
            self._shown, self._following = self._following, self._next_frame()
        if self._following is None and self._shown.pts < min(self._last_pts, int(wanted)):
            raise self._stuck()
        return self._shown

    def _stuck(self) -> VideoReadError:
        at = (self._shown.pts - self._start) * self._tick
        return VideoReadError(self._path, f"the frames after {at:.3f} s cannot be decoded")

    def _seek(self, time: float, wanted: float) -> None:
        """To any frame that appears at `wanted` or before."""
        earlier = 0.0
        while time > earlier:
            target = self._start + int((time - earlier) / self._tick)
            self._container.seek(target, stream=self._stream)
            self._start_decoding()
            if self._shown is not None and self._shown.pts <= wanted:
                return
            # Some indexes sort by decoding time, so that the keyframe found is shown too late.
            earlier = max(1.0, 2 * earlier)
        self._rewind()

    def _check(self, frame: av.VideoFrame) -> None:
        at = ((frame.pts or 0) - self._start) * self._tick
        if frame.is_corrupt:
            raise VideoReadError(self._path, f"the frame at {at:.3f} s is damaged")
        if (frame.width, frame.height) != self._size:
            was, now = "{}x{}".format(*self._size), f"{frame.width}x{frame.height}"
            raise VideoReadError(self._path, f"its size changes from {was} to {now} at {at:.3f} s")

    def _picture(self, frame: av.VideoFrame) -> np.ndarray:
        """Upright RGB (h w 3). Chroma is handled as decord does it: same pixels, 8-bit 4:2:0."""
        self._check(frame)
        rgb = self._reformatter.reformat(
            frame,
            format="rgb24",
            interpolation=Interpolation.BILINEAR,
            src_color_range=frame.color_range,
            dst_color_range=ColorRange.JPEG,
            threads=1,  # more only cost time here, 1 ms for the smallest frame
        )
        return self.orientation.apply(rgb.to_ndarray())


@functools.cache
def _decord() -> ModuleType | None:
    try:
        import decord
    except (ImportError, OSError):  # not installed, or its libraries do not load here
        return None
    decord.logging.set_level(decord.logging.QUIET)
    return decord


def _decord_reader(decord: ModuleType, source: str | BinaryIO) -> Any:
    if not isinstance(source, str):
        raise ValueError("decord would load all of it into memory")
    return decord.VideoReader(source, num_threads=1)


class _DecordSource:
    """Frames by time through decord, for files that it shows exactly like PyAV.

    These are files, or pieces of tar shards, that are on this machine, of 8-bit 4:2:0 video, not
    mirrored, where decord finds the same frames at the same times; rotated ones only in .mp4 and
    .mov, the only ones decord turns upright.
    """

    def __init__(self, path: str, reference: _PyAVSource) -> None:
        decord = _decord()
        if decord is None:
            raise VideoReadError(path, "decord is not installed")
        turned = reference.orientation.transpose or reference.orientation.flip_y
        if (
            reference.pix_fmt not in ("yuv420p", "yuvj420p")
            or reference.orientation.mirrored
            or (turned and "mp4" not in reference.container_format)
        ):
            raise VideoReadError(path, "decord does not show this kind of file exactly")
        times = reference.packet_times()
        try:
            self._reader = open_with(functools.partial(_decord_reader, decord), path)
            own_times = self._reader.get_frame_timestamp(range(len(self._reader)))[:, 0]
        except Exception as error:  # decord raises RuntimeError, DECORDError, AssertionError, ...
            raise VideoReadError(path, "decord cannot open it") from error
        # decord's times are float32 and count from the first frame of some files.
        own_times = own_times.astype(np.float64) - own_times[0]
        if times is None or len(times) != len(own_times) or np.abs(times - own_times).max() > 2e-3:
            raise VideoReadError(path, "decord finds other frames in it than PyAV")
        self._path, self._times, self._info = path, times, reference.info
        self._tolerance = reference.tolerance

    def read_at(self, times: np.ndarray) -> np.ndarray:
        indices = np.searchsorted(self._times, times + self._tolerance, side="right") - 1
        try:
            frames = self._reader.get_batch(indices).asnumpy()
        except Exception as error:
            raise VideoReadError(self._path, "decord cannot decode it") from error
        if frames.shape[1:] != (self._info.height, self._info.width, 3):
            raise VideoReadError(self._path, "decord shows it in another orientation")
        return frames


def _open(path: str) -> _PyAVSource | ImageSource:
    return ImageSource(path) if is_image_path(path) else _PyAVSource(path)


class VideoReader:
    """Frames of one file by time.

    The frame at time t is the last one that appears at t or before, by the file's own timestamps
    (so a variable frame rate is respected); t = 0 is the appearance of the first frame. Timestamps
    are trusted to half a tick of the container's clock, at most 1 ms.

    Args:
        path: a local path, or a URL that fsspec opens.
        backend: "auto", or one decoder by name ("decord" refuses what it would show differently);
            of videos, for images it says nothing.
    Raises:
        VideoReadError: missing, empty, cut off, not a video, no video stream, ...
    """

    def __init__(self, path: str | os.PathLike[str], backend: Backend = "auto") -> None:
        if backend not in ("auto", "decord", "pyav"):
            raise ValueError(f"backend={backend!r} is unknown: use 'auto', 'decord' or 'pyav'")
        self._exact = _open(os.fspath(path))
        self._required = backend == "decord"
        self._fast: _DecordSource | None = None
        if backend != "pyav" and isinstance(self._exact, _PyAVSource):
            try:
                self._fast = _DecordSource(os.fspath(path), self._exact)
            except VideoReadError:
                if self._required:
                    self.close()
                    raise

    @property
    def info(self) -> VideoInfo:
        return self._exact.info

    @property
    def backend(self) -> str:
        """The decoder in use, "decord", "pyav" or, for an image, "pillow"."""
        if isinstance(self._exact, ImageSource):
            return "pillow"
        return "pyav" if self._fast is None else "decord"

    def read_at(self, times: Sequence[float] | np.ndarray) -> np.ndarray:
        """The frames shown at `times`, upright.

        Args:
            times: seconds from the first frame, each in [0, duration), in any order.
        Returns:
            uint8 RGB (f h w 3).
        Raises:
            ValueError: a time is negative or not finite.
            VideoReadError: a time is past the end, or its frame cannot be decoded.
        """
        wanted = np.asarray(times, np.float64)
        if wanted.ndim != 1 or not np.isfinite(wanted).all() or (wanted < 0).any():
            raise ValueError(f"times must be seconds, finite and not negative, got {times}")
        duration = self.info.duration
        if len(wanted) and wanted.max() >= duration + self._exact.tolerance:
            reason = f"asked for the frame at {wanted.max():.3f} s, but it ends at {duration:.3f} s"
            raise VideoReadError(self.info.path, reason)
        if self._fast is not None and len(wanted):
            try:
                return self._fast.read_at(wanted)
            except VideoReadError:
                if self._required:
                    raise
                self._fast = None
        return self._exact.read_at(wanted)

    def frame_times(self) -> np.ndarray:
        """When each frame appears, as far as the file tells without decoding it.

        Returns:
            Seconds in [0, duration), ascending, (f,); evenly spaced where packets are not frames.
        Raises:
            VideoReadError: the packets cannot be read, or the header is absurd.
        """
        times = None if isinstance(self._exact, ImageSource) else self._exact.packet_times()
        if times is None:
            count = max(1, round(self.info.duration * self.info.fps))
            if count > _MAX_FRAMES:
                reason = f"its header promises {count} frames, which cannot be: it is damaged"
                raise VideoReadError(self.info.path, reason)
            times = np.arange(count) / self.info.fps
        return times[(times >= 0) & (times < self.info.duration)]

    def verify(self, start: float = 0.0, end: float | None = None) -> int:
        """Decodes every frame shown between `start` and `end` seconds, with PyAV, keeping none.

        `read_at` with decord does not notice damage that the decoder conceals; this does, as far
        as the format allows (a flipped bit in VP9 is a valid, wrong picture).

        Returns:
            The number of frames.
        Raises:
            VideoReadError: `start` is past the end, or a frame is damaged or cannot be decoded.
        """
        duration = self.info.duration
        if not 0 <= start < duration:
            reason = f"the piece starts at {start:.3f} s, but it ends at {duration:.3f} s"
            raise VideoReadError(self.info.path, reason)
        return self._exact.verify(start, duration if end is None else end)

    def close(self) -> None:
        self._exact.close()
        self._fast = None

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a VideoReader holds open files: send its path and open it over there")


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """What the video stream of a file, or an image, is; reads its first frame and its end.

    Raises:
        VideoReadError: as VideoReader.
    """
    source = _open(os.fspath(path))
    source.close()
    return source.info
