"""Scenarios: what each promises, at any size, split and length that it does not refuse."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import world_protocol as protocol
from data.world import LEVELS, SCENARIOS, UNSEEN_PAIRS, Scene, extents, make_scene
from data.world_captions import captions
from data.world_motion import FAST, SLOW, SPEED
from data.world_render import render
from data.world_scene import BACKGROUNDS, COLOURS, OCCLUDER_COLOUR
from data.world_subjects import HELD_OUT_SUBJECTS

KINDS = [(name, split) for name, kind in SCENARIOS.items() for split in kind.splits]
SIZES = [(32, 32), (36, 64), (56, 32), (16, 16)]


def many(scenario, split="train", count=40, **other):
    return [
        make_scene(scenario=scenario, seed=4, index=i, split=split, **other) for i in range(count)
    ]


def inside(item, scene, slack=1e-6):
    """Whether the object is entirely inside the frame, per frame."""
    left, right, top, bottom = extents(item.shape, item.radius)
    x, y = item.position.T
    return (
        (x >= left - slack)
        & (x <= scene.width - right + slack)
        & (y >= top - slack)
        & (y <= scene.height - bottom + slack)
    )


def energy_and_momentum(scene):
    """Per frame, with areas for masses."""
    masses = [item.radius**2 for item in scene.objects]
    velocities = [item.velocity for item in scene.objects]
    energy = sum(m * (v**2).sum(axis=1) for m, v in zip(masses, velocities))
    return energy, sum(m * v for m, v in zip(masses, velocities))


@pytest.mark.parametrize(("scenario", "split"), KINDS)
def test_every_scenario_and_split_draws_renders_words_and_round_trips(scenario, split):
    for height, width in SIZES:
        for scene in many(scenario, split, 3, height=height, width=width):
            state = json.loads(json.dumps(scene.to_state()))
            assert (state["scenario"], "level" in state) == (scenario, False)
            again = Scene.from_state(state)
            assert again.to_state() == scene.to_state()
            video = render(scene)
            assert (video.shape, video.dtype) == ((9, height, width, 3), np.uint8)
            difference = np.abs(render(again).astype(int) - video)
            assert difference.max() <= 1
            assert (video != video[:1, :1, :1]).any()
            texts = captions(scene, 3, np.random.default_rng(0))
            assert len(set(texts)) == len(texts) == (1 if protocol_like(scenario) else 3)


def protocol_like(scenario):
    return scenario in ("uniform", "collision", "parabola")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_splits_seeds_and_indices_give_other_scenes_and_the_same_arguments_the_same(scenario):
    found = [
        json.dumps(
            make_scene(scenario=scenario, seed=s, index=i, split=split).to_state()["objects"]
        )
        for split, s, i in itertools.product(SCENARIOS[scenario].splits, (0, 1), range(3))
    ]
    assert len(set(found)) == len(found)
    first = make_scene(scenario=scenario, seed=0, index=0, split="train").to_state()["objects"]
    assert json.dumps(first) == found[0]


@pytest.mark.parametrize(("scenario", "split"), KINDS)
def test_the_longest_and_shortest_clips_that_are_not_refused_can_be_made(scenario, split):
    for (height, width), fps in itertools.product([(16, 16), (32, 32), (40, 64)], (8.0, 24.0)):
        size = {"height": height, "width": width, "fps": fps}
        counts = []
        for frames in range(2, 90):
            try:
                SCENARIOS[scenario].check(scenario, split, frames, fps)
                counts.append(frames)
            except ValueError:
                pass
        assert len(counts) >= 2
        for frames in (counts[0], counts[-1]):
            assert len(many(scenario, split, 6, num_frames=frames, **size)) == 6


@pytest.mark.parametrize("scenario", ["subjects", "collisions", "occluders", "bounces"])
@pytest.mark.parametrize("size", SIZES)
def test_what_should_stay_inside_the_frame_does(scenario, size):
    for split in SCENARIOS[scenario].splits:
        for scene in many(scenario, split, 15, height=size[0], width=size[1]):
            assert all(inside(item, scene).all() for item in scene.objects)


@pytest.mark.parametrize("scenario", ["collisions", "occluders", "pan", "bounces"])
def test_unseen_pairs_and_out_of_range_speeds_are_in_their_splits_only(scenario):
    for split in ("train", "held-out", "speeds"):
        looks = {(o.colour, o.shape) for s in many(scenario, split) for o in s.objects}
        assert not looks & set(UNSEEN_PAIRS)
        assert {colour for colour, _ in looks} <= set(LEVELS[1].colours)
    for scene in many(scenario, "combinations"):
        assert sum((o.colour, o.shape) in UNSEEN_PAIRS for o in scene.objects) == 1
    if scenario == "collisions":
        return
    for split, ranges in (("train", [SPEED]), ("speeds", [SLOW, FAST])):
        for scene in many(scenario, split):
            speed = np.hypot(*scene.objects[0].velocity[0]) * scene.fps / 32
            assert any(low - 1e-9 <= speed <= high + 1e-9 for low, high in ranges)


def test_every_shape_passes_behind_bars_and_every_shape_is_panned_over():
    for scenario in ("occluders", "pan", "bounces"):
        shapes = [item.shape for scene in many(scenario, count=70) for item in scene.objects]
        for shape in ("circle", "square", "triangle"):
            assert shapes.count(shape) / len(shapes) > 0.1, (scenario, shape)


@pytest.mark.parametrize("frames", [9, 17])
@pytest.mark.parametrize("size", [(32, 32), (64, 36), (64, 112)])
def test_collisions_keep_momentum_and_energy_and_nothing_overlaps(size, frames):
    for split in SCENARIOS["collisions"].splits:
        for scene in many(
            "collisions", split, 12, height=size[0], width=size[1], num_frames=frames
        ):
            one, other = scene.objects
            assert one.colour != other.colour
            assert one.bounce_times == other.bounce_times
            (contact,) = one.bounce_times
            assert 0.29 <= contact / ((frames - 1) / scene.fps) <= 0.71
            energy, momentum = energy_and_momentum(scene)
            np.testing.assert_allclose(energy, energy[0])
            np.testing.assert_allclose(momentum, np.broadcast_to(momentum[0], momentum.shape))
            assert (one.velocity[0] != one.velocity[-1]).any()
            assert overlap(one, other).max() <= 1e-6
            # At the contact, by the velocity before it, they touch.
            gone = contact * scene.fps
            moved = [
                np.append(
                    item.position,
                    item.position[:1] + item.velocity[:1] * gone,
                    axis=0,
                )
                for item in (one, other)
            ]
            assert abs(overlap(one, other, *moved)[-1]) < 1e-6


def overlap(one, other, first=None, second=None):
    """By how much two circles or squares overlap, per frame; negative where they are apart."""
    first = one.position if first is None else first
    second = other.position if second is None else second
    away = np.abs(first - second)
    if one.shape == other.shape == "circle":
        return one.radius + other.radius - np.hypot(*away.T)
    if one.shape == other.shape == "square":
        reach = extents("square", one.radius)[0] + extents("square", other.radius)[0]
        return (reach - away).min(axis=1)
    circle, square = (one, other) if one.shape == "circle" else (other, one)
    outside = np.maximum(away - extents("square", square.radius)[0], 0.0)
    return circle.radius - np.hypot(*outside.T)


@pytest.mark.parametrize("split", SCENARIOS["occluders"].splits)
@pytest.mark.parametrize("size", SIZES)
def test_what_passes_behind_a_bar_is_seen_before_and_after_and_hidden_between(split, size):
    for scene in many("occluders", split, 25, height=size[0], width=size[1], num_frames=10):
        (item,) = scene.objects
        assert item.visible.min() == 0.0
        hidden = np.flatnonzero(item.visible == 0.0)
        assert (np.diff(hidden) == 1).all()
        assert item.visible[0] > 0.4
        assert item.visible[-1] > 0.4
        video = render(scene)
        left, top, right, bottom = scene.occluder
        assert (video[:, top:bottom, left:right] == OCCLUDER_COLOUR).all()
        background = np.array(BACKGROUNDS[scene.background])
        frame = video[hidden[0]].astype(int)
        frame[top:bottom, left:right] = background
        assert (frame == background).all()


def test_the_visible_share_is_the_area_that_is_drawn():
    scenes = [*many("occluders"), *many("pan"), *many("collision"), *many("parabola", "speeds")]
    for scene in scenes:
        assert (scene.objects[0].visible <= 1).all()
        video = render(scene).astype(float)
        if scene.occluder:
            left, top, right, bottom = scene.occluder
            video[:, top:bottom, left:right] = BACKGROUNDS[scene.background]
        for item in scene.objects:
            expected = item.visible * np.pi * item.radius**2
            alone = Scene.from_state({**scene.to_state(), "objects": [item_state(scene, item)]})
            video = render(alone).astype(float)
            if scene.occluder:
                video[:, top:bottom, left:right] = BACKGROUNDS[scene.background]
            colour, ground = np.array(COLOURS[item.colour]), np.array(BACKGROUNDS[scene.background])
            far = colour.astype(float) - ground
            alpha = ((video - ground) @ far) / (far @ far)
            np.testing.assert_allclose(alpha.sum(axis=(1, 2)), expected, atol=0.25)


def item_state(scene, item):
    return scene.to_state()["objects"][scene.objects.index(item)]


def test_the_bar_has_a_colour_of_its_own_between_backgrounds_and_objects():
    luma = np.array([0.299, 0.587, 0.114])
    bar = luma @ OCCLUDER_COLOUR
    assert max(luma @ c for c in BACKGROUNDS.values()) + 15 < bar
    assert bar + 15 < min(luma @ c for c in COLOURS.values())


@pytest.mark.parametrize("split", SCENARIOS["pan"].splits)
@pytest.mark.parametrize("frames", [9, 17])
def test_the_camera_moves_over_still_objects_of_which_one_is_always_seen(split, frames):
    for scene in many("pan", split, num_frames=frames):
        assert len(scene.objects) in (2, 3)
        camera = np.array(scene.camera)
        assert (camera == 0).sum() == 1
        for item in scene.objects:
            assert item.motion == "still"
            np.testing.assert_allclose(
                np.diff(item.position, axis=0), -camera[None] + 0 * item.position[1:], atol=1e-9
            )
            assert item.visible.max() > 0.4
        assert np.max([item.visible for item in scene.objects], axis=0).min() > 0.4
        way = (
            ("right" if camera[0] > 0 else "left")
            if camera[0]
            else ("down" if camera[1] > 0 else "up")
        )
        assert all(way in text for text in captions(scene, 3, np.random.default_rng(1)))


def test_objects_enter_and_leave_a_panned_frame():
    items = [item for scene in many("pan", count=80) for item in scene.objects]
    entered = sum(item.visible[0] < 0.01 for item in items)
    left = sum(item.visible[-1] < 0.01 for item in items)
    assert min(entered, left) > 0.1 * len(items)


@settings(max_examples=20)
@given(index=st.integers(0, 10**6), split=st.sampled_from(SCENARIOS["bounces"].splits))
def test_bounces_go_on_for_a_minute_inside_the_frame(index, split):
    scene = make_scene(scenario="bounces", seed=1, index=index, split=split, num_frames=481)
    (item,) = scene.objects
    assert inside(item, scene).all()
    speed = np.hypot(*item.velocity.T)
    np.testing.assert_allclose(speed, speed[0])
    steps = np.hypot(*np.diff(item.position, axis=0).T)
    assert steps.max() <= speed[0] + 1e-9
    # Whatever the direction, the room is crossed in 0.9 frame heights at most.
    assert len(item.bounce_times) >= 60 * speed[0] * scene.fps / 32 / 1.3 - 1


@pytest.mark.parametrize("frames", [2, 5, 9])
def test_something_bounces_in_every_short_clip(frames):
    for scene in many("bounces", num_frames=frames):
        assert scene.objects[0].bounce_times


def units(scene, values):
    return np.asarray(values) * protocol.UNITS / min(scene.height, scene.width)


@pytest.mark.parametrize("scenario", ["uniform", "parabola", "collision"])
@pytest.mark.parametrize("size", [(32, 32), (64, 48), (32, 64)])
def test_the_protocol_is_in_range_in_distribution_and_out_of_it_elsewhere(scenario, size):
    ranges = {
        "uniform": ((0.7, 1.4), (0.3, 2.0)),
        "parabola": ((0.7, 1.4), (0.3, 2.0)),
        "collision": ((0.5, 1.5), (0.3, 2.0)),
    }[scenario]
    for split, radius_range in zip(("train", "speeds"), ranges):
        for scene in many(scenario, split, 60, height=size[0], width=size[1]):
            radii = [float(units(scene, item.radius)) for item in scene.objects]
            speeds = [abs(float(units(scene, o.velocity[0, 0]))) * scene.fps for o in scene.objects]
            assert all(radius_range[0] <= radius <= radius_range[1] for radius in radii)
            ordinary = [ranges[0][0] - 1e-9 <= radius <= ranges[0][1] + 1e-9 for radius in radii]
            ordinary += [1.0 - 1e-9 <= speed <= 4.0 + 1e-9 for speed in speeds]
            assert all(ordinary) == (split == "train")
            assert max(speeds) <= 6.0 + 1e-9


def test_balls_of_the_protocol_move_as_the_law_says():
    for scene in many("uniform", "held-out"):
        (ball,) = scene.objects
        assert (ball.velocity == ball.velocity[0]).all()
        assert ball.velocity[0, 1] == 0
        assert inside(ball, scene).all()
        assert (ball.visible == 1).all()
    for scene in many("parabola", "held-out"):
        (ball,) = scene.objects
        fallen = units(scene, ball.position[-1, 1] - ball.position[0, 1])
        assert fallen == pytest.approx(0.5 * protocol.GRAVITY * 1.0**2)
        assert ball.velocity[0, 1] == 0
    for scene in many("collision", "held-out"):
        energy, momentum = energy_and_momentum(scene)
        np.testing.assert_allclose(energy, energy[0])
        np.testing.assert_allclose(momentum[:, 0], momentum[0, 0])
        assert overlap(*scene.objects).max() < 1e-6
        # The frames that a model is given come before the contact, and show both balls.
        assert scene.objects[0].bounce_times[0] * scene.fps > 2
        assert all((item.visible[:3] == 1).all() for item in scene.objects)


def test_clips_of_the_length_of_the_paper_leave_the_frame_where_they_must():
    scenes = many("uniform", num_frames=32, fps=10.0)
    stays = [inside(scene.objects[0], scene).all() for scene in scenes]
    assert 0.2 < np.mean(stays) < 0.8
    for scene in scenes:
        assert inside(scene.objects[0], scene)[:3].all()
        assert scene.objects[0].visible[-1] < 1 or inside(scene.objects[0], scene).all()


def test_held_out_subjects_are_seen_in_their_split_only():
    for split in SCENARIOS["subjects"].splits:
        known = [
            item.identity in HELD_OUT_SUBJECTS
            for s in many("subjects", split)
            for item in s.objects
        ]
        assert all(known) if split == "identities" else not any(known)
    twos = sum(len(scene.objects) == 2 for scene in many("subjects", count=300))
    assert 60 < twos < 140


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scenario": "weather"}, "scenario=weather is unknown; use one of shapes, subjects, coll"),
        ({"level": 1}, "level=1 says nothing about scenario=pan, which has none; leave the level"),
        ({"split": "identities"}, "split=identities is unknown in scenario=pan; use one of train"),
        ({"scenario": "shapes"}, "level=None is unknown; use one of 1, 2, 3, 4"),
        ({"height": 8}, "size=8x32 is too small"),
        ({"num_frames": 40}, "scenario=pan .train. lasts 2.40 s at most; use at most 20 frames"),
        ({"num_frames": 1}, "frames=1 show no motion"),
        ({"fps": float("nan")}, "fps=nan is not a frame rate"),
        ({"index": -1}, "index=-1 is negative"),
        ({"scenario": "occluders", "num_frames": 5}, "too short for scenario=occluders; use at"),
        ({"scenario": "uniform", "fps": 2.0, "num_frames": 5}, "fps=2 is too few for"),
        (
            {"scenario": "uniform", "num_frames": 4},
            "too short for scenario=uniform; use at least 5",
        ),
        ({"scenario": "uniform", "split": "combinations"}, "use one of train, held-out, speeds"),
    ],
)
def test_what_cannot_be_shown_is_refused(change, message):
    arguments = {"scenario": "pan", "seed": 0, "index": 0, "split": "train", **change}
    with pytest.raises(ValueError, match=message) as refusal:
        make_scene(**arguments)
    assert "\n" not in str(refusal.value)


def test_the_words_of_a_scenario_name_what_is_in_it():
    rng = np.random.default_rng(2)
    for scene in many("collisions"):
        text = captions(scene, 1, rng)[0]
        assert "collid" in text
        assert all(f"{item.colour} {item.shape}" in text for item in scene.objects)
    for scene in many("occluders"):
        text = captions(scene, 1, rng)[0]
        assert f"{scene.objects[0].colour} {scene.objects[0].shape}" in text
        assert scene.objects[0].motion in text
        assert "behind a bar" in text
    assert all("off the walls" in captions(s, 1, rng)[0] for s in many("bounces"))
    orders = set()
    for scene in many("subjects"):
        text = captions(scene, 1, rng)[0]
        assert not any(colour in text.split(" background")[0].split() for colour in ("red", "cyan"))
        if len(scene.objects) == 1:
            assert "the subject " in text
        else:
            orders.add(text.index("subject one") < text.index("subject two"))
            for name, item in zip(("subject one", "subject two"), scene.objects, strict=True):
                its = text.split(name)[1].split("subject")[0]
                assert item.motion in its
    assert orders == {True, False}  # a name is no place in the text
