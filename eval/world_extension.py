"""How a model goes on from given videos: forwards, backwards, from one into another, round in a loop.

Real clips are given in part, and the model makes the rest of their scenes; what counts most is the
seam. Every figure stands beside the same one inside the real clips of these scenes, where nothing
was made, which shows how much the tracker and H.264 add.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from data.randomness import stream_seed
from data.video import to_float, to_uint8
from data.world import BACKGROUNDS, COLOURS, LEVELS, Scene, split_motions
from data.world_motion import SPEED, max_duration
from eval.metrics import Estimate, mean_estimate, proportion
from eval.motion import mean_velocity
from eval.tracker import track
from eval.vae_suite import reconstruct
from eval.world_clips import draw_scenes, part_results, prompt_of
from eval.world_scores import is_permanent, match
from eval.world_suite import Progress, WorldSettings, real_clips, sampling_options

if TYPE_CHECKING:
    from torch import Tensor

    from sample.extend import Window
    from sample.pipeline import TextToVideo

SPLIT = "held-out"
_YES_NO = ("colour_kept", "shape_kept", "permanence")

Figures = dict[str, float | bool | None]  # of one clip; None where there is nothing to measure


@dataclass(frozen=True)
class Case:
    """One thing that is asked for, of frames of a scene of `total` frames.

    kept: the frames, (begin, end), that are given, in order; those between, before or behind are made.
    new: the frames that are made, as they lie in the result. In a loop they lie behind the scene's.
    """

    name: str
    scenario: str
    total: int
    kept: tuple[tuple[int, int], ...]
    new: tuple[int, int]
    window: Window
    loop: bool = False

    @property
    def seams(self) -> list[int]:
        """The given frames of the result that lie beside made ones."""
        first, last = self.new
        if self.loop:
            return [first - 1, last]  # the latter stands for the first, which comes next
        return [k for k in (first - 1, last) if 0 <= k < self.total]


def deviation(path: np.ndarray, k: int) -> float | None:
    """How far frame k + 1 is from the straight continuation of k - 1 and k, pixels; the same backwards.

    Args:
        path: (f, 2), NaN where nothing was found; then None.
    """
    step = path[k + 1] - 2 * path[k] + path[k - 1]
    return float(np.hypot(*step)) if np.isfinite(step).all() else None


def is_smooth(scene: Scene, k: int) -> bool:
    """Whether nothing bounces between the frames before and behind frame k."""
    times = [time * scene.fps for item in scene.objects for time in item.bounce_times]
    return all(abs(time - k) > 1 for time in times)


def _mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def velocity_change(path: np.ndarray, scene: Scene, case: Case) -> float | None:
    """How much the velocity changes at a seam, pixels per frame, mean over the seams: between the best
    lines through the frames on either side, each as far as nothing bounces in the scene.

    None where a line has less than two frames, or the object is not found in one.
    """
    first, last = case.new
    times = [time * scene.fps for item in scene.objects for time in item.bounce_times]
    seams = [(case.kept[0][0], first, last)] if first > 0 else []
    seams += [(first, last, case.kept[-1][1])] if last < case.total else []
    changes = []
    for begin, seam, end in seams:
        begin = max(begin, *(math.ceil(time) for time in times if time < seam), 0)
        end = min(end, *(math.floor(time) + 1 for time in times if time >= seam), case.total)
        sides = path[begin:seam], path[seam:end]
        if min(map(len, sides)) > 1 and np.isfinite(path[begin:end]).all():
            changes.append(float(np.hypot(*(mean_velocity(sides[1]) - mean_velocity(sides[0])))))
    return _mean(changes)


def path_figures(path: np.ndarray, scene: Scene, case: Case, *, inner: bool) -> Figures:
    """What a path (f, 2) in pixels says: the jump at the seams, or inside a real clip wherever nothing
    bounces; the change of velocity there; the distance from where the object should be.
    """
    frames = len(path)
    if inner:
        centres = [k for k in range(1, frames - 1) if is_smooth(scene, k)]
    else:
        centres = case.seams
    if case.loop and not inner:
        path = np.concatenate([path, path[:2]])  # the loop goes on with its beginning
    figures: Figures = {"jump": _mean([deviation(path, k) for k in centres])}
    new = slice(*case.new)
    if case.loop:
        return figures
    made, true = path[new], scene.objects[0].position[new]
    seen = np.isfinite(made[:, 0])
    error = np.linalg.norm(made - true, axis=1)[seen]
    figures["position_error"] = float(error.mean()) if len(error) else None
    figures["velocity_change"] = velocity_change(path, scene, case)
    return figures


def score_joined(video: np.ndarray, scene: Scene, case: Case, *, inner: bool) -> Figures:
    """All figures of one result, uint8 (f h w 3).

    Args:
        inner: it is a real clip of the scene, or what a VAE makes of all of it, and the jumps are those
            between all of its frames.
    """
    sighting = track(video, scene.fps)
    (seen,) = match(sighting, scene.objects)
    frames = len(video)
    path = np.full((frames, 2), np.nan) if seen is None else seen.position
    colours = np.full((frames, 3), np.nan) if seen is None else seen.colours
    figures = path_figures(path, scene, case, inner=inner)
    first, last = (0, frames) if case.loop and inner else case.new
    pairs = [(k, k + 1) for k in range(frames - 1)]
    if not inner:
        pairs = [(first - 1, first)] * (first > 0) + [(last - 1, last % frames)] * (
            case.loop or last < frames
        )
    for name, shown in (("object_jump", colours), ("background_jump", sighting.backgrounds)):
        changes = [float(np.abs(shown[a] - shown[b]).mean()) for a, b in pairs]
        figures[name] = _mean([change for change in changes if np.isfinite(change)])
    part = track(video[first:last], scene.fps)
    (made,) = match(part, scene.objects)
    (item,) = scene.objects
    figures["found"] = 0.0 if made is None else float(made.found.mean())
    figures["colour_kept"] = made is not None and made.colour == item.colour
    figures["shape_kept"] = made is not None and made.shape == item.shape
    figures["permanence"] = is_permanent(sighting, scene)
    return figures


def _summary(rows: Sequence[Figures]) -> dict[str, Estimate]:
    figures: dict[str, Estimate] = {}
    for name in rows[0]:
        values = [row[name] for row in rows if row[name] is not None]
        figures[name] = (
            proportion([bool(v) for v in values])
            if name in _YES_NO
            else mean_estimate([float(v) for v in values if v is not None])
        )
    return figures


def standing(scene: Scene, case: Case) -> np.ndarray:
    """The path (f, 2) of an object that stays where the given frames leave, or later find, it."""
    true, (first, last) = scene.objects[0].position, case.new
    if case.loop:
        (begin, end) = case.kept[0]
        return np.concatenate(
            [true[begin:end], np.repeat(true[end - 1 : end], last - first, axis=0)]
        )
    path = true.copy()
    path[first:last] = path[first - 1] if first else path[last]
    return path


def _longest(pipeline: TextToVideo) -> int:
    """Frames of the longest straight clips, at most."""
    info = pipeline.info
    limit = max_duration(split_motions(1, SPLIT), SPEED, info.width / info.height)
    return int(limit * info.fps) + 1


def make_cases(pipeline: TextToVideo) -> list[Case]:
    """What is asked of a model, for the length of its clips.

    Raises:
        ValueError: they are too short to be given something and to make something on either side.
    """
    from sample.extend import window_of

    info, factor, step = pipeline.info, pipeline.vae.temporal_factor, pipeline.vae.frame_step
    length = info.num_frames
    latents = pipeline.vae.latent_shape(length, info.height, info.width)[1]
    if latents < 3:
        raise ValueError(
            f"clips of {length} frames, {latents} latent ones, are too short to be extended; use a "
            "model of longer clips"
        )
    cases = []
    straight = 1 + (min(2 * length - 1, _longest(pipeline)) - 1) // step * step
    for scenario, total in (("shapes", straight), ("bounces", 2 * length - 1)):
        kept = min(length, total - step)
        if kept < 1 + factor:
            continue
        window = window_of(pipeline, length, None, there=kept)
        what = {"scenario": scenario, "total": total}
        word = "straight" if scenario == "shapes" else scenario
        cases.append(
            Case(f"forwards, {word}", kept=((0, kept),), new=(kept, total), window=window, **what)
        )
        window, made = window_of(pipeline, length, None, backward=True, there=kept), total - kept
        cases.append(
            Case(f"backwards, {word}", kept=((made, total),), new=(0, made), window=window, **what)
        )
    window = window_of(pipeline, length, None, sides=2)
    piece = 1 + window.given * factor
    made = length - 2 - (2 * window.given - 1) * factor
    pieces = ((0, piece), (piece + made, 2 * piece + made))
    total = 2 * piece + made
    cases.append(Case("connection", "bounces", total, pieces, (piece, piece + made), window))
    # Two frames more on either side show whether something bounces at the video's ends.
    total = 1 + -(-(piece + 3) // step) * step
    new = (piece, piece + made)
    cases.append(Case("loop", "bounces", total, ((2, 2 + piece),), new, window, loop=True))
    return cases


def _fits(case: Case) -> Callable[[Scene], bool]:
    """Whether nothing bounces at a scene's seams: a bounce is no jump."""
    if case.loop:
        ((begin, end),) = case.kept
        return lambda scene: is_smooth(scene, begin) and is_smooth(scene, end - 1)
    return lambda scene: all(is_smooth(scene, k) for k in case.seams)


