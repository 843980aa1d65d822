"""Optimizers, learning-rate schedules and gradient norms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from sample.processes import whole
from train.config import AdamWConfig, MuonConfig, ScheduleConfig
from train.muon import MuonAdamW
from train.recipe import TrainedGroup


def build_optimizer(
    trained: Sequence[TrainedGroup], config: AdamWConfig, blocks: Iterable[nn.Module] = ()
) -> Optimizer:
    """AdamW, or Muon with AdamW; matrices and kernels decay, biases, gains and vectors do not.

    Args:
        blocks: the repeated modules, whose linear weights are what Muon is for.
    """
    hidden: list[Tensor] = []
    if isinstance(config, MuonConfig):
        layers = (layer for block in blocks for layer in block.modules())
        hidden = [x.weight for x in layers if isinstance(x, nn.Linear)]
    held = {id(p) for p in hidden}
    groups: list[dict[str, Any]] = []
    for group in trained:
        lr = {"lr": config.lr * group.lr_ratio, "lr_ratio": group.lr_ratio}
        own: dict[str, Any] = {} if group.lr_ratio == 1 else lr
        if group.start_step:
            own["start_step"] = group.start_step
        if group.betas is not None:
            own["betas"] = group.betas
        matrices = [p for p in group.parameters.values() if p.ndim >= 2 and id(p) not in held]
        vectors = [p for p in group.parameters.values() if p.ndim < 2]
        groups.append({"params": matrices, "weight_decay": config.weight_decay, **own})
        groups.append({"params": vectors, "weight_decay": 0.0, **own})
    options: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "eps": config.eps,
        "fused": True,
    }
    if not isinstance(config, MuonConfig):
        return AdamW([group for group in groups if group["params"]], **options)
    ratio = config.muon_lr / config.lr
    muon = {"muon": True, "lr": config.muon_lr, "lr_ratio": ratio}
    groups.append({"params": hidden, "weight_decay": config.weight_decay, **muon})
    groups = [group for group in groups if group["params"]]
    return MuonAdamW(groups, momentum=config.momentum, **options)


def schedule_factor(config: ScheduleConfig, step: int, num_steps: int) -> float:
    """What the learning rate is multiplied with at a step, in (0, 1].

    Rises linearly over `warmup_steps`, and falls over the last decay_fraction * num_steps steps,
    the last of which would be followed by zero.

    Args:
        step: counted from 0.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    num_decay = round(config.decay_fraction * num_steps)
    if config.kind == "constant" or step < num_steps - num_decay:
        return warmup
    left = (num_steps - step) / (num_decay + 1)  # in (0, 1)
    decay = left if config.kind == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)
    return warmup * decay


def step_optimizer(optimizer: Optimizer, lr: float, step: int) -> None:
    """An update of every group, at its own ratio of the learning rate where it has one.

    A group that starts later stays as it is: neither do its weights decay, nor does Adam count the
    step, which its bias correction would otherwise take for a step of gradients seen.

    Args:
        step: of the run, counted from 0.
    """
    waiting = [group for group in optimizer.param_groups if step < group.get("start_step", 0)]
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)
    for group in waiting:
        group["lr"] = 0.0
    optimizer.step()
    for group in waiting:
        for parameter in group["params"]:
            optimizer.state[parameter]["step"].zero_()


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales gradients down to a global norm of at most max_norm; returns the norm before. All ranks
    call it, as gradients may be sharded."""
    parameters = list(parameters)
    norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
