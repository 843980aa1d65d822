"""How much of each pixel a shape covers: antialiasing by area, at sub-pixel positions.

Each shape is one horizontal span per height y. A pixel's coverage is the integral over its height
of the span's overlap with its width. The overlap is exact; the integral takes Gauss-Legendre nodes
over the part of the row that the shape reaches, so flat edges are exact and sloped or curved ones
nearly so.
"""

import math

import numpy as np

from data.world_motion import extents

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
    free = np.ones((height, width), bool)
    if occluder is not None:
        left, top, right, bottom = occluder
        free[top:bottom, left:right] = False
    pad = math.ceil(max(extents(shape, radius))) + 1
    free = np.pad(free, 2 * pad + 1)
    shares = []
    for x, y in position.tolist():
        column, row = math.floor(x), math.floor(y)
        alpha = coverage(shape, radius, x - column + pad, y - row + pad, 2 * pad + 1, 2 * pad + 1)
        # The window's corner is at (row - pad, column - pad), and far outside all is hidden alike.
        at = (
            np.clip(row, -pad - 1, height + pad) + pad + 1,
            np.clip(column, -pad - 1, width + pad) + pad + 1,
        )
        window = free[at[0] : at[0] + 2 * pad + 1, at[1] : at[1] + 2 * pad + 1]
        shares.append(float((alpha * window).sum() / alpha.sum()))
    return np.array(shares)
