"""Histograms as inline SVG, for pages that need nothing but themselves."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import numpy as np

_WIDTH, _HEIGHT = 330, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 8, 8, 24, 20
_BINS = 40


def histogram(
    title: str, values: Sequence[float], chosen: Sequence[float], marks: Sequence[float]
) -> str:
    """How `values` are spread, those of `chosen` in front of them.

    The axis runs over all values but the outermost hundredth, which are counted in the first and
    last bars, and over `marks`, which are drawn as lines.

    Args:
        title: of the chart; escaped here.
        values: all.
        chosen: some of them.
        marks: thresholds.
    Returns:
        An <svg> element; empty without values.
    """
    if not len(values):
        return ""
    low, high = _range(np.asarray(values, float), marks)
    counts = [
        np.histogram(np.clip(np.asarray(some, float), low, high), _BINS, (low, high))[0]
        for some in (values, chosen)
    ]
    most = max(1, int(counts[0].max()))
    inner_width, inner_height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    bar = inner_width / _BINS
    shapes = []
    for colour, each in zip(("#c3c8d0", "#2f6fd0"), counts):
        for index, count in enumerate(each.tolist()):
            if count:
                tall = inner_height * count / most
                shapes.append(
                    f'<rect x="{_LEFT + index * bar:.1f}" y="{_HEIGHT - _BOTTOM - tall:.1f}" '
                    f'width="{bar - 0.6:.1f}" height="{tall:.1f}" fill="{colour}"/>'
                )
    for mark in marks:
        x = _LEFT + (mark - low) / (high - low) * inner_width
        shapes.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" '
            'stroke="#c62b22" stroke-width="1.5"/>'
        )
    base = _HEIGHT - 6
    labels = (
        f'<text x="{_LEFT}" y="15">{html.escape(title)}</text>'
        f'<text x="{_LEFT}" y="{base}">{low:.4g}</text>'
        f'<text x="{_WIDTH - _RIGHT}" y="{base}" text-anchor="end">{high:.4g}</text>'
        f'<text x="{_WIDTH - _RIGHT}" y="15" text-anchor="end">{most}</text>'
    )
    axis = (
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{_HEIGHT - _BOTTOM}" '
        f'y2="{_HEIGHT - _BOTTOM}" stroke="#888"/>'
    )
    body = "".join(shapes)
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">'
        f"{labels}{body}{axis}</svg>"
    )


def _range(values: np.ndarray, marks: Sequence[float]) -> tuple[float, float]:
    low, high = np.percentile(values, [1, 99]).tolist()
    low, high = min([low, *marks]), max([high, *marks])
    if not math.isfinite(high - low) or high - low < 1e-9 * max(1.0, abs(high)):
        return low - 0.5, low + 0.5
    return low, high
