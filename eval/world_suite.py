"""Scores a text-to-video model on the procedural world, beside the tracker's own ceiling.

Three columns on the same scenes: what the model makes from their prompts; real clips, rendered,
written as .mp4 and read back, which shows how often the tracker itself errs; and the real
clips after a round trip through the model's VAE, which shows what its codec costs.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.manifest import Manifest
from data.randomness import numpy_generator, stream_seed
from data.video import VideoReadError, read_clip, write_video
from data.world import Scene, make_scene
from data.world_captions import caption
from data.world_render import render
from eval.metrics import difference
from eval.vae_suite import as_clips, quality, reconstruct
from eval.world_scores import ClipScore, chance, score_clip, summarise

if TYPE_CHECKING:
    from dit.samplers import SamplerName
    from sample.pipeline import TextToVideo
    from sample.processes import Ranks

_WORDINGS = 200  # tries for a prompt that is not among those to avoid

Progress = Callable[[str, int], object]


@dataclass(frozen=True)
class WorldSettings:
    """What is asked of the model; chosen before looking at scores.

    steps, guidance, guidance_references, sampler, temperature: as `TextToVideo`; None for its
        defaults.

    Raises:
        ValueError: num or batch_size is below 1, or a temperature outside its range.
    """

    level: int = 1
    split: str = "held-out"
    num: int = 200
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    guidance_references: float | None = None
    sampler: SamplerName | None = None
    temperature: float | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        for name in ("num", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; use at least 1")
        if self.temperature is not None:
            from dit.samplers import check_temperature

            check_temperature(self.temperature)


@dataclass(frozen=True)
class WorldRun:
    """The results as plain JSON values, and what was scored: one prompt and video per scene."""

    results: dict[str, Any]
    scenes: list[Scene]
    prompts: list[str]
    videos: list[np.ndarray]
    scores: list[ClipScore]


def eval_scenes(
    settings: WorldSettings, *, avoid: Collection[str] = (), **size: Any
) -> tuple[list[Scene], list[str]]:
    """Scenes of a stream of their own, and a complete caption for each, all different.

    The world's seed is derived from the evaluation's, so it is none that a dataset was made with.

    Args:
        avoid: captions that must not be used, such as those trained on; a set is quick. A scene
            that has no other wording is passed over.
        size: height, width, num_frames and fps, as `make_scene`.
    Raises:
        ValueError: the world has no such scenes, or too few with other wordings.
    """
    world_seed = stream_seed(settings.seed, "eval", "scenes")
    scenes: list[Scene] = []
    prompts: list[str] = []
    used: set[str] = set()
    for index in range(20 * settings.num):
        if len(scenes) == settings.num:
            break
        scene = make_scene(
            level=settings.level, seed=world_seed, index=index, split=settings.split, **size
        )
        for text in _wordings(scene, settings.seed, index):
            if text not in avoid and text not in used:
                used.add(text)
                scenes.append(scene)
                prompts.append(text)
                break
    if len(scenes) < settings.num:
        raise ValueError(
            f"found {len(scenes)} of {settings.num} different prompts outside the {len(avoid)} to "
            f"avoid; use a smaller num or a higher level"
        )
    return scenes, prompts


def _wordings(scene: Scene, seed: int, index: int) -> Iterator[str]:
    rng = numpy_generator(seed, "eval", "prompt", index)
    for _ in range(_WORDINGS):
        yield caption(scene, rng, complete=True)


def real_clips(scenes: Sequence[Scene], progress: Progress | None = None) -> list[np.ndarray]:
    """Scenes as a dataset holds them: rendered, written as .mp4, read back. uint8 (f h w 3)."""
    clips = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        for scene in scenes:
            write_video(path, render(scene), scene.fps)
            clips.append(read_scene(path, scene))
            if progress is not None:
                progress("real", 1)
    return clips


def read_scene(path: str | os.PathLike[str], scene: Scene) -> np.ndarray:
    """The clip of a scene from its file, uint8 (f h w 3)."""
    clip = read_clip(
        path,
        num_frames=scene.num_frames,
        fps=scene.fps,
        height=scene.height,
        width=scene.width,
    )
    return clip.permute(1, 2, 3, 0).contiguous().numpy()


def sampling_options(settings: WorldSettings) -> dict[str, Any]:
    """What settings say of the sampling, as `TextToVideo.__call__` takes it."""
    names = ("steps", "guidance", "guidance_references", "sampler", "temperature")
    options = {name: getattr(settings, name) for name in names}
    return {name: value for name, value in options.items() if value is not None}


def generate(
    pipeline: TextToVideo,
    prompts: Sequence[str],
    settings: WorldSettings,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> list[np.ndarray]:
    """One clip per prompt, uint8 (f h w 3), at the size the model was trained on.

    Sample i has the seed stream_seed(seed, "eval", i), so it does not depend on the batch size.

    Args:
        ranks: deals the batches out to several processes; each of them returns all clips.
    """
    options = sampling_options(settings)
    clips: dict[int, list[np.ndarray]] = {}
    starts = range(0, len(prompts), settings.batch_size)
    if ranks is not None:
        starts = starts[ranks.rank :: ranks.world_size]
    for first in starts:
        batch = list(prompts[first : first + settings.batch_size])
        seeds = [stream_seed(settings.seed, "eval", first + i) for i in range(len(batch))]
        clips[first] = as_clips(pipeline(batch, seeds=seeds, **options))
        if progress is not None:
            progress("generated", len(batch))
    parts = [clips] if ranks is None else ranks.gather(clips)
    every = {first: batch for part in parts for first, batch in part.items()}
    return [clip for first in sorted(every) for clip in every[first]]


def run_world_suite(
    pipeline: TextToVideo,
    settings: WorldSettings,
    *,
    avoid: Collection[str] = (),
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> WorldRun:
    """Generate, track and score, beside real clips and VAE reconstructions of the same scenes.

    Args:
        avoid: captions that no prompt may equal, such as those trained on.
        progress: called with a column's name and the number of clips just done there.
        ranks: shares the generating out among processes, each of which gets the result.
    Raises:
        ValueError: what `eval_scenes`, the pipeline or the VAE refuse.
    """
    info = pipeline.info
    size = {"height": info.height, "width": info.width, "num_frames": info.num_frames}
    scenes, prompts = eval_scenes(settings, avoid=avoid, fps=info.fps, **size)
    videos = generate(pipeline, prompts, settings, progress, ranks)
    real = real_clips(scenes, progress)
    restored = reconstruct(
        pipeline.vae,
        real,
        batch_size=settings.batch_size,
        progress=None if progress is None else lambda n: progress("vae", n),
    )
    scores = {
        "generated": [
            score_clip(v, s, caption=p) for v, s, p in zip(videos, scenes, prompts, strict=True)
        ],
        "vae": [score_clip(v, s, exact=True) for v, s in zip(restored, scenes, strict=True)],
        "real": [score_clip(v, s, exact=True) for v, s in zip(real, scenes, strict=True)],
    }
    figures = {column: summarise(rows) for column, rows in scores.items()}
    figures["vae"].update(quality(real, restored))
    # Both columns show the same scenes, so the difference is taken clip by clip.
    drop = difference(*([clip.joint for clip in scores[column]] for column in ("real", "vae")))
    results = {
        "suite": "world",
        "level": settings.level,
        "split": settings.split,
        "num": settings.num,
        "seed": settings.seed,
        "avoided_captions": len(avoid),
        **size,
        "fps": info.fps,
        "sampling": sampling_used(pipeline, settings),
        "chance": chance(settings.level),
        "scores": {
            column: {name: e.to_json() for name, e in rows.items()}
            for column, rows in figures.items()
        },
        "vae_joint_drop": drop.to_json(),
        "clips": [
            {"prompt": p, **s.to_json()} for p, s in zip(prompts, scores["generated"], strict=True)
        ],
    }
    return WorldRun(results, scenes, prompts, videos, scores["generated"])


def sampling_used(pipeline: TextToVideo, settings: WorldSettings) -> dict[str, Any]:
    """Steps, guidance and sampler, with the model's own where settings say nothing."""
    from dit.samplers import samplers_for

    usual = pipeline.sampling
    return {
        "steps": usual.steps,
        "guidance": usual.guidance,
        "sampler": usual.sampler or samplers_for(pipeline.objective)[0],
        **sampling_options(settings),
    }


def score_manifest(
    manifest: Manifest, *, num: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Score the clips of a manifest of the world against the states in its rows.

    Args:
        num: the first so many rows; None for all.
    Raises:
        ValueError: a row has no state.
        VideoReadError: a clip cannot be read.
    """
    rows = manifest.rows[:num]
    scores = []
    for row, line in zip(rows, manifest.lines):
        state = (row.model_extra or {}).get("state")
        if not isinstance(state, dict):
            raise ValueError(
                f"{manifest.path}, line {line}: no `state`; only clips of the procedural world, "
                f"made by `zoetrope data world`, can be scored against it"
            )
        try:
            scene = Scene.from_state(state)
            scores.append(score_clip(read_scene(manifest.locate(row), scene), scene, exact=True))
        except VideoReadError:
            raise
        except (TypeError, ValueError, KeyError, IndexError) as error:
            raise ValueError(
                f"{manifest.path}, line {line}: its `state` is not one that `zoetrope data world` "
                f"wrote ({error})"
            ) from None
        if progress is not None:
            progress("clips", 1)
    figures = {name: e.to_json() for name, e in summarise(scores).items()}
    return {"suite": "world", "num": len(rows), "scores": {"clips": figures}}
