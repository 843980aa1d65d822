"""Histograms as inline SVG, for pages that need nothing but themselves."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_WIDTH, _HEIGHT = 330, 164
_LEFT, _RIGHT, _TOP, _BOTTOM = 8, 8, 24, 34
_BINS = 40
_NUM_APART = 3  # bins of the axis for what a log scale cannot show: a bar and a gap
_MAX_DECADES = 6


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`; with `log`, a log scale. With `apart`, values below `low`, such as zeros,
    have a bar of their own on the left."""

    low: float
    high: float
    log: bool = False
    apart: bool = False

    def places(self, values: np.ndarray) -> np.ndarray:
        """Where values are, in shares of the axis, 0 to 1."""
        low, high = self.low, self.high
        if not self.log:
            return (values - low) / (high - low)
        shares = np.log(np.maximum(values, low) / low) / math.log(high / low)
        if not self.apart:
            return shares
        gap = _NUM_APART / _BINS
        return np.where(values < low, 0.0, gap + (1 - gap) * shares)

    def place_of_mark(self, mark: float, lowest: float) -> float | None:
        """Where a threshold is; None where it lies beyond all values."""
        if not lowest <= mark <= self.high:
            return None
        if self.apart and mark < self.low:  # between the bar on the left and the others
            return 0.5 * _NUM_APART / _BINS
        return float(self.places(np.array(mark)))


def axis_of(values: np.ndarray) -> Axis:
    """The axis for all of `values`: linear, or on a log scale where they span over two decades."""
    low, high = float(values.min()), float(values.max())
    above = values[values > 0]
    if low >= 0 and len(above) and high > 100 * above.min():
        least = max(float(above.min()), high / 10**_MAX_DECADES)
        return Axis(least, high, log=True, apart=low < least)
    if not math.isfinite(high - low) or high - low < 1e-9 * max(1.0, abs(high)):
        margin = 0.05 * abs(low) or 0.5
        return Axis(low - margin, low + margin)
    return Axis(low, high)


def histogram(
    title: str, values: Sequence[float], chosen: Sequence[float], marks: Mapping[str, float]
) -> str:
    """How `values` are spread, those of `chosen` in front of them.

    The axis runs from the least to the largest value, on a log scale where they span over two
    decades. Thresholds within are drawn as lines; all are named below.

    Args:
        title: of the chart; escaped here.
        values: all.
        chosen: some of them.
        marks: thresholds by name.
    Returns:
        An <svg> element; empty without values.
    """
    if not len(values):
        return ""
    numbers = np.asarray(values, float)
    axis = axis_of(numbers)
    counts = [
        np.histogram(axis.places(np.asarray(some, float)).clip(0, 1), _BINS, (0, 1))[0]
        for some in (values, chosen)
    ]
    most = max(1, int(counts[0].max()))
    lines, named = _marks(axis, numbers, marks)
    base = _HEIGHT - _BOTTOM
    left = f"{numbers.min():.4g}" if not axis.apart else _apart_label(axis, numbers)
    scale = "log scale" if axis.log else ""
    labels = (
        f'<text x="{_LEFT}" y="15">{html.escape(title)}</text>'
        f'<text x="{_WIDTH - _RIGHT}" y="15" text-anchor="end">{most}</text>'
        f'<text x="{_LEFT}" y="{base + 13}">{left}</text>'
        f'<text x="{_WIDTH / 2:g}" y="{base + 13}" text-anchor="middle">{scale}</text>'
        f'<text x="{_WIDTH - _RIGHT}" y="{base + 13}" text-anchor="end">{numbers.max():.4g}</text>'
        f'<text x="{_LEFT}" y="{base + 28}" style="fill: #c62b22">{html.escape(named)}</text>'
    )
    line = f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base}" y2="{base}" stroke="#888"/>'
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">'
        f"{labels}{_bars(counts, most)}{lines}{line}</svg>"
    )


def _apart_label(axis: Axis, values: np.ndarray) -> str:
    below = values[values < axis.low].max()
    return f"{'' if below == 0 else 'under '}{below:.4g} | {axis.low:.4g}"


def _bars(counts: Sequence[np.ndarray], most: int) -> str:
    bar = (_WIDTH - _LEFT - _RIGHT) / _BINS
    shapes = []
    for colour, each in zip(("#c3c8d0", "#2f6fd0"), counts):
        for index, count in enumerate(each.tolist()):
            if count:
                tall = (_HEIGHT - _TOP - _BOTTOM) * count / most
                shapes.append(
                    f'<rect x="{_LEFT + index * bar:.1f}" y="{_HEIGHT - _BOTTOM - tall:.1f}" '
                    f'width="{bar - 0.6:.1f}" height="{tall:.1f}" fill="{colour}"/>'
                )
    return "".join(shapes)


def _marks(axis: Axis, values: np.ndarray, marks: Mapping[str, float]) -> tuple[str, str]:
    """The thresholds as lines, and in words."""
    lines, words = [], []
    for name, mark in marks.items():
        share = axis.place_of_mark(mark, float(values.min()))
        if share is None:
            words.append(f"{name} {mark:g} is {'beyond' if mark > axis.high else 'below'}")
            continue
        words.append(f"{name} {mark:g}")
        x = _LEFT + share * (_WIDTH - _LEFT - _RIGHT)
        lines.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" '
            'stroke="#c62b22" stroke-width="1.5"/>'
        )
    return "".join(lines), ", ".join(words)
