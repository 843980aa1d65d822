"""What of each sample is given to the DiT in training, and what is asked of it.

A task says which latent frames are known, at which noise level, and which pictures stand beside the
clip (dit/conditions.py). All samples of a step have one shape, so a step's family of tasks is drawn
first, and the tasks of its samples among that family; over the steps each task is as frequent as the
config has it, but where reference pictures are given: they are alone in every other such step.
Everything is a function of (seed, step) and (seed, sample).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from data.randomness import numpy_generator
from dit.conditions import BesideFrames, keyframe_position, reference_position
from train.config_recipes import BESIDE, FAMILIES, TasksConfig
from train.recipe import Batch, counted_noise
from train.stills import still_frames, take_frames

if TYPE_CHECKING:
    from train.recipe_dit import DiTRecipe

_FAMILY_OF = {task: family for family, tasks in FAMILIES.items() for task in tasks}


@dataclass(frozen=True)
class Given:
    """What is given of the samples of a step.

    Attributes:
        tasks: of each sample.
        frames: (start, stop), the latent frames that this step works on.
        levels: noise level of what is known of these, (b f); NaN where it is asked for.
        independent: samples whose frames have noise levels of their own, (b,).
        still: which of a row's stills are beside each sample, (b, k), and at which noise level, (b,);
            None where nothing is.
    """

    tasks: tuple[str, ...]
    frames: tuple[int, int]
    levels: Tensor
    independent: Tensor
    still: Tensor | None = None
    still_levels: Tensor | None = None


def _draw(weights: dict[str, float], uniform: float) -> str:
    names, edges = list(weights), np.cumsum(list(weights.values()))
    return names[int(np.searchsorted(edges[:-1], uniform * edges[-1], side="right"))]


def draw_family(config: TasksConfig, seed: int, step: int) -> str:
    """Which family of tasks the samples of a step have."""
    weights: dict[str, float] = {}
    for task, weight in config.weights.items():
        weights[_FAMILY_OF[task]] = weights.get(_FAMILY_OF[task], 0.0) + weight
    if len(weights) == 1:
        return next(iter(weights))
    return _draw(weights, numpy_generator(seed, "task-family", step).random())


def draw_given(
    config: TasksConfig, seed: int, g: Sequence[int], num_frames: int, family: str
) -> Given:
    """What is given of some samples.

    Args:
        num_frames: latent frames of their clips; of a single one there is nothing to give.
        family: of the step.
    """
    if num_frames == 1 or (family == "window" and num_frames == 2):
        family = "clip" if family != "image" else family
    frames = {"image": (0, 1), "window": (1, num_frames)}.get(family, (0, num_frames))
    weights = {k: v for k, v in config.weights.items() if k in FAMILIES[family]}
    if num_frames == 1 or not weights:
        weights = {"text": 1.0}
    drawn = [_one(weights, config.noise, seed, number, frames) for number in g]
    tasks, levels, stills, noises = zip(*drawn)
    beside = family in BESIDE
    return Given(
        tasks=tasks,
        frames=frames,
        levels=torch.tensor(np.stack(levels), dtype=torch.float32),
        independent=torch.tensor([task == "independent" for task in tasks]),
        still=torch.tensor(stills) if beside else None,
        still_levels=torch.tensor(noises, dtype=torch.float32) if beside else None,
    )


def _one(
    weights: dict[str, float], noise: float, seed: int, g: int, frames: tuple[int, int]
) -> tuple[str, np.ndarray, list[int], float]:
    """The task of one sample, the levels of its latent frames, its stills and their level."""
    rng = numpy_generator(seed, "task", g)
    task = _draw(weights, rng.random())
    level = noise * max(0.0, 2 * rng.random() - 1)
    count = frames[1] - frames[0]
    known = _known(task, count, rng)
    stills = [int(rng.integers(0, 2)), 2] if task == "keyframes" else [int(task == "keyframe")]
    return task, np.where(known, level, np.nan), stills, level


def _known(task: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """Which of a clip's latent frames are given, (f,)."""
    number = int(rng.integers(1, max(2, count)))  # at least one, and at least one is left
    place = np.arange(count)
    match task:
        case "first" | "ends":
            return place < 1
        case "keyframes":
            return place < int(rng.integers(0, 2))
        case "leading" | "window":
            return place < number
        case "trailing":
            return place >= count - number
        case "sides":
            begin = int(rng.integers(0, number + 1))
            return (place < begin) | (place >= count - (number - begin))
        case "random":
            return rng.permutation(count) < number
    return np.zeros(count, bool)


