"""The procedural world: coloured shapes that move by exact physics, in levels of difficulty.

A clip is a pure function of (seed, split, level, index). Space is measured in pixels with the
origin in the upper left corner of the frame: x runs right, y runs down, pixel (row i, column j)
covers [j, j+1) x [i, i+1), so the middle of a frame of width w is at x = w / 2. Frame k shows the
time k / fps. How objects move is in `data.world_motion`, the closed forms in `data.world_physics`.

An object's position is its centroid. A size is the radius of the circle with the object's area:
all shapes of a size cover the same area, so a shape cannot be told by how much colour it puts on
the screen, and a size is read from the area alone.

Objects of one scene never touch: paths that would come within a pixel of each other are drawn
again. There are no collisions here, and things that pass through one another would teach ghosts.
"""

import math
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import numpy as np

from data.randomness import numpy_generator
from data.world_motion import (
    DIRECTIONS,
    FAST,
    GRAVITY_MOTIONS,
    MOTIONS,
    SHAPES,
    SIZES,
    SLOW,
    SPEED,
    Canvas,
    draw_motion,
    extents,
    max_duration,
    pick,
)

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "DIRECTIONS",
    "LEVELS",
    "MOTIONS",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "UNSEEN_PAIRS",
    "Level",
    "Object",
    "Scene",
    "check_arguments",
    "colour_shape_pairs",
    "extents",
    "make_scene",
    "split_motions",
]

MIN_SIDE = 16  # pixels; below, the shapes of small objects cannot be told apart
MIN_ASPECT = 0.75  # width over height

# Every object has a luma of at least 115 and every background of at most 75 (of 255), so outlines
# live in the full-resolution luma plane and survive 4:2:0 chroma subsampling.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (255, 66, 56),
    "green": (50, 200, 70),
    "blue": (70, 120, 255),
    "yellow": (250, 225, 50),
    "purple": (215, 70, 235),
    "white": (245, 245, 245),
    "orange": (255, 145, 20),
    "cyan": (60, 220, 230),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (10, 10, 12),
    "gray": (72, 72, 76),
    "navy": (18, 26, 92),
    "dark green": (14, 60, 34),
    "maroon": (80, 16, 30),
}

SPLITS: tuple[str, ...] = ("train", "held-out", "combinations", "speeds")
# Colour and shape pairs that only the split "combinations" shows. Every colour keeps two shapes and
# every shape keeps colours, so both words are known and only their pairing is new.
UNSEEN_PAIRS: tuple[tuple[str, str], ...] = (
    ("yellow", "triangle"),
    ("purple", "circle"),
    ("green", "square"),
)


@dataclass(frozen=True)
class Level:
    """What a level may draw from. Each level is a superset of the one below.

    synonyms: captions also use other words for the same things.
    omissions: captions may leave things unsaid.
    """

    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    sizes: tuple[str, ...]
    backgrounds: tuple[str, ...]
    motions: tuple[str, ...]
    num_objects: tuple[int, ...]
    synonyms: bool
    omissions: bool


def _level(colours: int, backgrounds: int, motions: int, objects: int, words: int) -> Level:
    return Level(
        colours=tuple(COLOURS)[:colours],
        shapes=SHAPES,
        sizes=tuple(SIZES),
        backgrounds=tuple(BACKGROUNDS)[:backgrounds],
        motions=MOTIONS[:motions],
        num_objects=tuple(range(1, objects + 1)),
        synonyms=words >= 1,
        omissions=words >= 2,
    )


LEVELS: dict[int, Level] = {
    1: _level(colours=6, backgrounds=3, motions=4, objects=1, words=0),
    2: _level(colours=8, backgrounds=5, motions=8, objects=1, words=1),
    3: _level(colours=8, backgrounds=5, motions=11, objects=1, words=1),
    4: _level(colours=8, backgrounds=5, motions=11, objects=2, words=2),
}


@dataclass(frozen=True, eq=False)
class Object:
    """One object and its exact state at every frame.

    radius: of the circle of equal area, pixels. position: centroid, (f, 2) pixels, x then y.
    velocity: (f, 2) pixels per frame. acceleration: pixels per frame squared, x then y, between
    contacts. restitution: speed after a contact over the speed before it. bounce_times: seconds.
    """

    colour: str
    shape: str
    size: str
    radius: float
    motion: str
    position: np.ndarray
    velocity: np.ndarray
    acceleration: tuple[float, float] = (0.0, 0.0)
    restitution: float = 1.0
    bounce_times: list[float] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Scene:
    """A clip's complete description; `data.world_render.render` draws it."""

    background: str
    objects: tuple[Object, ...]
    height: int
    width: int
    num_frames: int
    fps: float
    level: int
    seed: int
    index: int
    split: str

    def to_state(self) -> dict[str, Any]:
        """The scene as plain JSON values; positions and velocities rounded to 1e-6."""
        objects = []
        for item in self.objects:
            row = asdict(item)
            row["position"] = np.round(item.position, 6).tolist()
            row["velocity"] = np.round(item.velocity, 6).tolist()
            row["acceleration"] = list(item.acceleration)
            objects.append(row)
        return {**{k: v for k, v in vars(self).items() if k != "objects"}, "objects": objects}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Scene":
        """The scene that `to_state` wrote down.

        Raises:
            ValueError: a key is missing or unknown.
        """
        try:
            objects = []
            for row in state["objects"]:
                arrays = {k: np.asarray(row[k], np.float64) for k in ("position", "velocity")}
                objects.append(
                    Object(**{**row, **arrays, "acceleration": tuple(row["acceleration"])})
                )
            return cls(**{**state, "objects": tuple(objects)})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a state of the procedural world: {error}") from error


