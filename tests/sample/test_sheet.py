import numpy as np
import pytest
from PIL import Image

from sample.sheet import contact_sheet


def test_the_sheet_shows_every_pixel_of_every_frame_enlarged(tmp_path):
    rng = np.random.default_rng(0)
    clips = [rng.integers(0, 256, (n, 16, 20, 3), dtype=np.uint8) for n in (3, 5)]
    path = contact_sheet(
        tmp_path / "x" / "s.png", clips, ["first", "second " * 40], frame_height=50
    )
    sheet = np.asarray(Image.open(path))
    scale = 3  # the whole factor below 50 / 16
    for clip in clips:
        wanted = clip[-1].repeat(scale, 0).repeat(scale, 1)
        left = 12 + (len(clip) - 1) * (20 * scale + 2)
        columns = sheet[:, left : left + 20 * scale]
        found = [
            top
            for top in range(len(sheet) - 16 * scale + 1)
            if np.array_equal(columns[top : top + 16 * scale], wanted)
        ]
        assert len(found) == 1
        # Its caption: ink in the lines above the frames.
        assert (sheet[found[0] - 20 : found[0], 12:200] < 100).any()


def test_a_long_clip_is_thinned_from_first_to_last_frame(tmp_path):
    clip = np.arange(100, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    path = contact_sheet(tmp_path / "s.png", [clip], ["x"], frame_height=8, max_frames=4)
    row = np.asarray(Image.open(path))[-16]
    assert [int(row[12 + 10 * k, 0]) for k in range(4)] == [0, 33, 66, 99]


@pytest.mark.parametrize(
    ("clips", "captions"),
    [([], []), ([np.zeros((1, 8, 8, 3), np.uint8)], []), ([np.zeros((1, 8, 8, 3))], ["x"])],
)
def test_a_sheet_of_nothing_or_of_floats_is_refused(tmp_path, clips, captions):
    with pytest.raises(ValueError, match="expected"):
        contact_sheet(tmp_path / "s.png", clips, captions)
