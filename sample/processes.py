"""Processes and devices: what torchrun started, and how the processes are laid out.

Without torchrun there is one rank and no process group; every helper here then does nothing.
"""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

# From the slowest-changing axis to neighbouring ranks, which are in one machine and quickest to reach.
AXES = ("replicate", "shard", "context")


@dataclass(frozen=True)
class Ranks:
    """This process among all of them. `mesh`, with AXES, is None in a single process.

    `context` neighbouring ranks work on the same samples.
    """

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh | None
    context: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Among the groups of ranks that have samples of their own."""
        return self.rank // self.context

    @property
    def num_data_ranks(self) -> int:
        return self.world_size // self.context

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


def layout(world_size: int, shard: int | str, context: int) -> tuple[int, int, int]:
    """Processes along each of AXES.

    Args:
        shard: how many share a copy of the weights, or "auto" for all.
    Raises:
        ValueError: they do not divide the processes there are.
    """
    sharing = "auto" if shard == "auto" else shard * context  # type: ignore[operator]
    rest = world_size % (context if sharing == "auto" else int(sharing))
    if rest:
        wanted = f"shard={shard} x context={context}"
        if shard in ("auto", 1):
            wanted = f"context={context}"
        number = "1 process" if world_size == 1 else f"{world_size} processes"
        raise ValueError(
            f"{wanted} does not divide the {number} of this run; start a multiple of it with "
            "torchrun, or choose smaller ones"
        )
    number = world_size // context if shard == "auto" else int(shard)
    return world_size // (number * context), number, context


def start(
    device_name: str,
    threads: int | str | None,
    shard: int | str = 1,
    context: int = 1,
    timeout: float = 1800.0,
) -> Ranks:
    """Joins the process group that torchrun describes, if any, and sets this process's threads.

    Args:
        device_name: auto, cpu or cuda.
        threads: for matrix maths in this process; "auto" shares the cores; None does so too where
            there are several processes, and changes nothing in a single one.
        shard, context: processes along these axes of the mesh; shard may be "auto", for the rest.
        timeout: seconds that an exchange among ranks may take.
    Raises:
        ValueError: the processes do not divide into shard x context.
    """
    device = pick_device(device_name)
    several = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if threads is not None or several:
        torch.set_num_threads(_num_threads(threads or "auto"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not several:
        layout(1, shard, context)
        return Ranks(0, 1, device, None)
    sizes = layout(int(os.environ["WORLD_SIZE"]), shard, context)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    _join(backend, timedelta(seconds=timeout))
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=AXES)
    return Ranks(dist.get_rank(), dist.get_world_size(), device, mesh, context)


def _join(backend: str, timeout: timedelta) -> None:
    """Makes the process group that torchrun describes."""
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    if world_size > 1:
        name = _agree_on_name(store, rank, world_size, timeout)
        store = dist.PrefixStore(name, store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _agree_on_name(store: Any, rank: int, world_size: int, timeout: timedelta) -> str:
    """One that no processes before these have had, for their part of the store.

    When torchrun starts processes again, its store still has the addresses of those before, which
    whoever is there first would try to reach. What torchrun tells of its attempts differs between
    nodes. So rank 0 draws a name, and every other rank asks for it with a word that is new as well.

    Raises:
        DistNetworkError: a rank did not come in time.
    """
    if rank != 0:
        word = uuid.uuid4().hex
        store.set(f"word/{rank}", word)
        name = store.get(f"name/{word}").decode()
        store.set(f"{name}/has/{rank}", "")
        return name
    name, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    missing = set(range(1, world_size))
    while missing:
        for other in sorted(missing):
            if store.check([f"{name}/has/{other}"]):
                missing.remove(other)
            elif store.check([f"word/{other}"]):
                store.set(f"name/{store.get(f'word/{other}').decode()}", name)
        if time.monotonic() > end:
            seconds = f"{timeout.total_seconds():g} s"
            raise dist.DistNetworkError(f"rank {min(missing)} did not start in {seconds}")
        time.sleep(0.02)
    return name


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


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be spread over ranks, on each of them; all of them call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def stop() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def micro_batch_size(batch_size: int, grad_accum: int, num_data_ranks: int) -> int:
    """Samples per forward pass.

    Raises:
        ValueError: the global batch does not divide.
    """
    parts = grad_accum * num_data_ranks
    if batch_size % parts:
        down, up = batch_size // parts * parts, (batch_size // parts + 1) * parts
        fitting = f"{up} or {down}" if down else f"{up}"
        raise ValueError(
            f"train.batch_size={batch_size} does not divide into {num_data_ranks} processes x "
            f"train.grad_accum={grad_accum}; use {fitting}"
        )
    return batch_size // parts
