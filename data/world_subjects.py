"""Subjects: things with a texture of their own, told apart by looking and not by a name.

An identity is a number. It stands for a shape, a pattern and two colours, and nothing else: the
same subject looks the same in every clip, at any size and on any background. Patterns have few and
large parts, since a subject may be ten pixels across and its colour is stored at half resolution.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from data.randomness import numpy_generator
from data.world_motion import SHAPES, extents, pick
from data.world_scene import COLOURS, LEVELS, Object, Scene

# Whether a point shows the second colour; u runs right and v down from the centroid, in units of
# the radius of the circle of equal area.
PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "left half": lambda u, v: u < 0,
    "upper half": lambda u, v: v < 0,
    "falling diagonal": lambda u, v: u < v,
    "rising diagonal": lambda u, v: u < -v,
    "upright band": lambda u, v: np.abs(u) < 0.38,
    "level band": lambda u, v: np.abs(v) < 0.38,
    "upright stripes": lambda u, v: np.abs(np.abs(u) - 0.56) < 0.25,
    "quarters": lambda u, v: u * v < 0,
    "checks": lambda u, v: (np.abs(u) < 0.33) != (np.abs(v) < 0.33),
    "dot": lambda u, v: u**2 + v**2 < 0.5**2,
    "ring": lambda u, v: np.abs(np.sqrt(u**2 + v**2) - 0.52) < 0.22,
    "cross": lambda u, v: (np.abs(u) < 0.24) | (np.abs(v) < 0.24),
}
# Luma at least 39 (of 255) apart, so that a pattern is seen in the full-resolution plane.
COLOUR_PAIRS: tuple[tuple[str, str], ...] = (
    ("red", "white"),
    ("white", "blue"),
    ("blue", "yellow"),
    ("white", "purple"),
    ("green", "white"),
    ("yellow", "purple"),
    ("red", "cyan"),
    ("orange", "blue"),
    ("yellow", "red"),
    ("white", "orange"),
    ("cyan", "yellow"),
    ("green", "yellow"),
    ("cyan", "white"),
    ("purple", "cyan"),
)
NUM_SUBJECTS = len(SHAPES) * len(PATTERNS) * len(COLOUR_PAIRS)
NUM_HELD_OUT = 100
# The radius of a subject in a clip, and the range of those in reference pictures, in shorter sides.
SUBJECT_RADIUS = 0.165
REFERENCE_RADIUS = (0.2, 0.27)
_JITTER = 0.08  # of a reference's centre from the middle, in shorter sides
_FINE = 4  # samples of the pattern per pixel and axis


@dataclass(frozen=True)
class Subject:
    """What an identity looks like: `colours[1]` where the pattern is, `colours[0]` elsewhere."""

    identity: int
    shape: str
    pattern: str
    colours: tuple[str, str]


@cache
def subject(identity: int) -> Subject:
    """The subject with that number.

    Raises:
        ValueError: there is none.
    """
    if not 0 <= identity < NUM_SUBJECTS:
        raise ValueError(f"identity={identity} is unknown; use 0 to {NUM_SUBJECTS - 1}")
    rest, shape = divmod(identity, len(SHAPES))
    pair, pattern = divmod(rest, len(PATTERNS))
    return Subject(identity, SHAPES[shape], tuple(PATTERNS)[pattern], COLOUR_PAIRS[pair])


def _held_out() -> frozenset[int]:
    order = numpy_generator(0, "world", "held-out subjects").permutation(NUM_SUBJECTS)
    return frozenset(order[:NUM_HELD_OUT].tolist())


# Only the split "identities" shows these.
HELD_OUT_SUBJECTS: frozenset[int] = _held_out()
TRAINING_SUBJECTS: frozenset[int] = frozenset(range(NUM_SUBJECTS)) - HELD_OUT_SUBJECTS


def texture(item: Object, x: float, y: float, height: int, width: int) -> np.ndarray:
    """The colours of the subject `item` with its centroid at (x, y) pixels, (h w 3).

    Pixels that the subject does not reach have its first colour.
    """
    assert item.identity is not None
    look = subject(item.identity)
    first, second = (np.asarray(COLOURS[name], np.float64) for name in look.colours)
    left, right, top, bottom = extents(item.shape, item.radius)
    rows = slice(max(0, int(y - top)), min(height, int(y + bottom) + 1))
    columns = slice(max(0, int(x - left)), min(width, int(x + right) + 1))
    v, u = (
        (np.arange(part.start * _FINE, part.stop * _FINE) + 0.5) / _FINE for part in (rows, columns)
    )
    u, v = (u - x)[None] / item.radius, (v - y)[:, None] / item.radius
    inside = np.broadcast_to(PATTERNS[look.pattern](u, v), (len(v), u.shape[1]))
    shape = (rows.stop - rows.start, _FINE, columns.stop - columns.start, _FINE)
    share = inside.reshape(shape).sum(axis=(1, 3)) / _FINE**2
    out = np.empty((height, width, 3))
    out[:] = first
    out[rows, columns] += share[:, :, None] * (second - first)
    return out


def reference_scene(scene: Scene, number: int) -> Scene:
    """A still of one frame: subject `number` of a scene, larger and on another background.

    Pose and background differ from the clip's, so that the identity is all there is to copy.
    """
    item = scene.objects[number]
    rng = numpy_generator(scene.seed, "world references", scene.split, scene.index, number)
    unit = min(scene.height, scene.width)
    others = [name for name in LEVELS[1].backgrounds if name != scene.background]
    background = pick(rng, others)
    radius = float(rng.uniform(*REFERENCE_RADIUS)) * unit
    left, right, top, bottom = extents(item.shape, radius)
    centre = np.array([scene.width, scene.height]) / 2 + rng.uniform(-_JITTER, _JITTER, 2) * unit
    centre = np.clip(centre, [left, top], [scene.width - right, scene.height - bottom])
    still = Object(
        colour=item.colour,
        shape=item.shape,
        size="",
        radius=radius,
        motion="still",
        position=centre[None],
        velocity=np.zeros((1, 2)),
        identity=item.identity,
    )
    return replace(scene, background=background, objects=(still,), num_frames=1)
