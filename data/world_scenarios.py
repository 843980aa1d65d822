"""Scenarios: worlds beside the levels of `data.world`, each for one ability of a model.

They share the level 1's colours and backgrounds. Lengths and speeds count in the shorter side of
the frame, so every scenario fits every aspect ratio. A drawing that does not fit is drawn again.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data import world_physics as physics
from data import world_protocol as protocol
from data.world_motion import (
    DIRECTIONS,
    FAST,
    SHAPES,
    SIZES,
    SLOW,
    SPEED,
    Canvas,
    Interval,
    Motion,
    extents,
    max_duration,
    pick,
    room,
    straight,
)
from data.world_scene import (
    LEVELS,
    SPLITS,
    Drawing,
    Object,
    colour_shape_pairs,
    moving_object,
    never_touch,
    with_visible,
)
from data.world_subjects import HELD_OUT_SUBJECTS, SUBJECT_RADIUS, TRAINING_SUBJECTS, subject

__all__ = ["SCENARIOS", "Scenario"]

AXES = ("left", "right", "up", "down")
# Of things that collide, in shorter sides per second: two of them have to fit into the frame.
COLLISION_SPEED: Interval = (0.15, 0.45)
COLLISION_SLOW: Interval = (0.06, 0.12)
# The contact comes after this share of the clip.
CONTACT: Interval = (0.3, 0.7)
# A bar is wider than what it hides by this many frames of motion, so one frame shows nothing.
HIDDEN_FRAMES = 1.05
_TRIES = 5000


@dataclass(frozen=True)
class Scenario:
    """How a scenario is drawn, and what it can show.

    attempt: gives None where what was drawn does not fit.
    longest: seconds between the first and the last frame, at most. longest_speeds: the same of the
        split "speeds", where it is shorter.
    shortest: the same, at least, on top of `extra_frames` frames.
    min_frames, min_fps: at least.
    """

    attempt: Callable[[np.random.Generator, Canvas, str], Drawing | None]
    splits: tuple[str, ...]
    longest: float
    shortest: float = 0.0
    extra_frames: float = 0.0
    min_frames: int = 2
    min_fps: float = 0.0
    longest_speeds: float = math.inf

    def draw(self, rng: np.random.Generator, canvas: Canvas, split: str) -> Drawing:
        """The first attempt that fits."""
        for _ in range(_TRIES):
            drawing = self.attempt(rng, canvas, split)
            if drawing is not None:
                return drawing
        raise AssertionError(f"nothing fits {canvas}, {split}")

    def check(self, name: str, split: str, num_frames: int, fps: float) -> None:
        """Refuse clips that are too short or too long.

        Raises:
            ValueError: they are.
        """
        duration = (num_frames - 1) / fps
        longest = min(self.longest, self.longest_speeds if split == "speeds" else math.inf)
        got = f"frames={num_frames} at fps={fps:g} last {duration:.2f} s"
        if duration > longest + 1e-9:
            raise ValueError(
                f"{got}, but a clip of scenario={name} ({split}) lasts {longest:.2f} s at most; "
                f"use at most {int(longest * fps + 1e-9) + 1} frames or a higher fps"
            )
        if fps < self.min_fps:
            raise ValueError(f"fps={fps:g} is too few for scenario={name}; use {self.min_fps:g}")
        least = max(self.min_frames, math.ceil(self.shortest * fps + self.extra_frames) + 1)
        if num_frames < least:
            raise ValueError(
                f"{got}, which is too short for scenario={name}; use at least {least} frames"
            )


def _background(rng: np.random.Generator) -> str:
    return pick(rng, LEVELS[1].backgrounds)


def _looks(
    rng: np.random.Generator, split: str, count: int, shapes: tuple[str, ...] = SHAPES
) -> list[tuple[str, str]]:
    """Colour and shape of `count` objects of different colours."""
    looks: list[tuple[str, str]] = []
    for _ in range(count):
        # One unseen pair is what makes a scene unseen; its company is ordinary.
        pairs = colour_shape_pairs(1, "train" if split == "combinations" and looks else split)
        taken = {colour for colour, _ in looks}
        looks.append(pick(rng, [p for p in pairs if p[0] not in taken and p[1] in shapes]))
    return looks


def _speed(rng: np.random.Generator, split: str) -> Interval:
    return pick(rng, (SLOW, FAST)) if split == "speeds" else SPEED


def _subjects(rng: np.random.Generator, canvas: Canvas, split: str) -> Drawing | None:
    known = sorted(HELD_OUT_SUBJECTS if split == "identities" else TRAINING_SUBJECTS)
    count = 2 if rng.random() < 1 / 3 else 1
    background = _background(rng)
    for _ in range(_TRIES):
        numbers = rng.choice(known, count, replace=False).tolist()
        objects = tuple(_moving_subject(rng, canvas, number) for number in numbers)
        if never_touch(objects):
            return Drawing(background, objects)
    return None


def _moving_subject(rng: np.random.Generator, canvas: Canvas, identity: int) -> Object:
    look, kind = subject(identity), pick(rng, AXES)
    radius, speed = SUBJECT_RADIUS * canvas.unit, (SPEED[0] * canvas.unit, SPEED[1] * canvas.unit)
    motion = straight(rng, canvas, room(look.shape, radius, canvas), speed, DIRECTIONS[kind])
    colour = look.colours[0]
    return moving_object(colour, look.shape, "", radius, kind, motion, canvas.fps, identity)


def _reach(shape: str, radius: float, diagonal: bool) -> float:
    """From the centroid to the edge along the line of motion."""
    edge = extents(shape, radius)[0]
    return edge * math.sqrt(2) if diagonal and shape == "square" else edge


def _collisions(rng: np.random.Generator, canvas: Canvas, split: str) -> Drawing | None:
    # The force of a contact must go through both centres, or things would begin to turn. Circles
    # do that on every line, squares on their axes, and a square's corner on a circle does.
    looks = _looks(rng, split, 2, shapes=("circle", "square"))
    diagonals = () if looks[0][1] == looks[1][1] == "square" else ("down-right", "up-right")
    line = pick(rng, ("right", "down", *diagonals))
    looks = [looks[place] for place in rng.permutation(2)]
    sizes = [pick(rng, LEVELS[1].sizes) for _ in looks]
    radii = [SIZES[size] * canvas.unit for size in sizes]
    ranges = [COLLISION_SPEED, COLLISION_SPEED]
    if split == "speeds":
        slow = rng.random() < 0.5
        ranges = [COLLISION_SLOW] * 2 if slow else [FAST, COLLISION_SPEED]
        ranges = [ranges[place] for place in rng.permutation(2)]
    one, other = (float(rng.uniform(low, high)) * canvas.unit for low, high in ranges)
    contact = float(rng.uniform(*CONTACT)) * canvas.duration
    reach = sum(_reach(look[1], radius, "-" in line) for look, radius in zip(looks, radii))
    starts, masses = (0.0, reach + (one + other) * contact), (radii[0] ** 2, radii[1] ** 2)
    paths = physics.collide(canvas.times, starts, (one, -other), masses, reach)
    # Where the frame leaves both of them room, per axis.
    origin = []
    for axis, part in enumerate(DIRECTIONS[line]):
        low, high = -math.inf, math.inf
        for (_, shape), radius, path in zip(looks, radii, paths):
            least, most = room(shape, radius, canvas)[axis]
            low = max(low, least - float((part * path.position).min()))
            high = min(high, most - float((part * path.position).max()))
        if low > high:
            return None
        origin.append(float(rng.uniform(low, high)))
    objects = []
    for (colour, shape), size, radius, path in zip(looks, sizes, radii, paths):
        x, y = (
            physics.Path1D(start + part * path.position, part * path.velocity)
            for start, part in zip(origin, DIRECTIONS[line])
        )
        motion = Motion(x, y)
        item = moving_object(colour, shape, size, radius, "colliding", motion, canvas.fps)
        item.bounce_times.extend(path.contacts)
        objects.append(item)
    return Drawing(_background(rng), tuple(objects))


def _occluders(rng: np.random.Generator, canvas: Canvas, split: str) -> Drawing | None:
    ((colour, shape),) = _looks(rng, split, 1)
    for _ in range(_TRIES // 50):
        size, kind = pick(rng, LEVELS[1].sizes), pick(rng, AXES)
        radius = SIZES[size] * canvas.unit
        axis = 0 if kind in ("left", "right") else 1
        bounds = room(shape, radius, canvas)
        # Slow things would not get past a bar before a fast one has left the frame.
        speed = float(rng.uniform(*(FAST if split == "speeds" else SPEED))) * canvas.unit
        travel = speed * canvas.duration
        across = sum(extents(shape, radius)[2 * axis : 2 * axis + 2])
        thickness = math.ceil(across + HIDDEN_FRAMES * speed / canvas.fps)
        # At the ends of the clip the centroid is outside the bar, by whole pixels of it.
        if thickness + 1 <= travel <= bounds[axis][1] - bounds[axis][0]:
            break
    else:
        return None
    motion = straight(rng, canvas, bounds, (speed, speed), DIRECTIONS[kind])
    path = (motion.x, motion.y)[axis].position
    first, last = math.ceil(path.min()), math.floor(path.max()) - thickness
    start = int(rng.integers(first, last + 1))
    bar = [0, 0, canvas.width, canvas.height]
    bar[axis], bar[axis + 2] = start, start + thickness
    occluder = (bar[0], bar[1], bar[2], bar[3])
    item = moving_object(colour, shape, size, radius, kind, motion, canvas.fps)
    shown = with_visible(item, canvas, occluder)
    return Drawing(_background(rng), (shown,), occluder=occluder)


def _pan(rng: np.random.Generator, canvas: Canvas, split: str) -> Drawing | None:
    direction = np.array(DIRECTIONS[pick(rng, AXES)])
    camera = direction * float(rng.uniform(*_speed(rng, split))) * canvas.unit
    frame = np.array([canvas.width, canvas.height], np.float64)
    looks = _looks(rng, split, pick(rng, (2, 3)))
    sizes = [pick(rng, LEVELS[1].sizes) for _ in looks]
    for _ in range(_TRIES):
        objects = [
            _panned_object(rng, canvas, *look, size, camera) for look, size in zip(looks, sizes)
        ]
        shown = np.array([((o.position >= 0) & (o.position <= frame)).all(axis=1) for o in objects])
        # Something is seen at every time, and everything at some time.
        if shown.any(axis=0).all() and shown.any(axis=1).all() and never_touch(objects):
            x, y = (camera / canvas.fps).tolist()
            seen = tuple(with_visible(item, canvas) for item in objects)
            return Drawing(_background(rng), seen, camera=(x, y))
    return None


def _panned_object(
    rng: np.random.Generator,
    canvas: Canvas,
    colour: str,
    shape: str,
    size: str,
    camera: np.ndarray,
) -> Object:
    """A still object; `camera`: its velocity, pixels per second."""
    radius, sweep = SIZES[size] * canvas.unit, camera * canvas.duration
    inside = np.array(room(shape, radius, canvas))
    # Along the pan anywhere that the camera comes by; across it inside the frame.
    low = np.where(camera == 0, inside[:, 0], np.minimum(sweep, 0))
    frame = np.array([canvas.width, canvas.height])
    high = np.where(camera == 0, inside[:, 1], frame + np.maximum(sweep, 0))
    x, y = (
        physics.uniform(canvas.times, start, -velocity)
        for start, velocity in zip(rng.uniform(low, high).tolist(), camera.tolist())
    )
    return moving_object(colour, shape, size, radius, "still", Motion(x, y), canvas.fps)


def _bounces(rng: np.random.Generator, canvas: Canvas, split: str) -> Drawing | None:
    ((colour, shape),) = _looks(rng, split, 1)
    size = pick(rng, LEVELS[1].sizes)
    radius = SIZES[size] * canvas.unit
    direction = pick(rng, tuple(DIRECTIONS.values()))
    speed = float(rng.uniform(*_speed(rng, split))) * canvas.unit
    sure = pick(rng, [axis for axis in (0, 1) if direction[axis] != 0.0])
    paths = []
    for axis, ((low, high), part) in enumerate(zip(room(shape, radius, canvas), direction)):
        velocity = part * speed
        start = float(rng.uniform(low, high))
        if axis == sure:  # a first contact within the clip, however short
            within = min(0.9 * canvas.duration, (high - low) / abs(velocity))
            start = (high if velocity > 0 else low) - velocity * float(rng.uniform(0.1, 1)) * within
        paths.append(physics.reflect(canvas.times, start, velocity, low, high))
    motion = Motion(paths[0], paths[1])
    item = moving_object(colour, shape, size, radius, "ricocheting", motion, canvas.fps)
    return Drawing(_background(rng), (item,))


_STRAIGHT = max_duration(AXES, SPEED)


def _protocol(attempt: Callable[[np.random.Generator, Canvas, str], Drawing | None]) -> Scenario:
    return Scenario(
        attempt,
        protocol.SPLITS,
        protocol.LONGEST,
        min_frames=protocol.MIN_FRAMES,
        min_fps=protocol.MIN_FPS,
    )


SCENARIOS: dict[str, Scenario] = {
    "subjects": Scenario(_subjects, ("train", "held-out", "identities"), _STRAIGHT),
    "collisions": Scenario(_collisions, SPLITS, longest=2.2, min_frames=5),
    # Long enough to get past a bar that is wider than the object, short enough to stay inside.
    "occluders": Scenario(
        _occluders,
        SPLITS,
        _STRAIGHT,
        shortest=0.8,
        extra_frames=HIDDEN_FRAMES,
        longest_speeds=1.3,
    ),
    "pan": Scenario(_pan, SPLITS, longest=2.4),
    "bounces": Scenario(_bounces, SPLITS, longest=math.inf),
    "uniform": _protocol(protocol.uniform),
    "collision": _protocol(protocol.collision),
    "parabola": _protocol(protocol.parabola),
}
