"""Picture quality (PSNR, SSIM) and figures with error bars.

Everything takes numpy arrays. An `Estimate` is a figure, the number of clips behind it and its 95%
bootstrap interval; the resampling is seeded, so the same outcomes give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import convolve1d

NUM_RESAMPLES = 10_000
_ALPHA = 0.05
_PIECE = 2**20  # pixels of a clip that are worked on at once


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% interval, which is NaN for a single number; all are NaN when `num` is 0."""

    value: float
    low: float
    high: float
    num: int

    def to_json(self) -> dict[str, float | int | None]:
        """The four fields, with None for NaN (JSON has none)."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        clean = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        return {**clean, "num": self.num}

    def __str__(self) -> str:
        if self.num == 0:
            return "n/a"
        if not math.isfinite(self.low):
            return f"{self.value:.3f} N={self.num}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] N={self.num}"


_NOTHING = Estimate(math.nan, math.nan, math.nan, 0)


def _quantiles(samples: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(samples, [_ALPHA / 2, 1 - _ALPHA / 2])
    return float(low), float(high)


def mean_estimate(values: Sequence[float] | np.ndarray, *, seed: int = 0) -> Estimate:
    """Mean of one number per clip and its percentile bootstrap interval (Efron 1979).

    Of a single clip every resample is the same, so its interval would claim certainty: it has none.

    Args:
        values: one finite number per clip, in any unit; None of them may be NaN.
        seed: of the resampling.
    Raises:
        ValueError: a value is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        return _NOTHING
    if not np.isfinite(array).all():
        raise ValueError(f"got {(~np.isfinite(array)).sum()} values that are not finite; drop them")
    if array.size == 1:
        return Estimate(float(array[0]), math.nan, math.nan, 1)
    rng = np.random.default_rng(seed)
    # In slices: all indices at once would be 80 MB for a thousand clips.
    means = [
        array[rng.integers(array.size, size=(NUM_RESAMPLES // 10, array.size))].mean(axis=1)
        for _ in range(10)
    ]
    return Estimate(float(array.mean()), *_quantiles(np.concatenate(means)), array.size)


def proportion(outcomes: Sequence[bool] | np.ndarray, *, seed: int = 0) -> Estimate:
    """Share of clips that are right and its percentile bootstrap interval.

    A resample of n yes/no outcomes is a binomial draw, so the bootstrap needs no index matrix. When
    all outcomes agree every resample is the same and the bootstrap interval has no width, which
    would claim certainty; the exact (Clopper-Pearson) bound takes its place there.

    Args:
        outcomes: one yes or no per clip.
        seed: of the resampling.
    """
    array = np.asarray(outcomes, dtype=bool)
    num = array.size
    if num == 0:
        return _NOTHING
    right = int(array.sum())
    if right in (0, num):
        bound = (_ALPHA / 2) ** (1 / num)
        return Estimate(1.0, bound, 1.0, num) if right else Estimate(0.0, 0.0, 1 - bound, num)
    draws = np.random.default_rng(seed).binomial(num, right / num, NUM_RESAMPLES) / num
    return Estimate(right / num, *_quantiles(draws), num)


def difference(first: Sequence[bool], second: Sequence[bool], *, seed: int = 0) -> Estimate:
    """Share of the same clips that are right the first time, less the share the second time.

    The interval is `paired_difference`'s; where all clips differ alike it has no width, and the exact
    bound of `proportion` is put around it.

    Args:
        first, second: one yes or no per clip, in the same order.
        seed: of the resampling.
    """
    estimate = paired_difference(first, second, seed=seed)
    if estimate.num == 0 or len({float(a) - float(b) for a, b in zip(first, second)}) != 1:
        return estimate
    value, margin = estimate.value, 1 - (_ALPHA / 2) ** (1 / estimate.num)
    return Estimate(value, max(-1.0, value - margin), min(1.0, value + margin), estimate.num)


def paired_difference(
    first: Sequence[float], second: Sequence[float], *, seed: int = 0
) -> Estimate:
    """Mean of first minus second over the same clips, with a paired bootstrap interval: clips are
    drawn, and both of a clip's figures with it, so that what makes a clip hard cancels.

    Args:
        first, second: one finite number per clip in any unit, in the same order.
        seed: of the resampling.
    Raises:
        ValueError: not as many of one as of the other, or a value is not finite.
    """
    if len(first) != len(second):
        raise ValueError(f"got {len(first)} and {len(second)} figures, expected the same clips")
    return mean_estimate([float(a) - float(b) for a, b in zip(first, second)], seed=seed)


def _same_shape(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape or a.ndim < 3:
        raise ValueError(
            f"got pictures of shapes {a.shape} and {b.shape}, expected two alike (... h w c)"
        )


def _pieces(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Some frames (n h w c) of both at a time in float64: all of a long clip would fill the memory."""
    h, w, c = a.shape[-3:]
    x, y = a.reshape(-1, h, w, c), b.reshape(-1, h, w, c)
    step = max(1, _PIECE // (h * w))
    for first in range(0, len(x), step):
        piece = slice(first, first + step)
        yield x[piece].astype(np.float64), y[piece].astype(np.float64)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB over a whole clip; infinite for equal clips.

    Args:
        a, b: uint8, (... h w c), alike.
    Raises:
        ValueError: shapes differ.
    """
    _same_shape(a, b)
    errors = [float(np.sum((x - y) ** 2)) for x, y in _pieces(a, b)]
    return _decibels(math.fsum(errors) / a.size)


def temporal_psnr(a: np.ndarray, b: np.ndarray) -> float:
    """PSNR in dB of the changes from frame to frame, x[k + 1] - x[k], with the peak of pictures, 255.

    Errors that stay the same in every frame cost nothing here; flicker, which is the difference
    between the errors of neighbouring frames, is all that counts. Infinite for equal changes, NaN for
    a single frame.

    Args:
        a, b: uint8, (f h w c), alike.
    Raises:
        ValueError: shapes differ.
    """
    _same_shape(a, b)
    if len(a) < 2:
        return math.nan
    errors, before = [], None
    for x, y in _pieces(a, b):
        error = x - y if before is None else np.concatenate([before, x - y])
        errors.append(float(np.sum(np.diff(error, axis=0) ** 2)))
        before = error[-1:]
    return _decibels(math.fsum(errors) / a[1:].size)


def _decibels(squared_error: float) -> float:
    return math.inf if squared_error == 0 else 10 * math.log10(255.0**2 / squared_error)


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity, mean over pixels, channels and frames (Wang et al. 2004).

    The paper's settings: an 11-tap Gaussian window with sigma 1.5, K1 = 0.01, K2 = 0.03, windows
    that lie wholly inside the picture.

    Args:
        a, b: uint8, (... h w c), alike, h and w at least 11.
    Raises:
        ValueError: shapes differ, or the picture is smaller than the window.
    """
    _same_shape(a, b)
    h, w = a.shape[-3:-1]
    if min(h, w) < 11:
        raise ValueError(f"got pictures of {h}x{w}, expected at least 11x11, SSIM's window")
    taps = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    taps /= taps.sum()

    def blur(z: np.ndarray) -> np.ndarray:
        return convolve1d(convolve1d(z, taps, axis=1), taps, axis=2)[:, 5:-5, 5:-5]

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    total, count = 0.0, 0
    for x, y in _pieces(a, b):
        mean_x, mean_y = blur(x), blur(y)
        var_x = blur(x * x) - mean_x**2
        var_y = blur(y * y) - mean_y**2
        covariance = blur(x * y) - mean_x * mean_y
        score = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
        score /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
        total, count = total + float(score.sum()), count + score.size
    return total / count
