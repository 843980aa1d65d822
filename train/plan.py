"""What a run will cost, before it starts: `--dry-run`. On a cluster: train/plan_report.py.

Counted on the meta device, where shapes are computed and numbers are not.
"""

from __future__ import annotations

import os

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data.buckets import Size
from sample.processes import Ranks, micro_batch_size
from train.config import RunConfig
from train.config_file import dump_config
from train.recipe import Recipe
from train.setup import build_recipe, open_data
from train.sizes import describe_sizes, describe_waste


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Parameters, and those of them in training."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


def flops_per_sample(recipe: Recipe, size: Size) -> int:
    """Multiplications and additions of one sample's forward and backward pass, in matrix products
    and convolutions; without a latent cache, of the frozen VAE's encoder too. The recipe is on the
    meta device; size is that of the clip."""
    with FlopCounterMode(display=False) as counter:
        losses, _ = recipe(recipe.example_batch(1, "meta", size))
        losses.sum().backward()
    return counter.get_total_flops()


def plan(config: RunConfig) -> str:
    """The resolved config, parameters by part, tokens and FLOPs.

    Raises:
        ValueError: what training itself would raise about the config, the data and the networks.
        FileNotFoundError: a manifest or model folder is missing.
    """
    data = open_data(config)
    # Outside torchrun as few processes as can share a sample.
    context = config.train.parallel.context
    world_size = max(context, int(os.environ.get("WORLD_SIZE", 1)))
    ranks = Ranks(0, world_size, torch.device("cpu"), None, context)
    recipe = build_recipe(config, data, ranks, on_meta=True)
    recipe.order.check(ranks.num_data_ranks, config.train.grad_accum)
    batch_size = config.train.batch_size
    micro = micro_batch_size(batch_size, config.train.grad_accum, ranks.num_data_ranks)
    lines = [dump_config(config)]
    for name, module in recipe.parts().items():
        total, trained = count_parameters(module)
        lines.append(f"{name + ' parameters':28}{total:>16,}  ({trained:,} trained)")
    clips = len(data.train.rows)
    # Means over the steps, where batches have several sizes.
    counts = recipe.order.mean_counts()
    samples = sum(counts.values())
    tokens = sum(count * recipe.num_tokens(size) for size, count in counts.items())
    flops = sum(count * flops_per_sample(recipe, size) for size, count in counts.items())
    epochs = config.train.steps * batch_size / clips
    sizes = describe_sizes(data.train, config, recipe.order, recipe.num_tokens)
    waste = describe_waste(data.train, config, recipe.order)
    shown = f"{samples:,.2f}".removesuffix("0").removesuffix(".0")
    dealt = f"{micro:,} per micro-batch and process"
    if recipe.order.packed:
        dealt = f"in the mean, in {batch_size:,} packed rows, {dealt}"
    elif shown != f"{batch_size:,}":
        dealt = "in the mean"
    lines += [
        f"{'clips':28}{clips:>16,}  ({len(data.train.bad):,} rows left out)",
        *(sizes or [f"{'epochs':28}{epochs:>16,.1f}", *waste]),
        f"{'samples per batch':28}{shown:>16}  ({dealt})",
        f"{'tokens per sample':28}{round(tokens / samples):>16,}",
        f"{'tokens per batch':28}{round(tokens):>16,}",
        f"{'FLOPs per step':28}{flops:>16.3e}",
        f"{'FLOPs in all':28}{flops * config.train.steps:>16.3e}",
    ]
    return "\n".join(lines)
