"""How objects of the procedural world move: shapes' extents, speeds, and freely drawn paths.

Speeds and gravity are constants per second and *frame height*, so that the same scene looks the
same at every resolution and frame rate. Every path keeps its object entirely inside the frame.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from data import world_physics as physics
from data.world_physics import Path1D

T = TypeVar("T")
Interval = tuple[float, float]

SHAPES: tuple[str, ...] = ("circle", "square", "triangle")
# Radius of the circle of equal area, as a fraction of the frame height.
SIZES: dict[str, float] = {"small": 0.13, "large": 0.165}

_DIAGONAL = math.sqrt(0.5)
# Unit vectors (x right, y down) of the straight motions.
DIRECTIONS: dict[str, tuple[float, float]] = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "up-left": (-_DIAGONAL, -_DIAGONAL),
    "up-right": (_DIAGONAL, -_DIAGONAL),
    "down-left": (-_DIAGONAL, _DIAGONAL),
    "down-right": (_DIAGONAL, _DIAGONAL),
}
# falling: from rest, without reaching the floor. bouncing: thrown down, off the floor at least
# once. ricocheting: straight, elastically off at least one wall, no gravity.
MOTIONS: tuple[str, ...] = (*DIRECTIONS, "falling", "bouncing", "ricocheting")
# Their speed does not follow from a drawn number alone, so there is no out-of-range version.
GRAVITY_MOTIONS: tuple[str, ...] = ("falling", "bouncing")

# Frame heights per second; at 32 pixels and 8 frames per second 1.1 to 1.9 pixels per frame.
SPEED: Interval = (0.275, 0.475)
SLOW: Interval = (0.1, 0.2)
FAST: Interval = (0.52, 0.62)
# Frame heights per second squared; at 32 pixels and 8 frames per second 0.5 pixels per frame^2.
GRAVITY = 1.0
# Initial downward speed of a bouncing object, frame heights per second.
THROW: Interval = (0.3, 0.6)
RESTITUTION: Interval = (0.6, 0.9)


@dataclass(frozen=True)
class Canvas:
    """The frame and the time that a path has to fit: pixels, frames, frames per second."""

    height: int
    width: int
    num_frames: int
    fps: float

    @property
    def unit(self) -> int:
        """Pixels of the shorter side: what every scenario but `shapes` measures lengths in."""
        return min(self.height, self.width)

    @property
    def duration(self) -> float:
        """Seconds between the first and the last frame."""
        return (self.num_frames - 1) / self.fps

    @property
    def times(self) -> np.ndarray:
        """When the frames are, in seconds, (f,)."""
        return np.arange(self.num_frames) / self.fps


@dataclass(frozen=True)
class Motion:
    """A path in the plane and what shaped it. Pixels and seconds; x, then y."""

    x: Path1D
    y: Path1D
    gravity: float = 0.0
    restitution: float = 1.0


def extents(shape: str, radius: float) -> tuple[float, float, float, float]:
    """Distances from the centroid to the left, right, top and bottom edges, in units of `radius`.

    The square is axis-aligned; the triangle is equilateral and points up. All have the area
    pi * radius^2.
    """
    if shape == "circle":
        return radius, radius, radius, radius
    if shape == "square":
        half = radius * math.sqrt(math.pi) / 2
        return half, half, half, half
    assert shape == "triangle", shape
    side = radius * math.sqrt(4 * math.pi / math.sqrt(3))
    circumradius = side / math.sqrt(3)
    return side / 2, side / 2, circumradius, circumradius / 2


def max_duration(motions: Sequence[str], speed: Interval, aspect: float = 1.0) -> float:
    """Longest time between first and last frame, in seconds, in which all `motions` fit.

    Args:
        speed: the range of speeds; the slowest must fit.
        aspect: width over height of the frame.
    """
    left, right, top, bottom = extents("triangle", max(SIZES.values()))
    across, down = aspect - left - right, 1.0 - top - bottom
    limit = min(across, down) / speed[0]
    if "falling" in motions:
        limit = min(limit, math.sqrt(2 * down / GRAVITY))
    return limit


def room(shape: str, radius: float, canvas: Canvas) -> tuple[Interval, Interval]:
    """Where the centroid may be for the shape to be inside the frame: across and down, pixels."""
    left, right, top, bottom = extents(shape, radius)
    return (left, canvas.width - right), (top, canvas.height - bottom)


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One of `items`, all equally likely."""
    return items[int(rng.integers(len(items)))]


