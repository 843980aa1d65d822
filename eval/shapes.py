"""Which shape a blob is, by fitting the world's own shapes to it.

All shapes of a size cover the same area, so the blob's area and centroid place every candidate
before anything is fitted; only the small freedoms are searched: the radius around the
area's, and how blurred the picture is (video coding, a VAE). The errors are pooled over all frames
of a clip, because a shape does not change, and tell apart what one frame of 8 pixels cannot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

from data.world import SHAPES, SIZES
from data.world_render import coverage

_RADII = (0.92, 1.0, 1.08)  # times the radius of the circle with the blob's area
_BLURS = (0.0, 0.5, 0.8, 1.2)  # standard deviations, pixels
# A blob whose best fit leaves more than this share of its energy unexplained is no known shape; of
# real clips at 23 dB the fits leave 0.04 at most.
_MAX_RESIDUAL = 0.12
# Frames of 8 pixels err now and then, but one shape that turns into another is neither.
_AGREE = 0.75


@dataclass(frozen=True)
class ShapeFit:
    """The best shape, None when nothing fits, and its radius in pixels.

    residual: the share of the blob's energy that the best fit leaves unexplained, in [0, 1].
    agreement: the share of frames that alone would be given the same shape.
    """

    shape: str | None
    radius: float
    residual: float
    agreement: float


def fit_shape(alphas: np.ndarray, centres: np.ndarray) -> ShapeFit:
    """Fit every shape to a blob seen in several frames.

    Args:
        alphas: the blob's opacity per pixel, about 0 outside and 1 inside, (f h w), f >= 1.
        centres: its centroids, (f, 2) pixels, x then y.
    """
    area = float(np.median(alphas.sum(axis=(1, 2))))
    radius = math.sqrt(max(area, 1.0) / math.pi)
    errors = np.stack([_errors(alphas, centres, shape, radius) for shape in SHAPES])
    best = int(errors.sum(axis=1).argmin())
    residual = float(errors[best].sum() / (alphas**2).sum())
    agreement = float((errors.argmin(axis=0) == best).mean())
    known = residual <= _MAX_RESIDUAL and agreement >= _AGREE
    return ShapeFit(SHAPES[best] if known else None, radius, residual, agreement)


def _errors(alphas: np.ndarray, centres: np.ndarray, shape: str, radius: float) -> np.ndarray:
    """Squared error per frame, (f,), of the radius and the blur that fit all frames best."""
    _, h, w = alphas.shape
    best = (alphas**2).sum(axis=(1, 2))
    for factor in _RADII:
        sharp = np.stack([coverage(shape, radius * factor, x, y, h, w) for x, y in centres])
        for blur in _BLURS:
            template = gaussian_filter(sharp, (0, blur, blur)) if blur else sharp
            if not template.any():  # a blob of noise, whose centre may be outside the frame
                continue
            # Opacity is known up to the error of the estimated colour, so its scale is fitted.
            scale = (alphas * template).sum() / (template**2).sum()
            errors = ((alphas - scale * template) ** 2).sum(axis=(1, 2))
            if errors.sum() < best.sum():
                best = errors
    return best


def size_name(radius: float, height: int) -> str:
    """The size whose radius is nearest, for a radius in pixels in frames of `height` pixels."""
    return min(SIZES, key=lambda name: abs(SIZES[name] * height - radius))
