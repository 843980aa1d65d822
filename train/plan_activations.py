"""Memory that a step takes for a while, in any layout, from a few measured steps.

A DiT's blocks are alike, and so are the samples of a batch: what a few blocks, one sample and two take
(train/plan_measure.py) says what many do. Nothing is measured before a layout asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from train.plan_measure import Case, Measured, Storages, measure
from train.recipe import Batch, Recipe
from train.recipe_dit import DiTRecipe
from train.sizes import heaviest

# Blocks that are measured in place of all: with fewer, FSDP has not all in flight that it has.
FEW = 4, 5
PASSES = "forward", "backward"
RANKS = 8  # among which weights are spread to measure what takes place around sharded ones
# Of what a block keeps for the backward pass, where torch.compile's partitioner decides: between 0.71
# and 0.75 of it in the presets.
COMPILED_SHARE = 0.75


@dataclass(frozen=True)
class Most:
    """Bytes at most, beside weights, gradients, optimizer and averages: in the forward and backward
    passes; when all gradients but the first block's are there; while weights are updated."""

    step: float
    last: float
    update: float


class Activations:
    """Of a recipe on the meta device, in bytes of a rank; for the steps with the most or largest clips.

    Args:
        on_step: called before a step is measured, which takes seconds.
    """

    def __init__(self, recipe: Recipe, on_step: Callable[[], object]) -> None:
        self.recipe = recipe
        self.on_step = on_step
        self.size, self.clips = heaviest(recipe.config, recipe.num_tokens)
        self.num_blocks = len(recipe.dit.blocks) if isinstance(recipe, DiTRecipe) else 0
        self._measured = lru_cache(maxsize=None)(self._measure)

    def most(self, mode: str, *, sharded: bool, context: int, micro_batch: int) -> Most:
        """For a micro-batch, with activation checkpointing of a mode.

        Args:
            sharded: whether weights are spread over ranks, and gathered when they are needed.
            context: ranks that share each sample.
        """

        # Which moment of a phase takes the most may change with the size of the batch.
        pair = (1, 2) if micro_batch <= 2 else (2, 4)

        def at(blocks: int | None, phase: str, *, gradients: bool = False) -> float:
            def figure(of_context: int, samples: int, of_blocks: int | None) -> float:
                measured = self._measured(mode, sharded, of_context, of_blocks, samples)
                return (measured.together if gradients else measured.other)[phase]

            # What does not grow with the batch does not grow with sharded blocks either.
            few = FEW[0] if sharded and blocks in FEW else blocks

            def fixed_and_sample(of_context: int) -> tuple[float, float]:
                one, two = (figure(of_context, samples, few) for samples in pair)
                fixed = one - pair[0] * (two - one) / (pair[1] - pair[0])
                return fixed, (figure(of_context, pair[0], blocks) - fixed) / pair[0]

            fixed, sample = fixed_and_sample(1)
            if context > 1:
                nearest = self._nearest(context)
                fixed, part = fixed_and_sample(nearest)
                # Of tokens, which are shared out, and of the rest.
                of_tokens = (sample - part) / (1 - 1 / nearest)
                sample -= of_tokens * (1 - 1 / context)
            return fixed + micro_batch * self.clips * sample

        update = float(self._updates(sharded))
        if not self.num_blocks:
            forward, backward = (at(None, phase) for phase in PASSES)
            together = at(None, "backward", gradients=True)
            gradients = self._measured(mode, sharded, 1, None, 1).state["gradients"]
            return Most(max(forward, backward), together - gradients, update)
        if self.num_blocks <= FEW[1]:
            forward, backward = (at(self.num_blocks, phase) for phase in PASSES)
            return Most(max(forward, backward), at(1, "backward"), update)
        lower, upper = ([at(blocks, phase) for phase in PASSES] for blocks in FEW)
        kept = [b - a for a, b in zip(lower, upper)]
        all_of = [a + (self.num_blocks - FEW[0]) * b for a, b in zip(lower, kept)]
        if mode == "none" and self.recipe.config.train.compile:
            saving = (1 - COMPILED_SHARE) * self.num_blocks
            all_of = [whole - saving * each for whole, each in zip(all_of, kept)]
        return Most(max(all_of), lower[1] - (FEW[0] - 1) * kept[1], update)

    def _nearest(self, context: int) -> int:
        """The smallest context whose ranks exchange the same things as those of a larger one."""
        assert isinstance(self.recipe, DiTRecipe)
        heads = self.recipe.dit.config.num_heads
        method = self.recipe.config.train.parallel.context_method
        alike = [heads % size == 0 and method != "gather" for size in range(1, context + 1)]
        return 2 if alike[1] == alike[context - 1] else context

    def _measure(
        self, mode: str, sharded: bool, context: int, blocks: int | None, micro_batch: int
    ) -> Measured:
        shard = max(1, RANKS // context) if sharded else 1
        case = Case(mode, shard, context, micro_batch, num_blocks=blocks)
        self.on_step()
        return measure(self.recipe, case, self.size)

    @lru_cache(maxsize=2)  # noqa: B019 (as long-lived as this)
    def _updates(self, sharded: bool) -> float:
        """Bytes at most while weights are updated."""
        if self.recipe.config.train.optimizer.kind == "adamw":  # in place, by one kernel
            return 0.0
        shard = RANKS if sharded else 1
        few = FEW if self.num_blocks > FEW[1] else (self.num_blocks or None,)
        most = [
            measure(self.recipe, Case("none", shard, num_blocks=n, num_steps=2), self.size)
            for n in few
        ]
        figures = [float(measured.other["update"]) for measured in most]
        if len(figures) == 1:
            return figures[0]
        return figures[0] + (self.num_blocks - FEW[0]) * (figures[1] - figures[0])

    @lru_cache(maxsize=1)  # noqa: B019 (as long-lived as this)
    def encoding(self) -> float:
        """Bytes at most, per sample, while the frozen VAE encodes a clip."""
        batch = self._batch()
        if not isinstance(self.recipe, DiTRecipe) or "video" not in batch:
            return 0.0
        with torch.no_grad(), Storages() as storages:
            self.recipe.encode(batch["video"], batch["posterior_noise"])
            storages.end_of("encoding")
        return float(storages.other["encoding"])

    def batch_bytes(self) -> tuple[float, float]:
        """Of one sample as the loader gives it, and how much of that is not in what is measured."""
        batch = self._batch()
        names = ("video", "posterior_noise") if "ids" in batch else ()
        sizes = {name: tensor.nbytes for name, tensor in batch.items()}
        return float(sum(sizes.values())), float(sum(sizes.get(name, 0) for name in names))

    def _batch(self) -> Batch:
        return self.recipe.example_batch(1, "meta", self.size)
