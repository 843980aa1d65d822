import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.video import (
    VideoReader,
    VideoReadError,
    clip_times,
    probe,
    read_clip,
    to_float,
    to_uint8,
    write_video,
)

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


# Writing


@pytest.mark.parametrize("backend", BACKENDS)
def test_flat_colours_survive_the_round_trip(tmp_path, backend):
    colours = np.random.default_rng(0).integers(0, 256, (40, 3))
    corners = [[255 * (i & 1), 255 * (i >> 1 & 1), 255 * (i >> 2 & 1)] for i in range(8)]
    colours[:8] = corners
    video = np.broadcast_to(colours[:, None, None], (40, 32, 64, 3)).astype(np.uint8)
    write_video(tmp_path / "a.mp4", video, fps=8)
    with VideoReader(tmp_path / "a.mp4", backend) as reader:
        frames = reader.read_at(np.arange(40) / 8)
    assert np.abs(frames.astype(int) - video).max() <= 3


def test_a_written_file_is_what_it_says(tmp_path, counting):
    path = tmp_path / "a.mp4"
    write_video(path, counting(9, 32, 48), fps=8)
    info = probe(path)
    assert (info.num_frames, info.width, info.height, info.fps) == (9, 48, 32, 8)
    assert info.duration == pytest.approx(9 / 8, abs=1e-9)
    assert (info.codec, info.rotation, info.pixel_aspect) == ("h264", 0, 1)
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        assert [frame.time for frame in frames] == [k / 8 for k in range(9)]
        assert frames[0].format.name == "yuv420p"
        assert (frames[0].colorspace, frames[0].color_range) == (1, 1)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "the index comes first"
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"], "no temporary file is left"


@pytest.mark.parametrize("fps", [8, 29.97, 30000 / 1001, 0.5, 60])
def test_frame_rates_are_kept(tmp_path, counting, fps):
    write_video(tmp_path / "a.mp4", counting(3), fps=fps)
    assert probe(tmp_path / "a.mp4").fps == pytest.approx(fps, rel=1e-6)


