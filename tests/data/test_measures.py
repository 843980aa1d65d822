"""Scenes, bars, measures, duplicates: on pictures of which the answer is known."""

import cv2
import numpy as np
import pytest

from data.duplicates import (
    Vectors,
    find_duplicates,
    hash_distance,
    hash_times,
    hash_vectors,
    perceptual_hashes,
)
from data.ingest_config import Measures, Scenes
from data.ingest_steps import _windows
from data.letterbox import find_letterbox
from data.measures import (
    frozen_share,
    logo_share,
    measure_frames,
    measure_picture,
    sharpness,
    text_share,
)
from data.scenes import split_scenes
from data.text_share import text_mask
from data.video_read import VideoReader
from data.video_write import write_video


def grey(frames):
    return np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames])


def windows_of(video, num_windows=4, length=8):
    firsts = np.linspace(0, len(video) - length, num_windows).astype(int)
    return np.stack([video[first : first + length] for first in firsts])


@pytest.fixture(scope="module")
def shots(pan):
    """Three shots, of 20, 31 and 25 frames."""
    return np.concatenate([pan(1, 20), pan(2, 31, dx=-2), pan(3, 25, dy=1)])


@pytest.mark.parametrize("detector", ["content", "adaptive"])
def test_cuts_are_found_to_the_frame(tmp_path, shots, detector):
    write_video(tmp_path / "a.mp4", shots, fps=25)
    with VideoReader(tmp_path / "a.mp4") as reader:
        pieces = split_scenes(reader, Scenes(detector=detector))
    assert np.allclose(pieces, [(0, 0.8), (0.8, 2.04), (2.04, 3.04)], atol=1e-6)


def test_cuts_of_a_variable_rate_lie_where_the_frame_appears(tmp_path, shots, encode_video):
    pts = np.cumsum([0, *np.random.default_rng(0).integers(1, 4, len(shots) - 1)]).tolist()
    encode_video(tmp_path / "a.mp4", shots, fps=30, pts=pts)
    with VideoReader(tmp_path / "a.mp4") as reader:
        pieces = split_scenes(reader, Scenes())
    cuts = [first for first, _ in pieces[1:]]
    assert np.allclose(cuts, [pts[20] / 30, pts[51] / 30], atol=1e-4)


def test_without_a_detector_files_stay_whole_and_a_piece_is_split_alone(tmp_path, shots):
    write_video(tmp_path / "a.mp4", shots, fps=25)
    with VideoReader(tmp_path / "a.mp4") as reader:
        assert split_scenes(reader, Scenes(detector="none")) == [(0, reader.info.duration)]
        inside = split_scenes(reader, Scenes(), 0.4, 1.2)
    assert np.allclose(inside, [(0.4, 0.8), (0.8, 1.2)])


@pytest.mark.parametrize("most", [0.3, 0.5, 1.0, 5.0])
def test_long_scenes_are_cut_into_pieces_of_at_most_that_length(tmp_path, shots, most):
    write_video(tmp_path / "a.mp4", shots, fps=25)
    with VideoReader(tmp_path / "a.mp4") as reader:
        pieces = split_scenes(reader, Scenes(max_seconds=most))
    lengths = [last - first for first, last in pieces]
    assert max(lengths) <= most + 1e-6
    assert min(lengths) > 0.4 * min(most, 0.8)
    assert pieces[0][0] == 0
    assert pieces[-1][1] == pytest.approx(3.04)
    assert all(a[1] == b[0] for a, b in zip(pieces, pieces[1:]))
    assert np.allclose(np.array(pieces)[:, 0] * 25 % 1 % 0.999, 0, atol=1e-3)  # where frames are


