"""One video file: opening it, what it is, which way up, how long, whether it is all there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, TypeVar, cast

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from data.media import LocalMedia, find_media

T = TypeVar("T")

# A cached copy of a remote file may be thrown out by another process just before it is opened.
_TRIES = 3


def one_line(path: str) -> str:
    """A path for people, in one line: names may hold line ends and worse."""
    return path if path.isprintable() else repr(path)[1:-1]


class VideoReadError(ValueError):
    """A file, or the asked-for piece of it, that cannot be read: `path` and a one-line `reason`."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        self.path = os.fspath(path)
        self.reason = " ".join(reason.split())
        super().__init__(f"cannot read {one_line(self.path)}: {self.reason}")

    def __reduce__(self) -> tuple[type[VideoReadError], tuple[str, str]]:
        return VideoReadError, (self.path, self.reason)


@dataclass(frozen=True)
class VideoInfo:
    """What a file's video stream is.

    Attributes:
        path: as given.
        num_frames: as the file's header states it; None where it does not.
        width, height: of the upright picture, in stored pixels.
        fps: average frames per second.
        duration: seconds from the first frame's appearance to the last one's end, exact.
        rotation: clockwise degrees (0, 90, 180, 270) already applied to the frames.
        codec: such as "h264".
        pixel_aspect: width / height of one pixel of the upright picture; 1 for square ones.
        is_image: a still image, which has one frame and no motion, whatever its duration.
    """

    path: str
    num_frames: int | None
    width: int
    height: int
    fps: float
    duration: float
    rotation: int
    codec: str
    pixel_aspect: float = 1.0
    is_image: bool = False


