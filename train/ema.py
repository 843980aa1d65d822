"""An exponential moving average of the trained weights, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from train.config import EMAConfig


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class EMA:
    """Averages of `trained`, updated once a step; what is validated, sampled and exported.

    Each rank averages the parts that it has of sharded weights, in the CPU's memory if the config
    says so.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter], config: EMAConfig) -> None:
        self.config = config
        self._trained = dict(trained)
        self._parts: dict[str, Tensor] = {}
        for name, parameter in self._trained.items():
            part = local(parameter.detach()).to(torch.float32, copy=True)
            self._parts[name] = part.cpu() if config.offload else part

    @property
    def weights(self) -> dict[str, Tensor]:
        """The averages by name, sharded as the parameters are, and where they are."""
        return {name: self._like(p, self._parts[name]) for name, p in self._trained.items()}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Takes averages over, given as `weights` gives them."""
        for name, part in self._parts.items():
            part.copy_(local(weights[name]))

    @staticmethod
    def _like(parameter: Tensor, part: Tensor) -> Tensor:
        part = part.to(parameter.device)
        if not isinstance(parameter, DTensor):
            return part
        mesh, placements = parameter.device_mesh, parameter.placements
        whole = {"shape": parameter.shape, "stride": parameter.stride()}
        return DTensor.from_local(part, mesh, placements, run_check=False, **whole)

    def decay(self, step: int) -> float:
        """The weight of the past in the update that ends a step, counted from 0."""
        if not self.config.warmup:
            return self.config.decay
        return min(self.config.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the averages towards the current weights."""
        current = [
            local(parameter.detach()).to(self._parts[name].device, torch.float32)
            for name, parameter in self._trained.items()
        ]
        move = get_ema_multi_avg_fn(self.decay(step))
        move(list(self._parts.values()), current, None)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside it the trained parameters hold the averages."""
        saved = {name: local(p.detach()).clone() for name, p in self._trained.items()}
        self._put(self._parts)
        try:
            yield
        finally:
            self._put(saved)

    @torch.no_grad()
    def _put(self, parts: Mapping[str, Tensor]) -> None:
        for name, parameter in self._trained.items():
            local(parameter).copy_(parts[name])
