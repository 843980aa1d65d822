"""Scores edits: does what the prompt changes change, and does the rest stay?

Real clips of one shape are given with the caption of the same scene in another colour, or on another
background. The prompt says the shape and the motion too, so these can come from it alone; where
the object is at each frame can come from the given clip only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from data.randomness import numpy_generator, stream_seed
from data.world import LEVELS, Scene, colour_shape_pairs, extents
from data.world_captions import caption
from data.world_motion import pick
from eval.metrics import Estimate, mean_estimate, proportion
from eval.tracker import track
from eval.vae_suite import as_clips, as_video, reconstruct
from eval.world_clips import part_results
from eval.world_scores import chance as words_chance
from eval.world_scores import match
from eval.world_suite import (
    Progress,
    WorldSettings,
    eval_scenes,
    real_clips,
    sampling_options,
)

if TYPE_CHECKING:
    from torch import Tensor

    from sample.pipeline import TextToVideo

CHANGES = ("colour", "background")
STRENGTHS = (0.4, 0.6, 0.8)
MASKED_STRENGTH = 0.8  # of edits of the colour, whose mask is a box around the object
_MARGIN = 0.1  # of the box around the object, in shorter sides; 3 pixels at least
COLUMNS = {
    "unchanged": "the given clip, unchanged",
    **{f"strength_{strength:g}": f"strength {strength:g}" for strength in STRENGTHS},
    "masked": f"strength {MASKED_STRENGTH:g}, mask",
}
# In their order; `outside` is of edits of the colour alone.
FIGURES = (
    "colour",
    "shape",
    "motion",
    "background",
    "joint",
    "object_found",
    "position_error",
    "outside",
)


@dataclass(frozen=True)
class EditScore:
    """An edited clip against the scene that it should show.

    colour, shape, motion, background: as in that scene; joint: all four. object_found: it is there in
    at least three quarters of the frames. position_error: mean over frames, pixels, against the given
    clip's truth; None where not found. outside: the largest difference of a pixel from the given clip
    outside the object's box, 0 to 255; None where the background changes.
    """

    colour: bool
    shape: bool
    motion: bool
    background: bool
    joint: bool
    object_found: bool
    position_error: float | None
    outside: float | None


@dataclass(frozen=True)
class _Edits:
    """What is asked for: the scenes to come of one change, their prompts, and the given clips."""

    change: str
    targets: list[Scene]
    prompts: list[str]
    sources: list[np.ndarray]
    boxes: list[np.ndarray]


def edited_scene(scene: Scene, change: str, rng: np.random.Generator) -> Scene:
    """The same scene of one object in another colour, or on another background, of level 1.

    Args:
        change: one of CHANGES.
    """
    if change == "background":
        others = [name for name in LEVELS[1].backgrounds if name != scene.background]
        return replace(scene, background=pick(rng, others))
    (item,) = scene.objects
    known = colour_shape_pairs(1, "held-out")
    others = [c for c, shape in known if shape == item.shape and c != item.colour]
    return replace(scene, objects=(replace(item, colour=pick(rng, others)),))


def object_box(scene: Scene) -> np.ndarray:
    """A box around the scene's object at every frame, (f h w) bool, wider by _MARGIN."""
    (item,) = scene.objects
    margin = max(3.0, _MARGIN * min(scene.height, scene.width))
    left, right, top, bottom = (edge + margin for edge in extents(item.shape, item.radius))
    x, y = item.position.T[:, :, None]
    columns, rows = np.arange(scene.width) + 0.5, np.arange(scene.height) + 0.5
    across = (columns >= x - left) & (columns <= x + right)
    down = (rows >= y - top) & (rows <= y + bottom)
    return down[:, :, None] & across[:, None, :]


def score_edited(
    video: np.ndarray,
    target: Scene,
    change: str,
    source: np.ndarray,
    box: np.ndarray,
) -> EditScore:
    """Track an edited clip and compare it with what should have become of the given one.

    Args:
        video: uint8, (f h w 3).
        target: whose object moves as the given clip's does.
        source: the given clip, alike.
        box: around the object, (f h w) bool.
    """
    sighting, (item,) = track(video, target.fps), target.objects
    (seen,) = match(sighting, target.objects)
    right = {
        name: seen is not None and getattr(seen, name) == getattr(item, name)
        for name in ("colour", "shape", "motion")
    }
    right["background"] = sighting.background == target.background
    path = None if seen is None else seen.path
    away = None if path is None else np.linalg.norm(path - item.position, axis=1).mean()
    difference = np.abs(video.astype(int) - source).max(axis=-1)
    return EditScore(
        **right,
        joint=all(right.values()),
        object_found=away is not None,
        position_error=None if away is None else float(away),
        outside=float(difference[~box].max(initial=0)) if change == "colour" else None,
    )


def another_clip_error(scenes: Sequence[Scene]) -> float | None:
    """Mean distance, pixels, of objects from those of the next clip with the same motion: what a model
    gets that does as the prompt says and does not look at the given clip. None: there is no such pair.
    """
    by_motion: dict[str, list[np.ndarray]] = {}
    for scene in scenes:
        (item,) = scene.objects
        by_motion.setdefault(item.motion, []).append(item.position)
    distances = [
        float(np.linalg.norm(paths[k] - paths[k - 1], axis=1).mean())
        for paths in by_motion.values()
        if len(paths) > 1
        for k in range(len(paths))
    ]
    return sum(distances) / len(distances) if distances else None


