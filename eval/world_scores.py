"""Right or wrong, clip by clip: what the tracker sees against what the prompt's scene says.

The tracker never learns the scene; the two meet only here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data.world import DIRECTIONS, LEVELS, Object, Scene
from data.world_captions import SIZE_WORDS
from data.world_motion import FAST, GRAVITY_MOTIONS, SLOW, SPEED
from eval.metrics import Estimate, mean_estimate, proportion
from eval.motion import bounce_frames, fit_gravity, mean_velocity
from eval.tracker import Sighting, Track, track

# The longest step between frames that is no teleport, in frame heights per second, about twice the
# fastest of the world. At 32 pixels and 8 frames per second: 4 pixels, and 8 under gravity.
MAX_STEP, MAX_STEP_GRAVITY = 1.0, 2.0

_NAMES = ("colour", "shape", "motion")


@dataclass(frozen=True)
class ClipScore:
    """One clip against its scene; with several objects, all of them have to be right.

    joint: colour, shape, motion and background. permanence: exactly the scene's number of objects
    in every frame, and no step longer than MAX_STEP. size: None where the prompt does not say it.
    velocity_error: pixels per frame, straight motions only. gravity_error: pixels per frame
    squared, motions under gravity only. Both are None where there is nothing to measure.
    """

    colour: bool
    shape: bool
    motion: bool
    background: bool
    joint: bool
    permanence: bool
    joint_permanence: bool
    size: bool | None
    velocity_error: float | None
    gravity_error: float | None

    @property
    def verdict(self) -> str:
        """A few words for people: "all right", or what is wrong."""
        checked = (*_NAMES, "background", "permanence")
        wrong = [name for name in checked if not getattr(self, name)]
        return f"wrong: {', '.join(wrong)}" if wrong else "all right"

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)


def match(sighting: Sighting, objects: Sequence[Object]) -> list[Track | None]:
    """The track of each object, None for objects that have none.

    Only as many tracks as there are objects take part, the most present and largest ones, so
    a right answer cannot be picked from a crowd; among those, the pairing with most names right.
    """
    tracks: list[Track | None] = list(sighting.tracks[: len(objects)])
    tracks += [None] * (len(objects) - len(tracks))

    def right(order: Sequence[Track | None]) -> int:
        return sum(
            getattr(seen, name) == getattr(item, name)
            for seen, item in zip(order, objects)
            if seen is not None
            for name in (*_NAMES, "size")
        )

    return list(max(itertools.permutations(tracks), key=right))


def is_permanent(sighting: Sighting, scene: Scene) -> bool:
    """Whether every frame shows exactly the scene's objects and none of them teleports."""
    falls = any(item.motion in GRAVITY_MOTIONS for item in scene.objects)
    bound = (MAX_STEP_GRAVITY if falls else MAX_STEP) * scene.height / scene.fps
    return (
        set(sighting.counts) == {len(scene.objects)}
        and len(sighting.tracks) == len(scene.objects)
        and all(seen.largest_step <= bound for seen in sighting.tracks)
    )


def _velocity_error(path: np.ndarray, item: Object, scene: Scene, exact: bool) -> float:
    measured = mean_velocity(path)
    if exact:
        return float(np.linalg.norm(measured - mean_velocity(item.position)))
    unit = np.asarray(DIRECTIONS[item.motion])
    low, high = (SLOW[0], FAST[1]) if scene.split == "speeds" else SPEED
    scale = scene.height / scene.fps
    nearest = np.clip(measured @ unit, low * scale, high * scale)
    return float(np.linalg.norm(measured - nearest * unit))


def _gravity_error(path: np.ndarray, item: Object, scene: Scene) -> float | None:
    y = path[:, 1]
    contacts = bounce_frames(y, scene.height) if item.motion == "bouncing" else []
    gravity = fit_gravity(y, contacts)
    return abs(gravity - item.acceleration[1]) if np.isfinite(gravity) else None


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def says_size(caption: str, num_objects: int) -> bool:
    """Whether a caption names the size of every object."""
    words = {word for names in SIZE_WORDS.values() for word in names}
    return sum(word.strip(".,") in words for word in caption.split()) == num_objects


def score_clip(
    video: np.ndarray, scene: Scene, *, caption: str | None = None, exact: bool = False
) -> ClipScore:
    """Track a clip and compare it with a scene.

    Args:
        video: uint8, (f h w 3).
        scene: what the clip should show.
        caption: the prompt; the size counts only where it is said. None: the size counts.
        exact: the clip shows this very scene (a rendering, a reconstruction), so its velocity is
            known. Otherwise a prompt does not say the speed, and the velocity error is the distance
            to the nearest velocity that fits its direction and the world's range of speeds.
    Raises:
        ValueError: the clip is not uint8 (f h w 3).
    """
    sighting = track(video, scene.fps)
    seen = match(sighting, scene.objects)
    pairs = list(zip(seen, scene.objects))

    def all_right(name: str) -> bool:
        return all(s is not None and getattr(s, name) == getattr(o, name) for s, o in pairs)

    right = {name: all_right(name) for name in _NAMES}
    right["background"] = sighting.background == scene.background
    joint, permanence = all(right.values()), is_permanent(sighting, scene)
    paths = [(s.path, o) for s, o in pairs if s is not None]
    found = [(path, o) for path, o in paths if path is not None and len(path) > 1]
    velocity = [_velocity_error(p, o, scene, exact) for p, o in found if o.motion in DIRECTIONS]
    gravity = [_gravity_error(p, o, scene) for p, o in found if o.motion in GRAVITY_MOTIONS]
    said = caption is None or says_size(caption, len(scene.objects))
    return ClipScore(
        **right,
        joint=joint,
        permanence=permanence,
        joint_permanence=joint and permanence,
        size=all_right("size") if said else None,
        velocity_error=_mean(velocity),
        gravity_error=_mean([error for error in gravity if error is not None]),
    )


def summarise(scores: Sequence[ClipScore]) -> dict[str, Estimate]:
    """Every figure over all clips with its interval; `num` is the number of clips it applies to."""
    figures: dict[str, Estimate] = {}
    for name in ClipScore.__dataclass_fields__:
        values = [v for v in (getattr(score, name) for score in scores) if v is not None]
        figures[name] = mean_estimate(values) if name.endswith("error") else proportion(values)
    return figures


def chance(level: int) -> dict[str, float]:
    """What a blind guess among a level's own words gets; empty for levels with several objects."""
    chosen = LEVELS[level]
    if chosen.num_objects != (1,):
        return {}
    options = {
        "colour": chosen.colours,
        "shape": chosen.shapes,
        "motion": chosen.motions,
        "background": chosen.backgrounds,
        "size": chosen.sizes,
    }
    guess = {name: 1 / len(words) for name, words in options.items()}
    joint = guess["colour"] * guess["shape"] * guess["motion"] * guess["background"]
    return {**guess, "joint": joint}
