"""What kind of motion a path is, and the gravity in it, from measured positions alone."""

from __future__ import annotations

import itertools
import math

import numpy as np

from data.world import DIRECTIONS, extents
from data.world_motion import GRAVITY

# Shares of the frame height. An axis that moves less than _STILL over the clip does not move. A
# turn counts when the object goes at least _TURN both before and after it; it is one at a wall when
# the object's edge comes within _NEAR of it (up to half a frame's step of the way goes unseen).
_STILL = 0.05
_TURN = 0.03
_NEAR = 0.09
_MIN_FRAMES = 4


def _turns(track: np.ndarray, least: float) -> list[int]:
    """Frames where a 1D path turns, with a way of at least `least` before and after each."""
    turns: list[int] = []
    direction, extreme, start = 0, 0, 0
    for k in range(1, len(track)):
        if direction == 0:
            if abs(track[k] - track[start]) >= least:
                direction, extreme = int(np.sign(track[k] - track[start])), k
        elif direction * (track[k] - track[extreme]) >= 0:
            extreme = k
        elif abs(track[k] - track[extreme]) >= least:
            turns.append(extreme)
            direction, extreme = -direction, k
    return turns


def fit_gravity(y: np.ndarray, contacts: list[int]) -> float:
    """Acceleration of a height over frames, in pixels per frame squared, down positive.

    Least squares with one acceleration for the whole path, and an offset and a speed of its own for
    each flight. A contact lies somewhere next to its extreme frame, on the side where
    the fit is better.

    Args:
        y: heights in pixels at every frame, (f,), down positive.
        contacts: the frames nearest to contacts with the floor, ascending.
    Returns:
        NaN when the flights are too short to tell.
    """
    k = np.arange(len(y), dtype=np.float64)
    best, gravity = math.inf, math.nan
    for sides in itertools.product((0, 1), repeat=min(len(contacts), 6)):
        edges = [c + s for c, s in zip(contacts, sides)]
        flight = np.searchsorted(edges, k, side="right")
        ones = (flight[:, None] == np.arange(len(edges) + 1)).astype(np.float64)
        design = np.concatenate([ones, ones * k[:, None], 0.5 * k[:, None] ** 2], axis=1)
        solution, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
        if rank < design.shape[1] or len(y) <= rank:
            continue
        error = float(((design @ solution - y) ** 2).sum())
        if error < best:
            best, gravity = error, float(solution[-1])
    return gravity


def bounce_frames(y: np.ndarray, height: int) -> list[int]:
    """Frames nearest to contacts with the floor: the lowest points between fall and rebound."""
    return [k for k in _turns(y, _TURN * height) if y[k] >= np.median(y)]


def mean_velocity(track: np.ndarray) -> np.ndarray:
    """Velocity of the best straight line through a path, (2,) pixels per frame."""
    return np.polyfit(np.arange(len(track)), track, 1)[0]


def classify(
    track: np.ndarray, *, shape: str | None, radius: float, height: int, width: int, fps: float
) -> str | None:
    """The name of a path's motion, one of `data.world.MOTIONS`, or None when it is none of them.

    Args:
        track: the centroid at every frame, (f, 2) pixels, x then y, without gaps.
        shape, radius: of the object, for the distance to the walls; radius in pixels.
        height, width: of the frame, pixels.
        fps: frames per second, for the size of gravity.
    """
    if len(track) < _MIN_FRAMES:
        return None
    x, y = track[:, 0], track[:, 1]
    still = _STILL * height
    gravity = (
        0.5 * GRAVITY * height / fps**2
    )  # half the world's, the border between with and without
    turns_x, turns_y = _turns(x, _TURN * height), _turns(y, _TURN * height)
    if turns_x or turns_y:
        contacts = bounce_frames(y, height)
        upright = not turns_x and np.ptp(x) < still
        if upright and turns_y[:1] == contacts[:1] and fit_gravity(y, contacts) > gravity:
            return "bouncing"
        left, right, top, bottom = extents(shape or "circle", radius)
        near = _NEAR * height
        at_wall = [
            min(position - low, high - position) < near
            for path, turns, low, high in (
                (x, turns_x, left, width - right),
                (y, turns_y, top, height - bottom),
            )
            for position in path[turns]
        ]
        return "ricocheting" if all(at_wall) else None
    velocity = mean_velocity(track)
    travelled = float(np.hypot(*velocity)) * (len(track) - 1)
    if travelled < still:
        return None
    unit = velocity / np.hypot(*velocity)
    name = max(DIRECTIONS, key=lambda d: float(unit @ np.asarray(DIRECTIONS[d])))
    if name == "down" and fit_gravity(y, []) > gravity:
        return "falling"
    return name
