"""What a clip of the procedural world is made of: names, colours, levels, objects and scenes.

Who draws them: `data.world` and `data.world_scenarios`; who paints them: `data.world_render`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np

from data.world_coverage import visible_shares
from data.world_motion import MOTIONS, SHAPES, SIZES, Canvas, Motion, extents

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
# Of the bar that things pass behind: darker than every object, lighter than every background.
OCCLUDER_COLOUR: tuple[int, int, int] = (96, 96, 96)

SHAPES_SCENARIO = "shapes"  # the one with levels
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


# Fields that are arrays in an object, and tuples in a scene, and lists in a state.
_ARRAYS = frozenset({"position", "velocity", "visible"})
_PAIRS = frozenset({"occluder", "camera"})


@dataclass(frozen=True, eq=False)
class Object:
    """One object and its exact state at every frame.

    radius: of the circle of equal area, pixels. position: centroid, (f, 2) pixels, x then y.
    velocity: (f, 2) pixels per frame. acceleration: pixels per frame squared, x then y, between
    contacts. restitution: speed after a contact over the speed before it. bounce_times: when it
    touches a wall, the floor or another object, seconds.

    size is empty where radii are drawn from a range or are all the same. Some scenarios only:
    identity: the number of a textured subject (`data.world_subjects`), whose first colour `colour`
    is. visible: the share of the object's area that the frame shows, (f,) in [0, 1].
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
    identity: int | None = None
    visible: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Scene:
    """A clip's complete description; `data.world_render.render` draws it.

    level: None in scenarios other than `shapes`. Some scenarios only: occluder: the bar that hides
    what is behind it, (left, top, right, bottom) in pixels. camera: its velocity, pixels per frame,
    x then y; positions and velocities of objects are those in the frame all the same.
    """

    background: str
    objects: tuple[Object, ...]
    height: int
    width: int
    num_frames: int
    fps: float
    level: int | None
    seed: int
    index: int
    split: str
    scenario: str = SHAPES_SCENARIO
    occluder: tuple[int, int, int, int] | None = None
    camera: tuple[float, float] | None = None

    def to_state(self) -> dict[str, Any]:
        """The scene as plain JSON values; positions, velocities and shares rounded to 1e-6.

        What a scenario does not have is left out.
        """
        objects = []
        for item in self.objects:
            row = {key: value for key, value in asdict(item).items() if value is not None}
            for key in _ARRAYS & row.keys():
                row[key] = np.round(row[key], 6).tolist()
            row["acceleration"] = list(item.acceleration)
            objects.append(row)
        own = {k: v for k, v in vars(self).items() if k != "objects" and v is not None}
        if self.scenario == SHAPES_SCENARIO:
            del own["scenario"]
        for key in _PAIRS & own.keys():
            own[key] = list(own[key])
        return {**own, "objects": objects}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Scene":
        """The scene that `to_state` wrote down.

        Raises:
            ValueError: a key is missing or unknown.
        """
        try:
            objects = []
            for row in state["objects"]:
                arrays = {k: np.asarray(row[k], np.float64) for k in _ARRAYS & row.keys()}
                objects.append(
                    Object(**{**row, **arrays, "acceleration": tuple(row["acceleration"])})
                )
            own: dict[str, Any] = {k: tuple(state[k]) for k in _PAIRS & state.keys()}
            if "scenario" in state:
                own["level"] = None
            return cls(**{**state, **own, "objects": tuple(objects)})
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


def moving_object(
    colour: str,
    shape: str,
    size: str,
    radius: float,
    kind: str,
    motion: Motion,
    fps: float,
    identity: int | None = None,
) -> Object:
    """An object on the path `motion`, which is called `kind`; `radius` in pixels."""
    return Object(
        colour=colour,
        shape=shape,
        size=size,
        radius=radius,
        motion=kind,
        position=np.stack([motion.x.position, motion.y.position], axis=1),
        velocity=np.stack([motion.x.velocity, motion.y.velocity], axis=1) / fps,
        acceleration=(0.0, motion.gravity / fps**2),
        restitution=motion.restitution,
        bounce_times=sorted(motion.x.contacts + motion.y.contacts),
        identity=identity,
    )


@dataclass(frozen=True)
class Drawing:
    """What is drawn of a scene: the fields of `Scene` that do not follow from the arguments."""

    background: str
    objects: tuple[Object, ...]
    occluder: tuple[int, int, int, int] | None = None
    camera: tuple[float, float] | None = None


def with_visible(
    item: Object, canvas: Canvas, occluder: tuple[int, int, int, int] | None = None
) -> Object:
    """The object with its `visible` shares worked out."""
    size = (canvas.height, canvas.width)
    shares = visible_shares(item.shape, item.radius, item.position, *size, occluder)
    return replace(item, visible=shares)


def never_touch(objects: Sequence[Object], gap: float = 1.0) -> bool:
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