def chance(scenes: Sequence[Scene]) -> dict[str, float]:
    """A blind guess among level 1's words; of positions see `another_clip_error`."""
    away, guess = another_clip_error(scenes), words_chance(1)
    fields = {name: guess[name] for name in FIGURES if name in guess}
    if away is not None:
        fields["position_error"] = away
    return {f"new {change}: {name}": v for change in CHANGES for name, v in fields.items()}


def _figures(change: str, rows: Sequence[EditScore]) -> dict[str, Estimate]:
    figures: dict[str, Estimate] = {}
    for name in FIGURES:
        values = [v for row in rows if (v := getattr(row, name)) is not None]
        estimate = mean_estimate if name in ("position_error", "outside") else proportion
        if name != "outside" or change == "colour":
            figures[f"new {change}: {name}"] = estimate(values)
    return figures


def _generate(
    pipeline: TextToVideo,
    edits: _Edits,
    strength: float,
    masked: bool,
    settings: WorldSettings,
    progress: Progress | None,
) -> list[np.ndarray]:
    """The given clips as the prompts have them, uint8 (f h w 3)."""
    import torch

    from sample.edit import edit_batch

    clips: list[np.ndarray] = []
    for first in range(0, len(edits.prompts), settings.batch_size):
        batch = slice(first, first + settings.batch_size)
        masks: Tensor | None = None
        if masked:
            masks = torch.from_numpy(np.stack(edits.boxes[batch]))
        prompts = edits.prompts[batch]
        made = edit_batch(
            pipeline,
            prompts,
            as_video(edits.sources[batch], torch.device("cpu")),
            strength,
            masks,
            seeds=[stream_seed(settings.seed, "eval", first + k) for k in range(len(prompts))],
            **sampling_options(settings),
        )
        clips += as_clips(made)
        if progress is not None:
            progress("generated", len(prompts))
    return clips


def score_edit(
    pipeline: TextToVideo, settings: WorldSettings, progress: Progress | None = None
) -> dict[str, Any]:
    """`settings.num` real clips, each edited to another colour and to another background.

    Returns:
        plain JSON values: the columns in COLUMNS, vae and real, of FIGURES for each of CHANGES. vae and
        real show what the edits should have come to.
    Raises:
        ValueError: what `eval_scenes` and the pipeline refuse.
    """
    info = pipeline.info
    size: dict[str, Any] = {"num_frames": info.num_frames, "fps": info.fps}
    size |= {"height": info.height, "width": info.width}
    scenes, _ = eval_scenes(replace(settings, level=1, split="held-out"), **size)
    sources, boxes = real_clips(scenes, progress), [object_box(scene) for scene in scenes]
    scores: dict[str, dict[str, Estimate]] = {name: {} for name in (*COLUMNS, "vae", "real")}
    rows: list[dict[str, Any]] = []
    for change in CHANGES:
        edits = _asked(scenes, change, settings.seed, sources, boxes)
        for column, videos in _columns(pipeline, edits, settings, progress).items():
            told = [
                score_edited(video, target, change, source, box)
                for video, target, source, box in zip(
                    videos, edits.targets, sources, boxes, strict=True
                )
            ]
            scores[column] |= _figures(change, told)
            if column.startswith(("strength", "masked")):
                rows += [
                    {"prompt": prompt, "column": column, **asdict(score)}
                    for prompt, score in zip(edits.prompts, told)
                ]
    return part_results(
        pipeline,
        settings,
        "edit",
        scores,
        chance=chance(scenes),
        chance_is="a guess; position: another clip",
        num_is="clips, edited to another colour and to another background",
        notes=_NOTES,
        columns=COLUMNS,
        clips=rows,
    )


_NOTES = (
    "prompts say the shape, the motion and what else stays, so these can come from them; where the "
    "object is at each frame can come from the given clip alone",
    "real and VAE: the scene that the edit should come to; position: of another clip of that motion",
)


def _asked(
    scenes: Sequence[Scene],
    change: str,
    seed: int,
    sources: list[np.ndarray],
    boxes: list[np.ndarray],
) -> _Edits:
    targets, prompts = [], []
    for index, scene in enumerate(scenes):
        rng = numpy_generator(seed, "eval", "edit", change, index)
        targets.append(edited_scene(scene, change, rng))
        prompts.append(caption(targets[-1], rng, complete=True))
    return _Edits(change, targets, prompts, sources, boxes)


def _columns(
    pipeline: TextToVideo, edits: _Edits, settings: WorldSettings, progress: Progress | None
) -> dict[str, list[np.ndarray]]:
    """The clips of each column, uint8 (f h w 3). Masks are around the object, for its colour alone."""
    clips = {"unchanged": edits.sources}
    for strength in STRENGTHS:
        made = _generate(pipeline, edits, strength, False, settings, progress)
        clips[f"strength_{strength:g}"] = made
    if edits.change == "colour":
        clips["masked"] = _generate(pipeline, edits, MASKED_STRENGTH, True, settings, progress)
    clips["real"] = real_clips(edits.targets, progress)
    clips["vae"] = reconstruct(
        pipeline.vae,
        clips["real"],
        batch_size=settings.batch_size,
        progress=None if progress is None else lambda n: progress("vae", n),
    )
    return clips
