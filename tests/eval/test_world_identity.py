"""References scored: an oracle, models that ignore what they are given, and the real pipeline."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.video import to_float, to_uint8
from data.world import make_scene
from data.world_render import render
from data.world_subjects import HELD_OUT_SUBJECTS, reference_scene, subject
from dit.objective import FlowMatching
from eval.metrics import proportion
from eval.subjects import shrunk
from eval.tables import score_table
from eval.tracker import track
from eval.world_identity import (
    GROUPS,
    chance,
    reference_pictures,
    score_identity,
    score_plain,
    score_subjects,
    subject_scenes,
)
from eval.world_suite import WorldSettings, eval_scenes, real_clips
from sample.pipeline import TextToVideo

SIZE = {"height": 32, "width": 32, "num_frames": 9, "fps": 8.0}


class Oracle:
    """A pipeline that finds the scene by its references, or by its prompt where there is none."""

    def __init__(self, model, settings, spoil=lambda scene: scene):
        subjects, prompts = subject_scenes(settings, **SIZE)
        self.by_picture = {}
        for scene, prompt in zip(subjects, prompts):
            pictures = reference_pictures([scene])
            self.by_picture[prompt, *(p.numpy().tobytes() for p in pictures)] = scene
        plain, prompts = eval_scenes(settings, **SIZE)
        self.by_prompt = dict(zip(prompts, plain))
        self.spoil = spoil
        self.info, self.vae, self.objective = model.info, model.vae, FlowMatching()
        self.sampling = model.sampling
        self.calls = []

    def __call__(self, prompts, *, seeds, references=None, **options):
        self.calls.append((tuple(seeds), len(references or ()), options))
        scenes = [
            self.by_prompt[prompt]
            if references is None
            else self.by_picture[prompt, *(r[k : k + 1].numpy().tobytes() for r in references)]
            for k, prompt in enumerate(prompts)
        ]
        clips = [render(self.spoil(scene)) for scene in scenes]
        return to_float(torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3))


def with_subjects(scene, change):
    """A scene of subjects with the objects that `change` makes of its own; others as they are."""
    if scene.scenario != "subjects":
        return scene
    return replace(scene, objects=tuple(change(scene.objects)))


def repainted(item, number):
    look = subject(number)
    return replace(item, identity=number, shape=look.shape, colour=look.colours[0])


def test_a_perfect_model_scores_at_the_ceiling(tiny_model):
    settings = WorldSettings(num=30, batch_size=8, steps=3)
    oracle, seen = Oracle(tiny_model, settings), []
    results = score_identity(oracle, settings, lambda *done: seen.append(done))
    subjects, _ = subject_scenes(settings, **SIZE)
    ones = sum(len(scene.objects) == 1 for scene in subjects)
    assert 0 < ones < 30
    names = {f"{group}: {name}" for group, figures in GROUPS.items() for name in figures}
    none = {"subjects: copied_background", "plain shape, no reference: textured"}
    for column in ("generated", "vae", "real"):
        assert sum(n for name, n in seen if name == column) == 60
        scores = results["scores"][column]
        assert scores.keys() == names
        for name in names - none:
            assert scores[name]["value"] == 1.0, (column, name)
        for name in none:
            assert scores[name]["value"] == 0.0
            assert scores[name]["num"] == 30
        assert {scores[f"one subject: {name}"]["num"] for name in ("identity", "motion")} == {ones}
        assert scores["two subjects: own_motion"]["num"] == 30 - ones
        assert 0 < scores["two subjects: binding"]["num"] <= 30 - ones
    assert results["chance"]["one subject: identity"] == 0.01
    assert results["chance"].keys() < names
    assert (results["part"], results["num"]) == ("identity", 30)
    assert len(results["clips"]) == 60
    json.dumps(results, allow_nan=False)
    table = score_table(results)
    assert len(table.rows) == len(names)
    assert not any("_" in row[0] for row in table.rows)
    # Batches of like scenes, each sample with a seed of its own, and plain prompts without pictures.
    with_pictures = [call for call in oracle.calls if call[1]]
    assert {number for _, number, _ in with_pictures} == {1, 2}
    seeds = [seed for call in with_pictures for seed in call[0]]
    assert len(set(seeds)) == 30
    assert sum(len(call[0]) for call in oracle.calls if not call[1]) == 30
    assert all(options == {"steps": 3} for *_, options in oracle.calls)


def test_a_model_that_ignores_its_references_is_at_chance(tiny_model):
    """It moves some subject the right way, on the right background."""
    known, rng = sorted(HELD_OUT_SUBJECTS), np.random.default_rng(0)
    settings = WorldSettings(num=45)

    def others(objects):
        numbers = rng.choice(known, len(objects), replace=False).tolist()
        return (repainted(item, number) for item, number in zip(objects, numbers))

    oracle = Oracle(tiny_model, settings, lambda scene: with_subjects(scene, others))
    scores = score_identity(oracle, settings)["scores"]
    made = scores["generated"]
    identity, binding = made["one subject: identity"], made["two subjects: binding"]
    assert identity["low"] <= 0.01 <= identity["high"]
    assert identity["value"] < 0.1
    assert made["two subjects: own_motion"]["value"] < 0.1
    assert binding["low"] <= 0.5 <= binding["high"]
    for name in ("one subject: motion", "subjects: background", "subjects: permanence"):
        assert made[name]["value"] == 1.0
    assert made["subjects: textured"]["value"] == 1.0
    assert made["plain shape, no reference: joint"]["value"] == 1.0
    assert scores["real"]["one subject: identity"]["value"] == 1.0


def test_subjects_that_swap_their_motions_are_found_out():
    settings = WorldSettings(num=40)
    scenes = [s for s in subject_scenes(settings, **SIZE)[0] if len(s.objects) == 2]

    def swapped(objects):
        one, two = objects
        return repainted(one, two.identity), repainted(two, one.identity)

    told = [score_subjects(render(with_subjects(scene, swapped)), scene) for scene in scenes]
    assert all(score.identity_two for score in told)
    assert all(score.identity is None for score in told)
    differ = [len({item.motion for item in scene.objects}) == 2 for scene in scenes]
    assert 0 < sum(differ) < len(scenes)
    assert [score.binding for score in told] == [False if d else None for d in differ]
    assert [score.own_motion for score in told] == [not d for d in differ]


def test_copies_of_the_reference_are_found_out():
    """The background, and the size and the stillness, of the picture instead of the prompt's."""
    scenes = subject_scenes(WorldSettings(num=30), **SIZE)[0]
    for scene in scenes:
        reference = reference_scene(scene, 0)
        picture = np.repeat(render(reference), 9, axis=0)
        score = score_subjects(picture, scene)
        assert score.copied_background
        assert not score.background
        if len(scene.objects) == 1:
            assert score.identity
            assert score.motion is False
        else:
            assert score.identity_two is False
            assert score.textured is False  # one of them is not there


