from dataclasses import replace

import numpy as np
import pytest

from data.world import BACKGROUNDS, COLOURS, Scene, make_scene
from data.world_render import render
from eval.world_scores import chance, says_size, score_clip, summarise

RIGHT = ("colour", "shape", "motion", "background", "size", "permanence", "joint")


def with_object(scene, **changes):
    return replace(scene, objects=(replace(scene.objects[0], **changes),))


@pytest.fixture
def scene(scenes_with):
    return scenes_with(1, colour="red", shape="square", motion="left", size="small")[0]


def test_the_true_clip_is_right_in_everything(scene):
    score = score_clip(render(scene), scene, exact=True)
    assert all(getattr(score, name) for name in RIGHT)
    assert score.joint_permanence
    assert score.verdict == "all right"
    assert score.velocity_error < 0.02
    assert score.gravity_error is None


@pytest.mark.parametrize(
    ("wrong", "value"), [("colour", "yellow"), ("shape", "circle"), ("size", "large")]
)
def test_a_wrong_object_is_wrong_in_that_alone(scene, wrong, value):
    scale = {"radius": scene.objects[0].radius * 0.165 / 0.13} if wrong == "size" else {}
    score = score_clip(render(with_object(scene, **{wrong: value}, **scale)), scene)
    for name in RIGHT[:-1]:
        assert getattr(score, name) == (name != wrong), name
    assert score.joint == (wrong == "size")


def test_a_wrong_background_is_wrong_in_that_alone(scene):
    other = next(name for name in BACKGROUNDS if name != scene.background)
    score = score_clip(render(replace(scene, background=other)), scene)
    assert (score.background, score.joint, score.joint_permanence) == (False, False, False)
    assert score.colour
    assert score.shape
    assert score.motion
    assert score.permanence


def test_reversed_motion_is_wrong_and_its_velocity_off_by_twice_the_speed(scene):
    score = score_clip(render(scene)[::-1], scene, exact=True)
    assert not score.motion
    assert score.verdict == "wrong: motion"
    assert not score.joint
    assert score.permanence
    speed = np.hypot(*scene.objects[0].velocity[0])
    assert score.velocity_error == pytest.approx(2 * speed, abs=0.05)


def test_a_prompt_does_not_say_the_speed(scenes_with):
    (slow,) = scenes_with(1, motion="left")
    path = slow.objects[0].position
    start = np.array([23.0, 16.0])

    def error(speed, exact):
        moved = start + np.arange(9)[:, None] * np.array([-speed, 0.0])
        return score_clip(render(with_object(slow, position=moved)), slow, exact=exact)

    # Level 1 moves by 1.1 to 1.9 pixels per frame: in that range nothing is wrong with a clip.
    assert error(1.2, exact=False).velocity_error < 0.05
    assert error(1.7, exact=False).velocity_error < 0.05
    assert error(0.6, exact=False).velocity_error == pytest.approx(0.5, abs=0.05)
    true_speed = abs(path[1, 0] - path[0, 0])
    assert error(0.6, exact=True).velocity_error == pytest.approx(true_speed - 0.6, abs=0.05)


def test_a_teleport_and_a_gap_break_permanence_and_nothing_else(scene):
    clip = render(scene)
    far = scene.objects[0].position.copy()
    far[4, 1] += 8 if far[4, 1] < 16 else -8
    jumped = score_clip(render(with_object(scene, position=far)), scene)
    assert not jumped.permanence
    assert jumped.colour
    assert jumped.shape
    assert jumped.background
    gone = clip.copy()
    gone[5] = BACKGROUNDS[scene.background]
    missing = score_clip(gone, scene)
    assert not missing.permanence
    assert missing.joint
    assert not missing.joint_permanence


def test_an_object_that_disappears_halfway_is_not_there(scene):
    clip = render(scene)
    clip[4:] = BACKGROUNDS[scene.background]
    score = score_clip(clip, scene)
    assert not any(getattr(score, name) for name in ("colour", "shape", "motion", "permanence"))
    assert score.background
    assert score.velocity_error is None


def test_a_second_object_breaks_permanence_and_a_larger_one_is_what_the_clip_shows(scene):
    corner = np.full((9, 2), [25.5, 6.0 if scene.objects[0].position[0, 1] > 16 else 25.5])
    extra = with_object(scene, colour="white", radius=0.165 * 32, position=corner)
    background = np.array(BACKGROUNDS[scene.background])
    second = render(extra)
    clip = np.where((second != background).any(-1, keepdims=True), second, render(scene))
    score = score_clip(clip, scene)
    assert not score.permanence
    # A right answer beside it is not picked out.
    assert not score.colour


def test_with_two_objects_both_have_to_be_right():
    index = 0
    while len((scene := make_scene(level=4, seed=2, index=index, split="held-out")).objects) < 2:
        index += 1
    a, b = scene.objects
    assert score_clip(render(scene), scene, exact=True).joint
    swapped = replace(scene, objects=(replace(a, colour=b.colour), replace(b, colour=a.colour)))
    score = score_clip(render(swapped), scene)
    # Both colours are there, but on the wrong objects: the pairing cannot have all names right.
    assert not score.joint
    assert score.permanence
    unseen = next(c for c in COLOURS if c not in (a.colour, b.colour))
    assert not score_clip(
        render(replace(scene, objects=(a, replace(b, colour=unseen)))), scene
    ).colour
    assert not score_clip(render(replace(scene, objects=(a,))), scene).shape


@pytest.mark.parametrize("motion", ["falling", "bouncing"])
def test_gravity_is_measured(scenes_with, motion):
    scenes = scenes_with(6, level=3, motion=motion)
    scores = [score_clip(render(s), s, exact=True) for s in scenes]
    assert np.mean([s.gravity_error for s in scores]) < 0.05
    assert all(s.velocity_error is None for s in scores)
    item = scenes[0].objects[0]
    still = np.broadcast_to(item.position[0], item.position.shape)
    floating = score_clip(render(with_object(scenes[0], position=still)), scenes[0])
    assert floating.gravity_error == pytest.approx(0.5, abs=0.05)


def test_the_size_counts_only_where_it_is_said(scene):
    clip = render(scene)
    assert score_clip(clip, scene, caption="a red square moving left").size is None
    assert score_clip(clip, scene, caption="a little red square moving left").size is True
    assert says_size("a small red circle and a big box.", 2)
    assert not says_size("a small red circle and a box", 2)


def test_a_summary_counts_what_applies(scene):
    clip = render(scene)
    scores = [
        score_clip(clip, scene, caption="a red square"),
        score_clip(clip[::-1], scene, caption="a tiny red square"),
    ]
    figures = summarise(scores)
    assert (figures["colour"].value, figures["colour"].num) == (1.0, 2)
    assert (figures["motion"].value, figures["joint"].value) == (0.5, 0.5)
    assert (figures["size"].value, figures["size"].num) == (1.0, 1)
    assert figures["gravity_error"].num == 0
    assert figures["velocity_error"].num == 2
    for figure in figures.values():
        assert figure.num == 0 or figure.low <= figure.value <= figure.high


def test_a_state_from_a_manifest_scores_like_the_scene(scene):
    again = Scene.from_state(scene.to_state())
    assert score_clip(render(scene), again, exact=True).joint


def test_chance_is_one_over_the_words():
    level_1 = chance(1)
    assert level_1["colour"] == pytest.approx(1 / 6)
    assert level_1["joint"] == pytest.approx(1 / (6 * 3 * 4 * 3))
    assert chance(4) == {}
