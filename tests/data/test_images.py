"""Still images of every kind that people have, as clips of one frame."""

from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image

from data.images import is_image_path
from data.video import VideoReader, VideoReadError, probe, read_clip

GREEN, RED = (10, 200, 30), (200, 0, 0)


def picture(height=24, width=48):
    """Green, with a red corner at the upper left."""
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:] = GREEN
    pixels[: height // 2, : width // 3] = RED
    return Image.fromarray(pixels)


def read(path):
    """(h w 3) int at the file's own size."""
    info = probe(path)
    clip = read_clip(path, num_frames=1, fps=8, height=info.height, width=info.width)
    assert clip.shape == (3, 1, info.height, info.width)
    assert clip.dtype == torch.uint8
    return clip[:, 0].permute(1, 2, 0).int().numpy()


def near(pixel, colour, level=4):
    return np.abs(pixel - np.array(colour)).max() <= level


@pytest.mark.parametrize(
    "name", ["a.png", "a.JPG", "a.jpeg", "a.webp", "a.bmp", "a.tif", "a.Tiff", "a b&c.png"]
)
def test_every_format_is_read(tmp_path, name):
    how = {"lossless": True} if name.endswith("webp") else {}
    picture().save(tmp_path / name, **how)
    pixels = read(tmp_path / name)
    assert pixels.shape == (24, 48, 3)
    assert near(pixels[2, 2], RED, 8)
    assert near(pixels[-2, -2], GREEN)
    with VideoReader(tmp_path / name, "decord") as reader:
        assert reader.backend == "pillow"
        assert reader.info.is_image
        assert reader.verify() == 1
        assert (reader.read_at([0.0, 0.01])[1] == pixels).all()


# The EXIF orientation, the rotation it asks for, and where the red upper left corner goes.
TURNS = {
    1: (0, (0, 0)),
    2: (0, (0, -1)),
    3: (180, (-1, -1)),
    4: (180, (-1, 0)),
    5: (270, (0, 0)),
    6: (90, (0, -1)),
    7: (90, (-1, -1)),
    8: (270, (-1, 0)),
    77: (0, (0, 0)),
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("turn", TURNS)
def test_exif_orientation_is_applied(tmp_path, suffix, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    path = tmp_path / f"a.{suffix}"
    picture().save(path, exif=exif)
    rotation, (row, column) = TURNS[turn]
    assert probe(path).rotation == rotation
    pixels = read(path)
    assert pixels.shape == ((48, 24, 3) if 5 <= turn <= 8 else (24, 48, 3))
    corners = {(i, j): pixels[i, j, 0] - pixels[i, j, 1] for i in (0, -1) for j in (0, -1)}
    assert [place for place, redness in corners.items() if redness > 0] == [(row, column)]


def test_transparent_pixels_are_on_white(tmp_path):
    alpha = np.zeros((24, 48), np.uint8)
    alpha[:, 24:] = 255
    clear = picture().convert("RGBA")
    clear.putalpha(Image.fromarray(alpha))
    for name in ("a.png", "a.webp", "a.tiff"):
        clear.save(tmp_path / name, **({"lossless": True} if "webp" in name else {}))
        pixels = read(tmp_path / name)
        assert near(pixels[2, 2], (255, 255, 255), 0)
        assert near(pixels[-2, -2], GREEN, 0)
    clear.convert("LA").save(tmp_path / "la.png")
    assert near(read(tmp_path / "la.png")[2, 2], (255, 255, 255), 0)
    palette = picture().quantize(4)
    red = int(np.asarray(palette)[0, 0])
    palette.save(tmp_path / "p.png", transparency=red)
    pixels = read(tmp_path / "p.png")
    assert near(pixels[2, 2], (255, 255, 255), 0)
    assert near(pixels[-2, -2], GREEN)


def test_palettes_grey_and_bitmaps(tmp_path):
    picture().quantize(4).save(tmp_path / "p.png")
    assert near(read(tmp_path / "p.png")[2, 2], RED)
    picture().convert("L").save(tmp_path / "l.png")
    grey = read(tmp_path / "l.png")
    assert (grey[..., 0] == grey[..., 2]).all()
    assert grey[-1, -1, 0] == 124
    Image.fromarray(np.eye(24, dtype=bool)).save(tmp_path / "1.png")
    assert read(tmp_path / "1.png")[0, :2, 0].tolist() == [255, 0]


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_16_bits_are_scaled(tmp_path, name):
    values = np.linspace(0, 65535, 24 * 48).reshape(24, 48).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    expected = np.round(values / 257).astype(int)
    assert (read(tmp_path / name) == expected[..., None]).all()


@pytest.mark.parametrize("name", ["a.jpg", "a.tiff"])
def test_cmyk_keeps_its_colours(tmp_path, name):
    picture().convert("CMYK").save(tmp_path / name)
    pixels = read(tmp_path / name)
    assert near(pixels[2, 2], RED, 8)
    assert near(pixels[-2, -2], GREEN, 8)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bits_are_refused(tmp_path, dtype):
    Image.fromarray(np.zeros((8, 8), dtype)).save(tmp_path / "a.tiff")
    with pytest.raises(VideoReadError, match=r"32 bits a value; expected 8 or 16"):
        probe(tmp_path / "a.tiff")


def test_the_first_of_several_pictures_is_read(tmp_path):
    more = [Image.new("RGB", (48, 24), "black")]
    for name in ("a.webp", "a.tiff"):
        picture().save(tmp_path / name, save_all=True, append_images=more)
        assert near(read(tmp_path / name)[-2, -2], GREEN, 8)


def test_images_are_resized_like_frames(tmp_path):
    picture().save(tmp_path / "a.png")
    clip = read_clip(tmp_path / "a.png", num_frames=1, fps=8, height=12, width=12, position=1.0)
    assert clip.shape == (3, 1, 12, 12)
    assert clip[:, 0, -1, -1].tolist() == list(GREEN)


def test_an_image_does_not_move(tmp_path):
    picture().save(tmp_path / "a.png")
    with pytest.raises(VideoReadError, match=r"a\.png: an image, but 2 frames are wanted"):
        read_clip(tmp_path / "a.png", num_frames=2, fps=1000, height=8, width=8)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5])
def test_a_cut_off_image_is_refused(tmp_path, suffix, share):
    path = tmp_path / f"a.{suffix}"
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(VideoReadError) as caught:
        read_clip(path, num_frames=1, fps=8, height=8, width=8)
    assert caught.value.reason
    assert "\n" not in str(caught.value)


def test_no_damage_ends_a_run(tmp_path):
    """Whatever bytes are wrong, an image is read or refused: no other error gets out."""
    draw = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("png", "jpg", "webp", "bmp", "tiff"):
        path = tmp_path / f"a.{suffix}"
        picture().save(path, exif=exif)
        good = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(60):
            damaged = good.copy()
            damaged[draw.integers(0, min(len(good), 400), 3)] = draw.integers(0, 256, 3)
            path.write_bytes(damaged.tobytes())
            with suppress(VideoReadError):
                probe(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "no such file"), (b"", "is empty"), (b"hello" * 50, "not an image")],
)
def test_what_is_no_image_is_refused(tmp_path, content, reason):
    path = tmp_path / "a.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(VideoReadError, match=reason):
        probe(path)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(VideoReadError, match="a directory"):
        probe(tmp_path / "folder.png")


def test_too_large_an_image_is_refused(tmp_path, monkeypatch):
    picture().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(VideoReadError, match="exceeds limit"):
        probe(tmp_path / "a.png")


def test_images_are_read_from_urls(tmp_path):
    picture().save(tmp_path / "a.png")
    pixels = read(tmp_path / "a.png")
    assert (read((tmp_path / "a.png").as_uri()) == pixels).all()


@pytest.mark.parametrize(
    ("path", "image"),
    [
        ("a.png", True),
        ("A.JPEG", True),
        ("https://x.org/a.webp?width=3#top", True),
        ("https://x.org/play.mp4?poster=a.png", False),
        ("zip://inside/a.tif::/data/b.zip", True),
        ("simplecache::s3://bucket/a.bmp", True),
        ("png", False),
        ("a.png.mp4", False),
        ("a.gif", False),
    ],
)
def test_images_are_known_by_their_ending(path, image):
    assert is_image_path(path) == image


def test_an_image_under_a_videos_name_is_refused_or_read(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "a.jpg").rename(tmp_path / "a.mp4")
    with suppress(VideoReadError):  # by the release of PyAV
        assert read(tmp_path / "a.mp4").shape == (48, 24, 3)
