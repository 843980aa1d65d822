"""Scenes: determinism, levels, splits, staying in the frame, and agreement with their physics."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import world
from data.world import LEVELS, SPLITS, UNSEEN_PAIRS, Scene, extents, make_scene
from data.world_motion import FAST, GRAVITY, RESTITUTION, SLOW, SPEED

levels = st.sampled_from(sorted(LEVELS))
splits = st.sampled_from(SPLITS)
scenes = st.builds(
    make_scene,
    level=levels,
    seed=st.integers(0, 2**40),
    index=st.integers(0, 10**6),
    split=splits,
    height=st.sampled_from([32, 64, 50]),
    width=st.sampled_from([64, 80]),
    num_frames=st.sampled_from([5, 9]),
    fps=st.sampled_from([8.0, 12.0]),
)


def many(level, split, count=300, **other):
    return [make_scene(level=level, seed=3, index=i, split=split, **other) for i in range(count)]


@given(level=levels, split=splits, seed=st.integers(0, 99), index=st.integers(0, 99))
def test_the_same_arguments_give_the_same_scene(level, split, seed, index):
    one = make_scene(level=level, seed=seed, index=index, split=split)
    two = make_scene(level=level, seed=seed, index=index, split=split)
    assert one.to_state() == two.to_state()


def test_seed_split_level_and_index_all_matter():
    found = {
        json.dumps(
            make_scene(level=level, seed=seed, index=index, split=split).to_state()["objects"]
        )
        for level, seed, index, split in itertools.product((1, 2), (0, 1), range(20), SPLITS)
    }
    assert len(found) == 2 * 2 * 20 * len(SPLITS)


def test_each_level_is_a_superset_of_the_one_below():
    for low, high in itertools.pairwise(sorted(LEVELS)):
        for name, choices in vars(LEVELS[low]).items():
            more = getattr(LEVELS[high], name)
            if isinstance(choices, bool):
                assert more >= choices
            else:
                assert set(choices) <= set(more), name


def test_level_one_is_the_promised_one_and_the_top_has_everything():
    one, top = LEVELS[1], LEVELS[max(LEVELS)]
    assert len(one.colours) == 6
    assert len(one.backgrounds) == 3
    assert one.motions == ("left", "right", "up", "down")
    assert one.num_objects == (1,)
    assert set(top.colours) == set(world.COLOURS)
    assert set(top.backgrounds) == set(world.BACKGROUNDS)
    assert {"falling", "bouncing", "ricocheting", "up-left"} < set(top.motions)
    assert top.num_objects == (1, 2)


@pytest.mark.parametrize("level", sorted(LEVELS))
def test_unseen_pairs_are_seen_only_in_their_split(level):
    def pairs(scene):
        return [(item.colour, item.shape) for item in scene.objects]

    for split in ("train", "held-out", "speeds"):
        assert not any(
            pair in UNSEEN_PAIRS for scene in many(level, split) for pair in pairs(scene)
        )
    for scene in many(level, "combinations"):
        assert sum(pair in UNSEEN_PAIRS for pair in pairs(scene)) == 1


def test_words_of_unseen_pairs_are_known_from_training():
    seen = world.colour_shape_pairs(1, "train")
    for colour, shape in UNSEEN_PAIRS:
        assert sum(pair[0] == colour for pair in seen) >= 2
        assert sum(pair[1] == shape for pair in seen) >= 2


def test_training_scenes_cover_the_level_evenly():
    items = [scene.objects[0] for scene in many(1, "train", 1200)]
    for name, count in (("motion", 4), ("size", 2)):
        values, counts = np.unique([getattr(item, name) for item in items], return_counts=True)
        assert len(values) == count
        # Five standard deviations of a binomial draw.
        assert np.abs(counts - 1200 / count).max() < 5 * np.sqrt(1200 / count)
    pairs = {(item.colour, item.shape) for item in items}
    assert pairs == set(world.colour_shape_pairs(1, "train"))


@settings(max_examples=200)
@given(scene=scenes)
def test_objects_stay_inside_the_frame(scene):
    for item in scene.objects:
        left, right, top, bottom = extents(item.shape, item.radius)
        x, y = item.position.T
        assert (x - left).min() >= -1e-6
        assert (x + right).max() <= scene.width + 1e-6
        assert (y - top).min() >= -1e-6
        assert (y + bottom).max() <= scene.height + 1e-6


@settings(max_examples=200)
@given(scene=scenes)
def test_velocity_and_acceleration_account_for_every_step(scene):
    """Between frames without a contact the path is the parabola of its own state."""
    for item in scene.objects:
        acceleration = np.array(item.acceleration)
        bounces = np.array(item.bounce_times) * scene.fps
        assert (bounces <= scene.num_frames - 1).all()
        for k in range(scene.num_frames - 1):
            if ((bounces > k - 1e-9) & (bounces < k + 1 + 1e-9)).any():
                continue
            step = item.velocity[k] + acceleration / 2
            np.testing.assert_allclose(item.position[k + 1] - item.position[k], step, atol=1e-7)
            np.testing.assert_allclose(
                item.velocity[k + 1] - item.velocity[k], acceleration, atol=1e-7
            )


@pytest.mark.parametrize("split", SPLITS)
def test_speeds_are_in_the_range_of_the_split(split):
    allowed = (SLOW, FAST) if split == "speeds" else (SPEED,)
    speeds = []
    for scene in many(3, split):
        (item,) = scene.objects
        if item.motion in ("falling", "bouncing"):
            assert split != "speeds"
            continue
        drawn = np.linalg.norm(item.velocity, axis=1) * scene.fps / scene.height
        np.testing.assert_allclose(drawn, drawn[0])
        speeds.append(drawn[0])
        assert any(low - 1e-9 <= drawn[0] <= high + 1e-9 for low, high in allowed)
    for low, high in allowed:
        assert any(low <= speed <= high for speed in speeds)


def test_ranges_of_speed_do_not_overlap():
    assert SLOW[1] < SPEED[0] < SPEED[1] < FAST[0]


@pytest.mark.parametrize("motion", sorted(world.DIRECTIONS))
def test_straight_motions_go_where_their_name_says(motion):
    items = [s.objects[0] for s in many(2, "train", 200) if s.objects[0].motion == motion]
    assert items
    for item in items:
        dx, dy = item.position[-1] - item.position[0]
        assert np.sign(round(dx, 6)) == ("right" in motion) - ("left" in motion)
        assert np.sign(round(dy, 6)) == ("down" in motion) - ("up" in motion)
        assert item.bounce_times == []


def test_motions_of_level_three_do_what_their_name_says():
    items = [scene.objects[0] for scene in many(3, "train", 400)]
    per_frame = GRAVITY * 32 / 8.0**2
    for motion in ("falling", "bouncing", "ricocheting"):
        assert any(item.motion == motion for item in items)
    for item in items:
        if item.motion == "falling":
            assert item.bounce_times == []
            assert item.acceleration == (0.0, per_frame)
            np.testing.assert_array_equal(item.velocity[0], 0.0)
        elif item.motion == "bouncing":
            assert item.bounce_times
            assert item.acceleration == (0.0, per_frame)
            assert RESTITUTION[0] <= item.restitution <= RESTITUTION[1]
            assert item.velocity[0, 1] > 0 > item.velocity[:, 1].min()
        elif item.motion == "ricocheting":
            assert item.bounce_times
            assert item.restitution == 1.0
            assert item.acceleration == (0.0, 0.0)


def test_two_objects_never_touch_and_differ_in_colour():
    pairs = [scene for scene in many(4, "train") if len(scene.objects) == 2]
    assert len(pairs) > 100
    for scene in pairs:
        one, other = scene.objects
        assert one.colour != other.colour
        # Also between the frames, along straight lines.
        fine = np.linspace(0, scene.num_frames - 1, 65)
        gaps = []
        for axis, (low, high) in enumerate(((0, 1), (2, 3))):
            a, b = (
                np.interp(fine, range(scene.num_frames), item.position[:, axis])
                for item in (one, other)
            )
            a_box, b_box = extents(one.shape, one.radius), extents(other.shape, other.radius)
            gaps.append(
                np.maximum(a - b - a_box[low] - b_box[high], b - a - b_box[low] - a_box[high])
            )
        assert np.maximum(*gaps).min() >= 1.0 - 1e-6


def test_the_same_physics_at_every_resolution_and_frame_rate():
    """A gravity of 1 frame height per second squared, whatever the pixels and the frame rate."""
    for height, fps, frames in ((32, 8.0, 9), (128, 16.0, 17)):
        found = [
            item
            for scene in many(
                3, "train", 100, height=height, width=height, num_frames=frames, fps=fps
            )
            for item in scene.objects
            if item.motion == "falling"
        ]
        for item in found:
            seconds = (frames - 1) / fps
            fallen = item.position[-1, 1] - item.position[0, 1]
            assert fallen == pytest.approx(0.5 * GRAVITY * height * seconds**2)


@given(scene=scenes)
def test_state_survives_json(scene):
    again = Scene.from_state(json.loads(json.dumps(scene.to_state())))
    assert again.to_state() == scene.to_state()
    for a, b in zip(again.objects, scene.objects):
        np.testing.assert_allclose(a.position, b.position, atol=1e-6)
        np.testing.assert_allclose(a.velocity, b.velocity, atol=1e-6)
        assert (a.colour, a.shape, a.motion) == (b.colour, b.shape, b.motion)


@pytest.mark.parametrize("damage", ["missing", "unknown", "object"])
def test_a_damaged_state_is_one_clear_error(damage):
    state = make_scene(level=1, seed=0, index=0, split="train").to_state()
    if damage == "missing":
        del state["background"]
    elif damage == "unknown":
        state["weather"] = "rain"
    else:
        del state["objects"][0]["position"]
    with pytest.raises(ValueError, match="not a state of the procedural world"):
        Scene.from_state(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"level": 9}, "level=9 is unknown; use one of 1, 2, 3, 4"),
        ({"split": "test"}, "use one of train, held-out, combinations, speeds"),
        ({"index": -1}, "index=-1 is negative"),
        ({"height": 8}, "size=8x32 is too small; use at least 16"),
        ({"height": 64}, "size=64x32 is too narrow; use a width of at least 48"),
        ({"num_frames": 1}, "frames=1 show no motion; use at least 2"),
        ({"fps": 0.0}, "fps=0 is not a frame rate"),
        ({"fps": float("nan")}, "fps=nan is not a frame rate"),
        ({"num_frames": 65}, "use at most 17 frames or a higher fps"),
        ({"num_frames": 17, "level": 3}, "use at most 9 frames or a higher fps"),
    ],
)
def test_what_cannot_be_shown_is_refused(change, message):
    arguments = {"level": 1, "seed": 0, "index": 0, "split": "train", **change}
    with pytest.raises(ValueError, match=message):
        make_scene(**arguments)


@pytest.mark.parametrize("level", sorted(LEVELS))
@pytest.mark.parametrize("split", SPLITS)
def test_the_longest_clips_that_are_not_refused_can_be_made(level, split):
    with pytest.raises(ValueError, match="use at most") as refusal:
        make_scene(level=level, seed=0, index=0, split=split, num_frames=1001, fps=64.0)
    frames = int(str(refusal.value).split("use at most ")[1].split()[0])
    for scene in many(level, split, 60, num_frames=frames, fps=64.0):
        for item in scene.objects:
            assert item.position.min() > 0
            assert item.position.max() < 32
