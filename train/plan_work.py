"""What a run has to compute and to keep, whatever it runs on: FLOPs and parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data.buckets import Size
from train.config import MuonConfig
from train.recipe import Recipe
from train.recipe_dit import DiTRecipe


@dataclass(frozen=True)
class Work:
    """FLOPs of a sample in matrix products and convolutions, and its tokens; means over the sizes that
    a run's batches have."""

    tokens: float
    forward: float
    backward: float
    blocks: float  # of `forward`, in the blocks that activation checkpointing computes anew
    encoding: float  # of `forward`, in the frozen VAE, which works in float32

    def recomputed(self, activation_checkpointing: str) -> float:
        """FLOPs that a backward pass repeats."""
        return self.blocks if activation_checkpointing == "block" else 0.0


def count_work(recipe: Recipe) -> Work:
    """Counted by torch as the recipe goes forward and backward on the meta device."""
    data = recipe.config.data
    shares = data.shares or {data.sizes[0]: 1.0}
    works = [(share, _work(recipe, size)) for size, share in shares.items()]
    total = sum(shares.values())
    names = [field.name for field in fields(Work)]
    return Work(*(sum(w * getattr(work, name) for w, work in works) / total for name in names))


def _work(recipe: Recipe, size: Size) -> Work:
    names = {module: name for name, module in recipe.named_modules()}
    blocks = {f"{type(recipe).__name__}.{names[block]}" for block in recipe.blocks()}
    batch = recipe.example_batch(1, "meta", size)
    with FlopCounterMode(display=False) as counter:
        losses, _ = recipe(batch)
        forward, counts = counter.get_total_flops(), counter.get_flop_counts()
        in_blocks = sum(sum(counts[name].values()) for name in blocks if name in counts)
        losses.sum().backward()
        backward = counter.get_total_flops() - forward
    recipe.zero_grad()
    encoding = 0
    if isinstance(recipe, DiTRecipe) and "video" in batch:
        with FlopCounterMode(display=False) as counter:
            recipe.encode(batch["video"], batch["posterior_noise"])
        encoding = counter.get_total_flops()
    return Work(recipe.num_tokens(size), forward, backward, in_blocks, encoding)


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
