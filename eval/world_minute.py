"""Whether a minute of video stays what it was: the object there, its colour and its speed as before.

Videos are made window by window, decoded window by window, and measured frame by frame as they come, so
the memory they take does not grow with their length. Beside them stand real clips of the same length.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.randomness import stream_seed
from data.video_write import write_chunks
from data.world import COLOURS, LEVELS, Scene
from data.world_motion import SPEED
from data.world_render import render
from eval.metrics import Estimate, mean_estimate
from eval.tracker import find_blobs, name_of
from eval.vae_suite import reconstruct
from eval.world_clips import draw_scenes, part_results, prompt_of
from eval.world_suite import Progress, WorldSettings, read_scene, sampling_options

if TYPE_CHECKING:
    from sample.pipeline import TextToVideo

SECONDS, EVERY, FIRST = (
    60.0,
    10.0,
    1.0,
)  # of a video, of a figure, and of the colour to compare with
_LEAST = 0.5  # the share of a stretch's frames that have to show the object before it is measured
_PIECE = 64  # frames rendered at once


@dataclass(frozen=True)
class Course:
    """What a video shows, frame by frame.

    right: exactly one object, of the right colour, (f,) bool. colours: of the object, (f, 3) RGB, and
    position: (f, 2) pixels, x then y; both NaN where there is none, or more than one.
    """

    right: np.ndarray
    colours: np.ndarray
    position: np.ndarray


def follow(chunks: Iterable[np.ndarray], colour: str) -> Course:
    """The course of a video that comes piece by piece, uint8 (n h w 3).

    Args:
        colour: what its object should have.
    """
    right, colours, position = [], [], []
    for chunk in chunks:
        for frame in chunk.astype(np.float64):
            blobs = find_blobs(frame, np.median(frame, axis=(0, 1)))
            blob = blobs[0] if len(blobs) == 1 else None
            right.append(blob is not None and name_of(blob.colour, COLOURS) == colour)
            colours.append(np.full(3, np.nan) if blob is None else blob.colour)
            position.append(np.full(2, np.nan) if blob is None else blob.centre)
    return Course(np.array(right), np.array(colours), np.array(position))


def _mean_colour(colours: np.ndarray) -> np.ndarray | None:
    seen = colours[np.isfinite(colours[:, 0])]
    return seen.mean(axis=0) if len(seen) >= _LEAST * len(colours) else None


def _speed(position: np.ndarray) -> float | None:
    """The median way from frame to frame, pixels: a bounce shortens a few of them only."""
    steps = np.hypot(*np.diff(position, axis=0).T)
    seen = steps[np.isfinite(steps)]
    return float(np.median(seen)) if len(seen) >= max(1.0, _LEAST * len(steps)) else None


def measure(course: Course, fps: float, every: float) -> dict[str, float]:
    """Figures of one video: of all of it, and of every stretch of `every` seconds.

    A stretch that shows a single object in less than half of its frames has no drift; its permanence
    says that it is so. The last stretch may be shorter.
    """
    frames = len(course.right)
    figures = {"permanence": float(course.right.mean())}
    first = _mean_colour(course.colours[: max(1, round(FIRST * fps))])
    length = every * fps
    at_first = None
    for number in range(math.ceil(frames / length)):
        begin, end = round(number * length), min(frames, round((number + 1) * length))
        group = f"{begin / fps:g} to {end / fps:g} s"
        figures[f"{group}: permanence"] = float(course.right[begin:end].mean())
        colour = _mean_colour(course.colours[begin:end])
        if colour is not None and first is not None:
            drift = np.linalg.norm(course.colours[begin:end] - first, axis=1)
            figures[f"{group}: colour_drift"] = float(np.nanmean(drift))
        speed = _speed(course.position[begin:end])
        if number == 0:
            at_first = speed
        elif speed is not None and at_first:
            figures[f"{group}: speed_drift"] = abs(speed / at_first - 1)
            figures[f"{group}: speed_ratio"] = speed / at_first
    return figures


def real_video(scene: Scene) -> np.ndarray:
    """A long scene as a dataset holds it, uint8 (f h w 3): rendered in pieces, written, read back."""

    def pieces() -> Iterator[np.ndarray]:
        for begin in range(0, scene.num_frames, _PIECE):
            items = [
                replace(item, position=item.position[begin : begin + _PIECE])
                for item in scene.objects
            ]
            length = len(items[0].position)
            yield render(replace(scene, objects=tuple(items), num_frames=length))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        write_chunks(path, pieces(), scene.fps)
        return read_scene(path, scene)


def _rolled(
    pipeline: TextToVideo,
    scene: Scene,
    frames: int,
    settings: WorldSettings,
    progress: Progress | None,
) -> Course:
    """The course of a video that the model makes from a scene's caption."""
    from sample.roll import decoded, plan_windows, roll
    from sample.schedule import Schedule

    plan = plan_windows(pipeline, frames)
    seed = stream_seed(settings.seed, "eval", "minute", scene.index)
    with tempfile.TemporaryDirectory() as name:
        schedule = Schedule((0.0,), (prompt_of(scene, settings),))
        options = sampling_options(settings)
        for done in roll(pipeline, schedule, plan, Path(name), seed=seed, **options):
            if progress is not None:
                progress(f"window {done} of {plan.num_windows}", 0)
        course = follow(decoded(pipeline, plan, Path(name), frames), scene.objects[0].colour)
    if progress is not None:
        progress("generated", 1)
    return course


