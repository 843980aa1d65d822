"""Where one shot of a video ends and the next begins, by PySceneDetect's detectors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from data.ingest_config import Scenes
from data.video_read import VideoReader

# Full-size frames held at once while they are made smaller.
_MAX_BYTES = 64 * 2**20


class _Detector(Protocol):
    def process_frame(self, timecode: Any, frame_img: np.ndarray) -> list[Any]: ...
    def post_process(self, timecode: Any) -> list[Any]: ...


def check_scene_detection(settings: Scenes) -> None:
    """Raises ValueError where the detector asked for is not installed."""
    if settings.detector == "none":
        return
    try:
        import scenedetect  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "splitting into scenes needs PySceneDetect: pip install 'zoetrope[ingest]', or keep "
            "files whole with scenes.detector=none"
        ) from error


def split_scenes(
    reader: VideoReader, settings: Scenes, start: float = 0.0, end: float | None = None
) -> list[tuple[float, float]]:
    """The shots of a video, in order, one after the other without gaps.

    The detectors see every frame, at the file's own times, so a cut lies where the first frame of
    the new shot appears, also with a variable frame rate.

    Args:
        reader: the opened file.
        settings: the detector and its thresholds.
        start, end: the piece to split, in seconds; default the whole file.
    Returns:
        (start, end) of each, in seconds.
    Raises:
        VideoReadError: a frame cannot be decoded.
    """
    info = reader.info
    stop = info.duration if end is None else min(end, info.duration)
    times = reader.frame_times()
    times = times[(times >= start) & (times < stop)]
    cuts: list[float] = []
    if settings.detector != "none" and len(times) > 1:
        cuts = [float(times[index]) for index in _cuts(reader, times, settings)]
    edges = [start, *(cut for cut in cuts if start < cut < stop), stop]
    pieces = []
    for first, last in zip(edges, edges[1:]):
        pieces += _pieces(first, last, times, settings.max_seconds)
    return pieces


def _cuts(reader: VideoReader, times: np.ndarray, settings: Scenes) -> list[int]:
    """Indices into `times` of the frames that begin a shot."""
    from scenedetect import FrameTimecode

    fps = max(1.0, (len(times) - 1) / max(float(times[-1] - times[0]), 1e-3))
    detector = _make_detector(settings, fps)
    found: list[Any] = []
    timecode = None
    # The detectors count frames; what the frames' times are stays on this side.
    for index, frame in enumerate(_small_frames(reader, times, settings.height)):
        timecode = FrameTimecode(index, fps)
        found += detector.process_frame(timecode, frame)
    found += detector.post_process(timecode)
    return sorted({cut.frame_num for cut in found})


def _make_detector(settings: Scenes, fps: float) -> _Detector:
    from scenedetect.detectors import AdaptiveDetector, ContentDetector

    shortest = round(settings.min_seconds * fps)
    if settings.detector == "adaptive":
        return AdaptiveDetector(
            adaptive_threshold=settings.threshold or 3.0, min_scene_len=shortest
        )
    return ContentDetector(threshold=settings.threshold or 27.0, min_scene_len=shortest)


def _small_frames(reader: VideoReader, times: np.ndarray, height: int) -> Iterator[np.ndarray]:
    """The frames at `times`, BGR (h w 3), at most `height` pixels high."""
    import cv2

    info = reader.info
    scale = min(1.0, height / info.height)
    size = (max(8, round(info.width * scale)), max(8, round(info.height * scale)))
    chunk = max(1, min(64, _MAX_BYTES // (info.width * info.height * 3)))
    for first in range(0, len(times), chunk):
        for frame in reader.read_at(times[first : first + chunk]):
            small = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
            yield cv2.cvtColor(small, cv2.COLOR_RGB2BGR)


def _pieces(
    start: float, end: float, times: np.ndarray, max_seconds: float | None
) -> list[tuple[float, float]]:
    """A shot in equal pieces of at most `max_seconds`, which begin where a frame appears."""
    if max_seconds is None or end - start <= max_seconds + 1e-6:
        return [(start, end)]
    # A cut moves back to the frame before, so that no piece may be longer than allowed by a frame:
    # each is measured from where the one before really ended.
    edges = [start]
    while end - edges[-1] > max_seconds + 1e-6:
        left = end - edges[-1]
        wanted = edges[-1] + left / math.ceil(left / max_seconds - 1e-9)
        before = times[(times > edges[-1]) & (times <= wanted + 1e-6)]
        edges.append(float(before[-1]) if len(before) else wanted)
    edges.append(end)
    return list(zip(edges, edges[1:]))
