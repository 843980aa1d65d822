"""Processes and devices: what torchrun started, and how the training module is spread over it.

Without torchrun there is one rank and no process group; every helper here then does nothing.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

DATA_AXIS = "data"


@dataclass(frozen=True)
class Ranks:
    """This process among all of them. `mesh` is None in a single process."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh | None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """`values` added up over all ranks, in place; the same bits on each of them."""
        if self.mesh is not None:
            dist.all_reduce(values)
        return values

    def agree(self, error: Exception | None) -> None:
        """Raises on every rank when one of them has an error: its own there, else a ValueError.

        Without it the others would wait at their next barrier for a rank that has gone.
        """
        failed = torch.full((1,), float(error is not None), device=self.device)
        self.sum(failed)
        if error is not None:
            raise error
        if failed.item():
            raise ValueError("another process of this run could not go on; see what it says")

    def gather(self, value: Any) -> list[Any]:
        """What every rank has, by rank; the values can be pickled."""
        if self.mesh is None:
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value)
        return found

    def barrier(self) -> None:
        if self.mesh is not None:
            dist.barrier()


def pick_device(name: str) -> torch.device:
    """The device of this process for `auto`, `cpu` or `cuda`.

    Raises:
        ValueError: cuda was asked for and there is none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("device=cuda, but torch sees no GPU here; use device=cpu or auto")
    if name == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def start(device_name: str, threads: int | str) -> Ranks:
    """Joins the process group that torchrun describes, if any, and sets this process's threads.

    Args:
        device_name: auto, cpu or cuda.
        threads: for matrix maths in this process, or "auto".
    """
    device = pick_device(device_name)
    torch.set_num_threads(_num_threads(threads))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Ranks(0, 1, device, None)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=(DATA_AXIS,))
    return Ranks(dist.get_rank(), dist.get_world_size(), device, mesh)


def _num_threads(threads: int | str) -> int:
    """Shares the cores among the local ranks, unless a number was given, in the config or (with one
    local rank: for several, torchrun sets it to 1 itself) as OMP_NUM_THREADS."""
    if threads != "auto":
        return int(threads)
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if num_local == 1 and "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, cores // num_local)


def stop() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def micro_batch_size(batch_size: int, grad_accum: int, world_size: int) -> int:
    """Samples per forward pass.

    Raises:
        ValueError: the global batch does not divide.
    """
    parts = grad_accum * world_size
    if batch_size % parts:
        down, up = batch_size // parts * parts, (batch_size // parts + 1) * parts
        fitting = f"{up} or {down}" if down else f"{up}"
        raise ValueError(
            f"train.batch_size={batch_size} does not divide into {world_size} processes x "
            f"train.grad_accum={grad_accum}; use {fitting}"
        )
    return batch_size // parts


def parallelize(recipe: nn.Module, ranks: Ranks) -> nn.Module:
    """The recipe as all ranks train it together: gradients are averaged over the mesh."""
    if ranks.mesh is None or ranks.world_size == 1:
        return recipe
    return DistributedDataParallel(recipe, device_mesh=ranks.mesh, gradient_as_bucket_view=True)


def keep_local(model: nn.Module, local: bool) -> AbstractContextManager[None]:
    """Inside it, backward passes leave gradients unsynchronised if `local`."""
    if local and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return nullcontext()
