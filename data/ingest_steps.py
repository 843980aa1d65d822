"""The steps of `zoetrope data ingest`: each takes a record of one file or clip and its settings, and
returns records, from these alone. A record is a dict of what JSON holds."""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel

from data.ingest_captions import written_captions
from data.ingest_config import IngestConfig, Letterbox, Measures, Scenes
from data.video_file import VideoReadError
from data.video_read import VideoReader

Record = dict[str, Any]

_THUMBNAIL = (160, 90)  # at most, in pixels
# Frames are read at full size, and so many bytes of them are held at once.
_MAX_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: of its file of results.
        function: of a list of tasks and the settings; for each task the records that come of it.
        inputs: the columns of a record that it looks at: two records that agree in them agree in
            the results.
        settings: of the config; results are kept by them.
        version: to be raised when the same input would give other results.
        batch: tasks per call.
        is_model: runs in one process, which may have a GPU.
        extra: what the results depend on besides, such as a model's files.
    """

    name: str
    function: Callable[[list[Record], Any], list[list[Record]]]
    inputs: tuple[str, ...]
    settings: BaseModel | None
    version: int = 1
    batch: int = 1
    is_model: bool = False
    extra: Any = None

    def key(self, task: Record) -> str:
        """Names the results of a task: 32 hex digits of all that they depend on."""
        settings = None
        if self.settings is not None:
            settings = self.settings.model_dump(mode="json", exclude={"batch_size", "device"})
        parts = [self.name, self.version, settings, self.extra, task]
        text = json.dumps(parts, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def each(function: Callable[[Record, Any], list[Record]]) -> Callable[..., list[list[Record]]]:
    """A function of one task as one of a list; what it raises becomes a record with `error`."""
    return functools.partial(_each, function)


def _each(
    function: Callable[[Record, Any], list[Record]], tasks: list[Record], settings: Any
) -> list[list[Record]]:
    results = []
    for task in tasks:
        try:
            results.append(function(task, settings))
        except Exception as error:  # decoders and Pillow raise of everything on damaged files
            results.append([{"error": reason_of(error)}])
    return results


def reason_of(error: Exception) -> str:
    """One line, without the path, which the record has."""
    if isinstance(error, VideoReadError):
        return error.reason
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def probe(task: Record, _: Any) -> list[Record]:
    """What a file is: the columns of its video stream."""
    from data.video_file import open_video

    with VideoReader(task["path"], "pyav") as reader:
        info = reader.info
    has_audio = False
    if not info.is_image:
        container, _ = open_video(task["path"])
        with container:
            has_audio = bool(container.streams.audio)
    found: Record = {
        "width": info.width,
        "height": info.height,
        "fps": info.fps,
        "duration": info.duration,
        "num_frames": info.num_frames,
        "codec": info.codec,
        "rotation": info.rotation,
        "pixel_aspect": info.pixel_aspect,
        "has_audio": has_audio,
        "is_image": info.is_image,
    }
    return [found]


def scenes(task: Record, settings: Scenes) -> list[Record]:
    """The shots of a file, as `start` and `end` in seconds; an image is left as it is."""
    from data.scenes import split_scenes

    if task["is_image"]:
        return [{}]
    start, end = task.get("start", 0.0), min(task.get("end", math.inf), task["duration"])
    if start >= end:
        reason = f"the piece starts at {start:.3f} s, but it ends at {task['duration']:.3f} s"
        return [{"error": reason}]
    with VideoReader(task["path"]) as reader:
        pieces = split_scenes(reader, settings, start, end)
    return [{"start": round(first, 6), "end": round(last, 6)} for first, last in pieces]


def letterbox(task: Record, settings: Letterbox) -> list[Record]:
    """The picture inside its bars, as `crop`, and the share of the whole that is bars; a crop that
    the source manifest gives is taken as it is."""
    import cv2

    from data.letterbox import find_letterbox

    if "crop" in task:
        return [_given_crop(task)]
    if not settings.enabled:
        return [{}]
    start, end = _span(task)
    count = 1 if task["is_image"] else settings.num_frames
    grey = []
    with VideoReader(task["path"]) as reader:
        for time in spread(start, end, count):
            grey.append(cv2.cvtColor(reader.read_at([time])[0], cv2.COLOR_RGB2GRAY))
    crop = find_letterbox(np.stack(grey))
    if crop is None:
        return [{"bars": 0.0}]
    return [{"crop": list(crop), "bars": _cropped_share(crop, task)}]


def _given_crop(task: Record) -> Record:
    (x, y, width, height), whole = task["crop"], (task["width"], task["height"])
    if min(x, y) < 0 or min(width, height) < 1 or x + width > whole[0] or y + height > whole[1]:
        return {
            "error": f"crop {task['crop']} (x, y, width, height) of the source manifest is not inside "
            f"the picture of {whole[0]}x{whole[1]}"
        }
    return {"bars": _cropped_share(task["crop"], task)}


def _cropped_share(crop: Sequence[int], task: Record) -> float:
    return round(1 - crop[2] * crop[3] / (task["width"] * task["height"]), 4)


def measures(task: Record, settings: Measures) -> list[Record]:
    """All measures of a clip, its perceptual hashes, and a picture of three frames of it."""
    import cv2

    from data.duplicates import hash_times, perceptual_hashes
    from data.measures import measure_frames, measure_picture

    cv2.setNumThreads(1)  # there is a process per core
    start, end = _span(task)
    with VideoReader(task["path"]) as reader:
        if task["is_image"]:
            frames = _read(reader, np.zeros(1), task)
            found: Record = measure_picture(frames)
            hashes = perceptual_hashes(frames) * len(hash_times(0, 0))
            strip = frames
        else:
            windows, spacing = _windows(start, end, task["fps"], settings)
            frames = _read(reader, windows.ravel(), task)
            shaped = frames.reshape(*windows.shape, *frames.shape[1:])
            found = measure_frames(shaped, task["fps"], spacing)
            looked_at = _read(reader, hash_times(start, end), task)
            hashes = perceptual_hashes(looked_at)
            strip = looked_at[[0, 1, 3]]
    return [found | {"hashes": hashes, "thumbnail": _thumbnail(strip)}]


def captions(task: Record, _: Any) -> list[Record]:
    """What people wrote about a clip: `written`, and what is wrong with files of theirs."""
    span = (0.0, math.inf) if task["is_image"] else (task["start"], task["end"])
    found, problems = written_captions(task.get("column"), task["sidecars"], *span)
    return [{"written": found} | ({"caption_problems": problems} if problems else {})]


def spread(start: float, end: float, count: int) -> np.ndarray:
    """Seconds of `count` frames, in the middles of equal parts of a clip."""
    return start + (np.arange(count) + 0.5) / count * (end - start)


def clip_frames(task: Record, count: int, height: int | None = None) -> np.ndarray:
    """`count` frames spread over a clip, cropped, of an image one; uint8 RGB (f h w 3).

    Args:
        height: at most, in pixels; None for full size.
    """
    start, end = _span(task)
    times = np.zeros(1) if task["is_image"] else spread(start, end, count)
    with VideoReader(task["path"]) as reader:
        return _read(reader, times, task, height)


def _span(task: Record) -> tuple[float, float]:
    return (0.0, 0.0) if task["is_image"] else (task["start"], task["end"])


def _windows(start: float, end: float, fps: float, settings: Measures) -> tuple[np.ndarray, float]:
    """Times (n f) of the frames to measure, and the seconds between those of a window.

    Neighbours are a frame apart, up to 30 fps; above, as far apart as at 30, because the smaller
    the movement, the worse it is measured. Windows of short clips overlap, and then are fewer.
    """
    spacing = max(1, math.floor(fps / 30 + 0.51)) / fps
    available = max(1, math.floor((end - start) / spacing + 1e-6))
    length = min(settings.window_frames, available)
    count = max(1, min(settings.num_windows, available // length))
    if length == 1:  # a clip of one frame
        return np.full((1, 2), start), spacing
    # Half a frame in, so that a time rounded down is still the frame that is meant.
    last = end - start - length * spacing
    firsts = start + np.linspace(0, 1, count) * last if count > 1 else np.array([start + last / 2])
    firsts = start + np.round((firsts - start) / spacing) * spacing
    times = firsts[:, None] + np.arange(length) * spacing
    return np.minimum(times, end - 0.25 / fps), spacing


def _read(
    reader: VideoReader, times: np.ndarray, task: Record, max_height: int | None = None
) -> np.ndarray:
    """The frames at `times`, cropped, and made smaller where they would fill the memory."""
    import cv2

    x, y, width, height = task.get("crop") or (0, 0, task["width"], task["height"])
    scale = min(1.0, math.sqrt(_MAX_BYTES / (len(times) * width * height * 3)))
    scale = min(scale, (max_height or height) / height)
    size = (max(8, round(width * scale)), max(8, round(height * scale)))
    frames = np.empty((len(times), size[1], size[0], 3), np.uint8)
    chunk = max(1, int(_MAX_BYTES / (task["width"] * task["height"] * 3)))
    for first in range(0, len(times), chunk):
        for index, frame in enumerate(reader.read_at(times[first : first + chunk]), first):
            part = frame[y : y + height, x : x + width]
            frames[index] = cv2.resize(part, size, interpolation=cv2.INTER_AREA)
    return frames


def _thumbnail(frames: np.ndarray) -> str:
    """The frames side by side, a JPEG in base64."""
    from PIL import Image

    pictures = [Image.fromarray(frame) for frame in frames]
    for picture in pictures:
        picture.thumbnail(_THUMBNAIL)
    width, height = pictures[0].size
    strip = Image.new("RGB", (width * len(pictures), height))
    for index, picture in enumerate(pictures):
        strip.paste(picture, (index * width, 0))
    buffer = io.BytesIO()
    strip.save(buffer, "JPEG", quality=75)
    return base64.b64encode(buffer.getvalue()).decode()


_CLIP = ("path", "version", "start", "end", "is_image")


def media_steps(config: IngestConfig) -> list[Step]:
    """The steps that every file goes through, in order."""
    measured = (*_CLIP, "width", "height", "fps", "crop")
    return [
        Step("probe", each(probe), ("path", "version"), None),
        Step("scenes", each(scenes), (*_CLIP, "duration"), config.scenes),
        Step("letterbox", each(letterbox), (*_CLIP, "width", "height", "crop"), config.letterbox),
        Step("measures", each(measures), measured, config.measures),
    ]


def caption_step() -> Step:
    """Reads sidecar files."""
    inputs = ("sidecars", "column", "start", "end", "is_image")
    return Step("captions", each(captions), inputs, None)


def model_steps(config: IngestConfig) -> tuple[Step | None, Step | None]:
    """Those of the models that the config names: embeddings, and captions."""
    from data import captioner, embeddings

    shown = (*_CLIP, "width", "height", "crop")
    embed = write = None
    if config.duplicates.clip is not None:
        settings = config.duplicates.clip
        # What counts as a duplicate is decided later; the embeddings stay.
        settings = settings.model_copy(update={"min_cosine": 1.0})
        stamp = captioner.file_stamps(settings.weights)
        embed = Step("embeddings", embeddings.embed, shown, settings, 1, 16, True, stamp)
    if config.captions.captioner is not None:
        asked = config.captions.captioner
        stamp = captioner.file_stamps(asked.model)
        size = asked.batch_size
        write = Step("captioner", captioner.caption_clips, shown, asked, 1, size, True, stamp)
    return embed, write
