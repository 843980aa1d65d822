import pickle
from pathlib import Path

import av
import numpy as np
import pytest

from data.video import VideoReader, VideoReadError, probe, read_clip, write_video

try:
    import decord
except (ImportError, OSError):
    decord = None
needs_decord = pytest.mark.skipif(decord is None, reason="decord has no wheel for this machine")
BACKENDS = ["pyav", pytest.param("decord", marks=needs_decord)]


def numbers(frames: np.ndarray) -> list[int]:
    """Which frames of conftest's counting_frames these are."""
    gray = frames[:, 20:28, 40:48].reshape(len(frames), -1).mean(1)
    return np.round((gray - 16) / 6).astype(int).tolist()


KINDS = {
    "h264.mp4": {},
    "b-frames.mp4": {"options": {"bf": "3", "g": "8"}},
    "h264.mkv": {},
    "fragmented.mp4": {"container_options": {"movflags": "+frag_keyframe+empty_moov"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "10-bit.mp4": {"pix_fmt": "yuv420p10le"},
    "444.mp4": {"pix_fmt": "yuv444p"},
    "mpeg4.avi": {"codec": "mpeg4"},
    "av1.mkv": {"codec": "libsvtav1", "options": {"preset": "12"}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_found_by_time(make_video, kind):
    path = make_video(kind, **KINDS[kind])
    with VideoReader(path) as reader:
        assert reader.info.duration == pytest.approx(2, abs=2e-3)
        assert (reader.info.width, reader.info.height) == (64, 48)
        order = [7, 0, 19, 3, 3, 12, 1]
        assert numbers(reader.read_at([k / 10 for k in order])) == order
        assert numbers(reader.read_at([0.05, 0.098, 0.101, 1.999])) == [0, 0, 1, 19]
        assert reader.read_at([]).shape == (0, 48, 64, 3)


@needs_decord
@pytest.mark.parametrize("kind", ["h264.mp4", "b-frames.mp4", "h264.mkv", "fragmented.mp4"])
def test_both_backends_show_the_same_pixels(make_video, kind):
    path = make_video(kind, **KINDS[kind])
    times = np.random.default_rng(0).uniform(0, 2, 12)
    with VideoReader(path, "decord") as a, VideoReader(path, "pyav") as b, VideoReader(path) as c:
        assert (a.backend, b.backend, c.backend) == ("decord", "pyav", "decord")
        # Zero on every file tried; the levels are for other builds of the two.
        assert np.abs(a.read_at(times).astype(int) - b.read_at(times)).max() <= 2


@needs_decord
def test_widths_that_decord_fails_on_are_read(make_video):
    path = make_video("a.mp4", width=48)
    with VideoReader(path) as reader:
        assert reader.read_at([0.1, 0.9]).shape == (2, 48, 48, 3)


@needs_decord
@pytest.mark.parametrize("kind", ["10-bit.mp4", "444.mp4", "av1.mkv"])
def test_decord_is_not_used_where_it_differs(make_video, kind):
    path = make_video(kind, **KINDS[kind])
    with VideoReader(path) as reader:
        assert reader.backend == "pyav"
    with pytest.raises(VideoReadError, match="decord"):
        VideoReader(path, "decord")


def test_without_decord_everything_still_works(make_video, monkeypatch):
    monkeypatch.setattr("data.video_read._decord", lambda: None)
    path = make_video("a.mp4")
    with VideoReader(path) as reader:
        assert reader.backend == "pyav"
        assert numbers(reader.read_at([0.5])) == [5]
    with pytest.raises(VideoReadError, match="not installed"):
        VideoReader(path, "decord")


@needs_decord
def test_a_failure_of_decord_is_made_up_for(make_video, monkeypatch):
    def fail(*_):
        raise RuntimeError("decord says no")

    path = make_video("a.mp4")
    monkeypatch.setattr(decord.VideoReader, "get_batch", fail)
    with VideoReader(path) as reader:
        assert numbers(reader.read_at([0.5, 0.1])) == [5, 1]
        assert reader.backend == "pyav"
    with VideoReader(path, "decord") as reader, pytest.raises(VideoReadError, match="decode"):
        reader.read_at([0.5])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_frame_rate_is_respected(make_video, backend, suffix):
    appears = [0, 1, 2, 10, 11, 30, 31, 50]  # in 1/10 s
    path = make_video(f"vfr.{suffix}", num_frames=8, pts=appears)
    times = np.arange(50) / 10
    expected = [sum(a <= k for a in appears) - 1 for k in range(50)]
    with VideoReader(path, backend) as reader:
        assert numbers(reader.read_at(times)) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_times_rounded_by_the_container_skip_no_frame(make_video, backend):
    path = make_video("30.mkv", num_frames=30, fps=30)  # 1/30 s is 0.033, 2/30 s is 0.067
    with VideoReader(path, backend) as reader:
        assert numbers(reader.read_at(np.arange(30) / 30)) == list(range(30))


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_seeks_land_on_the_right_frame(make_video, backend):
    path = make_video("a.mp4", num_frames=38, fps=2, options={"bf": "3", "g": "6"})
    order = [30, 2, 37, 11, 29, 0, 18]
    with VideoReader(path, backend) as reader:
        for k in order:
            assert numbers(reader.read_at([k / 2])) == [k]


# The matrix (a, b, c, d) of tkhd, and where the red upper left corner goes.
TURNS = {
    "upright": ((1, 0, 0, 1), 0, (0, 0)),
    "clockwise": ((0, 1, -1, 0), 90, (0, -1)),
    "upside down": ((-1, 0, 0, -1), 180, (-1, -1)),
    "counterclockwise": ((0, -1, 1, 0), 270, (-1, 0)),
    "mirrored": ((-1, 0, 0, 1), 0, (0, -1)),
    "flipped": ((1, 0, 0, -1), 180, (-1, 0)),
    "transposed": ((0, 1, 1, 0), 270, (0, 0)),
}


@pytest.mark.parametrize("turn", TURNS)
def test_frames_are_upright(make_video, turn):
    matrix, _, (row, column) = TURNS[turn]
    path = make_video("a.mp4", num_frames=4, height=48, width=96, turned=matrix)
    size = (96, 48) if matrix[0] == 0 else (48, 96)
    for backend in ("auto", "pyav"):
        with VideoReader(path, backend) as reader:
            frame = reader.read_at([0.1])[0]
            assert frame.shape == (*size, 3) == (reader.info.height, reader.info.width, 3)
        corners = {
            (i, j): int(frame[i, j, 0]) - int(frame[i, j, 1]) for i in (0, -1) for j in (0, -1)
        }
        assert max(corners, key=corners.__getitem__) == (row, column)
        assert sorted(corners.values())[2] < 20, "one corner only"


@pytest.mark.parametrize("turn", ["upright", "clockwise", "upside down", "counterclockwise"])
def test_the_rotation_is_reported(make_video, turn):
    matrix, rotation, _ = TURNS[turn]
    assert probe(make_video("a.mp4", num_frames=2, turned=matrix)).rotation == rotation


@needs_decord
@pytest.mark.parametrize("turn", ["clockwise", "upside down", "counterclockwise"])
def test_decord_turns_as_pyav_does(make_video, turn):
    path = make_video("a.mp4", num_frames=4, height=64, width=96, turned=TURNS[turn][0])
    with VideoReader(path, "decord") as a, VideoReader(path, "pyav") as b:
        assert np.abs(a.read_at([0, 0.2]).astype(int) - b.read_at([0, 0.2])).max() <= 2


def test_a_reader_is_not_pickled(make_video):
    with VideoReader(make_video("a.mp4")) as reader, pytest.raises(TypeError, match="open files"):
        pickle.dumps(reader)


def test_an_error_is_pickled():
    error = pickle.loads(pickle.dumps(VideoReadError("a.mp4", "some\nreason")))
    assert (error.path, error.reason) == ("a.mp4", "some reason")
    assert str(error) == "cannot read a.mp4: some reason"


def test_urls_are_read(make_video):
    path = make_video("a.mp4")
    with VideoReader(path.as_uri()) as reader:
        assert numbers(reader.read_at([0.7])) == [7]


def test_times_must_make_sense(make_video):
    with VideoReader(make_video("a.mp4")) as reader:
        for times in ([-0.1], [float("nan")], [[0.1]]):
            with pytest.raises(ValueError, match="times must be"):
                reader.read_at(times)
        with pytest.raises(VideoReadError, match=r"2.500 s, but it ends at 2.000 s"):
            reader.read_at([0.1, 2.5])
    with pytest.raises(ValueError, match="backend='opencv'"):
        VideoReader("a.mp4", "opencv")  # pyright: ignore[reportArgumentType]


# Files that cannot be read


def cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("index at the end.mp4", {}),
        ("index first.mp4", {"container_options": {"movflags": "+faststart"}}),
        ("a.mkv", {}),
        ("a.webm", KINDS["vp9.webm"]),
    ],
)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_cut_off_file_is_refused(make_video, kind, how, share):
    path = cut(make_video(kind, **how), share)
    with pytest.raises(VideoReadError, match=r"cut off|no video stream") as caught:
        read_clip(path, num_frames=2, fps=10, height=16, width=16)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "no such file"), (b"", "is empty"), (b"hello, I am a text\n" * 50, "not a video")],
)
def test_what_is_no_video_is_refused(tmp_path, content, reason):
    path = tmp_path / "a.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(VideoReadError, match=reason):
        VideoReader(path)
    with pytest.raises(VideoReadError, match=reason):
        probe(path)