def draw_motion(
    rng: np.random.Generator,
    canvas: Canvas,
    motion: str,
    speed: Interval,
    shape: str,
    radius: float,
) -> Motion:
    """Draw a path of the kind `motion` for an object that has to stay inside the frame.

    Args:
        speed: range of speeds, frame heights per second; used by motions without gravity.
        radius: of the circle of equal area, pixels.
    """
    across, down = room(shape, radius, canvas)
    pixels = (speed[0] * canvas.height, speed[1] * canvas.height)
    if motion == "falling":
        return _falling(rng, canvas, across, down)
    if motion == "bouncing":
        return _bouncing(rng, canvas, across, down)
    if motion == "ricocheting":
        return _ricocheting(rng, canvas, (across, down), pixels)
    return straight(rng, canvas, (across, down), pixels, DIRECTIONS[motion])


def straight(
    rng: np.random.Generator,
    canvas: Canvas,
    bounds: tuple[Interval, Interval],
    speed: Interval,
    direction: tuple[float, float],
) -> Motion:
    """Constant velocity, inside the frame for the whole clip.

    Args:
        bounds: of the centroid, as `room`.
        speed: the range to draw from, pixels per second.
        direction: a unit vector.
    """
    # A large object in a long clip has room only for the slower part of the range.
    fit = min(
        (high - low) / (abs(part) * canvas.duration)
        for (low, high), part in zip(bounds, direction)
        if part != 0.0
    )
    drawn = float(rng.uniform(speed[0], min(speed[1], fit)))
    paths = []
    for (low, high), part in zip(bounds, direction):
        travel = part * drawn * canvas.duration
        start = float(rng.uniform(low - min(0.0, travel), high - max(0.0, travel)))
        paths.append(physics.uniform(canvas.times, start, part * drawn))
    return Motion(*paths)


def _falling(rng: np.random.Generator, canvas: Canvas, across: Interval, down: Interval) -> Motion:
    gravity = GRAVITY * canvas.height
    x = physics.uniform(canvas.times, float(rng.uniform(*across)), 0.0)
    start = float(rng.uniform(down[0], down[1] - 0.5 * gravity * canvas.duration**2))
    return Motion(x, physics.accelerate(canvas.times, start, 0.0, gravity), gravity)


def _bouncing(rng: np.random.Generator, canvas: Canvas, across: Interval, down: Interval) -> Motion:
    gravity = GRAVITY * canvas.height
    x = physics.uniform(canvas.times, float(rng.uniform(*across)), 0.0)
    velocity = float(rng.uniform(*THROW)) * canvas.height
    restitution = float(rng.uniform(*RESTITUTION))
    # Early enough to see the rebound, late enough to see the fall. In one second even the fastest
    # fall starts, and the highest rebound ends, inside the frame.
    contact = float(rng.uniform(0.25, 0.6)) * min(canvas.duration, 1.0)
    start = down[1] - velocity * contact - 0.5 * gravity * contact**2
    y = physics.drop(canvas.times, start, velocity, gravity, down[1], restitution)
    return Motion(x, y, gravity, restitution)


def _ricocheting(
    rng: np.random.Generator,
    canvas: Canvas,
    bounds: tuple[Interval, Interval],
    speed: Interval,
) -> Motion:
    direction = pick(rng, tuple(DIRECTIONS.values()))
    drawn = float(rng.uniform(*speed))
    # The axis on which a contact is sure to happen; the other one is placed freely.
    sure = pick(rng, [axis for axis in (0, 1) if direction[axis] != 0.0])
    contact = float(rng.uniform(0.25, 0.7)) * canvas.duration
    paths = []
    for axis, ((low, high), part) in enumerate(zip(bounds, direction)):
        velocity = part * drawn
        start = float(rng.uniform(low, high))
        if axis == sure:
            # In a frame much narrower than high the object crosses its room sooner.
            contact = min(contact, (high - low) / abs(velocity))
            start = (high if velocity > 0 else low) - velocity * contact
        paths.append(physics.reflect(canvas.times, start, velocity, low, high))
    return Motion(*paths)
