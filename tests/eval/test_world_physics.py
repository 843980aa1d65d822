"""The physics part: a model that knows the law, one that does not move, and one that knows nothing."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.video import to_float
from data.world import make_scene
from data.world_render import render
from eval.tables import as_text, score_table
from eval.world_clips import draw_scenes
from eval.world_physics import (
    ball_positions,
    can_be_scored,
    given_latents,
    score_balls,
    score_physics,
)
from eval.world_suite import WorldSettings
from sample.pipeline import TextToVideo

SIZE = {"height": 64, "width": 64, "num_frames": 9, "fps": 8.0}


def scene_of(scenario, split="held-out", given=5, index=0):
    while True:
        scene = make_scene(scenario=scenario, seed=3, index=index, split=split, **SIZE)
        if can_be_scored(scene, given):
            return scene
        index += 1


class Given(TextToVideo):
    """Draws what it is told to make of the frames that it is given; asks a function of them."""

    def __init__(self, model, made):
        super().__init__(model, "cpu", dtype=torch.float32)
        self.made = made

    def __call__(self, prompts, *, seeds, given, **options):
        levels = given.levels
        assert levels[:, :2].eq(0).all()
        assert levels[:, 2:].isnan().all()
        assert len(prompts) == len(seeds) == len(levels)
        with torch.no_grad():
            shown = self.vae.decode(given.known[:, :, :2]).clamp(-1, 1)
        assert shown.shape[2] == 5
        return torch.stack([self.made(prompt, video) for prompt, video in zip(prompts, shown)])


def stays(prompt, shown):
    return torch.cat([shown, shown[:, -1:].expand(-1, 4, -1, -1)], dim=1)


@pytest.fixture(scope="module")
def predictor(tiny_model):
    """tiny_model at 64x64, as one that was trained to go on from given frames."""
    changes = {"height": 64, "width": 64, "tasks": ("text", "leading")}
    return replace(tiny_model, info=tiny_model.info.model_copy(update=changes))


@pytest.mark.parametrize("split", ["held-out", "speeds"])
@pytest.mark.parametrize("scenario", ["uniform", "collision", "parabola"])
def test_what_is_drawn_exactly_is_measured_exactly(scenario, split):
    scene = scene_of(scenario, split)
    score = score_balls(render(scene), scene, 5)
    assert score.found == 1
    assert score.error < 0.06
    assert (score.after is not None) == (scenario == "collision")
    assert score.after is None or score.after < 0.06


def test_a_wrong_velocity_is_its_difference():
    """A ball that moves 2 units per second slower to the right than it should."""
    scene = scene_of("uniform")
    (ball,) = scene.objects
    slower = 2.0 * scene.height / 10 / scene.fps * np.arange(9)
    position = ball.position - np.stack([slower, 0 * slower], axis=1)
    wrong = replace(scene, objects=(replace(ball, position=position + np.array([8, 0])),))
    assert score_balls(render(wrong), scene, 5).error == pytest.approx(2.0, abs=0.08)


def test_balls_that_touch_and_balls_of_another_colour():
    scene = scene_of("collision")
    red, blue = scene.objects
    touching = [replace(item, position=np.tile([x, 32.0], (9, 1))) for item, x in
                zip((replace(red, radius=9.0), replace(blue, radius=7.0)), (24.0, 40.0))]  # fmt: skip
    video = render(replace(scene, objects=tuple(touching)))
    found = ball_positions(video, ("red", "blue"), (9.0, 7.0))
    assert np.abs(found - [[[24.0, 32.0]], [[40.0, 32.0]]]).max() < 0.2
    green = [replace(item, colour=colour) for item, colour in zip(touching, ("green", "white"))]
    video = render(replace(scene, objects=tuple(green)))
    assert np.isnan(ball_positions(video, ("red", "blue"), (9.0, 7.0))).all()


def test_balls_that_are_gone_are_counted():
    scene = scene_of("uniform")
    video = render(scene)
    video[6:] = video[0, 0, 0]
    score = score_balls(video, scene, 5)
    assert score.found == pytest.approx(1 / 4)
    assert score.error is not None  # of the one frame that has it
    video[5:] = video[0, 0, 0]
    assert score_balls(video, scene, 5).error is None


def test_contacts_come_after_what_is_given():
    for index in range(40):
        scene = scene_of("collision", index=index)
        assert min(scene.objects[0].bounce_times) * 8.0 > 4
    assert [given_latents(factor) for factor in (1, 2, 4, 8)] == [3, 2, 2, 2]


def test_a_model_that_knows_the_law_and_one_that_does_not_move(predictor):
    settings = WorldSettings(num=3, batch_size=2)
    standing = score_physics(Given(predictor, stays), settings)
    json.dumps(standing, allow_nan=False)
    scores, chance = standing["scores"], standing["chance"]
    assert len(chance) == 8 + 6
    for name, guess in chance.items():
        assert scores["generated"][name]["value"] == pytest.approx(guess, rel=0.1, abs=0.05), name
        for column in ("real", "vae"):
            if "found" in name:
                assert scores[column][name]["value"] == guess == 1
            else:
                assert scores[column][name]["value"] < 0.1, (column, name)
            assert scores[column][name]["num"] == 3
    text = as_text(score_table(standing))
    assert "world suite, physics: 3 clips of each scenario and split, seed 0" in text
    assert "the last given frame stays" in text
    assert "collision, out of distribution: velocity error after the contact, units/s" in text
    assert any("DiT-B, 30K videos 0.433" in line for line in standing["notes"])

    scenes = {}
    for scenario in ("uniform", "collision", "parabola"):
        for split in ("held-out", "speeds"):
            where = {**SIZE, "scenario": scenario, "split": split}
            for scene in draw_scenes(settings, lambda s: can_be_scored(s, 5), **where):
                scenes[(scenario, split, scene.index)] = to_float(
                    torch.from_numpy(render(scene)).permute(3, 0, 1, 2)
                )

    def true(prompt, shown):
        return min(scenes.values(), key=lambda video: (video[:, :5] - shown).abs().mean())

    seen = []
    knowing = score_physics(
        Given(predictor, true), settings, lambda column, num: seen.append((column, num))
    )
    for name in chance:
        value = knowing["scores"]["generated"][name]["value"]
        assert value == pytest.approx(knowing["scores"]["real"][name]["value"], abs=0.06), name
    assert {c: sum(n for x, n in seen if x == c) for c, _ in seen} == dict.fromkeys(
        ("real", "generated", "vae"), 18
    )


def test_a_model_that_knows_nothing(tiny_model):
    """The real pipeline, at 32x32."""
    info = tiny_model.info.model_copy(update={"tasks": ("leading",)})
    pipeline = TextToVideo(replace(tiny_model, info=info), "cpu", dtype=torch.float32)
    results = score_physics(pipeline, WorldSettings(num=2, steps=1, guidance=1))
    assert results["sampling"]["steps"] == 1
    for name, figure in results["scores"]["generated"].items():
        if name.endswith(": found"):
            assert figure["value"] < results["scores"]["real"][name]["value"] == 1


def test_models_that_do_not_suit_are_one_line(tiny_model, predictor):
    with pytest.raises(ValueError, match="predicting a clip from its first frames needs a model"):
        score_physics(TextToVideo(tiny_model, "cpu"), WorldSettings(num=1))
    info = predictor.info.model_copy(update={"num_frames": 5})
    with pytest.raises(ValueError, match="clips of 5 frames, of which 5 would be given"):
        score_physics(TextToVideo(replace(predictor, info=info), "cpu"), WorldSettings(num=1))
