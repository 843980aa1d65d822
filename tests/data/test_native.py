"""Sizes after the clips' own: which there are, which row has which, and that framing is kept."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.buckets import assign_rows, row_sizes
from data.dataset import ClipDataset
from data.manifest import Manifest, Row, Rows, read_manifest, write_manifest
from data.native import native_sizes, usual_lengths, waste_of
from data.order import BucketOrder
from data.video import write_video

ASPECTS = [Fraction(a) for a in ("9/16", "3/4", "1/1", "4/3", "16/9")]


@given(
    st.integers(64, 1024),
    st.integers(64, 1024),
    st.sampled_from([2, 8, 16, 32]),
    st.lists(st.fractions(Fraction(1, 4), 4), min_size=1, max_size=5),
)
def test_sizes_have_about_the_area_and_the_aspects(height, width, multiple, aspects):
    sizes = native_sizes([1, 9], height, width, aspects, multiple)
    assert len(set(sizes)) == len(sizes)
    assert {size[0] for size in sizes} == {1, 9}
    assert all(h % multiple == w % multiple == 0 for _, h, w in sizes)
    aspects = [*aspects, Fraction(width, height)]
    smallest = min(math.sqrt(height * width * min(a, 1 / a)) for a in aspects)
    slack = (1 + multiple / smallest) ** 2  # both sides rounded by a multiple at most
    assert all(
        1 / slack <= h * w / (height * width) <= slack for _, h, w in sizes if multiple < smallest
    )
    for aspect in aspects:
        nearest = min(abs(math.log(w / h / aspect)) for _, h, w in sizes)
        assert multiple >= smallest or nearest <= math.log(slack) + 0.05


def test_usual_sizes():
    sizes = native_sizes([17], 480, 832, ASPECTS, 16)
    assert sizes[0] == (17, 480, 832), "in place of 16:9, which is nearly the same"
    assert sizes == [
        *((17, 480, 832), (17, 544, 720), (17, 640, 640)),
        *((17, 720, 544), (17, 848, 480)),
    ]


@pytest.mark.parametrize(
    ("num_frames", "expected"),
    [
        (1, [1]),
        (5, [1, 5]),
        (17, [1, 9, 17]),
        (33, [1, 9, 17, 33]),
        (81, [1, 41, 81]),
        (16, [1, 16]),
    ],
)
def test_usual_lengths(num_frames, expected):
    assert usual_lengths(num_frames) == expected


# Rows

SIZES = native_sizes([1, 5, 17], 64, 64, ASPECTS, 8)


def manifest_of(*rows):
    checked = [Row.model_validate({"caption": "x", "path": "a.mp4"} | row) for row in rows]
    return Manifest(Path("m.jsonl"), Rows(checked), list(range(1, len(rows) + 1)))


HD = {"width": 1920, "height": 1080, "duration": 9.0}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (HD, (17, 48, 88)),
        (HD | {"width": 1080, "height": 1920}, (17, 88, 48)),
        (HD | {"duration": 2.0}, (5, 48, 88)),  # 17 frames at 8 fps need more than 2 s
        (HD | {"duration": 2.01}, (17, 48, 88)),
        (HD | {"duration": 0.5}, (1, 48, 88)),
        (HD | {"start": 1.0, "end": 1.6}, (5, 48, 88)),
        (HD | {"crop": [420, 0, 1080, 1080]}, (17, 64, 64)),
        (HD | {"width": 1440, "pixel_aspect": 4 / 3}, (17, 48, 88)),  # HDV
        (HD | {"path": "a.png", "duration": 0.04}, (1, 48, 88)),
        ({"path": "a.png", "width": 100, "height": 90}, (1, 64, 64)),
        (HD | {"width": 4000}, (17, 48, 88)),  # wider than all: the widest
        ({"width": 1920, "height": 1080}, None),
        ({"duration": 9.0}, None),
    ],
)
def test_a_row_has_the_longest_size_and_the_nearest_aspect(row, expected):
    found = assign_rows(manifest_of(row, HD), SIZES, fps=8)
    assert (SIZES[found.of_row[0]] if found.of_row[0] >= 0 else None) == expected


def test_a_row_in_no_bucket_is_counted_with_its_reason():
    manifest = manifest_of(HD, {"duration": 9.0}, {"width": 8, "height": 8}, HD | {"duration": 0.1})
    moving = [size for size in SIZES if size[0] > 1]
    image = manifest_of(HD, HD | {"path": "b.jpg"})
    assert assign_rows(manifest, moving, 8).left_out == {
        "have no width and height in the manifest": 1,
        "have no duration in the manifest": 1,
        "are too short for 5 frames at 8 fps": 1,
    }
    assert assign_rows(image, moving, 8).left_out == {
        "are images, for which num_frames needs a 1": 1
    }
    assert assign_rows(image, SIZES, 8).left_out == {}


def test_a_manifest_without_measurements_is_refused():
    expected = r"^m\.jsonl: none of its 2 rows has a bucket: 2 have no width and height .*measure"
    with pytest.raises(ValueError, match=expected) as caught:
        assign_rows(manifest_of({}, {}), SIZES, fps=8)
    assert "\n" not in str(caught.value)


class Data:
    def __init__(self, native, buckets, *sizes):
        self.native, self.buckets, self.sizes, self.fps = native, buckets, list(sizes), 8


def test_the_size_of_each_row():
    manifest = manifest_of(HD, {"path": "a.png"}, HD | {"duration": 0.1})
    one = (5, 64, 64)
    assert row_sizes(manifest, Data(None, (), one)).tolist() == [0, -1, -1]
    assert row_sizes(manifest, Data(None, (one,), one)).tolist() == [0, -1, -1]
    found = row_sizes(manifest, Data(True, (), *SIZES)).tolist()
    assert [SIZES[k] if k >= 0 else None for k in found] == [(17, 48, 88), None, (1, 48, 88)]
    with pytest.raises(ValueError, match=r"data\.buckets may draw a row in several sizes"):
        row_sizes(manifest, Data(None, (1, 2), (5, 64, 64), (1, 64, 64)))


def test_waste():
    square, wide = (1, 64, 64), (5, 32, 128)
    manifest = manifest_of(
        HD | {"width": 200, "height": 100, "duration": 1.25},
        HD | {"width": 100, "height": 100, "duration": 1.0},
        {"path": "a.png", "width": 100, "height": 50},
        {"path": "b.png"},
    )
    rows = {square: np.array([2, 3]), wide: np.array([0, 1])}
    waste = waste_of(manifest, rows, {square: 2.0, wide: 2.0}, fps=8)
    # Of the images only one is measured, 1/2 is cut off; of the videos 1/2 (2:1 in 4:1) and 3/4.
    assert waste.pixels == pytest.approx((0.5 * 1 + 0.625 * 2) / 3)
    assert waste.seconds == pytest.approx((0.5 + 0.375) / 2)
    unknown = waste_of(manifest_of({}), {square: np.array([0])}, {square: 1.0}, fps=8)
    assert math.isnan(unknown.pixels)


# Framing

MARKS = {"16:9": (72, 128), "9:16": (128, 72), "1:1": (96, 96)}
CORNERS = {"top": (200, 0, 0), "bottom": (0, 200, 0), "left": (0, 0, 200), "right": (200, 200, 0)}


def marked(height, width):
    """Grey, with a block of a colour of its own in the middle of each edge."""
    frames = np.full((6, height, width, 3), 128, np.uint8)
    m = 10
    for name, colour in CORNERS.items():
        y = {"top": 0, "bottom": height - m}.get(name, (height - m) // 2)
        x = {"left": 0, "right": width - m}.get(name, (width - m) // 2)
        frames[:, y : y + m, x : x + m] = colour
    return frames


def edges_seen(video):
    """Whose mark is in the middle of its edge, in a clip (3 f h w)."""
    _, _, h, w = video.shape
    picture = video[:, 0].numpy().astype(int)
    at = {
        "top": (2, w // 2),
        "bottom": (h - 3, w // 2),
        "left": (h // 2, 2),
        "right": (h // 2, w - 3),
    }
    return {name for name, (y, x) in at.items() if abs(picture[:, y, x] - CORNERS[name]).max() < 60}


def test_framing_is_kept(tmp_path):
    rows = []
    for name, (height, width) in MARKS.items():
        file = f"{name.replace(':', 'x')}.mp4"
        write_video(tmp_path / file, marked(height, width), fps=8)
        rows.append(
            {"path": file, "caption": name, "width": width, "height": height, "duration": 0.75}
        )
    write_manifest(tmp_path / "m.jsonl", rows)
    manifest = read_manifest(tmp_path / "m.jsonl")
    base = {"num_frames": 5, "height": 64, "width": 64, "fps": 8, "seed": 0}
    sizes = native_sizes([5], 64, 64, ASPECTS, 8)
    order = BucketOrder(assign_rows(manifest, sizes, 8).rows(), dict.fromkeys(sizes, 1), seed=0)
    native = ClipDataset(manifest, **base, order=order)
    found = {native[g]["caption"]: native[g]["video"] for g in range(9)}
    assert found.keys() == MARKS.keys()
    shapes = {name: tuple(video.shape[2:]) for name, video in found.items()}
    assert shapes == {"16:9": (48, 88), "9:16": (88, 48), "1:1": (64, 64)}
    for name, video in found.items():
        assert edges_seen(video) == set(CORNERS), name
    # One square size loses the sides, so that the marks are a test.
    square = ClipDataset(manifest, **base)
    seen = {square[g]["caption"]: edges_seen(square[g]["video"]) for g in range(3)}
    assert seen == {"16:9": {"top", "bottom"}, "9:16": {"left", "right"}, "1:1": set(CORNERS)}
