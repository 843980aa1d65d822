"""Muon for the matrices inside transformer blocks, AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW

from sample.processes import whole

# The quintic of Jordan et al. 2024 that takes singular values towards 1 in five steps.
_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor) -> Tensor:
    """About U V^T of each matrix U S V^T in a stack (k m n), by Newton-Schulz in bfloat16.

    Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". Singular values
    come out in about [0.7, 1.2]; a zero matrix stays zero.
    """
    a, b, c = _QUINTIC
    wide = matrices.shape[-2] <= matrices.shape[-1]
    norms = matrices.flatten(1).norm(dim=1).view(-1, 1, 1)
    x = (matrices / (norms + 1e-7)).bfloat16()
    x = x if wide else x.mT.contiguous()
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)


class MuonAdamW(AdamW):
    """AdamW whose groups with a true `muon` entry hold matrices that take Muon's step instead.

    Momentum is Nesterov's; a step has a spectral norm of about lr * sqrt(max(1, rows / columns)).
    Matrices of one shape are orthogonalised together, which is what makes it cheap.
    """

    def __init__(self, params: list[dict[str, Any]], *, momentum: float, **adamw: Any) -> None:
        super().__init__(params, **adamw)
        for group in self.param_groups:
            group.setdefault("muon", False)
            group["momentum"] = momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        groups = self.param_groups
        for group in groups:
            if group["muon"]:
                self._muon_step(group)
        # AdamW's own step sees only its own groups.
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups

    def _muon_step(self, group: dict[str, Any]) -> None:
        stacks: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                stacks[parameter.shape].append(parameter)
        beta, lr = group["momentum"], group["lr"]
        for (rows, columns), parameters in stacks.items():
            grads: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
            buffers = []
            for parameter in parameters:
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                    state["step"] = torch.zeros(())  # AdamW looks for it when loading a state
                buffers.append(state["momentum_buffer"])
            # torch keeps its foreach operations private; they are what its own optimizers use.
            torch._foreach_lerp_(buffers, grads, 1 - beta)  # pyright: ignore[reportPrivateImportUsage]
            directions = torch._foreach_lerp(grads, buffers, beta)  # pyright: ignore[reportPrivateImportUsage]
            # Of sharded matrices each rank needs all rows, and keeps its own of what comes out.
            updates = orthogonalise(torch.stack([whole(direction) for direction in directions]))
            updates = updates * (-lr * max(1.0, rows / columns) ** 0.5)
            parts = [_like(p, update) for p, update in zip(parameters, updates.unbind(0))]
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_add_(parameters, parts)  # pyright: ignore[reportPrivateImportUsage]


def _like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A tensor that every rank has, sharded as the parameter is."""
    if not isinstance(parameter, DTensor):
        return tensor
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)
