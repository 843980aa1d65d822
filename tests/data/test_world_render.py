"""Pixels: centroids, areas, symmetry and colours of the rendered shapes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.world import BACKGROUNDS, COLOURS, LEVELS, SHAPES, SIZES, extents, make_scene
from data.world_render import coverage, render

shapes = st.sampled_from(SHAPES)
radii = st.floats(3.0, 9.0)
positions = st.floats(20.0, 30.0)


@given(shape=shapes, radius=radii, x=positions, y=positions)
def test_centroid_and_area_are_right(shape, radius, x, y):
    alpha = coverage(shape, radius, x, y, 50, 52)
    rows, columns = np.mgrid[:50, :52] + 0.5
    # A box filter counts a partly covered pixel at its middle: up to 1/8 px per side length.
    assert alpha.sum() == pytest.approx(np.pi * radius**2, rel=1e-3)
    assert (alpha * columns).sum() / alpha.sum() == pytest.approx(x, abs=0.03)
    assert (alpha * rows).sum() / alpha.sum() == pytest.approx(y, abs=0.03)


@given(shape=shapes, radius=radii, x=positions, y=positions)
def test_coverage_agrees_with_brute_force_supersampling(shape, radius, x, y):
    fine = 16
    samples = (np.arange(50 * fine) + 0.5) / fine
    dx, dy = samples[None, :] - x, samples[:, None] - y
    _, right, top, bottom = extents(shape, radius)
    if shape == "circle":
        inside = dx**2 + dy**2 <= radius**2
    elif shape == "square":
        inside = (np.abs(dx) <= right) & (np.abs(dy) <= bottom)
    else:
        # Below both slanted sides and above the base.
        inside = (np.abs(dx) / right <= (dy + top) / (top + bottom)) & (dy <= bottom)
    expected = inside.reshape(50, fine, 50, fine).mean(axis=(1, 3))
    # Thin overlaps at an edge cost the supersampling up to one of its 16 lines.
    np.testing.assert_allclose(coverage(shape, radius, x, y, 50, 50), expected, atol=1 / 15)


@given(shape=shapes, radius=radii, x=st.floats(10, 20))
def test_shapes_are_mirror_images_of_themselves(shape, radius, x):
    alpha = coverage(shape, radius, x, 20.3, 40, 30)
    np.testing.assert_allclose(
        alpha[:, ::-1], coverage(shape, radius, 30 - x, 20.3, 40, 30), atol=1e-9
    )


def test_a_triangle_points_up():
    alpha = coverage("triangle", 6.0, 20.0, 20.0, 40, 40)
    widths = alpha.sum(axis=1)[alpha.sum(axis=1) > 0]
    assert (np.diff(widths[:-1]) > 0).all()


@given(shape=shapes, x=st.floats(-20, 60), y=st.floats(-20, 60))
def test_shapes_are_clipped_by_the_frame(shape, x, y):
    whole = coverage(shape, 5.0, x + 40, y + 40, 120, 120)
    clipped = coverage(shape, 5.0, x, y, 40, 40)
    np.testing.assert_allclose(clipped, whole[40:80, 40:80], atol=1e-9)


@pytest.mark.parametrize("level", sorted(LEVELS))
def test_rendered_objects_are_where_the_state_says(level):
    for index in range(40):
        scene = make_scene(level=level, seed=5, index=index, split="train")
        if len(scene.objects) > 1:
            continue
        (item,) = scene.objects
        video = render(scene)
        assert video.shape == (9, 32, 32, 3)
        assert video.dtype == np.uint8
        background = np.array(BACKGROUNDS[scene.background], float)
        direction = np.array(COLOURS[item.colour]) - background
        alpha = (video - background) @ direction / (direction @ direction)
        rows, columns = np.mgrid[:32, :32] + 0.5
        for frame, (x, y) in zip(alpha, item.position):
            assert (frame * columns).sum() / frame.sum() == pytest.approx(x, abs=0.05)
            assert (frame * rows).sum() / frame.sum() == pytest.approx(y, abs=0.05)
            assert frame.sum() == pytest.approx(np.pi * item.radius**2, rel=0.02)


def test_rendering_repeats_exactly_and_shows_both_pure_colours():
    for index in range(20):
        scene = make_scene(level=4, seed=6, index=index, split="held-out")
        video = render(scene)
        np.testing.assert_array_equal(video, render(scene))
        colours = {tuple(pixel) for pixel in video.reshape(-1, 3).tolist()}
        assert BACKGROUNDS[scene.background] in colours
        for item in scene.objects:
            assert COLOURS[item.colour] in colours


def test_every_shape_of_a_size_shows_as_much_colour():
    radius = SIZES["small"] * 32
    areas = [coverage(shape, radius, 15.3, 16.8, 32, 32).sum() for shape in SHAPES]
    assert max(areas) / min(areas) == pytest.approx(1.0, abs=1e-3)


def test_colours_stay_apart_after_chroma_subsampling():
    luma = np.array([0.299, 0.587, 0.114])
    foreground = np.array(list(COLOURS.values()), float)
    background = np.array(list(BACKGROUNDS.values()), float)
    assert (foreground @ luma).min() - (background @ luma).max() >= 40
    for palette, least in ((foreground, 80), (background, 45)):
        distances = np.linalg.norm(palette[:, None] - palette[None], axis=-1)
        assert distances[~np.eye(len(palette), dtype=bool)].min() >= least