@dataclass(frozen=True)
class Orientation:
    """How to turn a stored picture upright: transpose first, then flip."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    @classmethod
    def of(cls, frame: av.VideoFrame) -> Orientation:
        """From the display matrix (ISO 14496-12, tkhd): x' = a*x + c*y, y' = b*x + d*y."""
        side_data = frame.side_data.get("DISPLAYMATRIX")
        if side_data is None:
            return cls()
        a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(side_data), np.int32)[:5])
        if abs(b) + abs(c) > abs(a) + abs(d):
            return cls(transpose=True, flip_x=c < 0, flip_y=b < 0)
        return cls(flip_x=a < 0, flip_y=d < 0)

    @property
    def mirrored(self) -> bool:
        return (self.transpose + self.flip_x + self.flip_y) % 2 == 1

    @property
    def rotation(self) -> int:
        if self.transpose:
            return 90 if self.flip_x else 270
        return 180 if self.flip_y else 0

    def apply(self, picture: np.ndarray) -> np.ndarray:
        if self.transpose:
            picture = picture.swapaxes(0, 1)
        return picture[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]


@contextmanager
def reporting(path: str) -> Iterator[None]:
    """Turns what ffmpeg, the file system and fsspec raise into VideoReadError."""
    try:
        yield
    except VideoReadError:
        raise
    except FileNotFoundError as error:
        raise VideoReadError(path, "no such file") from error
    except (av.error.IsADirectoryError, IsADirectoryError) as error:
        raise VideoReadError(path, "a directory") from error
    except av.error.FFmpegError as error:
        # Its texts are those of errno: a cut-off .mp4 can be "Operation not permitted".
        detail = error.strerror or type(error).__name__
        raise VideoReadError(path, f"not a video, or cut off, or damaged ({detail})") from error
    except (OSError, ValueError, ImportError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise VideoReadError(path, reason or type(error).__name__) from error


def open_source(path: str) -> str | BinaryIO:
    """What decoders open: a name, as of a local file, wherever there can be one, or an opened file.

    Args:
        path: a local path, a URL, or a piece of a tar shard (see data/media.py).
    Raises:
        VideoReadError: it is empty, or what a URL names cannot be reached.
    """
    found = _find(path)
    return found.name if isinstance(found, LocalMedia) else found


def open_bytes(path: str) -> BinaryIO:
    """The bytes of what `open_source` takes.

    Raises:
        VideoReadError: it cannot be opened.
    """
    with reporting(path):
        return open_with(_opened, path, _find)


def _opened(found: LocalMedia | BinaryIO) -> BinaryIO:
    return found.open() if isinstance(found, LocalMedia) else found


def _find(path: str) -> LocalMedia | BinaryIO:
    with reporting(path):
        found = find_media(path)
        if isinstance(found, LocalMedia) and found.length is None:
            if os.path.isfile(found.path) and os.path.getsize(found.path) == 0:
                raise VideoReadError(path, "the file is empty")
        elif isinstance(found, LocalMedia) and found.length == 0:
            raise VideoReadError(path, "the file is empty")
        return found


def open_with(opener: Callable[[Any], T], path: str, find: Callable[[str], Any] = open_source) -> T:
    """What `opener` makes of `find(path)`, which it is given."""
    for _ in range(_TRIES - 1):
        try:
            return opener(find(path))
        except FileNotFoundError:
            if "://" not in path:
                raise
    return opener(find(path))


def open_video(path: str) -> tuple[InputContainer, VideoStream]:
    """The opened file and its main video stream, set to decode in the calling thread."""
    container = cast(InputContainer, open_with(partial(av.open, metadata_errors="replace"), path))
    stream = cast(VideoStream | None, container.streams.best("video"))
    if stream is None or stream.disposition & Disposition.attached_pic:
        kinds = sorted({other.type for other in container.streams})
        found = f"only {', '.join(kinds)}" if kinds else "nothing"
        container.close()
        raise VideoReadError(path, f"no video stream in it, {found}")
    if stream.codec_context is None:
        container.close()
        raise VideoReadError(path, "this build of PyAV has no decoder for its video codec")
    stream.thread_count = 1
    return container, stream


def check_complete(path: str, container: InputContainer, stream: VideoStream) -> None:
    """Raises VideoReadError where the container's own index or size field says bytes are gone."""
    needed = 0
    entries = stream.index_entries
    if len(entries):
        needed = entries[len(entries) - 1].pos + entries[len(entries) - 1].size
    if "matroska" in container.format.name:
        with open_bytes(path) as file:
            needed = max(needed, _matroska_size(file.read(4096)))
    if 0 < container.size < needed:
        raise VideoReadError(
            path, f"cut off: it has {container.size} bytes of at least {needed}; copy it again"
        )


def _matroska_size(head: bytes) -> int:
    """Bytes that a Matroska or WebM file needs by its Segment's size; 0 where that is unknown."""
    at = head.find(b"\x18\x53\x80\x67") + 4  # the Segment element (RFC 9559)
    if at < 4 or at + 8 > len(head) or head[at] == 0:
        return 0
    length = 9 - head[at].bit_length()  # RFC 8794: leading zero bits give the length of the field
    size = int.from_bytes(head[at : at + length]) & ((1 << 7 * length) - 1)
    unknown = (1 << 7 * length) - 1
    return 0 if size == unknown else at + length + size


def last_frame(path: str, container: InputContainer, stream: VideoStream) -> tuple[int, int]:
    """Timestamp and end of the frame shown last, in ticks, from the packets after the last
    keyframe."""
    tick = stream.time_base
    assert tick is not None
    if stream.duration is not None:
        container.seek((stream.start_time or 0) + stream.duration, stream=stream)
    elif container.duration is not None:
        ticks = (container.start_time + container.duration) / av.time_base / tick
        container.seek(int(ticks), stream=stream)
    usual = round(1 / stream.average_rate / tick) if stream.average_rate else 1
    shown = [(p.pts, p.duration or usual) for p in container.demux(stream) if p.pts is not None]
    if not shown:
        raise VideoReadError(path, "no frame with a timestamp in it")
    return max((pts, pts + duration) for pts, duration in shown)
