"""Small media files, made with PyAV, of the kinds that people have."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

MakeVideo = Callable[..., Path]


def counting_frames(num_frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frame k is a flat gray of 16 + 6 * k, with a red corner that tells up from sideways."""
    video = np.empty((num_frames, height, width, 3), np.uint8)
    video[:] = (16 + 6 * np.arange(num_frames, dtype=np.uint8))[:, None, None, None]
    video[:, : height // 3, : width // 4] = (200, 0, 0)
    return video


def encode(
    path: Path,
    video: np.ndarray,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    fps: int = 10,
    pts: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Encodes `video` at `fps`; `pts`, in 1/fps, overrides when frames appear."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1
        stream.codec_context.options = options or {}
        for index, array in enumerate(video):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24").reformat(format=pix_fmt)
            frame.pts = index if pts is None else pts[index]
            frame.time_base = Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def turn(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Patches the display matrix (a, b, c, d) of an .mp4's only track (ISO 14496-12, tkhd)."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4
    assert data[at] == 0, "expected a version 0 box"
    at += 4 + 5 * 4 + 8 + 2 * 4  # version, five times and ids, reserved, layer and volume
    a, b, c, d = (value * 65536 for value in matrix)
    for index, value in enumerate((a, b, 0, c, d, 0, 0, 0, 1 << 30)):
        data[at + 4 * index : at + 4 * index + 4] = value.to_bytes(4, "big", signed=True)
    path.write_bytes(data)
    return path


@pytest.fixture(autouse=True)
def media_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of remote media, which otherwise is in the user's home."""
    for name in ("ZOETROPE_CACHE_GB", "ZOETROPE_PATIENCE"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("ZOETROPE_CACHE", str(tmp_path / "media-cache"))
    return tmp_path / "media-cache"


@pytest.fixture
def counting() -> Callable[..., np.ndarray]:
    return counting_frames


@pytest.fixture
def make_video(tmp_path: Path) -> MakeVideo:
    """make_video(name, num_frames=20, height=48, width=64, turned=None, **encode's) -> path"""

    def make(
        name: str,
        num_frames: int = 20,
        height: int = 48,
        width: int = 64,
        turned: tuple[int, int, int, int] | None = None,
        **how,
    ) -> Path:
        path = encode(tmp_path / name, counting_frames(num_frames, height, width), **how)
        return path if turned is None else turn(path, turned)

    return make


@pytest.fixture
def audio_only(tmp_path: Path) -> Path:
    path = tmp_path / "audio.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def panning(
    seed: int, num_frames: int, height: int = 96, width: int = 160, dx: int = 1, dy: int = 0
) -> np.ndarray:
    """A coloured texture of its own for each seed, that moves by (dx, dy) pixels a frame."""
    rng = np.random.default_rng(seed)
    tall, wide = height + abs(dy) * num_frames, width + abs(dx) * num_frames
    layers = []
    for size in (32, 8):
        cells = rng.uniform(0, 255, (tall // size + 3, wide // size + 3, 3)).astype(np.uint8)
        full = Image.fromarray(cells).resize(
            (cells.shape[1] * size, cells.shape[0] * size), Image.Resampling.BICUBIC
        )
        layers.append(np.asarray(full, np.float32)[:tall, :wide])
    whole = (0.6 * layers[0] + 0.4 * layers[1]).astype(np.uint8)
    tops = [dy * k if dy >= 0 else -dy * (num_frames - 1 - k) for k in range(num_frames)]
    lefts = [dx * k if dx >= 0 else -dx * (num_frames - 1 - k) for k in range(num_frames)]
    return np.stack([whole[y : y + height, x : x + width] for y, x in zip(tops, lefts)])


@pytest.fixture(scope="session")
def pan() -> Callable[..., np.ndarray]:
    """pan(seed, num_frames, height=96, width=160, dx=1, dy=0) -> uint8 (f h w 3)"""
    return panning


@pytest.fixture(scope="session")
def encode_video() -> Callable[..., Path]:
    """encode_video(path, video, codec=, pix_fmt=, fps=, pts=, options=) -> path"""
    return encode
