"""Sizes after the clips' own: buckets of about one area and several aspects, and what is cut off.

NovelAI's aspect ratio bucketing (2022, "NovelAI Improvements on Stable Diffusion") and SDXL's (Podell
et al. 2023, section 2.3): every picture is trained on in the size of a list whose aspect is nearest to
its own, instead of having its sides cut off to one size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from data.buckets import Size, image_rows, row_aspects, row_seconds
from data.manifest import Manifest


def native_sizes(
    num_frames: Iterable[int], height: int, width: int, aspects: Iterable[Fraction], multiple: int
) -> list[Size]:
    """Sizes of about the area of height x width: each number of frames in that aspect and in others.

    Args:
        num_frames: of a clip.
        aspects: width / height; those within a twentieth of that of height and width are left out.
        multiple: what heights and widths are multiples of, in pixels.
    """
    own = width / height
    wanted = {own, *(float(a) for a in aspects if abs(math.log(a / own)) > 0.05)}
    frames = sorted({_nearest(height * width, aspect, multiple) for aspect in wanted})
    return [(n, height, width) for n in sorted(set(num_frames)) for height, width in frames]


def _nearest(area: int, aspect: float, multiple: int) -> tuple[int, int]:
    """Height and width whose aspect and area are nearest in ratio; the batch makes up for an area, and
    nothing for an aspect, which counts twice as much."""
    height, width = math.sqrt(area / aspect) / multiple, math.sqrt(area * aspect) / multiple
    around = [
        (multiple * max(1, math.floor(height) + i), multiple * max(1, math.floor(width) + j))
        for i in (0, 1)
        for j in (0, 1)
    ]
    return min(
        around,
        key=lambda size: (
            math.log(size[0] * size[1] / area) ** 2 + 4 * math.log(size[1] / size[0] / aspect) ** 2,
            size,
        ),
    )


def usual_lengths(num_frames: int) -> list[int]:
    """`num_frames`, about half of it and so on while they stay 8 k + 1, which every VAE here takes
    that shortens time by 2, 4 or 8; and 1, for images."""
    lengths = [num_frames]
    while (lengths[-1] - 1) % 16 == 0 and lengths[-1] > 1:
        lengths.append((lengths[-1] - 1) // 2 + 1)
    return sorted({1, *lengths})


def balanced_batch(budget: float, tokens: int, multiple: int) -> int:
    """The multiple of `multiple`, at least one, with which a step has about `budget` tokens.

    Args:
        budget: tokens of a step; tokens: of one clip.
    """
    return max(1, round(budget / tokens / multiple)) * multiple


@dataclass(frozen=True)
class Waste:
    """What training does not see of its rows, each share in [0, 1] and a mean over samples; NaN where
    the manifest does not say.

    Attributes:
        pixels: of the picture, outside the centre that is cropped to a size's aspect.
        seconds: of a video, outside the clip that is read; other epochs may read others.
    """

    pixels: float
    seconds: float


def waste_of(
    manifest: Manifest,
    rows: Mapping[Size, np.ndarray | Sequence[int]],
    weights: Mapping[Size, float],
    fps: float,
) -> Waste:
    """The waste of a run.

    Args:
        rows: that each size draws from.
        weights: how many samples have each size, relative to each other.
    """
    aspects, seconds, images = (f(manifest) for f in (row_aspects, row_seconds, image_rows))
    pixels = np.zeros(2)  # sums of what is wasted, and of weights
    times = np.zeros(2)
    for size, indices in rows.items():
        index = np.asarray(indices, np.int64)
        ratio = aspects[index] * size[1] / size[2]
        cut = 1 - np.minimum(ratio, 1 / ratio)
        room = np.where(images[index] | np.isinf(seconds[index]), np.nan, seconds[index])
        left = 1 - np.minimum(1, size[0] / fps / room)
        for sums, shares in ((pixels, cut), (times, left)):
            known = shares[~np.isnan(shares)]
            if len(known):
                weight = weights[size] * len(known) / len(index)
                sums += (weight * float(known.mean()), weight)
    found = [float(sums[0] / sums[1]) if sums[1] else math.nan for sums in (pixels, times)]
    return Waste(*found)
