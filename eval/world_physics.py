"""Velocities that a model predicts from a clip's first frames, after "How Far Is Video Generation
from World Model: A Physical Law Perspective" (Kang et al., arXiv 2411.02385).

The model is given the first frames of a ball that moves by a law, or of two that collide, and makes
the rest. Balls are found by their colours; their velocities are differences of positions between
neighbouring frames, and so are the true ones. As in the paper, frames count where all of a ball is
in view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data.randomness import stream_seed
from data.world import COLOURS, Scene
from data.world_protocol import UNITS
from eval.metrics import Estimate, mean_estimate
from eval.tracker import find_blobs
from eval.vae_suite import as_clips, reconstruct
from eval.world_clips import draw_scenes, encoded, part_results, prompt_of
from eval.world_suite import Progress, WorldSettings, real_clips, sampling_options

if TYPE_CHECKING:
    from sample.pipeline import TextToVideo

SCENARIOS = ("uniform", "collision", "parabola")
SPLITS = {"held-out": "in distribution", "speeds": "out of distribution"}
LEAST_GIVEN = 3  # frames, as in the paper
_WHOLE = 0.999  # the share of a ball that is in view where all of it is
_MIXED = (
    80.0  # RGB distance from every mixture of the balls' colours and the background: something else
)

# The paper's errors, in units per second, by scenario and split: from section 3.2, but for DiT-B's
# 0.0138. That is in table 4, which does not say how many videos; the error out of distribution beside
# it, 0.3583, is the one that section 3.2 gives for 3M. All else, among it most of DiT-S and every model
# of collision and parabola, is only in figure 3, which has no numbers.
PUBLISHED: dict[str, dict[str, float]] = {
    "uniform, in distribution": {
        "DiT-S, 30K videos": 0.022,
        "DiT-B, 3M videos": 0.0138,
        "DiT-L, 3M videos": 0.012,
    },
    "uniform, out of distribution": {
        "DiT-B, 30K videos": 0.433,
        "DiT-B, 300K videos": 0.328,
        "DiT-B, 3M videos": 0.358,
        "DiT-L, 3M videos": 0.427,
    },
}
# Table 3: real videos and what its VAE makes of them, in distribution; collision after the contact.
PUBLISHED_CEILING: dict[str, dict[str, float]] = {
    "uniform": {"real": 0.0099, "vae": 0.0105},
    "collision": {"real": 0.0117, "vae": 0.0131},
    "parabola": {"real": 0.0210, "vae": 0.0212},
}


@dataclass(frozen=True)
class BallScore:
    """One clip, over its generated frames that should show all of a ball; units per second.

    error: mean |v - v_true|; None where no ball was found in two neighbouring frames. after: the same
    after the contact, None without one. found: the share of frames in which the ball was found.
    stays, stays_after: mean |v_true|, the error of a ball that stays where it was.
    """

    error: float | None
    after: float | None
    found: float
    stays: float
    stays_after: float | None


def given_latents(temporal_factor: int) -> int:
    """Latent frames that begin a clip and hold at least LEAST_GIVEN frames; the first holds one."""
    return 1 + -(-(LEAST_GIVEN - 1) // temporal_factor)


def ball_positions(video: np.ndarray, colours: Sequence[str], radii: Sequence[float]) -> np.ndarray:
    """Where balls of different colours are, (n f 2) pixels, x then y; NaN where one is not found.

    Every pixel is taken for a mixture of the background's and the balls' colours, so two balls that
    touch are told apart; the largest blob of a colour is the ball.

    Args:
        video: uint8, (f h w 3).
        radii: of the balls, pixels; a blob of less than 0.3 of a ball's area is none.
    """
    position = np.full((len(colours), len(video), 2), np.nan)
    wanted = np.array([COLOURS[colour] for colour in colours], np.float64)
    for k, frame in enumerate(video.astype(np.float64)):
        background = np.median(frame, axis=(0, 1))
        axes, offset = wanted - background, frame - background
        shares = offset @ np.linalg.pinv(axes)
        strange = np.linalg.norm(offset - shares @ axes, axis=-1) > _MIXED
        shares = np.where(strange[..., None], 0.0, shares.clip(0.0))
        for n, radius in enumerate(radii):
            alone = background + shares[..., n, None] * axes[n]
            blobs = find_blobs(alone, background, least_radius=radius)
            if blobs:
                position[n, k] = max(blobs, key=lambda blob: blob.area).centre
    return position


def _whole(scene: Scene, given: int) -> np.ndarray:
    """Generated frames that should show all of a ball, and the frame before too, (n f) bool."""
    seen = np.stack([np.asarray(item.visible) >= _WHOLE for item in scene.objects])
    seen[:, 1:] &= seen[:, :-1]
    seen[:, :given] = False
    return seen


def _contact(scene: Scene) -> float:
    """The frame of the contact, a fraction; -1 where there is none."""
    times = [time for item in scene.objects for time in item.bounce_times]
    return min(times) * scene.fps if times else -1.0


def can_be_scored(scene: Scene, given: int) -> bool:
    """Whether a contact comes after the given frames, and each ball is seen whole after that."""
    contact, whole = _contact(scene), _whole(scene, given)
    if contact < 0:
        return bool(whole.any(axis=1).all())
    after = np.arange(scene.num_frames) - 1 >= contact
    return contact > given - 1 and bool((whole & after).any(axis=1).all())


def score_balls(video: np.ndarray, scene: Scene, given: int) -> BallScore:
    """Find the balls of a clip, uint8 (f h w 3), and compare their velocities with the scene's.

    Args:
        given: frames at the beginning that do not count.
    """
    items, count = scene.objects, scene.num_frames
    names, radii = [item.colour for item in items], [item.radius for item in items]
    found = ball_positions(video, names, radii)
    true = np.stack([item.position for item in items])
    scale = scene.fps * UNITS / min(scene.height, scene.width)
    counts = _whole(scene, given)[:, 1:]
    error = np.linalg.norm(np.diff(found - true, axis=1), axis=-1) * scale
    speed = np.linalg.norm(np.diff(true, axis=1), axis=-1) * scale
    both = counts & np.isfinite(error)
    after = np.arange(1, count) - 1 >= _contact(scene) if _contact(scene) >= 0 else None

    def mean(values: np.ndarray, where: np.ndarray) -> float | None:
        return float(values[where].mean()) if where.any() else None

    return BallScore(
        error=mean(error, both),
        after=None if after is None else mean(error, both & after),
        found=float(np.isfinite(found[:, 1:, 0])[counts].mean()),
        stays=float(speed[counts].mean()),
        stays_after=None if after is None else mean(speed, counts & after),
    )


def _predicted(
    pipeline: TextToVideo,
    scenes: Sequence[Scene],
    clips: Sequence[np.ndarray],
    settings: WorldSettings,
    progress: Progress | None,
) -> list[np.ndarray]:
    """Clips, uint8 (f h w 3), of which the model is given the beginning of real ones."""
    from sample.given import known_frames

    info, factor = pipeline.info, pipeline.vae.temporal_factor
    known = given_latents(factor)
    shown = 1 + (known - 1) * factor
    length = pipeline.vae.latent_shape(info.num_frames, info.height, info.width)[1]
    made: list[np.ndarray] = []
    for first in range(0, len(scenes), settings.batch_size):
        batch = scenes[first : first + settings.batch_size]
        latents = encoded(pipeline, [c[:shown] for c in clips[first : first + len(batch)]])
        seeds = [
            stream_seed(settings.seed, "eval", "physics", str(s.scenario), s.split, first + i)
            for i, s in enumerate(batch)
        ]
        video = pipeline(
            [prompt_of(scene, settings) for scene in batch],
            seeds=seeds,
            given=known_frames(latents, length, slice(0, known)),
            **sampling_options(settings),
        )
        made += as_clips(video)
        if progress is not None:
            progress("generated", len(batch))
    return made


def _summary(rows: Sequence[BallScore]) -> dict[str, Estimate]:
    def mean(name: str) -> Estimate:
        return mean_estimate([v for v in (getattr(row, name) for row in rows) if v is not None])

    figures = {"velocity_error_units": mean("error"), "found": mean("found")}
    if any(row.stays_after is not None for row in rows):
        figures["velocity_error_after"] = mean("after")
    return figures


def score_physics(
    pipeline: TextToVideo, settings: WorldSettings, progress: Progress | None = None
) -> dict[str, Any]:
    """Velocity errors in `settings.num` scenes of each scenario and split; see docs/eval-world.md.

    Raises:
        ValueError: the model was not trained to be given first frames, or its clips do not suit.
    """
    from sample.given import require_task

    require_task(pipeline.info, "leading", "predicting a clip from its first frames")
    info, factor = pipeline.info, pipeline.vae.temporal_factor
    given = 1 + (given_latents(factor) - 1) * factor
    if info.num_frames <= given:
        raise ValueError(
            f"clips of {info.num_frames} frames, of which {given} would be given, leave nothing to "
            "predict; use a model of longer clips"
        )
    size = {"height": info.height, "width": info.width, "num_frames": info.num_frames}
    scores: dict[str, dict[str, Estimate]] = {"generated": {}, "vae": {}, "real": {}}
    chance: dict[str, float] = {}
    for scenario in SCENARIOS:
        for split, name in SPLITS.items():
            where = {**size, "fps": info.fps, "scenario": scenario, "split": split}
            scenes = draw_scenes(settings, lambda scene: can_be_scored(scene, given), **where)
            clips = {"real": real_clips(scenes, progress)}
            clips["generated"] = _predicted(pipeline, scenes, clips["real"], settings, progress)
            done = None if progress is None else lambda n: progress("vae", n)
            batch = settings.batch_size
            clips["vae"] = reconstruct(pipeline.vae, clips["real"], batch_size=batch, progress=done)
            rows: list[BallScore] = []
            for column, videos in clips.items():
                rows = [score_balls(v, s, given) for v, s in zip(videos, scenes, strict=True)]
                figures = _summary(rows)
                scores[column] |= {f"{scenario}, {name}: {key}": f for key, f in figures.items()}
            # The same in all columns, as it follows from the scenes alone.
            stays = {"velocity_error_units": [row.stays for row in rows]}
            stays["velocity_error_after"] = [
                row.stays_after for row in rows if row.stays_after is not None
            ]
            chance |= {f"{scenario}, {name}: {k}": float(np.mean(v)) for k, v in stays.items() if v}
            chance[f"{scenario}, {name}: found"] = 1.0
    return part_results(
        pipeline,
        settings,
        "physics",
        scores,
        chance=chance,
        chance_is="the last given frame stays",
        num_is="clips of each scenario and split",
        notes=_notes(given, info.num_frames),
        given_frames=given,
        published={"source": "arXiv 2411.02385", "models": PUBLISHED, "videos": PUBLISHED_CEILING},
    )


def _notes(given: int, total: int) -> list[str]:
    lines = [f"{given} of {total} frames are given; a unit is a tenth of the frame's shorter side"]
    for group, errors in PUBLISHED.items():
        said = ", ".join(f"{who} {error:g}" for who, error in errors.items())
        lines.append(f"arXiv 2411.02385 (32 frames, 3 given, 128x128), {group}: {said}")
    said = ", ".join(
        f"{scenario} {error['real']:g} and {error['vae']:g}"
        for scenario, error in PUBLISHED_CEILING.items()
    )
    lines.append(f"arXiv 2411.02385, real videos and its VAE's, in distribution: {said}")
    return lines
