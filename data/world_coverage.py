"""How much of each pixel a shape covers: antialiasing by area, at sub-pixel positions.

Each shape is one horizontal span per height y. A pixel's coverage is the integral over its height
of the span's overlap with its width. The overlap is exact; the integral takes Gauss-Legendre nodes
over the part of the row that the shape reaches, so flat edges are exact and sloped or curved ones
nearly so.
"""

import math

import numpy as np

from data.world_motion import extents

Box = tuple[float, float, float, float]  # left, top, right, bottom

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(6)


def _spans(shape: str, radius: float, y: np.ndarray) -> np.ndarray:
    """Half the width of the shape at heights `y` (from the centroid, down), zero outside it."""
    _, right, top, bottom = extents(shape, radius)
    if shape == "circle":
        half = np.sqrt(np.maximum(radius**2 - y**2, 0.0))
    elif shape == "square":
        half = np.full_like(y, right)
    else:
        half = (y + top) * (right / (top + bottom))
    return np.where((y >= -top) & (y <= bottom), np.maximum(half, 0.0), 0.0)


def coverage(shape: str, radius: float, x: float, y: float, height: int, width: int) -> np.ndarray:
    """The share of each pixel that the shape covers, (h, w) in [0, 1].

    Args:
        radius: of the circle of equal area, pixels.
        x, y: centroid in pixels; pixel (i, j) covers [j, j + 1) x [i, i + 1).
    """
    left, right, top, bottom = extents(shape, radius)
    out = np.zeros((height, width))
    rows = np.arange(max(0, math.floor(y - top)), min(height, math.ceil(y + bottom)))
    columns = np.arange(max(0, math.floor(x - left)), min(width, math.ceil(x + right)))
    if not (len(rows) and len(columns)):
        return out
    # The part of each row between the shape's top and bottom, and the nodes in it: (row, node).
    start = np.maximum(rows, y - top)[:, None]
    length = np.minimum(rows + 1, y + bottom)[:, None] - start
    nodes = start + length * (_NODES + 1) / 2
    half = _spans(shape, radius, nodes - y)[:, :, None]
    overlap = np.minimum(columns + 1, x + half) - np.maximum(columns, x - half)
    weights = (length * _WEIGHTS / 2)[:, :, None]
    window = (np.maximum(overlap, 0.0) * weights).sum(axis=1)
    out[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = np.clip(window, 0.0, 1.0)
    return out


def visible_shares(
    shape: str,
    radius: float,
    position: np.ndarray,
    height: int,
    width: int,
    occluder: tuple[int, int, int, int] | None = None,
) -> np.ndarray:
    """The share of a shape that is inside the frame and outside the occluder, (f,) in [0, 1].

    Args:
        position: centroids, (f, 2) pixels.
        occluder: (left, top, right, bottom) in pixels.
    """
    frame = (0, 0, width, height)
    left, right, top, bottom = extents(shape, radius)
    shares = []
    for x, y in position.tolist():
        box = (x - left, y - top, x + right, y + bottom)
        if _disjoint(box, frame) or (occluder is not None and _within(box, occluder)):
            shares.append(0.0)
        elif _within(box, frame) and (occluder is None or _disjoint(box, occluder)):
            shares.append(1.0)
        else:
            shares.append(_drawn_share(shape, radius, box, frame, occluder))
    return np.array(shares)


def _within(box: Box, other: Box) -> bool:
    return box[0] >= other[0] and box[1] >= other[1] and box[2] <= other[2] and box[3] <= other[3]


def _disjoint(box: Box, other: Box) -> bool:
    return box[2] <= other[0] or box[0] >= other[2] or box[3] <= other[1] or box[1] >= other[3]


def _drawn_share(shape: str, radius: float, box: Box, frame: Box, occluder: Box | None) -> float:
    """By the shape's own pixels, wherever they are."""
    left, _, top, _ = extents(shape, radius)
    column, row = math.floor(box[0]), math.floor(box[1])
    columns = np.arange(column, math.ceil(box[2]))
    rows = np.arange(row, math.ceil(box[3]))[:, None]
    x, y = box[0] + left - column, box[1] + top - row
    alpha = coverage(shape, radius, x, y, len(rows), len(columns))
    free = (columns >= frame[0]) & (columns < frame[2]) & (rows >= frame[1]) & (rows < frame[3])
    if occluder is not None:
        hidden = (columns >= occluder[0]) & (columns < occluder[2])
        free &= ~(hidden & (rows >= occluder[1]) & (rows < occluder[3]))
    # The same order of summation above and below, so that all is exactly 1 and nothing exactly 0.
    return float((alpha * free).sum() / alpha.sum())