def complete(
    pipeline: TextToVideo, clip: np.ndarray, scene: Scene, case: Case, settings: WorldSettings
) -> np.ndarray:
    """Frames of a real clip as they are, and those that the model makes, uint8 (f h w 3)."""
    import torch

    from sample.extend import connect, lengthen, loop

    pieces = [_video(clip[first:last]) for first, last in case.kept]
    seeds = (
        stream_seed(settings.seed, "eval", case.name, scene.index, number) for number in count()
    )
    prompt, options = prompt_of(scene, settings), sampling_options(settings)
    if case.loop:
        new = loop(pipeline, prompt, pieces[0], case.window, seeds=[next(seeds)], **options)
        return _clip(torch.cat([pieces[0], new], dim=1))
    if len(pieces) == 2:
        new = connect(
            pipeline, prompt, pieces[0], pieces[1], case.window, seeds=[next(seeds)], **options
        )
        return _clip(torch.cat([pieces[0], new, pieces[1]], dim=1))
    made = case.new[1] - case.new[0]
    backward = case.new[0] == 0
    return _clip(
        lengthen(
            *(pipeline, prompt, pieces[0], case.window, made, seeds), backward=backward, **options
        )
    )


def _between(clip: np.ndarray, restored: np.ndarray, case: Case) -> np.ndarray:
    """What a model of the VAE's latents makes that knows the truth: the real clip, but for the frames
    that are asked for, in colours that are matched at those given, as `sample.extend` does."""
    first, last = case.new
    given = [k for k in range(len(clip)) if not first <= k < last]
    offset = (clip[given].astype(np.float64) - restored[given]).mean(axis=(0, 1, 2))
    made = (restored[first:last] + offset).round().clip(0, 255).astype(np.uint8)
    return np.concatenate([clip[:first], made, clip[last:]])