def test_textures_where_none_is_asked_for_are_found_out():
    """And half of a clip's frames do not make one."""
    plain = eval_scenes(WorldSettings(num=24), **SIZE)[0]
    numbers = sorted(HELD_OUT_SUBJECTS)[:24]
    for scene, number in zip(plain, numbers):
        leaked = replace(scene, objects=(repainted(scene.objects[0], number),))
        assert score_plain(render(leaked), scene).textured_plain
        assert not score_plain(render(scene), scene).textured_plain
        some = render(scene)
        some[:4] = render(leaked)[:4]
        assert not score_plain(some, scene).textured_plain


@pytest.mark.parametrize("size", [(36, 64), (64, 36), (96, 128)])
def test_other_sizes_have_the_same_ceiling(size):
    settings = WorldSettings(num=12)
    height, width = size
    scenes = subject_scenes(settings, **{**SIZE, "height": height, "width": width})[0]
    scores = [score_subjects(clip, scene) for clip, scene in zip(real_clips(scenes), scenes)]
    for name in ("identity", "identity_two", "motion", "own_motion", "background", "permanence"):
        told = [v for v in (getattr(score, name) for score in scores) if v is not None]
        assert told
        assert proportion(told).value == 1.0, name


def test_clips_are_averaged_down():
    clip = np.zeros((2, 100, 70, 3), np.uint8)
    clip[:, :, 34:36] = 200
    small = shrunk(clip)
    assert small.shape == (2, 50, 35, 3)
    assert small[0, 0, 16:19, 0].tolist() == [0, 200, 0]
    assert shrunk(clip[:, :63]) is not clip
    assert shrunk(clip[:, :63]).shape == (2, 63, 70, 3)