def barred(video, top=0, bottom=0, left=0, right=0, colour=0, noise=0.0):
    video = np.pad(video, ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=colour)
    if noise:
        video = video + np.random.default_rng(0).normal(0, noise, video.shape)
    return np.clip(video, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("noise", [0.0, 3.0])
@pytest.mark.parametrize("colour", [0, 90])
@pytest.mark.parametrize(
    "bars", [(20, 20, 0, 0), (0, 0, 33, 31), (13, 8, 6, 10), (0, 16, 0, 0), (0, 0, 0, 0)]
)
def test_bars_are_found_to_two_pixels(pan, bars, colour, noise):
    video = barred(pan(4, 12), *bars, colour=colour, noise=noise)
    crop = find_letterbox(grey(video))
    if not any(bars):
        assert crop is None
        return
    x, y, width, height = crop
    assert [value % 2 for value in crop] == [0, 0, 0, 0]
    found = (y, video.shape[1] - y - height, x, video.shape[2] - x - width)
    assert all(bar <= value <= bar + 2 for bar, value in zip(bars, found)), found


def test_bars_survive_encoding(tmp_path, pan):
    write_video(tmp_path / "a.mp4", barred(pan(4, 12), 24, 24), fps=10, crf=30)
    with VideoReader(tmp_path / "a.mp4") as reader:
        frames = reader.read_at(np.arange(12) / 10)
    x, y, width, height = find_letterbox(grey(frames))
    assert (x, width) == (0, 160)
    assert abs(y - 24) <= 2
    assert abs(height - 96) <= 2


def test_dark_pictures_are_no_bars(pan):
    black = np.zeros((8, 96, 160), np.uint8)
    assert find_letterbox(black) is None
    lamp = black.copy()
    lamp[:, 40:50, 70:80] = 200
    assert find_letterbox(lamp) is None
    dusk = np.broadcast_to(np.linspace(0, 60, 96)[:, None], (8, 96, 160)).astype(np.uint8)
    assert find_letterbox(dusk) is None
    night = (pan(5, 8) * 0.12).astype(np.uint8)
    assert find_letterbox(grey(night)) is None
    x, y, width, height = find_letterbox(grey(barred(night, 20, 20)))
    assert (x, width) == (0, 160)
    assert abs(y - 20) <= 2
    assert abs(height - 96) <= 3


@pytest.mark.parametrize(("dx", "dy", "fps"), [(1, 0, 25), (3, 0, 25), (0, -2, 10), (2, 2, 30)])
def test_motion_is_that_of_the_picture(pan, dx, dy, fps):
    video = pan(6, 40, dx=dx, dy=dy)
    expected = np.hypot(dx, dy) * fps / np.hypot(96, 160)
    found = measure_frames(windows_of(video), fps, 1 / fps)
    assert found["motion"] == pytest.approx(expected, rel=0.15)
    assert found["jerk"] < 0.1 * expected
    assert found["frozen"] == 0


def test_jerk_is_how_much_the_camera_changes_its_speed(pan):
    wide = pan(7, 1, height=140, width=240, dx=0)[0]
    shifts = np.random.default_rng(0).integers(-4, 5, (32, 2)) + 10
    shaken = np.stack([wide[y : y + 96, x : x + 160] for y, x in shifts])
    velocity = np.diff(shifts.reshape(4, 8, 2), axis=1)
    expected = np.hypot(*np.diff(velocity, axis=1).reshape(-1, 2).T).mean() * 25 / np.hypot(96, 160)
    found = measure_frames(shaken.reshape(4, 8, 96, 160, 3), 25, 0.04)
    assert found["jerk"] == pytest.approx(expected, rel=0.25)


def test_frozen_and_black_are_shares(pan):
    video = pan(8, 8)
    half = np.concatenate([video[:4], np.repeat(video[4:5], 5, axis=0)])
    assert frozen_share(grey(half)[None]) == pytest.approx(4 / 8)
    still = np.repeat(video[:1], 32, axis=0).reshape(4, 8, 96, 160, 3)
    found = measure_frames(still, 25, 0.04)
    assert (found["frozen"], found["jerk"]) == (1, 0)
    assert found["motion"] < 1e-3
    assert "logo" not in found
    assert found["black"] == 0
    dark = (video * 0.05).astype(np.uint8)
    assert measure_picture(dark)["black"] == 1
    assert measure_picture(np.concatenate([dark[:2], video[:6]]))["black"] == 0.25


def test_sharpness_falls_with_blur_and_not_with_size():
    cells = np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)
    picture = cv2.GaussianBlur(np.kron(cells, np.ones((16, 16, 1), np.uint8)), (0, 0), 1)
    sharp, soft = (cv2.GaussianBlur(picture, (0, 0), s) if s else picture for s in (0, 8))
    values = [measure_picture(each[None])["sharpness"] for each in (sharp, soft)]
    assert values[1] < 0.1 * values[0]
    double = cv2.resize(sharp, (1024, 1024), interpolation=cv2.INTER_CUBIC)
    assert measure_picture(double[None])["sharpness"] == pytest.approx(values[0], rel=0.3)
    assert sharpness(np.full((64, 64), 9, np.uint8)) == 0


def lettered(picture, text, at, scale=0.9):
    picture = picture.copy()
    for colour, thickness in (((0, 0, 0), 6), ((255, 255, 255), 2)):
        cv2.putText(picture, text, at, cv2.FONT_HERSHEY_SIMPLEX, scale, colour, thickness)
    return picture


WORDS = ["Breaking news tonight", "the quick brown fox", "SUBSCRIBE NOW", "Part 2 of 7", "weather"]


def test_text_is_found_where_it_is_and_seldom_elsewhere(pan):
    """The rates of the detector on synthetic text; docs/ingest.md has those of more kinds."""
    hits, false_alarms = [], []
    for seed in range(20):
        picture = pan(100 + seed, 1, height=360, width=640)[0]
        false_alarms.append(text_mask(grey([picture])[0]).mean() > 0.002)
        y = 60 + 14 * seed
        mask = text_mask(grey([lettered(picture, WORDS[seed % 5], (120, y))])[0])
        (width, height), _ = cv2.getTextSize(WORDS[seed % 5], cv2.FONT_HERSHEY_SIMPLEX, 0.9, 2)
        hits.append(mask[y - height : y, 120 : 120 + width].mean() >= 0.5)
    assert np.mean(hits) >= 0.85
    assert np.mean(false_alarms) <= 0.05