def _summary(rows: Sequence[dict[str, float]]) -> dict[str, Estimate]:
    """Over videos; all names of any of them, in the order of time."""
    names = sorted(
        {name for row in rows for name in row},
        key=lambda name: (name != "permanence", name.split(": ")[-1], _begin(name)),
    )
    return {name: mean_estimate([row[name] for row in rows if name in row]) for name in names}


def chance(names: Iterable[str]) -> dict[str, float]:
    """What one object gets that has one of the level's colours at random, and in every stretch another
    of the world's speeds, of these figures."""
    palette = np.array([COLOURS[name] for name in LEVELS[1].colours], float)
    distances = np.linalg.norm(palette[:, None] - palette, axis=-1)
    speeds = np.linspace(*SPEED, 1000)
    ratios = speeds[:, None] / speeds
    guesses = {
        "permanence": 1 / len(palette),
        "colour_drift": float(distances.mean()),
        "speed_drift": float(np.abs(ratios - 1).mean()),
        "speed_ratio": float(ratios.mean()),
    }
    return {name: guesses[kind] for name in names if (kind := name.split(": ")[-1]) in guesses}


def _begin(name: str) -> float:
    return float(name.split(" ")[0]) if ": " in name else -1.0


def score_minute(
    pipeline: TextToVideo,
    settings: WorldSettings,
    progress: Progress | None = None,
    *,
    seconds: float = SECONDS,
    every: float = EVERY,
) -> dict[str, Any]:
    """Permanence and drift in `settings.num` long videos; see docs/eval-world.md.

    Args:
        seconds: of each video; every: of each figure.
    Raises:
        ValueError: the model was not trained to be given the end of a window, or its VAE cannot decode
            in pieces.
    """
    from sample.roll import plan_windows

    info, step = pipeline.info, pipeline.vae.frame_step
    frames = max(2, round(seconds * info.fps))
    plan = plan_windows(pipeline, frames)  # refuses models that cannot
    # The VAE takes so many; those above `frames` are not looked at.
    length = 1 + -(-(frames - 1) // step) * step
    size = {"height": info.height, "width": info.width, "fps": info.fps, "num_frames": length}
    scenes = draw_scenes(settings, scenario="bounces", split="held-out", **size)
    rows: dict[str, list[dict[str, float]]] = {"generated": [], "vae": [], "real": []}
    for scene in scenes:
        colour, real = scene.objects[0].colour, real_video(scene)
        courses = {"real": follow([real[:frames]], colour)}
        if progress is not None:
            progress("real", 1)
        (restored,) = reconstruct(pipeline.vae, [real])
        courses["vae"] = follow([restored[:frames]], colour)
        if progress is not None:
            progress("vae", 1)
        courses["generated"] = _rolled(pipeline, scene, frames, settings, progress)
        for column, course in courses.items():
            rows[column].append(measure(course, info.fps, every))
    scores = {column: _summary(videos) for column, videos in rows.items()}
    return part_results(
        pipeline,
        settings,
        "minute",
        scores,
        chance=chance(scores["real"]),
        chance_is="one object, of any colour and speed",
        num_is=f"videos of {seconds:g} s",
        notes=[
            f"{frames} frames in {plan.num_windows} windows, each of {plan.length} latent frames, of "
            f"which {plan.given} are given",
            "permanence: share of frames with exactly one object, of the colour asked for; drifts are "
            f"of stretches that show one object in {_LEAST:.0%} of their frames or more",
            f"colour: RGB distance from its mean in the first {FIRST:g} s; speed: the median of a "
            f"stretch over that of the first {every:g} s",
        ],
        seconds=seconds,
        frames=frames,
        windows=plan.num_windows,
    )
