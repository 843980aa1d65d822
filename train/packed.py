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
from train.tasks import given_levels, mean_asked

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
    batch = {"sizes": items["sizes"], "noise": noise}
    if recipe.options.tasks.only_text:
        batch["t"] = torch.cat(t).to(device)
    else:
        given = [
            given_levels(recipe, [g], recipe.vae.latent_shape(*size), level)
            for g, size, level in zip(items["g"], sizes, t)
        ]
        batch["t"], batch["asked"] = (torch.cat(x, dim=1)[0].to(device) for x in zip(*given))
    return batch | recipe.latents_of(items, posterior_noise)


def packed_losses(recipe: DiTRecipe, batch: Batch) -> Tensor:
    """Loss per clip, (b,): what each would have by itself."""
    sizes, objective = _sizes(batch["sizes"]), recipe.objective
    shapes = [recipe.vae.latent_shape(*size) for size in sizes]
    noises, asked = unflatten(batch["noise"], shapes), batch.get("asked")
    lengths = [1 if asked is None else shape[1] for shape in shapes]  # noise levels of each clip
    levels = batch["t"].split(lengths)
    clips = unflatten(batch["latents"], shapes) if "latents" in batch else _encode(recipe, batch)
    noisy = [
        objective.add_noise(x_0[None], noise[None], t.expand(1, x_0.shape[1]))[0]
        for x_0, noise, t in zip(clips, noises, levels)
    ]
    context, mask = recipe.text_states(batch)
    masks = [None] * len(sizes) if mask is None else mask
    contexts = list(zip(context, masks))
    told = [objective.network_t(t if asked is not None else t[0]) for t in levels]
    preds = recipe.dit.forward_packed(noisy, told, contexts)
    losses = [
        objective.loss(pred[None], x_0[None], noise[None], t.expand(1, x_0.shape[1]))
        for pred, x_0, noise, t in zip(preds, clips, noises, levels)
    ]
    if asked is None:
        return torch.stack([loss.mean() for loss in losses])
    masks = asked[None].split(lengths, dim=1)
    return torch.cat([mean_asked(loss, mask) for loss, mask in zip(losses, masks)])


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
