"""The DiT's validation: held-out clips at every noise level, with their captions and with others', and
task by task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit.conditions import BesideFrames
from train.clips import read_rows, rows_of_one_size
from train.config_recipes import TasksConfig
from train.recipe import counted_noise
from train.stills import cut_stills, num_stills, take_frames
from train.tasks import (
    chosen_frames,
    draw_given,
    family_of,
    keyframe_positions,
    mean_asked,
    reference_positions,
)
from train.watchdog import beat

if TYPE_CHECKING:
    from train.recipe_dit import DiTRecipe

NUM_T_BINS = 10
_REFERENCES = ("references", "references_shuffled")
TASK_LEVELS = (0.25, 0.5, 0.75, 0.95)  # of the range of t


@dataclass(frozen=True)
class ValidationSet:
    """Manifest rows with their latents (n c f h w), of their stills (n c k h w) and reference pictures
    (c k h w) each, and token ids (n m) of two captions each."""

    rows: list[int]
    latents: Tensor
    stills: Tensor
    references: list[Tensor]
    ids: Tensor
    shuffled_ids: Tensor

    def parts(self, size: int) -> Iterator[ValidationSet]:
        """Pieces of at most `size` clips."""
        for first in range(0, len(self.rows), size):
            yield self.take(range(first, min(first + size, len(self.rows))))

    def take(self, places: Sequence[int]) -> ValidationSet:
        """Some of the clips."""
        index = torch.tensor(places, dtype=torch.long)
        return ValidationSet(
            [self.rows[place] for place in places],
            *(self.latents[index], self.stills[index]),
            [self.references[place] for place in places],
            *(self.ids[index], self.shuffled_ids[index]),
        )


def read_validation(recipe: DiTRecipe) -> ValidationSet:
    """This rank's share of the clips, as latents."""
    manifest, data, ranks = recipe.data.validation, recipe.config.data, recipe.ranks
    fitting = rows_of_one_size(manifest, data)[: recipe.config.logging.num_val_clips]
    half = len(fitting) // 2
    others = dict(zip(fitting, [*fitting[half:], *fitting[:half]]))
    share = fitting[ranks.rank :: ranks.world_size]
    shown = recipe.config.gives_references
    rows, video, pictures = read_rows(manifest, share, data, recipe.quarantine, shown)
    latents = _encoded(recipe, video, recipe.latent_shape)
    c, _, *size = recipe.latent_shape
    count = num_stills(recipe.options.tasks)
    stills = [
        _encoded(recipe, still, (c, 1, *size)) for still in cut_stills(video, rows, count)
    ] or [latents[:, :, :0]]
    references = [
        _encoded(recipe, each.transpose(0, 1)[:, :, None], (c, 1, *size))[:, :, 0].transpose(0, 1)
        for each in pictures
    ]
    right = [manifest.rows[row].captions[0] for row in rows]
    wrong = [manifest.rows[others[row]].captions[0] for row in rows]
    ids, shuffled_ids = (recipe.tokenize(texts).to(ranks.device) for texts in (right, wrong))
    stills = torch.cat(stills, dim=2)
    return ValidationSet(rows, latents, stills, references, ids, shuffled_ids)