def test_a_tensor_is_written_like_an_array(tmp_path, counting):
    video = counting(5)
    write_video(tmp_path / "a.mp4", video, fps=8)
    write_video(tmp_path / "b.mp4", torch.from_numpy(video).permute(3, 0, 1, 2), fps=8)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_quality_follows_crf(tmp_path):
    video = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    sizes = []
    for crf in (0, 10, 40):
        write_video(tmp_path / "a.mp4", video, fps=8, crf=crf)
        sizes.append((tmp_path / "a.mp4").stat().st_size)
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize(
    ("video", "how", "message"),
    [
        (np.zeros((2, 31, 32, 3), np.uint8), {}, "use 32x32"),
        (np.zeros((2, 32, 32, 3), np.float32), {}, "takes uint8"),
        (np.zeros((2, 32, 32, 4), np.uint8), {}, r"\(f h w 3\)"),
        (np.zeros((32, 32, 3), np.uint8), {}, r"\(f h w 3\)"),
        (np.zeros((0, 32, 32, 3), np.uint8), {}, r"\(f h w 3\)"),
        (torch.zeros(3, 2, 32, 32), {}, "takes uint8"),
        (np.zeros((2, 32, 32, 3), np.uint8), {"fps": 0}, "fps=0"),
        (np.zeros((2, 32, 32, 3), np.uint8), {"fps": float("nan")}, "fps=nan"),
        (np.zeros((2, 32, 32, 3), np.uint8), {"crf": 99}, "crf=99"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, video, how, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "a.mp4", video, **({"fps": 8} | how))
    assert not list(tmp_path.iterdir())


def test_writing_into_no_folder(tmp_path, counting):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        write_video(tmp_path / "no" / "a.mp4", counting(2), fps=8)


# Clips


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_clip_has_the_frames_of_its_times(make_video, backend):
    path = make_video("a.mp4", num_frames=30)
    how = {"height": 48, "width": 64, "backend": backend}
    clip = read_clip(path, num_frames=5, fps=4, start=0.5, **how)
    assert clip.shape == (3, 5, 48, 64)
    assert clip.dtype == torch.uint8
    assert numbers(clip.permute(1, 2, 3, 0).numpy()) == [5, 7, 10, 12, 15]
    assert numbers(read_clip(path, num_frames=1, fps=4, **how).permute(1, 2, 3, 0).numpy()) == [0]
    late = read_clip(path, num_frames=3, fps=10, start=1.0, end=2.0, position=1.0, **how)
    assert numbers(late.permute(1, 2, 3, 0).numpy()) == [17, 18, 19]


def test_a_clip_of_the_files_size_is_untouched(make_video):
    path = make_video("a.mp4")
    clip = read_clip(path, num_frames=3, fps=10, height=48, width=64)
    with VideoReader(path) as reader:
        assert (clip.permute(1, 2, 3, 0).numpy() == reader.read_at([0, 0.1, 0.2])).all()


def test_long_clips_come_in_chunks(make_video, monkeypatch):
    path = make_video("a.mp4")
    how = {"num_frames": 7, "fps": 10, "height": 24, "width": 24}
    whole = read_clip(path, **how)
    monkeypatch.setattr("data.video._MAX_BYTES", 2 * 48 * 64 * 3)
    assert torch.equal(read_clip(path, **how), whole)


def test_a_clip_keeps_its_aspect(tmp_path):
    video = np.zeros((2, 96, 160, 3), np.uint8)
    rows, columns = np.mgrid[:96, :160]
    video[:, (rows - 48) ** 2 + (columns - 80) ** 2 < 24**2] = 255  # a disc of 1809 pixels
    write_video(tmp_path / "a.mp4", video, fps=8)
    square = read_clip(tmp_path / "a.mp4", num_frames=1, fps=8, height=32, width=32)[0, 0].float()
    assert square.shape == (32, 32)
    assert square.sum() / 255 == pytest.approx(1809 / 9, rel=0.03)
    across, along = square[16].sum() / 255, square[:, 16].sum() / 255
    assert (across, along) == (pytest.approx(16, abs=0.6), pytest.approx(16, abs=0.6))
    wide = read_clip(tmp_path / "a.mp4", num_frames=1, fps=8, height=32, width=80)[0, 0].float()
    assert wide[16].sum() / 255 == pytest.approx(24, abs=0.6), "covers the width at half size"
    large = read_clip(tmp_path / "a.mp4", num_frames=1, fps=8, height=192, width=192)[0, 0]
    assert (large[96] > 128).sum() == pytest.approx(96, abs=2), "a small file is enlarged"


def test_pixels_that_are_not_square_are_squared(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = 2
        picture = np.zeros((64, 32, 3), np.uint8)
        picture[16:48, 8:24] = 255
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    assert probe(path).pixel_aspect == 2
    shown = read_clip(path, num_frames=1, fps=10, height=64, width=64)[0, 0]
    assert (shown[32] > 128).sum() == (shown[:, 32] > 128).sum() == 32


def test_shrinking_is_antialiased(tmp_path):
    stripes = np.zeros((1, 64, 64, 3), np.uint8)
    stripes[:, :, ::2] = 255
    write_video(tmp_path / "a.mp4", stripes, fps=8, crf=0)
    small = read_clip(tmp_path / "a.mp4", num_frames=1, fps=8, height=12, width=12).float()
    assert small.std() < 8
    assert small.mean() == pytest.approx(127.5, abs=4)


def test_a_clip_that_is_too_short_says_what_it_needs(make_video):
    path = make_video("a.mp4", num_frames=10)
    size = {"height": 16, "width": 16}
    assert read_clip(path, num_frames=10, fps=10, **size).shape[1] == 10
    with pytest.raises(VideoReadError, match=r"11 frames at 10 fps need more than 1.000 s") as e:
        read_clip(path, num_frames=11, fps=10, **size)
    assert "the file ends at 1.000 s: it has room for 10 at that rate" in str(e.value)
    with pytest.raises(VideoReadError, match=r"the piece from 0.250 s ends at 0.500 s.* for 3"):
        read_clip(path, num_frames=4, fps=10, start=0.25, end=0.5, **size)
    with pytest.raises(VideoReadError, match="no frame there"):
        read_clip(path, num_frames=1, fps=10, start=4.0, **size)


@pytest.mark.parametrize(
    "wrong", [{"num_frames": 0}, {"fps": 0}, {"height": 0}, {"position": 2}, {"start": -1}]
)
def test_clip_arguments_must_make_sense(make_video, wrong):
    right = {"num_frames": 2, "fps": 5, "height": 16, "width": 16}
    with pytest.raises(ValueError, match=r"needs|must be") as caught:
        read_clip(make_video("a.mp4"), **(right | wrong))
    assert not isinstance(caught.value, VideoReadError)


@given(
    duration=st.floats(0.05, 1e4),
    fps=st.floats(0.5, 60),
    start=st.floats(0, 100),
    length=st.one_of(st.none(), st.floats(0.01, 100)),
    position=st.floats(0, 1),
    data=st.data(),
)
def test_clip_times_stay_inside_the_piece(duration, fps, start, length, position, data):
    num_frames = data.draw(st.integers(1, 40))
    info = probe_like(duration)
    end = None if length is None else start + length
    piece = min(duration, duration if end is None else end) - start
    how = {"num_frames": num_frames, "fps": fps, "start": start, "end": end}
    if piece <= (num_frames - 1) / fps + 1e-6:
        with pytest.raises(VideoReadError):
            clip_times(info, position=position, **how)
    else:
        times = clip_times(info, position=position, **how)
        assert len(times) == num_frames
        assert times[0] >= start
        assert times[-1] < start + piece
        np.testing.assert_allclose(np.diff(times), 1 / fps, rtol=1e-6)


def probe_like(duration: float):
    from data.video import VideoInfo

    return VideoInfo("a.mp4", None, 16, 16, 10.0, duration, 0, "h264")


def test_an_image_is_a_clip_of_one_frame(tmp_path):
    from PIL import Image

    Image.new("RGB", (40, 20), (10, 200, 30)).save(tmp_path / "a.png")
    clip = read_clip(tmp_path / "a.png", num_frames=1, fps=8, height=20, width=20)
    assert clip.shape == (3, 1, 20, 20)
    assert clip[:, 0, 10, 10].tolist() == [10, 200, 30]


def test_uint8_and_float_are_a_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    video = to_float(levels)
    assert video.dtype == torch.float32
    assert (video.min(), video.max()) == (-1, 1)
    assert torch.equal(to_uint8(video), levels)
    assert to_uint8(torch.tensor([-3.0, 3.0, 0.0])).tolist() == [0, 255, 128]
