"""Still images as clips of one frame, through Pillow.

PyAV does not do: it cannot open images with EXIF orientation, TIFF and animated WebP, and shows the
colours that hide behind full transparency. Pillow is imported where an image is read.
"""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING

import numpy as np

from data.media import Piece
from data.video_file import VideoInfo, VideoReadError, open_bytes, reporting

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
# An image is shown for one frame at ffmpeg's default rate, so that times in [0, 1/25) show it.
_FPS = 25.0
_ORIENTATION = 0x0112  # the EXIF tag
# Clockwise degrees to turn upright, as video_file.Orientation counts them.
_ROTATIONS = {3: 180, 4: 180, 5: 270, 6: 90, 7: 90, 8: 270}


def is_image_path(path: str | os.PathLike[str]) -> bool:
    """Whether a path or URL names a still image, by its ending alone (upper or lower case)."""
    name = os.fspath(path)
    piece = Piece.parse(name)
    if piece is not None:
        return piece.suffix.lower() in IMAGE_SUFFIXES
    if "://" in name:  # fsspec chains URLs with "::", the file inside first; HTTP has queries
        name = next(part for part in name.split("::") if "://" in part)
        name = name.split("?")[0].split("#")[0]
    return name.lower().endswith(IMAGE_SUFFIXES)


def eight_bits(image: Image.Image) -> Image.Image:
    """An image in 8-bit RGB: 16-bit grey scaled by 1/257, transparency on white, CMYK converted
    without its colour profile.

    Raises:
        ValueError: its values have 32 bits, of which nothing says what is white.
    """
    from PIL import Image

    # Pillow has 16 bits of grey as I;16, or in these formats as I; its own conversion clips them.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.float64) / 257
        grey = values.round().clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("an image of 32 bits a value; expected 8 or 16: convert it")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class ImageSource:
    """The one frame of an image; the first one of an animated file.

    Args:
        path: a local path, or a URL that fsspec opens.
    Raises:
        VideoReadError: missing, empty, damaged, cut off, too large, or of 32 bits a value.
    """

    tolerance = 0.0

    def __init__(self, path: str) -> None:
        with reporting(path):
            self._picture, kind, rotation = _read(path)
        height, width = self._picture.shape[:2]
        self.info = VideoInfo(
            path=path,
            num_frames=1,
            width=width,
            height=height,
            fps=_FPS,
            duration=1 / _FPS,
            rotation=rotation,
            codec=kind,
            is_image=True,
        )

    def read_at(self, times: np.ndarray) -> np.ndarray:
        """The picture for each time, uint8 RGB (f h w 3)."""
        return np.repeat(self._picture[None], len(times), axis=0)

    def verify(self, start: float, end: float) -> int:
        """All of it was decoded on opening: one frame."""
        return 1

    def close(self) -> None:
        """Nothing is open."""


def _read(path: str) -> tuple[np.ndarray, str, int]:
    """Upright RGB (h w 3), the format's name, and clockwise degrees it was turned by."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        # Pillow warns of odd metadata; what it cannot do without, it raises for.
        with (
            warnings.catch_warnings(action="ignore"),
            open_bytes(path) as file,
            Image.open(file) as image,
        ):
            kind = (image.format or "image").lower()
            turn = image.getexif().get(_ORIENTATION, 1)
            # Not by `turn`: Pillow turns a TIFF itself when it loads it, and drops the tag.
            ImageOps.exif_transpose(image, in_place=True)
            return np.array(eight_bits(image)), kind, _ROTATIONS.get(turn, 0)
    except UnidentifiedImageError as error:
        raise VideoReadError(path, "not an image, or its first bytes are damaged") from error
    except (OSError, VideoReadError):
        raise
    except Exception as error:  # what Pillow raises on damaged files depends on format and damage
        raise VideoReadError(path, f"not readable as an image: {error}") from error
