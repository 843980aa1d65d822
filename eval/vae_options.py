"""What `zoetrope eval VAE --suite vae` is asked for: its options, and sizes that fit every VAE."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit.vae import VAE
    from eval.frechet import PixelRange
    from sample.model import ModelInfo

_SSIM_SIDE = 11  # pixels, SSIM's window
_FAR = 4096  # pixels or frames: how far a fitting size is looked for


@dataclass(frozen=True)
class VAEOptions:
    """What the command line says, beside what all suites share.

    Raises:
        ValueError: options that need each other, or numbers that make no sense.
    """

    manifest: Path | None = None
    against: Sequence[Path] = ()
    sizes: Sequence[str] = ()
    frames: int | None = None
    fps: float | None = None
    batch_size: int | None = None
    lpips_weights: Path | None = None
    lpips_linear: Path | None = None
    lpips_backbone: str | None = None  # vgg16
    fvd_extractor: Path | None = None
    fvd_range: PixelRange | None = None  # "255"
    tile: int | None = None
    overlap: int | None = None

    def __post_init__(self) -> None:
        if (self.lpips_weights is None) != (self.lpips_linear is None):
            given = "weights" if self.lpips_linear is None else "linear"
            other = "linear" if self.lpips_linear is None else "weights"
            raise ValueError(
                f"--lpips-{given} is given without --lpips-{other}; LPIPS needs the classifier's "
                "weights and its own"
            )
        if self.lpips_backbone is not None and self.lpips_weights is None:
            raise ValueError(
                "--lpips-backbone is of LPIPS; give --lpips-weights and --lpips-linear"
            )
        if self.fvd_range is not None and self.fvd_extractor is None:
            raise ValueError("--fvd-range is of FVD's extractor; give --fvd-extractor too")
        for name in ("frames", "batch_size", "tile"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}; use at least 1")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ValueError(f"fps={self.fps}; use frames per second above 0")
        if self.overlap is not None and self.tile is None:
            raise ValueError(f"--overlap {self.overlap} is of tiles; give --tile too")
        if self.tile is not None and not 0 <= 2 * self.blend <= self.tile:
            raise ValueError(
                f"--overlap {self.overlap} of tiles of {self.tile}; use 0 to {self.tile // 2}, half a "
                "tile"
            )
        if self.manifest is not None and not self.manifest.is_file():
            self._name_misplaced(self.manifest)

    def _name_misplaced(self, manifest: Path) -> None:
        """What looks like a second value of an option, which takes one."""
        if re.fullmatch(r"[0-9]+(x[0-9]+)?", manifest.name):
            raise ValueError(
                f"{manifest}: no such manifest; several sizes are given as --sizes 32,64x48"
            )
        if manifest.is_dir():
            raise ValueError(
                f"{manifest}: a folder, expected a manifest; every further VAE needs its own --against"
            )

    @property
    def backbone(self) -> str:
        """timm's name of LPIPS's classifier."""
        return self.lpips_backbone or "vgg16"

    @property
    def pixels(self) -> PixelRange:
        """What the extractor takes."""
        return self.fvd_range or "255"

    @property
    def blend(self) -> int:
        """The overlap of blended tiles: a quarter of one unless said otherwise."""
        return (self.tile or 0) // 4 if self.overlap is None else self.overlap


@dataclass(frozen=True)
class ClipSize:
    """Clips that are compared: pixels, frames, frames per second."""

    height: int
    width: int
    num_frames: int
    fps: float

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as tell all of them apart.

    Raises:
        ValueError: two are the same.
    """
    whole = [Path(path).resolve() for path in paths]
    for path in whole:
        if whole.count(path) > 1:
            raise ValueError(f"{path} is given twice; compare different VAEs")
    for count in range(1, max(len(path.parts) for path in whole) + 1):
        names = ["/".join(path.parts[-count:]) for path in whole]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in whole]


def _nearest(value: int, fits: Callable[[int], bool]) -> list[int]:
    """The next values above and below that fit, if there are any nearby."""
    above = next((v for v in range(value + 1, value + _FAR) if fits(v)), None)
    below = next((v for v in range(value - 1, 0, -1) if fits(v)), None)
    return [v for v in (above, below) if v is not None]


def check_size(vaes: Mapping[str, VAE], size: ClipSize) -> None:
    """Refuses clips that not every VAE can take.

    Raises:
        ValueError: names the nearest that fit all of them.
    """
    square = math.lcm(*(vae.spatial_factor for vae in vaes.values()))

    def misfit(f: int, h: int, w: int) -> str | None:
        for name, vae in vaes.items():
            try:
                vae.latent_shape(f, h, w)
            except ValueError:
                return name
        return None

    axes: dict[str, tuple[int, Callable[[int], tuple[int, int, int]]]] = {
        "frames": (size.num_frames, lambda v: (v, square, square)),
        "height": (size.height, lambda v: (1, v, square)),
        "width": (size.width, lambda v: (1, square, v)),
    }
    for axis, (value, shape) in axes.items():
        name = misfit(*shape(value))
        if name is None:
            continue
        near = _nearest(value, lambda v, shape=shape: misfit(*shape(v)) is None)
        use = f"use {' or '.join(map(str, near))}" if near else "nothing near it does"
        option = "--frames" if axis == "frames" else "--sizes"
        fitting = f", which fit all {len(vaes)} VAEs" if near and len(vaes) > 1 else ""
        raise ValueError(f"{axis}={value} does not fit {name}; {use}{fitting} ({option})")
    if min(size.height, size.width) < _SSIM_SIDE:
        raise ValueError(
            f"{size.height}x{size.width} is smaller than SSIM's window; use at least "
            f"{_SSIM_SIDE}x{_SSIM_SIDE} (--sizes)"
        )


def check_tile(vaes: Mapping[str, VAE], size: ClipSize, tile: int) -> None:
    """Refuses tiles as large as the picture, which would be compared with itself.

    Raises:
        ValueError: names what is smaller.
    """
    for name, vae in vaes.items():
        largest = max(size.height, size.width) // vae.spatial_factor
        if tile >= largest:
            raise ValueError(
                f"--tile {tile}: clips of {size.height}x{size.width} have at most {largest} latents "
                f"a side with {name}; use less, or larger --sizes"
            )


def wanted_sizes(options: VAEOptions, info: ModelInfo) -> list[ClipSize]:
    """The sizes on the command line, or the first model's own.

    Raises:
        ValueError: one is not written as a size.
    """
    from data.video import parse_size

    frames = options.frames or info.num_frames
    fps = options.fps or info.fps
    texts = [text for given in options.sizes for text in re.split(r"[,\s]+", given) if text]
    if options.sizes and not texts:
        raise ValueError("--sizes is empty; give pixels, as 32,64x48")
    try:
        pixels = [parse_size(text) for text in texts] or [(info.height, info.width)]
    except ValueError as error:
        raise ValueError(str(error).replace("--size ", "--sizes ")) from None
    return [ClipSize(h, w, frames, fps) for h, w in dict.fromkeys(pixels)]
