"""An exponential moving average of the trained weights, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from train.config import EMAConfig


class EMA:
    """Averages of `trained`, updated once a step; what is validated, sampled and exported.

    `weights` maps the same names to the averages and is part of every checkpoint.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter], config: EMAConfig) -> None:
        self.config = config
        self._trained = dict(trained)
        self.weights: dict[str, Tensor] = {
            name: p.detach().float().clone() for name, p in trained.items()
        }

    def decay(self, step: int) -> float:
        """The weight of the past in the update that ends a step, counted from 0."""
        if not self.config.warmup:
            return self.config.decay
        return min(self.config.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the averages towards the current weights."""
        current = [p.detach().float() for p in self._trained.values()]
        move = get_ema_multi_avg_fn(self.decay(step))
        move(list(self.weights.values()), current, None)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside it the trained parameters hold the averages."""
        saved = {name: p.detach().clone() for name, p in self._trained.items()}
        self._put(self.weights)
        try:
            yield
        finally:
            self._put(saved)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._trained.items():
            parameter.copy_(values[name])