def test_a_file_with_sound_only_is_refused(audio_only):
    with pytest.raises(VideoReadError, match="no video stream in it, only audio"):
        VideoReader(audio_only)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(VideoReadError, match="directory"):
        VideoReader(tmp_path)


def test_a_broken_url_is_refused():
    with pytest.raises(VideoReadError, match="nope"):
        VideoReader("nope://somewhere/a.mp4")


def test_damage_is_noticed(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), np.uint8), fps=4)
    with VideoReader(path) as reader:
        assert reader.verify() == 12
        assert reader.verify(0.5, 1.0) == 2
        with pytest.raises(VideoReadError, match=r"starts at 3.000 s"):
            reader.verify(3.0)
    with av.open(str(path)) as container:
        packet = list(container.demux(video=0))[8]
    assert packet.pos is not None
    data = bytearray(path.read_bytes())
    middle = packet.pos + packet.size // 2
    data[middle : middle + 20] = bytes(range(100, 120))
    path.write_bytes(data)
    with VideoReader(path, "pyav") as reader:
        assert reader.verify(0, 2.0) == 8
        with pytest.raises(VideoReadError, match=r"the frame at 2.000 s is damaged"):
            reader.verify()
        with pytest.raises(VideoReadError, match=r"the frame at 2.000 s is damaged"):
            reader.read_at([2.0])