def given_levels(
    recipe: DiTRecipe, g: Sequence[int], shape: tuple[int, ...], t: Tensor
) -> tuple[Tensor, Tensor]:
    """Noise levels (b f) of the latent frames of samples, and True for those that are asked for, as the
    tasks of whole clips have them.

    Args:
        shape: of the latents of each, (c f h w).
        t: drawn for each sample, (b,).
    """
    tasks, seed = recipe.options.tasks, recipe.config.seed
    return _levels(recipe, draw_given(tasks, seed, g, shape[1], "clip"), g, shape, t)


def _levels(
    recipe: DiTRecipe, given: Given, g: Sequence[int], shape: tuple[int, ...], t: Tensor
) -> tuple[Tensor, Tensor]:
    f, t = given.levels.shape[1], t[:, None]
    if given.independent.any():
        draws = [numpy_generator(recipe.config.seed, "t-frames", k).random(f) for k in g]
        own = recipe.sample_t(torch.from_numpy(np.stack(draws)), recipe.tokens_of(shape))
        t = torch.where(given.independent[:, None], own, t)
    asked = given.levels.isnan()
    return torch.where(asked, t, given.levels), asked


def given_batch(
    recipe: DiTRecipe, items: dict[str, Any], step: int, uniform: Tensor, batch: Batch
) -> Batch:
    """What a batch has with tasks: noise and noise levels of the frames that the step works on, which
    of them are asked for, and the pictures beside the clips.

    Args:
        uniform: a draw in [0, 1) for each sample's t, (b,).
        batch: with noise for all latent frames, (b c f h w), and latents or video.
    """
    tasks, seed, device = recipe.options.tasks, recipe.config.seed, recipe.ranks.device
    g, shape = items["g"], batch["noise"].shape[1:]
    shown = "references" in items and shows_references(tasks, seed, step)
    if shown and references_alone(seed, step):
        tasks = TasksConfig(noise=tasks.noise)
    given = draw_given(tasks, seed, g, shape[1], draw_family(tasks, seed, step))
    start, stop = given.frames
    cut = (shape[0], stop - start, *shape[2:])
    t, asked = _levels(recipe, given, g, cut, recipe.sample_t(uniform, recipe.tokens_of(cut)))
    changed: Batch = {
        "t": t.to(device),
        "asked": asked.to(device),
        "noise": batch["noise"][:, :, start:stop],
    }
    if "latents" in batch:
        changed["latents"] = batch["latents"][:, :, start:stop]
    elif stop == 1:
        changed["video"] = batch["video"][:, :, :1]
        changed["posterior_noise"] = batch["posterior_noise"][:, :, :1]
    pictures = []
    if given.still is not None:
        pictures.append(_still(recipe, items, given, shape))
    if shown:
        pictures.append(_references(recipe, items))
    if pictures:
        for name, parts in pictures[0].items():
            others = [part[name] for part in pictures[1:]]
            changed[name] = torch.cat([parts, *others], dim=2 if parts.ndim == 5 else 1)
    return changed


def shows_references(config: TasksConfig, seed: int, step: int) -> bool:
    """Whether a step gives its clips' reference pictures, if they have any."""
    return numpy_generator(seed, "references", step).random() < config.references


def references_alone(seed: int, step: int) -> bool:
    """Whether a step that gives reference pictures gives nothing else, as every other one does: what is
    given of a clip shows its subjects, and so would teach little of the pictures."""
    return numpy_generator(seed, "references alone", step).random() < 0.5


def family_of(task: str) -> str:
    """The family that a task belongs to."""
    return _FAMILY_OF[task]


