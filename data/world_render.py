"""Draws scenes of the procedural world: antialiased by area coverage, at sub-pixel positions.

Each shape is one horizontal span per height y. A pixel's coverage is the integral over its height
of the span's overlap with its width. The overlap is exact; the integral takes Gauss-Legendre nodes
over the part of the row that the shape reaches, so flat edges are exact and sloped or curved ones
nearly so.
"""

import math

import numpy as np

from data.world import BACKGROUNDS, COLOURS, Scene, extents

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


def render(scene: Scene) -> np.ndarray:
    """The clip of a scene, uint8 (f h w 3). Objects are drawn in order, the last one on top."""
    size = (scene.num_frames, scene.height, scene.width)
    video = np.empty((*size, 3))
    video[:] = BACKGROUNDS[scene.background]
    for item in scene.objects:
        colour = np.asarray(COLOURS[item.colour], np.float64)
        for frame, (x, y) in zip(video, item.position):
            alpha = coverage(item.shape, item.radius, x, y, scene.height, scene.width)[:, :, None]
            frame += alpha * (colour - frame)
    return np.round(video).astype(np.uint8)
