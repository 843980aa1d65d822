"""Scores references: does the subject of a given picture move through the clip that was asked for?

The subjects are the hundred that no training clip shows, known by their pictures alone: prompts say
"the subject moving left". Beside them prompts of plain shapes go through the same model without a
picture, to see whether textures come uncalled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from data.randomness import stream_seed
from data.video import to_float
from data.world import LEVELS, Scene
from data.world_render import render
from data.world_scenarios import AXES
from data.world_subjects import reference_scene
from eval.metrics import Estimate, proportion
from eval.subjects import CANDIDATES, FRAMES, has_texture, look, shrunk, subject_errors
from eval.vae_suite import as_clips, reconstruct
from eval.world_clips import draw_scenes, part_results, prompt_of
from eval.world_scores import is_permanent, score_clip
from eval.world_suite import (
    Progress,
    WorldSettings,
    eval_scenes,
    generate,
    real_clips,
    sampling_options,
)

if TYPE_CHECKING:
    from torch import Tensor

    from sample.pipeline import TextToVideo

T = TypeVar("T")

SPLIT = "identities"
# The figures of each group, as the results name them, by the fields of SubjectScore and PlainScore.
GROUPS = {
    "one subject": {"identity": "identity", "motion": "motion"},
    "two subjects": {"identity": "identity_two", "own_motion": "own_motion", "binding": "binding"},
    "subjects": {
        name: name for name in ("background", "copied_background", "permanence", "textured")
    },
    "plain shape, no reference": {
        name: f"{name}_plain" for name in ("textured", "colour", "joint")
    },
}


@dataclass(frozen=True)
class SubjectScore:
    """One clip of subjects against its scene. None where a figure does not apply.

    identity, motion: of scenes with one subject. identity_two: the two subjects are those asked for,
    in any order. own_motion: and each moves as the prompt says of it. binding: of clips that show the
    two motions asked for, which differ: whether the two things, taken for the two subjects in the order
    that fits their looks better, have them the right way round. copied_background: that of a reference.
    textured: every subject shows two colours.
    """

    identity: bool | None
    motion: bool | None
    identity_two: bool | None
    own_motion: bool | None
    binding: bool | None
    background: bool
    copied_background: bool
    permanence: bool
    textured: bool


@dataclass(frozen=True)
class PlainScore:
    """A clip of one plain shape, asked for without a reference. textured_plain: it has two colours."""

    textured_plain: bool
    colour_plain: bool
    joint_plain: bool


def subject_scenes(settings: WorldSettings, **size: Any) -> tuple[list[Scene], list[str]]:
    """Scenes of held-out subjects, and a caption for each.

    Args:
        size: height, width, num_frames and fps, as `make_scene`.
    Raises:
        ValueError: a clip longer than the scenario's.
    """
    scenes = draw_scenes(settings, scenario="subjects", split=SPLIT, **size)
    return scenes, [prompt_of(scene, settings) for scene in scenes]


def reference_pictures(scenes: Sequence[Scene]) -> list[Tensor]:
    """What the subjects of scenes look like, in their order: (b 3 h w) in [-1, 1] for each.

    The very pixels of the pictures that a dataset has; all scenes have as many subjects.
    """
    import torch

    pictures = []
    for number in range(len(scenes[0].objects)):
        drawn = [render(reference_scene(scene, number))[0] for scene in scenes]
        pictures.append(to_float(torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)))
    return pictures


def _generate(
    pipeline: TextToVideo,
    scenes: Sequence[Scene],
    prompts: Sequence[str],
    settings: WorldSettings,
    progress: Progress | None,
) -> list[np.ndarray]:
    """One clip per scene, uint8 (f h w 3); a batch has scenes with as many subjects."""
    options = sampling_options(settings)
    clips: dict[int, np.ndarray] = {}
    for count in (1, 2):
        places = [k for k, scene in enumerate(scenes) if len(scene.objects) == count]
        for first in range(0, len(places), settings.batch_size):
            batch = places[first : first + settings.batch_size]
            video = pipeline(
                [prompts[k] for k in batch],
                references=reference_pictures([scenes[k] for k in batch]),
                seeds=[stream_seed(settings.seed, "eval", k) for k in batch],
                **options,
            )
            clips.update(zip(batch, as_clips(video)))
            if progress is not None:
                progress("generated", len(batch))
    return [clips[k] for k in range(len(scenes))]


def score_subjects(video: np.ndarray, scene: Scene) -> SubjectScore:
    """Find a clip's subjects, and compare who they are and what they do with a scene.

    Only as many tracks as there are subjects take part, the most present and largest ones.

    Args:
        video: uint8, (f h w 3).
    """
    video = shrunk(video)
    sighting = look(video, scene.fps)
    count = len(scene.objects)
    tracks = sighting.tracks[:count]
    complete = len(tracks) == count
    errors = [subject_errors(video, seen) for seen in tracks]
    found = [CANDIDATES[int(each.argmin())] for each in errors]
    asked = [item.identity for item in scene.objects]
    seen, wanted = [t.motion for t in tracks], [item.motion for item in scene.objects]
    pairs = {*zip(found, seen)} == {*zip(asked, wanted)}
    binding = None
    if (
        count == 2
        and complete
        and wanted[0] != wanted[1]
        and sorted(map(str, seen)) == sorted(wanted)
    ):
        costs = [
            [each[CANDIDATES.index(number)] for number in asked if number is not None]
            for each in errors
        ]
        straight = costs[0][0] + costs[1][1] <= costs[0][1] + costs[1][0]
        binding = bool(straight == (seen == wanted))
    backgrounds = {reference_scene(scene, number).background for number in range(count)}
    return SubjectScore(
        identity=found == asked if count == 1 else None,
        motion=seen == wanted if count == 1 else None,
        identity_two=complete and set(found) == set(asked) if count == 2 else None,
        own_motion=complete and pairs if count == 2 else None,
        binding=binding,
        background=sighting.background == scene.background,
        copied_background=sighting.background in backgrounds,
        permanence=is_permanent(sighting, replace(scene, height=video.shape[1])),
        textured=complete and all(has_texture(video, each) for each in tracks),
    )


def score_plain(video: np.ndarray, scene: Scene) -> PlainScore:
    """Whether the largest thing in a clip of a plain shape has a texture, and the text part's verdict.

    Args:
        video: uint8, (f h w 3).
    """
    small = shrunk(video)
    tracks = look(small, scene.fps).tracks[:1]
    score = score_clip(video, scene)
    return PlainScore(
        textured_plain=any(has_texture(small, seen) for seen in tracks),
        colour_plain=score.colour,
        joint_plain=score.joint,
    )


def chance(scenes: Sequence[Scene]) -> dict[str, float]:
    """What a blind guess gets: one of 100 subjects, of the straight motions, of the backgrounds."""
    one, motion, plain = 1 / len(CANDIDATES), 1 / len(AXES), LEVELS[1]
    two = 2 * one / (len(CANDIDATES) - 1)
    backgrounds = [
        len({reference_scene(scene, number).background for number in range(len(scene.objects))})
        for scene in scenes
    ]
    colour, background = 1 / len(plain.colours), 1 / len(plain.backgrounds)
    fields = {
        "identity": one,
        "motion": motion,
        "identity_two": two,
        "own_motion": two * motion**2,
        "binding": 0.5,
        "background": background,
        "copied_background": float(np.mean(backgrounds)) * background,
        "colour_plain": colour,
        "joint_plain": colour / len(plain.shapes) / len(plain.motions) * background,
    }
    return _grouped(fields)


def _grouped(fields: Mapping[str, T]) -> dict[str, T]:
    """Values by field as values by the names of GROUPS; fields that are missing are left out."""
    return {
        f"{group}: {name}": fields[field]
        for group, names in GROUPS.items()
        for name, field in names.items()
        if field in fields
    }


def _figures(subjects: Sequence[SubjectScore], plain: Sequence[PlainScore]) -> dict[str, Estimate]:
    fields: dict[str, Estimate] = {}
    for rows in (subjects, plain):
        for name in type(rows[0]).__dataclass_fields__:
            values = [v for row in rows if (v := getattr(row, name)) is not None]
            fields[name] = proportion(values)
    return _grouped(fields)


def score_identity(
    pipeline: TextToVideo, settings: WorldSettings, progress: Progress | None = None
) -> dict[str, Any]:
    """`settings.num` scenes of held-out subjects with their references, and as many plain ones without.

    Returns:
        plain JSON values: columns generated, vae and real, of the figures in GROUPS.
    Raises:
        ValueError: the model was not trained with references, or its clips are too long.
    """
    info = pipeline.info
    size: dict[str, Any] = {"num_frames": info.num_frames, "fps": info.fps}
    size |= {"height": info.height, "width": info.width}
    scenes, prompts = subject_scenes(settings, **size)
    # First what a model without references refuses.
    made = _generate(pipeline, scenes, prompts, settings, progress)
    ordinary = replace(settings, level=1, split="held-out")
    plain, plain_prompts = eval_scenes(ordinary, **size)
    made += generate(pipeline, plain_prompts, ordinary, progress)
    real = real_clips([*scenes, *plain], progress)
    restored = reconstruct(
        pipeline.vae,
        real,
        batch_size=settings.batch_size,
        progress=None if progress is None else lambda n: progress("vae", n),
    )
    scores, clips = {}, []
    for column, videos in (("generated", made), ("vae", restored), ("real", real)):
        subjects = [score_subjects(video, scene) for video, scene in zip(videos, scenes)]
        shapes = [score_plain(v, scene) for v, scene in zip(videos[len(scenes) :], plain)]
        scores[column] = _figures(subjects, shapes)
        if column == "generated":
            every = zip([*prompts, *plain_prompts], [*subjects, *shapes])
            clips = [{"prompt": prompt, **asdict(score)} for prompt, score in every]
    if settings.guidance_references is None:  # said in the results
        pictured = pipeline.sampling.guidance_references
        settings = replace(settings, guidance_references=pictured)
    return part_results(
        pipeline,
        settings,
        "identity",
        scores,
        chance=chance(scenes),
        chance_is="chance",
        num_is="scenes of subjects, and as many of plain shapes",
        notes=[*_NOTES, f"guidance towards the pictures: {settings.guidance_references:g}"],
        clips=clips,
    )


_NOTES = (
    f"a subject is the nearest of {len(CANDIDATES)} that training never shows, by its pixels in "
    f"{FRAMES} frames",
    "which of the two has which motion: of clips that show both motions, which differ",
    "shows a texture: real subjects are the detector's hits, real plain shapes its false alarms",
)
