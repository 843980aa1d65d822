"""Who a textured thing in a clip is, from its pixels alone.

A track's pixels, in several frames, are compared with drawings of every held-out subject at the same
place and as large; the nearest is who it is. Whether a thing has a texture at all is how far its
colours lie apart.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from data.world_render import coverage
from data.world_scene import Object
from data.world_subjects import HELD_OUT_SUBJECTS, SUBJECT_RADIUS, subject, texture
from eval.tracker import Sighting, Track, track

CANDIDATES: tuple[int, ...] = tuple(sorted(HELD_OUT_SUBJECTS))
FRAMES = 5  # of a clip, in which a subject is looked at
_SIDE = 32  # larger clips are averaged down until their shorter side is less than twice this
_PHASES = 4  # places per pixel and axis that subjects are drawn at
_RADII = 10  # sizes per world's radius of a subject, between the smallest and the largest
_SMALLEST, _LARGEST = 0.6, 1.8
_REACH = 1.3  # half the side of what is compared, in radii
# A thing shows a texture if the colours inside it, within _INSIDE radii of its centre, have a standard
# deviation of more than _SPREAD (of 255) along the line on which they differ most, in the median of
# frames. After H.264 at 32 x 32 plain ones have 17 at most and held-out subjects 40 at least, in 60
# clips of each.
_INSIDE = 0.6
_SPREAD = 30.0


def shrunk(video: np.ndarray) -> np.ndarray:
    """A clip, uint8 (f h w 3), averaged in whole blocks so that its shorter side is 32 to 63 pixels.

    Smaller ones stay as they are; rows and columns that fill no block are left out.
    """
    factor = min(video.shape[1:3]) // _SIDE
    if factor < 2:
        return video
    f, h, w, c = video.shape
    h, w = h // factor, w // factor
    blocks = video[:, : h * factor, : w * factor].reshape(f, h, factor, w, factor, c)
    return blocks.mean(axis=(2, 4)).round().astype(np.uint8)


def look(video: np.ndarray, fps: float) -> Sighting:
    """The textured things of a clip, uint8 (f h w 3), `shrunk` before."""
    return track(video, fps, textured=True)


def _reach(radius: float) -> int:
    return math.ceil(_REACH * radius)


@lru_cache(maxsize=96)
def _drawings(radius: float, phase: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Every candidate's opacity (n s s 1), and its colours times that (n s s 3), in the middle of a
    square of 2 * _reach + 1 pixels, off by `phase` of 1/_PHASES pixels."""
    reach = _reach(radius)
    side = 2 * reach + 1
    x, y = (reach + part / _PHASES for part in phase)
    alphas, colours = [], []
    for identity in CANDIDATES:
        seen = subject(identity)
        still = np.array([[x, y]])
        item = Object(
            seen.colours[0], seen.shape, "", radius, "still", still, 0 * still, identity=identity
        )
        alpha = coverage(seen.shape, radius, x, y, side, side)[:, :, None]
        alphas.append(alpha)
        colours.append(alpha * texture(item, x, y, side, side))
    return np.stack(alphas).astype(np.float32), np.stack(colours).astype(np.float32)


def subject_errors(video: np.ndarray, seen: Track) -> np.ndarray:
    """How far a track's pixels are from each of CANDIDATES: mean squared difference, (n,).

    Args:
        video: uint8 (f h w 3), `shrunk`, in which the track was found.
    """
    usual = SUBJECT_RADIUS * min(video.shape[1:3])
    size = min(max(seen.radius / usual, _SMALLEST), _LARGEST)
    radius = usual * round(size * _RADII) / _RADII
    reach = _reach(radius)
    at = np.flatnonzero(seen.found)
    chosen = at[np.linspace(0, len(at) - 1, min(FRAMES, len(at))).round().astype(int)]
    errors = []
    for k in chosen:
        frame = video[k].astype(np.float64)
        background = np.median(frame, axis=(0, 1))
        padded = np.empty((frame.shape[0] + 2 * reach + 2, frame.shape[1] + 2 * reach + 2, 3))
        padded[:] = background
        padded[reach : reach + frame.shape[0], reach : reach + frame.shape[1]] = frame
        column, row = np.floor(seen.position[k] * _PHASES + 0.5).astype(int)
        (column, phase_x), (row, phase_y) = divmod(column, _PHASES), divmod(row, _PHASES)
        crop = padded[row : row + 2 * reach + 1, column : column + 2 * reach + 1]
        alpha, colour = _drawings(radius, (int(phase_x), int(phase_y)))
        errors.append(((colour + (1 - alpha) * background - crop) ** 2).mean(axis=(1, 2, 3)))
    return np.mean(errors, axis=0)


def spread(video: np.ndarray, seen: Track) -> float:
    """How far the colours inside a track lie apart: their standard deviation along the line on which
    they differ most, 0 to 255; the median of its frames."""
    height, width = video.shape[1:3]
    y, x = np.mgrid[0.5:height, 0.5:width]
    spreads = []
    for k in np.flatnonzero(seen.found):
        centre = seen.position[k]
        inside = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 <= (_INSIDE * seen.radius) ** 2
        pixels = video[k][inside].astype(np.float64)
        if len(pixels) > 2:
            spreads.append(math.sqrt(max(0.0, np.linalg.eigvalsh(np.cov(pixels.T))[-1])))
    return float(np.median(spreads)) if spreads else 0.0


def has_texture(video: np.ndarray, seen: Track) -> bool:
    """Whether a track shows more than one colour."""
    return spread(video, seen) > _SPREAD
