"""What a run has to compute and to keep, whatever it runs on: FLOPs and parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data.buckets import Size
from train.config import MuonConfig
from train.parallel import checkpoint_activations
from train.recipe import Batch, Recipe
from train.recipe_dit import DiTRecipe
from train.sizes import expected_counts


@dataclass(frozen=True)
class Work:
    """FLOPs of a sample in matrix products and convolutions, and its tokens: those of the mean step,
    divided by train.batch_size, whatever sizes its clips have and however many they are."""

    tokens: float
    forward: float
    backward: float
    encoding: float  # of `forward`, in the frozen VAE, which works in float32
    blocks: float  # of `forward`, again in the backward pass if blocks are computed anew

    def recomputed(self, activation_checkpointing: str) -> float:
        """FLOPs that a backward pass repeats. Selective checkpointing keeps the results of products."""
        return self.blocks if activation_checkpointing == "block" else 0.0


def count_work(recipe: Recipe) -> Work:
    """Counted by torch as the recipe goes forward and backward on the meta device."""
    counts = mean_counts(recipe)
    works = [(count, _work(recipe, size)) for size, count in counts.items()]
    names, batch_size = [field.name for field in fields(Work)], recipe.config.train.batch_size
    return Work(*(sum(n * getattr(work, name) for n, work in works) / batch_size for name in names))


def mean_counts(recipe: Recipe) -> dict[Size, float]:
    """How many clips of each size the mean step has, by the manifest where it has been read."""
    if recipe.data.train.rows:
        return recipe.order.mean_counts()
    return expected_counts(recipe.config, recipe.num_tokens)


def _work(recipe: Recipe, size: Size) -> Work:
    encoding, num_blocks, few = 0, 1, copy_of(recipe)
    if isinstance(recipe, DiTRecipe):
        batch = recipe.example_batch(1, "meta", size)
        if "video" in batch:
            with FlopCounterMode(display=False) as counter:
                recipe.encode(batch["video"], batch["posterior_noise"])
            encoding = counter.get_total_flops()
        # Blocks are alike: what one computes anew, all do.
        num_blocks, few = len(recipe.dit.blocks), copy_of(recipe, 1)
    once = sum(_passes(few, size))
    checkpoint_activations(few, selective=False)
    recomputed = num_blocks * (sum(_passes(few, size)) - once)
    forward, backward = _passes(recipe, size)
    return Work(recipe.num_tokens(size), forward + encoding, backward, encoding, recomputed)


def copy_of(recipe: Recipe, num_blocks: int | None = None) -> Recipe:
    """A copy on the meta device, of a DiT with its first blocks alone; what is beside the DiT is
    the same."""
    beside = [recipe.vae, recipe.text] if isinstance(recipe, DiTRecipe) else []
    recipe = copy.deepcopy(recipe, {id(module): module for module in beside})
    if isinstance(recipe, DiTRecipe):
        recipe.dit.blocks = recipe.dit.blocks[:num_blocks]
    return recipe


def example_of(recipe: Recipe, samples: int, size: Size) -> Batch:
    """A batch on the meta device, for a DiT with latents, as if the frozen VAE had been there."""
    batch = recipe.example_batch(samples, "meta", size)
    if "video" in batch and "ids" in batch:
        batch["latents"] = batch["noise"]
        del batch["video"], batch["posterior_noise"]
    return batch


def _passes(recipe: Recipe, size: Size) -> tuple[int, int]:
    """FLOPs forward and backward."""
    with FlopCounterMode(display=False) as counter:
        losses, _ = recipe(example_of(recipe, 1, size))
        forward = counter.get_total_flops()
        losses.sum().backward()
        backward = counter.get_total_flops() - forward
    recipe.zero_grad()
    return forward, backward


@dataclass(frozen=True)
class Parameter:
    """A parameter, and what training keeps for it."""

    unit: str  # "block", "rest" of a sharded network, "beside" those, or "frozen" beside them
    rows: int  # of its first dimension, along which it is sharded
    size: int
    bytes_each: int
    trained: bool
    num_states: int  # of the optimizer, float32, each of its size
    averaged: bool

    def held(self, ranks: int) -> float:
        """Values of it that the rank with the most of them has, where `ranks` share the weights."""
        if self.unit in ("beside", "frozen"):
            return self.size
        return math.ceil(self.rows / ranks) * self.size / max(1, self.rows)


def list_parameters(recipe: Recipe) -> list[Parameter]:
    """All parameters of a recipe on the meta device."""
    try:
        networks = recipe.networks()
    except ValueError:  # none whose weights may be sharded
        networks = []
    in_networks = {id(p) for network in networks for p in network.parameters()}
    in_blocks = {id(p) for block in recipe.blocks() for p in block.parameters()}
    averaged = {id(p) for p in recipe.groups()[0].parameters.values()}
    by_muon = _muon_weights(recipe)
    found = []
    for p in recipe.parameters():
        unit = "beside" if p.requires_grad else "frozen"
        if id(p) in in_networks:
            unit = "block" if id(p) in in_blocks else "rest"
        states = (1 if id(p) in by_muon else 2) if p.requires_grad else 0
        rows = p.shape[0] if p.ndim else 1
        found.append(
            Parameter(
                *(unit, rows, p.numel(), p.element_size(), p.requires_grad, states),
                averaged=id(p) in averaged,
            )
        )
    return found


def _muon_weights(recipe: Recipe) -> set[int]:
    """As `train.optim.build_optimizer` chooses them."""
    if not isinstance(recipe.config.train.optimizer, MuonConfig):
        return set()
    layers = (layer for block in recipe.blocks() for layer in block.modules())
    return {id(layer.weight) for layer in layers if isinstance(layer, nn.Linear)}


def total(values: Iterable[float]) -> float:
    """Their sum, as a float where there are none."""
    return float(sum(values))
