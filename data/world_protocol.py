"""Three scenarios after Kang et al., "How Far Is Video Generation from World Model: A Physical Law
Perspective" (arXiv 2411.02385): a ball at constant velocity, two balls that collide head-on, a ball
thrown level under gravity.

Lengths count in units of a tenth of the frame's shorter side, times in seconds; the ranges and the
placement are those of the authors' own generator. Everything moves to the right to begin with, as
in their training data. A clip of theirs has 32 frames, a tenth of a second apart, of which a model
is given 3.
"""

import numpy as np

from data import world_physics as physics
from data.world_motion import Canvas, Interval, Motion, pick
from data.world_scene import Drawing, Object, moving_object, with_visible

__all__ = ["SPLITS", "collision", "parabola", "uniform"]

SPLITS = ("train", "held-out", "speeds")
LONGEST = 3.2  # seconds; theirs last 3.1
MIN_FRAMES, MIN_FPS = 5, 4.0  # three to give and some to predict; the given ones show all of a ball
UNITS = 10.0

SPEED: Interval = (1.0, 4.0)
SPEED_OUT: tuple[Interval, ...] = ((0.0, 0.8), (4.5, 6.0))
RADIUS: Interval = (0.7, 1.4)
RADIUS_OUT: tuple[Interval, ...] = ((0.3, 0.6), (1.5, 2.0))
# Of colliding balls.
COLLISION_RADIUS: Interval = (0.5, 1.5)
COLLISION_RADIUS_OUT: tuple[Interval, ...] = ((0.3, 0.4), (1.7, 2.0))
GRAVITY = 2.5
_MARGIN = 0.5  # between a ball and the upper and lower edges at the start
_LATEST = 0.5  # a ball too fast to stay inside starts within this of the left edge
_DROP = 1.0  # the range of heights that a ball is thrown from
_CONTACT: Interval = (0.25, 0.75)  # theirs: after 8 to 24 of 32 frames
_BACKGROUND, _COLOURS = "black", ("red", "blue")


def _draw(
    rng: np.random.Generator, split: str, known: Interval, unknown: tuple[Interval, ...], out: bool
) -> float:
    return float(rng.uniform(*(pick(rng, unknown) if split == "speeds" and out else known)))


def _ball(
    number: int, radius: float, kind: str, motion: Motion, canvas: Canvas, scale: float
) -> Object:
    x, y = (
        physics.Path1D(path.position * scale, path.velocity * scale, path.contacts)
        for path in (motion.x, motion.y)
    )
    pixels = Motion(x, y, gravity=motion.gravity * scale)
    size, colour = "", _COLOURS[number]
    item = moving_object(colour, "circle", size, radius * scale, kind, pixels, canvas.fps)
    return with_visible(item, canvas)


def _one_ball(
    rng: np.random.Generator, canvas: Canvas, split: str, kind: str, gravity: float
) -> Drawing:
    scale = canvas.unit / UNITS
    width, height = canvas.width / scale, canvas.height / scale
    # Out of range is the radius, the velocity, or both.
    what = pick(rng, ("radius", "speed", "both"))
    radius = _draw(rng, split, RADIUS, RADIUS_OUT, what != "speed")
    speed = _draw(rng, split, SPEED, SPEED_OUT, what != "radius")
    latest = width - radius - speed * canvas.duration
    x = float(rng.uniform(radius, latest if latest >= radius else radius + _LATEST))
    top = radius + _MARGIN
    y = float(rng.uniform(top, top + _DROP if gravity else height - top))
    motion = Motion(
        physics.uniform(canvas.times, x, speed),
        physics.accelerate(canvas.times, y, 0.0, gravity),
        gravity,
    )
    return Drawing(_BACKGROUND, (_ball(0, radius, kind, motion, canvas, scale),))


def uniform(rng: np.random.Generator, canvas: Canvas, split: str) -> Drawing:
    """One ball at constant velocity."""
    return _one_ball(rng, canvas, split, "right", 0.0)


def parabola(rng: np.random.Generator, canvas: Canvas, split: str) -> Drawing:
    """One ball thrown level, from near the top."""
    return _one_ball(rng, canvas, split, "parabola", GRAVITY)


def collision(rng: np.random.Generator, canvas: Canvas, split: str) -> Drawing | None:
    """Two balls that collide head-on; None where they have no room to."""
    scale = canvas.unit / UNITS
    width, height = canvas.width / scale, canvas.height / scale
    what = pick(rng, ("radius", "speed", "both"))
    which = pick(rng, ((True, True), (True, False), (False, True)))  # balls out of range
    radii, speeds = [], []
    for out in which:
        unknown = COLLISION_RADIUS_OUT
        radii.append(_draw(rng, split, COLLISION_RADIUS, unknown, out and what != "speed"))
        speeds.append(_draw(rng, split, SPEED, SPEED_OUT, out and what != "radius"))
    # After the frames that a model is given.
    earliest = max(_CONTACT[0] * canvas.duration, 2.5 / canvas.fps)
    contact = float(rng.uniform(earliest, _CONTACT[1] * canvas.duration))
    reach = radii[0] + radii[1]
    apart = reach + (speeds[0] + speeds[1]) * contact
    # Both begin inside the frame.
    latest = width - radii[1] - apart
    if latest < radii[0]:
        return None
    x = float(rng.uniform(radii[0], latest))
    edge = max(radii) + _MARGIN
    y = float(rng.uniform(edge, height - edge))
    paths = physics.collide(
        canvas.times,
        (x, x + apart),
        (speeds[0], -speeds[1]),
        (radii[0] ** 2, radii[1] ** 2),
        reach,
    )
    objects = []
    for number, (radius, path) in enumerate(zip(radii, paths)):
        motion = Motion(path, physics.uniform(canvas.times, y, 0.0))
        objects.append(_ball(number, radius, "colliding", motion, canvas, scale))
    return Drawing(_BACKGROUND, tuple(objects))
