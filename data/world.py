"""The procedural world: coloured shapes that move by exact physics, in levels of difficulty.

A clip is a pure function of (seed, split, level or scenario, index). Space is measured in pixels
with the origin in the upper left corner of the frame: x runs right, y runs down, pixel (row i,
column j) covers [j, j+1) x [i, i+1), so the middle of a frame of width w is at x = w / 2. Frame k
shows the time k / fps. How objects move is in `data.world_motion`, the closed forms in
`data.world_physics`.

An object's position is its centroid. A size is the radius of the circle with the object's area:
all shapes of a size cover the same area, so a shape cannot be told by how much colour it puts on
the screen, and a size is read from the area alone.

Objects of one scene never touch: paths that would come within a pixel of each other are drawn
again. Things that pass through one another would teach ghosts.

All this is the scenario `shapes`. The others are in `data.world_scenarios`: textured subjects,
collisions, occluders, a moving camera, and scenes to compare with published ones.
"""

import math

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
from data.world_scenarios import SCENARIOS
from data.world_scene import (
    BACKGROUNDS,
    COLOURS,
    LEVELS,
    SHAPES_SCENARIO,
    SPLITS,
    UNSEEN_PAIRS,
    Level,
    Object,
    Scene,
    colour_shape_pairs,
    moving_object,
    never_touch,
)

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "DIRECTIONS",
    "LEVELS",
    "MOTIONS",
    "SCENARIOS",
    "SHAPES",
    "SHAPES_SCENARIO",
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
MIN_ASPECT = 0.75  # width over height, of `shapes`, which measures in frame heights


def split_motions(level: int, split: str) -> tuple[str, ...]:
    """The motions that a split draws from: out-of-range speeds leave out those under gravity."""
    motions = LEVELS[level].motions
    if split == "speeds":
        return tuple(motion for motion in motions if motion not in GRAVITY_MOTIONS)
    return motions


def make_scene(
    *,
    level: int | None = None,
    seed: int,
    index: int,
    split: str,
    height: int = 32,
    width: int = 32,
    num_frames: int = 9,
    fps: float = 8.0,
    scenario: str = SHAPES_SCENARIO,
) -> Scene:
    """Draw scene number `index` of a split; the same arguments always give the same scene.

    In `shapes` every object stays entirely inside the frame for the whole clip, and is placed
    freely within what that leaves.

    Args:
        level: the difficulty of `shapes`; None for other scenarios.
        height, width: pixels.
    Raises:
        ValueError: what `check_arguments` says, or a negative index.
    """
    check_arguments(
        level=level,
        split=split,
        height=height,
        width=width,
        num_frames=num_frames,
        fps=fps,
        scenario=scenario,
    )
    if index < 0:
        raise ValueError(f"index={index} is negative; scenes are numbered from 0")
    canvas = Canvas(height, width, num_frames, fps)
    place = (height, width, num_frames, fps, level, seed, index, split)
    if level is None:
        rng = numpy_generator(seed, "world", scenario, split, index)
        drawing = SCENARIOS[scenario].draw(rng, canvas, split)
        return Scene(
            drawing.background,
            drawing.objects,
            *place,
            scenario=scenario,
            occluder=drawing.occluder,
            camera=drawing.camera,
        )
    background, objects = _draw_shapes(
        numpy_generator(seed, "world", level, split, index), canvas, level, split
    )
    return Scene(background, objects, *place)


def _draw_shapes(
    rng: np.random.Generator, canvas: Canvas, level: int, split: str
) -> tuple[str, tuple[Object, ...]]:
    chosen = LEVELS[level]
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
        if never_touch(objects):
            return background, tuple(objects)
    raise AssertionError(f"no disjoint paths for {count} objects in {canvas}")


def check_arguments(
    *,
    level: int | None,
    split: str,
    height: int,
    width: int,
    num_frames: int,
    fps: float,
    scenario: str = SHAPES_SCENARIO,
) -> None:
    """Refuse what the world cannot show.

    Raises:
        ValueError: unknown scenario, level or split, a level where there is none, a frame too small
            or too narrow, too few frames, or a clip too long for what it should show.
    """
    names = (SHAPES_SCENARIO, *SCENARIOS)
    if scenario not in names:
        raise ValueError(f"scenario={scenario} is unknown; use one of {', '.join(names)}")
    if scenario == SHAPES_SCENARIO and level not in LEVELS:
        raise ValueError(f"level={level} is unknown; use one of {', '.join(map(str, LEVELS))}")
    if scenario != SHAPES_SCENARIO and level is not None:
        raise ValueError(
            f"level={level} says nothing about scenario={scenario}, which has none; "
            f"leave the level out, or use scenario={SHAPES_SCENARIO}"
        )
    splits = SPLITS if level is not None else SCENARIOS[scenario].splits
    if split not in splits:
        of = "" if level is not None else f" in scenario={scenario}"
        raise ValueError(f"split={split} is unknown{of}; use one of {', '.join(splits)}")
    if min(height, width) < MIN_SIDE:
        raise ValueError(f"size={height}x{width} is too small; use at least {MIN_SIDE}x{MIN_SIDE}")
    if level is not None and width < MIN_ASPECT * height:
        raise ValueError(
            f"size={height}x{width} is too narrow; "
            f"use a width of at least {math.ceil(MIN_ASPECT * height)}"
        )
    if num_frames < 2:
        raise ValueError(f"frames={num_frames} show no motion; use at least 2")
    if not 0 < fps <= 1000:
        raise ValueError(f"fps={fps:g} is not a frame rate; use a number above 0, at most 1000")
    if level is None:
        SCENARIOS[scenario].check(scenario, split, num_frames, fps)
        return
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
    return moving_object(colour, shape, size, radius, kind, motion, canvas.fps)