def _video(clip: np.ndarray) -> Tensor:
    import torch

    return to_float(torch.from_numpy(clip).permute(3, 0, 1, 2))


def _clip(video: Tensor) -> np.ndarray:
    return to_uint8(video).permute(1, 2, 3, 0).contiguous().numpy()


def _check_tasks(pipeline: TextToVideo) -> None:
    from sample.given import require_task

    require_task(pipeline.info, "leading", "extending a video")
    require_task(pipeline.info, "trailing", "extending a video backwards")
    require_task(pipeline.info, "sides", "connecting videos")


def score_extension(
    pipeline: TextToVideo, settings: WorldSettings, progress: Progress | None = None
) -> dict[str, Any]:
    """Seams and what comes behind them, `settings.num` scenes of each case; see docs/eval-world.md.

    Raises:
        ValueError: the model was not trained to be given such frames, or its clips do not suit.
    """
    _check_tasks(pipeline)
    info = pipeline.info
    size = {"height": info.height, "width": info.width, "fps": info.fps, "split": SPLIT}
    scores: dict[str, dict[str, Estimate]] = {"generated": {}, "vae": {}, "real": {}}
    chance: dict[str, float] = {}
    cases = make_cases(pipeline)
    for case in cases:
        where = {"level": 1} if case.scenario == "shapes" else {"scenario": case.scenario}
        scenes = draw_scenes(settings, _fits(case), num_frames=case.total, **where, **size)
        real = real_clips(scenes, progress)
        done = None if progress is None else lambda n: progress("vae", n)
        vae = reconstruct(pipeline.vae, real, batch_size=settings.batch_size, progress=done)
        rows: dict[str, list[Figures]] = {"generated": [], "vae": [], "real": []}
        for scene, clip, restored in zip(scenes, real, vae, strict=True):
            made = complete(pipeline, clip, scene, case, settings)
            rows["generated"].append(score_joined(made, scene, case, inner=False))
            rows["real"].append(score_joined(clip, scene, case, inner=True))
            known = restored if case.loop else _between(clip, restored, case)
            rows["vae"].append(score_joined(known, scene, case, inner=case.loop))
            if progress is not None:
                progress("generated", 1)
        for column, clips in rows.items():
            scores[column] |= {f"{case.name}: {k}": f for k, f in _summary(clips).items()}
        stays = [path_figures(standing(s, case), s, case, inner=False) for s in scenes]
        for name in stays[0]:
            chance[f"{case.name}: {name}"] = _summary(stays)[name].value
        level = LEVELS[1]
        chance[f"{case.name}: found"] = 1.0
        chance[f"{case.name}: colour_kept"] = 1 / len(level.colours)
        chance[f"{case.name}: shape_kept"] = 1 / len(level.shapes)
        colours = [COLOURS[name] for name in level.colours]
        backgrounds = [BACKGROUNDS[name] for name in level.backgrounds]
        chance[f"{case.name}: object_jump"] = _guessed_jump(colours)
        chance[f"{case.name}: background_jump"] = _guessed_jump(backgrounds)
    return part_results(
        pipeline,
        settings,
        "extension",
        scores,
        chance=chance,
        chance_is="it stays (names and colours: a guess)",
        num_is="scenes of each kind",
        notes=_notes(cases),
        cases={case.name: _facts(case) for case in cases},
    )