def test_text_counts_when_it_stays(pan):
    video = pan(10, 8, height=360, width=640)
    staying = np.stack([lettered(frame, "stays to be read", (90, 300)) for frame in video])
    passing = video.copy()
    passing[0] = staying[0]
    assert text_share(staying[None]) > 0.01
    assert text_share(passing[None]) < 0.002


def test_a_logo_stays_while_the_picture_moves(pan):
    video = pan(11, 32, height=180, width=320, dx=4)
    marked = np.stack([lettered(frame, "TV", (250, 40)) for frame in video])
    assert logo_share(windows_of(video)) < 0.002
    assert logo_share(windows_of(marked)) > 0.008
    still = np.repeat(marked[:1], 32, axis=0)
    assert logo_share(windows_of(still)) is None


@pytest.mark.parametrize("fps", [5.0, 24.0, 29.97, 59.94, 120.0])
@pytest.mark.parametrize("seconds", [0.04, 0.3, 1.0, 60.0])
def test_windows_lie_inside_the_clip_and_apart(fps, seconds):
    times, spacing = _windows(2.0, 2.0 + seconds, fps, Measures())
    assert times.shape[1] >= 2
    assert times.shape[0] <= 4
    assert times.min() >= 2.0
    assert times.max() < 2.0 + seconds
    assert spacing == pytest.approx(round(spacing * fps) / fps)
    assert spacing <= max(1 / fps, 1 / 29)
    if seconds == 60:
        assert times.shape == (4, 8)
        assert times[0, 0] < 2.5
        assert times[-1, -1] > 61


def test_hashes_agree_for_copies_and_not_for_others(tmp_path, pan):
    video = pan(12, 40)
    write_video(tmp_path / "a.mp4", video, fps=20)
    small = np.stack([cv2.resize(f, (120, 72), interpolation=cv2.INTER_AREA) for f in video])
    write_video(tmp_path / "b.mp4", small, fps=20, crf=35)
    write_video(tmp_path / "c.mp4", video[::2], fps=20)  # twice as quick
    write_video(tmp_path / "d.mp4", pan(13, 40), fps=20)
    hashes = []
    for name in "abcd":
        with VideoReader(tmp_path / f"{name}.mp4") as reader:
            hashes.append(perceptual_hashes(reader.read_at(hash_times(0, reader.info.duration))))
    matches = find_duplicates(range(4), [hash_vectors(hashes, 6)])
    assert {clip: match.of for clip, match in matches.items()} == {1: 0, 2: 0}
    assert all(0 <= hash_distance(match.cosine) <= 6 for match in matches.values())


def test_distances_are_exact_at_the_threshold():
    zero = ["0" * 16] * 4
    six = ["000000000000003f"] * 4
    almost = ["000000000000003f"] * 3 + ["000000000000007f"]
    for hashes, found in ((six, {1}), (almost, set())):
        assert set(find_duplicates([0, 1], [hash_vectors([zero, hashes], 6.0)])) == found
    assert not find_duplicates([0, 1], [hash_vectors([None, None], 6.0)])


def test_blocks_give_what_comparing_one_by_one_gives(monkeypatch):
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2, (40, 256))
    bits = base[rng.integers(0, 40, 300)] ^ (rng.random((300, 256)) < 0.04)
    hashes = [[f"{int(''.join(map(str, row[i : i + 64])), 2):016x}" for i in range(0, 256, 64)]
              for row in bits.tolist()]  # fmt: skip
    order = rng.permutation(300).tolist()
    expected, kept = {}, []
    for clip in order:
        near = [other for other in kept if (bits[clip] != bits[other]).sum() <= 24]
        if near:
            expected[clip] = near[0]
        else:
            kept.append(clip)
    assert 0 < len(expected) < 300
    monkeypatch.setattr("data.duplicates._BLOCK", 7)
    monkeypatch.setattr("data.duplicates._TILE", 5)
    matches = find_duplicates(order, [hash_vectors(hashes, 6.0)])
    assert {clip: match.of for clip, match in matches.items()} == expected


def test_any_criterion_is_enough():
    apart = Vectors(np.eye(3, dtype=np.float32), 0.9, "hash")
    near = Vectors(np.array([[1, 0], [0, 1], [1, 0]], np.float32), 0.9, "embedding")
    matches = find_duplicates([2, 0, 1], [apart, near])
    assert {clip: (match.of, match.kind) for clip, match in matches.items()} == {
        0: (2, "embedding")
    }
