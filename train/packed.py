"""Clips of different sizes in one row of tokens: their batch and their losses.

All tensors of a packed batch are flat, the values of one clip after the other's; `sizes` says whose.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data.buckets import Size
from data.dataset import flatten
from train.recipe import Batch, counted_noise

if TYPE_CHECKING:
    from train.recipe_dit import DiTRecipe


def packed_batch(recipe: DiTRecipe, items: dict[str, Any], uniform: Tensor) -> Batch:
    """What a packed batch has beside its captions.

    Args:
        items: as `data.dataset.collate_packed` makes them; or with flat `mean` and `std` of cached
            posteriors in place of `video`.
        uniform: a draw in [0, 1) for each clip's t, (b,).
    """
    seed, device, sizes = recipe.config.seed, recipe.ranks.device, _sizes(items["sizes"])
    t = [recipe.sample_t(u, recipe.num_tokens(size)) for u, size in zip(uniform.split(1), sizes)]
    noise, posterior_noise = (
        flatten(
            [
                counted_noise(seed, purpose, [g], recipe.vae.latent_shape(*size), device)
                for g, size in zip(items["g"], sizes)
            ]
        )
        for purpose in ("noise", "posterior")
    )
    batch = {"t": torch.cat(t).to(device), "sizes": items["sizes"], "noise": noise}
    return batch | recipe.latents_of(items, posterior_noise)


def packed_losses(recipe: DiTRecipe, batch: Batch) -> Tensor:
    """Loss per clip, (b,): what each would have by itself."""
    sizes, objective = _sizes(batch["sizes"]), recipe.objective
    shapes = [recipe.vae.latent_shape(*size) for size in sizes]
    noises, levels = unflatten(batch["noise"], shapes), batch["t"].split(1)
    clips = unflatten(batch["latents"], shapes) if "latents" in batch else _encode(recipe, batch)
    noisy = [
        objective.add_noise(x_0[None], noise[None], t)[0]
        for x_0, noise, t in zip(clips, noises, levels)
    ]
    context, mask = recipe.text_states(batch)
    masks = [None] * len(sizes) if mask is None else mask
    contexts = list(zip(context, masks))
    preds = recipe.dit.forward_packed(noisy, objective.network_t(batch["t"]), contexts)
    losses = [
        objective.loss(pred[None], x_0[None], noise[None], t).mean()
        for pred, x_0, noise, t in zip(preds, clips, noises, levels)
    ]
    return torch.stack(losses)


def _encode(recipe: DiTRecipe, batch: Batch) -> list[Tensor]:
    """Latents (c f h w) of each clip; neighbours of one size go through the VAE together."""
    sizes = _sizes(batch["sizes"])
    videos = unflatten(batch["video"], [(3, *size) for size in sizes])
    noises = unflatten(batch["posterior_noise"], [recipe.vae.latent_shape(*s) for s in sizes])
    latents: list[Tensor] = []
    for _, group in groupby(range(len(sizes)), key=sizes.__getitem__):
        which = list(group)
        video, noise = (torch.stack([parts[k] for k in which]) for parts in (videos, noises))
        latents += recipe.encode(video, noise)
    return latents


def unflatten(values: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """The tensors that `data.dataset.flatten` made flat."""
    parts = values.split([prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes)]


def _sizes(sizes: Tensor) -> list[Size]:
    return [(f, h, w) for f, h, w in sizes.tolist()]