def _guessed_jump(palette: Sequence[tuple[int, int, int]]) -> float:
    """The mean jump from one of these colours to any of them."""
    colours = np.array(palette, float)
    return float(np.abs(colours[:, None] - colours).mean())


def _facts(case: Case) -> dict[str, Any]:
    facts = {"frames": case.total, "given": case.kept, "made": case.new[1] - case.new[0]}
    return {**facts, "window": {"given": case.window.given, "new": case.window.new}}


def _notes(cases: Sequence[Case]) -> list[str]:
    lines = [
        "jump: from the straight continuation of two frames; real: between all frames of these scenes, "
        "where nothing bounces",
        "VAE: the true frames after its round trip, between the given ones: a perfect model of these "
        "latents; loop, whose truth nobody knows: all frames of real clips, as under real",
    ]
    for case in cases:
        given = " and ".join(str(last - first) for first, last in case.kept)
        lines.append(
            f"{case.name}: {given} frames given, {case.new[1] - case.new[0]} made; latent frames of a "
            f"window: {case.window.given} given{' on each side' * (case.name in _SIDES)}, "
            f"{case.window.new} new"
        )
    if not any(case.scenario == "shapes" for case in cases):
        lines.append("no straight motion lasts longer than this model's clips, so none is extended")
    return lines


_SIDES = ("connection", "loop")