def _still(recipe: DiTRecipe, items: dict[str, Any], given: Given, shape: tuple[int, ...]) -> Batch:
    """The frames beside each clip as pictures: their latents, or what they are made of.

    Args:
        shape: of a clip's latents, (c f h w).
    """
    assert given.still is not None
    assert given.still_levels is not None
    num_frames, factor = shape[1], recipe.vae.temporal_factor
    frames = chosen_frames(items["rows"], given.still, num_frames, factor)
    if "stills" in items:
        pictures = take_frames(items["stills"], given.still)
    else:
        pictures = take_frames(items["video"], frames)
    levels = given.still_levels[:, None].expand(given.still.shape)
    return _beside(recipe, items, pictures, levels, keyframe_positions(frames, factor), "still")


def _references(recipe: DiTRecipe, items: dict[str, Any]) -> Batch:
    """The pictures of each clip's subjects, clean."""
    pictures = items["references"]
    count = pictures.shape[-3]
    t = torch.zeros(len(pictures), count)
    positions = reference_positions(count).expand_as(t)
    return _beside(recipe, items, pictures, t, positions, "references")


def _beside(
    recipe: DiTRecipe,
    items: dict[str, Any],
    pictures: Tensor,
    t: Tensor,
    positions: Tensor,
    purpose: str,
) -> Batch:
    """What stands beside each clip of a batch.

    Args:
        pictures: uint8 (b 3 k h w), or mean and standard deviation of their latents (b 2 c k h w).
        t, positions: of each, (b k).
        purpose: of the draws of noise.
    """
    seed, device, g = recipe.config.seed, recipe.ranks.device, items["g"]
    pictures = pictures.to(device)
    if pictures.ndim == 6:
        mean, std = pictures.float().unbind(1)
        found, shape = {"beside_mean": mean, "beside_std": std}, tuple(mean.shape[1:])
    else:
        c, _, h, w = recipe.vae.latent_shape(1, *pictures.shape[3:])
        found, shape = {"beside_video": pictures}, (c, pictures.shape[2], h, w)
    return {
        **found,
        "beside_noise": counted_noise(seed, purpose, g, shape, device),
        "beside_posterior_noise": counted_noise(seed, f"{purpose}-posterior", g, shape, device),
        "beside_t": t.to(device),
        "beside_positions": positions.to(device),
    }


def chosen_frames(
    rows: Sequence[int], still: Tensor, num_frames: int, temporal_factor: int
) -> Tensor:
    """Which frames of its clip each row's chosen stills (b, k) are, (b, k).

    Args:
        num_frames: latent frames of a clip.
    """
    length = (num_frames - 1) * temporal_factor + 1
    every = torch.tensor([still_frames(row, length, 3) for row in rows])
    return every.gather(1, still)


def keyframe_positions(frames: Tensor, temporal_factor: int) -> Tensor:
    """Where the pictures of frames (b, k) beside each clip lie along time, (b, k)."""
    places = [
        [keyframe_position(frame, temporal_factor) for frame in row] for row in frames.tolist()
    ]
    return torch.tensor(places)


def reference_positions(count: int) -> Tensor:
    """Where the pictures of subjects lie along time, (1 k)."""
    return torch.tensor([[float(reference_position(number)) for number in range(count)]])


def beside_frames(recipe: DiTRecipe, batch: Batch) -> BesideFrames | None:
    """What stands beside the clips of a batch."""
    if "beside_t" not in batch:
        return None
    posterior_noise, t = batch["beside_posterior_noise"], batch["beside_t"]
    if "beside_video" in batch:
        # Each by itself, as a clip of one frame.
        pictures, noise = (
            rearrange(each, "b c k h w -> (b k) c 1 h w")
            for each in (batch["beside_video"], posterior_noise)
        )
        x_0 = rearrange(recipe.encode(pictures, noise), "(b k) c 1 h w -> b c k h w", k=t.shape[1])
    else:
        x_0 = torch.addcmul(batch["beside_mean"], batch["beside_std"], posterior_noise)
    x_t = recipe.objective.add_noise(x_0, batch["beside_noise"], t)
    return BesideFrames(x_t, recipe.objective.network_t(t), batch["beside_positions"])


def mean_asked(losses: Tensor, asked: Tensor) -> Tensor:
    """Mean over the frames that are asked for, of losses (b f); (b,)."""
    return torch.where(asked, losses, 0.0).sum(dim=1) / asked.sum(dim=1)