def _encoded(recipe: DiTRecipe, video: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Latents (n, *shape) of video, a few clips at a time."""
    device = recipe.ranks.device
    pieces = [piece for piece in video.split(recipe.chunk) if len(piece)]
    parts = [recipe.encode(piece.to(device)) for piece in pieces]
    return torch.cat([torch.empty(0, *shape, device=device), *parts])


@torch.no_grad()
def validate(recipe: DiTRecipe, clips: ValidationSet) -> dict[str, float]:
    """Per noise level, on noise that never changes: the loss, and the error of the predicted x_0 with
    the right and with shuffled captions. Where the two part, the text is used."""
    objective, ranks, (low, high) = recipe.objective, recipe.ranks, recipe.t_range
    levels = [low + (high - low) * (k + 0.5) / NUM_T_BINS for k in range(NUM_T_BINS)]
    sums = torch.zeros(NUM_T_BINS, 4, dtype=torch.float64, device=ranks.device)
    for k, level in enumerate(levels):
        for part in clips.parts(recipe.chunk):
            beat()
            purpose = f"validation-{k}"
            noise = counted_noise(0, purpose, part.rows, recipe.latent_shape, ranks.device)
            x_0 = part.latents
            t = torch.full_like(x_0[:, 0, 0, 0, 0], level)
            x_t, network_t = objective.add_noise(x_0, noise, t), objective.network_t(t)
            preds = [
                recipe.dit(x_t, network_t, *recipe.text(ids)).float()
                for ids in (part.ids, part.shuffled_ids)
            ]
            sums[k, 0] += objective.loss(preds[0], x_0, noise, t).mean(dim=1).sum()
            for column, pred in enumerate(preds, start=1):
                guess, _ = objective.x_0_and_noise(pred, x_t, t)
                sums[k, column] += (guess - x_0).square().mean(dim=(1, 2, 3, 4)).sum()
            sums[k, 3] += len(x_0)
    total = ranks.sum(sums).cpu()
    means = total[:, :3] / total[:, 3:]
    figures = {"val/loss": means[:, 0].mean().item()}
    for column, name in enumerate(("loss", "x_0_error", "x_0_error_shuffled")):
        for k, level in enumerate(levels):
            figures[f"val/{name}/t={level:.2f}"] = means[k, column].item()
    return figures


@torch.no_grad()
def validate_tasks(recipe: DiTRecipe, clips: ValidationSet) -> dict[str, float]:
    """The loss on what each task of the config asks for, at the same noise levels for all of them; that
    of whole clips with pictures of their subjects, and with those of other clips."""
    config = recipe.options.tasks
    tasks = [] if config.only_text else list(config.weights)
    device, (low, high) = recipe.ranks.device, recipe.t_range
    levels = [low + (high - low) * share for share in TASK_LEVELS]
    names = [*tasks, *_REFERENCES] if config.references else tasks
    sums = torch.zeros(len(names), 2, dtype=torch.float64, device=device)
    for number, task in enumerate(tasks):
        for part in clips.parts(recipe.chunk):
            for k in range(len(levels)):
                beat()
                # Of independent frames, each is at another one of the levels.
                step = int(task == "independent")
                own = [levels[(k + step * i) % len(levels)] for i in range(part.latents.shape[2])]
                losses = _task_losses(recipe, part, task, torch.tensor(own, device=device))
                sums[number, 0] += losses.sum()
                sums[number, 1] += len(losses)
    for places in _by_references(clips) if config.references else ():
        turned = [*places[1:], places[0]]
        for number, pictured in enumerate((places, turned), start=len(tasks)):
            if len(places) == 1 and pictured is turned:  # there is no other clip's
                continue
            shown = replace(
                clips.take(places), references=[clips.references[place] for place in pictured]
            )
            for part in shown.parts(recipe.chunk):
                beside = _clean(torch.stack(part.references))
                for level in levels:
                    beat()
                    t = torch.full((part.latents.shape[2],), level, device=device)
                    losses = _task_losses(recipe, part, "text", t, beside)
                    sums[number, 0] += losses.sum()
                    sums[number, 1] += len(losses)
    total = recipe.ranks.sum(sums).cpu()
    return {f"val/task/{name}": (x / n).item() for name, (x, n) in zip(names, total) if n}


def _by_references(clips: ValidationSet) -> list[list[int]]:
    """Places of the clips that have one reference picture, of those that have two, and so on."""
    places: dict[int, list[int]] = {}
    for place, pictures in enumerate(clips.references):
        places.setdefault(pictures.shape[1], []).append(place)
    return [places[count] for count in sorted(places) if count]


def _clean(references: Tensor) -> BesideFrames:
    """Latents of reference pictures (n c k h w) as they stand beside clips."""
    positions = reference_positions(references.shape[2]).to(references.device)
    positions = positions.expand(len(references), -1)
    return BesideFrames(references, torch.zeros_like(positions), positions)


def _task_losses(
    recipe: DiTRecipe,
    part: ValidationSet,
    task: str,
    levels: Tensor,
    beside: BesideFrames | None = None,
) -> Tensor:
    """Loss per clip, (n,), where what a task asks for is at the noise levels (f,).

    Args:
        beside: reference pictures, of a task that has none of its own.
    """
    device, objective = recipe.ranks.device, recipe.objective
    alone = TasksConfig(**{"text": 0.0, task: 1.0})
    num_frames = part.latents.shape[2]
    given = draw_given(alone, 0, part.rows, num_frames, family_of(task))
    x_0 = part.latents[:, :, slice(*given.frames)]
    noise = counted_noise(0, f"validation-{task}", part.rows, tuple(x_0.shape[1:]), device)
    asked = given.levels.isnan().to(device)
    t = torch.where(asked, levels[: asked.shape[1]], given.levels.to(device))
    if given.still is not None:
        factor = recipe.vae.temporal_factor
        frames = chosen_frames(part.rows, given.still, num_frames, factor)
        positions = keyframe_positions(frames, factor).to(device)
        latents = take_frames(part.stills, given.still)
        beside = BesideFrames(latents, torch.zeros_like(positions), positions)
    x_t, told = objective.add_noise(x_0, noise, t), objective.network_t(t)
    pred = recipe.dit(x_t, told, *recipe.text(part.ids), beside=beside)
    return mean_asked(objective.loss(pred, x_0, noise, t), asked)
