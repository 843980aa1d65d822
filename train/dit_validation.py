"""The DiT's validation: held-out clips at every noise level, with their captions and with others'."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from train.clips import read_rows, rows_of_one_size
from train.recipe import counted_noise
from train.watchdog import beat

if TYPE_CHECKING:
    from train.recipe_dit import DiTRecipe

NUM_T_BINS = 10


@dataclass(frozen=True)
class ValidationSet:
    """Manifest rows with their latents (n c f h w), and token ids (n m) of two captions each."""

    rows: list[int]
    latents: Tensor
    ids: Tensor
    shuffled_ids: Tensor

    def parts(self, size: int) -> Iterator[ValidationSet]:
        """Pieces of at most `size` clips."""
        for first in range(0, len(self.rows), size):
            cut = slice(first, first + size)
            yield ValidationSet(
                self.rows[cut], self.latents[cut], self.ids[cut], self.shuffled_ids[cut]
            )


def read_validation(recipe: DiTRecipe) -> ValidationSet:
    """This rank's share of the clips, as latents."""
    manifest, data, ranks = recipe.data.validation, recipe.config.data, recipe.ranks
    fitting = rows_of_one_size(manifest, data)[: recipe.config.logging.num_val_clips]
    half = len(fitting) // 2
    others = dict(zip(fitting, [*fitting[half:], *fitting[:half]]))
    share = fitting[ranks.rank :: ranks.world_size]
    rows, video = read_rows(manifest, share, data, recipe.quarantine)
    pieces = video.split(recipe.chunk)
    parts = [recipe.encode(piece.to(ranks.device)) for piece in pieces if len(piece)]
    latents = torch.cat([torch.empty(0, *recipe.latent_shape, device=ranks.device), *parts])
    right = [manifest.rows[row].captions[0] for row in rows]
    wrong = [manifest.rows[others[row]].captions[0] for row in rows]
    ids, shuffled_ids = (recipe.tokenize(texts).to(ranks.device) for texts in (right, wrong))
    return ValidationSet(rows, latents, ids, shuffled_ids)


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
