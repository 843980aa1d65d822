"""What the parts of the world suite share: scenes, latents, and the form of their results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from data.randomness import numpy_generator, stream_seed
from data.world import Scene, make_scene
from data.world_captions import caption
from eval.metrics import Estimate
from eval.vae_suite import as_video, full_precision
from eval.world_suite import WorldSettings, sampling_used

if TYPE_CHECKING:
    from torch import Tensor

    from sample.pipeline import TextToVideo

_DRAWS = 200  # per scene, before none is thought to fit

Scores = Mapping[str, Mapping[str, Estimate]]  # by column, then by figure


def draw_scenes(
    settings: WorldSettings,
    accept: Callable[[Scene], bool] = lambda _: True,
    **where: Any,
) -> list[Scene]:
    """The first `settings.num` scenes that are accepted, of a stream of the evaluation's own.

    Args:
        where: what `make_scene` takes beside seed and index.
    Raises:
        ValueError: the world has no such scenes, or too few are accepted.
    """
    seed = stream_seed(settings.seed, "eval", "scenes")
    scenes: list[Scene] = []
    for index in range(_DRAWS * settings.num):
        scene = make_scene(seed=seed, index=index, **where)
        if accept(scene):
            scenes.append(scene)
            if len(scenes) == settings.num:
                return scenes
    name = where.get("scenario", "shapes")
    raise ValueError(
        f"{len(scenes)} of {_DRAWS * settings.num} scenes of {name} ({where['split']}) can be scored "
        f"in {where['num_frames']} frames; use a model of longer clips"
    )


def prompt_of(scene: Scene, settings: WorldSettings) -> str:
    """A complete caption of a scene."""
    return caption(
        scene, numpy_generator(settings.seed, "eval", "prompt", scene.index), complete=True
    )


def encoded(pipeline: TextToVideo, clips: Sequence[np.ndarray]) -> Tensor:
    """Latents (b c f h w) of clips, uint8 (f h w 3), all alike: the posterior's mean."""
    with full_precision():
        device = next(pipeline.vae.parameters()).device
        return pipeline.vae.encode(as_video(clips, device)).mean


def part_results(
    pipeline: TextToVideo,
    settings: WorldSettings,
    part: str,
    scores: Scores,
    *,
    chance: Mapping[str, float],
    chance_is: str,
    num_is: str,
    notes: Iterable[str],
    **more: Any,
) -> dict[str, Any]:
    """A part's results as plain JSON values, as `eval.tables.score_table` shows them.

    Args:
        scores: by column and figure; a figure's name may begin with its group: "GROUP: NAME".
        chance: by figure, what a guess or a baseline gets; chance_is: which, in a few words.
        num_is: what there are `settings.num` of.
        notes: lines to read beside the table.
        more: what else to keep; `columns` names columns of the part's own.
    """
    info = pipeline.info
    return {
        "suite": "world",
        "part": part,
        "num": settings.num,
        "num_is": num_is,
        "seed": settings.seed,
        "height": info.height,
        "width": info.width,
        "num_frames": info.num_frames,
        "fps": info.fps,
        "sampling": sampling_used(pipeline, settings),
        "chance_is": chance_is,
        "chance": dict(chance),
        "scores": {
            column: {name: estimate.to_json() for name, estimate in rows.items()}
            for column, rows in scores.items()
        },
        "notes": list(notes),
        **more,
    }
