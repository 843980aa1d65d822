"""Textured subjects: identities that can be told apart after compression, and their pictures."""

from dataclasses import replace

import av
import numpy as np
import pytest

from data.video_write import write_video
from data.world import SHAPES, extents, make_scene
from data.world_render import render
from data.world_scene import COLOURS
from data.world_subjects import (
    COLOUR_PAIRS,
    HELD_OUT_SUBJECTS,
    NUM_SUBJECTS,
    PATTERNS,
    REFERENCE_RADIUS,
    TRAINING_SUBJECTS,
    reference_scene,
    subject,
)


def scenes(split="train", count=40, **other):
    return [
        make_scene(scenario="subjects", seed=6, index=i, split=split, **other) for i in range(count)
    ]


def still(scene, item, identity, position):
    """One frame that shows `identity` in the place of `item`."""
    look = subject(identity)
    shown = replace(
        item,
        identity=identity,
        shape=look.shape,
        colour=look.colours[0],
        position=np.asarray(position)[None],
    )
    return render(replace(scene, objects=(shown,), num_frames=1))[0]


def test_every_number_is_another_subject_and_a_hundred_are_held_out():
    every = set(range(NUM_SUBJECTS))
    looks = {(s.shape, s.pattern, s.colours) for s in map(subject, range(NUM_SUBJECTS))}
    assert len(looks) == NUM_SUBJECTS >= 400
    assert len(HELD_OUT_SUBJECTS) == 100
    assert every == HELD_OUT_SUBJECTS | TRAINING_SUBJECTS
    assert not HELD_OUT_SUBJECTS & TRAINING_SUBJECTS
    # Fixed: a model trained on one version must not have seen what another holds out.
    assert sorted(HELD_OUT_SUBJECTS)[:6] == [2, 5, 6, 17, 18, 25]
    assert sum(HELD_OUT_SUBJECTS) == 24571


def test_parts_of_held_out_subjects_are_known_from_training():
    known = [subject(number) for number in TRAINING_SUBJECTS]
    assert {look.shape for look in known} == set(SHAPES)
    assert {look.pattern for look in known} == set(PATTERNS)
    assert {look.colours for look in known} == set(COLOUR_PAIRS)
    assert {name for pair in COLOUR_PAIRS for name in pair} == set(COLOURS)


def test_the_two_colours_of_a_subject_differ_in_luma():
    luma = {name: np.dot(rgb, (0.299, 0.587, 0.114)) for name, rgb in COLOURS.items()}
    assert len({frozenset(pair) for pair in COLOUR_PAIRS}) == len(COLOUR_PAIRS)
    assert min(abs(luma[a] - luma[b]) for a, b in COLOUR_PAIRS) > 38


def test_a_subject_shows_both_colours_in_equal_measure_wherever_it_is():
    scene = scenes(count=1, height=64, width=64)[0]
    item = scene.objects[0]
    for number in range(0, NUM_SUBJECTS, 7):
        shares = []
        for position in ((30.0, 31.0), (33.4, 30.7)):
            picture = still(scene, item, number, position).astype(int)
            first, second = (np.array(COLOURS[name]) for name in subject(number).colours)
            shares.append(
                [int((np.abs(picture - c).max(axis=2) <= 2).sum()) for c in (first, second)]
            )
        area = np.pi * item.radius**2
        assert np.min(shares) > 0.12 * area, subject(number)
        # Pixels on an outline count for neither, and which they are depends on the place.
        assert np.abs(np.subtract(*shares)).max() < 0.2 * area


def test_held_out_subjects_are_told_apart_after_compression(tmp_path):
    """The ceiling of a retrieval among a hundred: nearest neighbour in pixels, from a centre that
    is off by up to half a pixel, after H.264 at 32 x 32."""
    rng = np.random.default_rng(0)
    right = []
    for scene in scenes("identities", 18):
        path = tmp_path / "clip.mp4"
        write_video(path, render(scene), scene.fps)
        with av.open(str(path)) as container:
            frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        for item in scene.objects:
            x, y = item.position[4] + rng.uniform(-0.5, 0.5, 2)
            reach = 1.3 * item.radius
            crop = (
                slice(max(0, int(y - reach)), int(y + reach) + 1),
                slice(max(0, int(x - reach)), int(x + reach) + 1),
            )
            errors = {
                number: np.square(
                    still(scene, item, number, (x, y))[crop].astype(float) - frames[4][crop]
                ).mean()
                for number in HELD_OUT_SUBJECTS
            }
            right.append(min(errors, key=errors.__getitem__) == item.identity)
    assert len(right) > 18
    assert np.mean(right) >= 0.95


@pytest.mark.parametrize("size", [(32, 32), (32, 56), (56, 32)])
def test_a_reference_shows_the_subject_larger_elsewhere_and_on_another_background(size):
    for scene in scenes("identities", 25, height=size[0], width=size[1]):
        for number, item in enumerate(scene.objects):
            reference = reference_scene(scene, number)
            (shown,) = reference.objects
            assert shown.identity == item.identity
            assert reference.background != scene.background
            low, high = (share * min(size) for share in REFERENCE_RADIUS)
            assert item.radius < low <= shown.radius <= high
            left, right, top, bottom = extents(shown.shape, shown.radius)
            (x, y) = shown.position[0]
            assert left <= x <= size[1] - right
            assert top <= y <= size[0] - bottom
            assert abs(x - size[1] / 2) < 0.15 * min(size)
            assert abs(y - size[0] / 2) < 0.15 * min(size)
            assert render(reference).shape == (1, *size, 3)
    positions = [tuple(reference_scene(s, 0).objects[0].position[0]) for s in scenes()]
    assert len(set(positions)) == len(positions)


def test_unknown_subjects_are_refused():
    with pytest.raises(ValueError, match=f"identity={NUM_SUBJECTS} is unknown; use 0 to"):
        subject(NUM_SUBJECTS)