def test_textured_things_are_found_where_they_are():
    """Also two that nearly touch; plain tracking looks for the middle of one of their colours."""
    scenes = [
        make_scene(scenario="subjects", seed=8, index=i, split="train", **SIZE) for i in range(60)
    ]
    away = {True: [], False: []}
    for clip, scene in zip(real_clips(scenes), scenes):
        for textured, found in away.items():
            seen = track(clip, scene.fps, textured=textured)
            if textured:
                assert set(seen.counts) == {len(scene.objects)}
                assert all(each.colour is None for each in seen.tracks)
            for item in scene.objects:
                errors = [np.linalg.norm(t.position - item.position, axis=1) for t in seen.tracks]
                found.append(min(np.nanmax(error) for error in errors))
    assert np.max(away[True]) < 0.6
    assert np.mean(away[True]) < 0.3 * np.mean(away[False])


def test_an_untrained_model_scores_nothing(tiny_model):
    knows = tiny_model.info.model_copy(update={"references": 2})
    pipeline = TextToVideo(replace(tiny_model, info=knows), "cpu", dtype=torch.float32)
    settings = WorldSettings(num=5, batch_size=2, steps=1, guidance=1)
    results = score_identity(pipeline, settings)
    made, real = results["scores"]["generated"], results["scores"]["real"]
    for name in ("two subjects: own_motion", "two subjects: identity"):
        assert made[name]["num"] > 0
        assert made[name]["value"] == 0
    assert made["plain shape, no reference: joint"]["value"] == 0
    assert real["one subject: identity"]["value"] == 1
    used = {"steps": 1, "guidance": 1, "guidance_references": 2.0, "sampler": "euler"}
    assert results["sampling"] == used
    json.dumps(results, allow_nan=False)


def test_scenes_are_a_function_of_the_seed():
    """New subjects alone; more clips are the same ones and more; pictures are pixel for pixel."""
    scenes, prompts = subject_scenes(WorldSettings(num=12), **SIZE)
    longer, more = subject_scenes(WorldSettings(num=15), **SIZE)
    assert more[:12] == prompts
    assert [s.to_state() for s in longer[:12]] == [s.to_state() for s in scenes]
    other, _ = subject_scenes(WorldSettings(num=12, seed=1), **SIZE)
    assert [s.to_state() for s in other] != [s.to_state() for s in scenes]
    assert {o.identity for s in longer for o in s.objects} <= HELD_OUT_SUBJECTS
    twos = [scene for scene in longer if len(scene.objects) == 2][:2]
    pictures = reference_pictures(twos)
    assert [p.shape for p in pictures] == [(2, 3, 32, 32)] * 2
    exact = to_uint8(pictures[1][0]).permute(1, 2, 0).numpy()
    assert np.array_equal(exact, render(reference_scene(twos[0], 1))[0])
    guess = chance(longer)
    assert guess["one subject: motion"] == 0.25
    assert 1 / 3 <= guess["subjects: copied_background"] <= 2 / 3


def test_clips_that_are_too_long_are_one_line():
    with pytest.raises(ValueError, match="a clip of scenario=subjects"):
        subject_scenes(WorldSettings(num=2), **{**SIZE, "num_frames": 33})


def test_a_model_without_references_is_refused(tiny_model):
    pipeline = TextToVideo(tiny_model, "cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match="the model was trained with none"):
        score_identity(pipeline, WorldSettings(num=2, steps=1))