@cache
def colour_shape_pairs(level: int, split: str) -> tuple[tuple[str, str], ...]:
    """The (colour, shape) pairs that a split draws from (evenly)."""
    chosen = LEVELS[level]
    unseen = split == "combinations"
    return tuple(
        (colour, shape)
        for colour in chosen.colours
        for shape in chosen.shapes
        if ((colour, shape) in UNSEEN_PAIRS) == unseen
    )


def split_motions(level: int, split: str) -> tuple[str, ...]:
    """The motions that a split draws from: out-of-range speeds leave out those under gravity."""
    motions = LEVELS[level].motions
    if split == "speeds":
        return tuple(motion for motion in motions if motion not in GRAVITY_MOTIONS)
    return motions


def make_scene(
    *,
    level: int,
    seed: int,
    index: int,
    split: str,
    height: int = 32,
    width: int = 32,
    num_frames: int = 9,
    fps: float = 8.0,
) -> Scene:
    """Draw scene number `index` of a split; the same arguments always give the same scene.

    Every object stays entirely inside the frame for the whole clip, and is placed freely within
    what that leaves.

    Raises:
        ValueError: what `check_arguments` says, or a negative index.
    """
    check_arguments(
        level=level, split=split, height=height, width=width, num_frames=num_frames, fps=fps
    )
    if index < 0:
        raise ValueError(f"index={index} is negative; scenes are numbered from 0")
    chosen = LEVELS[level]
    canvas = Canvas(height, width, num_frames, fps)
    rng = numpy_generator(seed, "world", level, split, index)
    background = pick(rng, chosen.backgrounds)
    count = pick(rng, chosen.num_objects)
    for _ in range(1000):
        objects: list[Object] = []
        for _ in range(count):
            # One unseen pair is what makes a scene unseen; its company is ordinary.
            pair_split = "train" if split == "combinations" and objects else split
            taken = {item.colour for item in objects}
            pairs = [p for p in colour_shape_pairs(level, pair_split) if p[0] not in taken]
            objects.append(_draw_object(rng, canvas, level, split, *pick(rng, pairs)))
        if _never_touch(objects):
            break
    else:
        raise AssertionError(f"no disjoint paths for {count} objects in {canvas}")
    return Scene(
        background, tuple(objects), height, width, num_frames, fps, level, seed, index, split
    )


def check_arguments(
    *, level: int, split: str, height: int, width: int, num_frames: int, fps: float
) -> None:
    """Refuse what the world cannot show.

    Raises:
        ValueError: unknown level or split, a frame too small or too narrow, fewer than 2 frames,
            or a clip too long for objects to stay inside the frame.
    """
    if level not in LEVELS:
        raise ValueError(f"level={level} is unknown; use one of {', '.join(map(str, LEVELS))}")
    if split not in SPLITS:
        raise ValueError(f"split={split} is unknown; use one of {', '.join(SPLITS)}")
    if min(height, width) < MIN_SIDE:
        raise ValueError(f"size={height}x{width} is too small; use at least {MIN_SIDE}x{MIN_SIDE}")
    if width < MIN_ASPECT * height:
        raise ValueError(
            f"size={height}x{width} is too narrow; "
            f"use a width of at least {math.ceil(MIN_ASPECT * height)}"
        )
    if num_frames < 2:
        raise ValueError(f"frames={num_frames} show no motion; use at least 2")
    if not 0 < fps <= 1000:
        raise ValueError(f"fps={fps:g} is not a frame rate; use a number above 0, at most 1000")
    speed = FAST if split == "speeds" else SPEED
    limit = max_duration(split_motions(level, split), speed, width / height)
    duration = (num_frames - 1) / fps
    if duration > limit:
        raise ValueError(
            f"frames={num_frames} at fps={fps:g} last {duration:.2f} s, but objects of "
            f"level {level} ({split}) leave the frame after {limit:.2f} s; "
            f"use at most {int(limit * fps) + 1} frames or a higher fps"
        )


def _draw_object(
    rng: np.random.Generator, canvas: Canvas, level: int, split: str, colour: str, shape: str
) -> Object:
    size = pick(rng, LEVELS[level].sizes)
    kind = pick(rng, split_motions(level, split))
    speed = pick(rng, (SLOW, FAST)) if split == "speeds" else SPEED
    radius = SIZES[size] * canvas.height
    motion = draw_motion(rng, canvas, kind, speed, shape, radius)
    return Object(
        colour=colour,
        shape=shape,
        size=size,
        radius=radius,
        motion=kind,
        position=np.stack([motion.x.position, motion.y.position], axis=1),
        velocity=np.stack([motion.x.velocity, motion.y.velocity], axis=1) / canvas.fps,
        acceleration=(0.0, motion.gravity / canvas.fps**2),
        restitution=motion.restitution,
        bounce_times=sorted(motion.x.contacts + motion.y.contacts),
    )


def _never_touch(objects: list[Object], gap: float = 1.0) -> bool:
    """Whether all bounding boxes stay `gap` pixels apart.

    Two boxes must be apart on the same side in neighbouring frames, so that fast objects cannot
    pass through each other in between.
    """
    for number, one in enumerate(objects):
        for other in objects[:number]:
            a, b = extents(one.shape, one.radius), extents(other.shape, other.radius)
            offset = one.position - other.position
            sides = np.stack(
                [
                    offset[:, 0] >= a[0] + b[1] + gap,
                    -offset[:, 0] >= a[1] + b[0] + gap,
                    offset[:, 1] >= a[2] + b[3] + gap,
                    -offset[:, 1] >= a[3] + b[2] + gap,
                ]
            )
            if not (sides[:, :-1] & sides[:, 1:]).any(axis=0).all():
                return False
    return True
