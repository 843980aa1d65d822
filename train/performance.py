"""How fast a run is, what of the hardware it uses, and which rank is the slowest."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import Variable

from data.buckets import Size
from sample.processes import Ranks
from train.config import RunConfig
from train.gpus import peak_flops


def peak_tflops(config: RunConfig, device: torch.device) -> float | None:
    """What a process could reach in matrix products, in 1e12 FLOPs per second: as the config says, or
    by the name of the GPU; None where that is not known."""
    if config.logging.peak_tflops is not None:
        return config.logging.peak_tflops
    if device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(device), config.train.dtype)
    return None if peak is None else peak / 1e12


def peak_memory_gb(device: torch.device) -> float | None:
    """The most memory that was in use so far, in 1e9 bytes: on a GPU what torch gave out, else what
    this process has in RAM; None on a system that does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


@dataclass(frozen=True)
class Costs:
    """What a sample of a size takes.

    Args:
        tokens: positions that the network works on.
        flops: forward and backward pass, without what is computed anew; empty if not to be known.
        peak_tflops: of one process; None if not known.
    """

    tokens: Mapping[Size, int]
    flops: Mapping[Size, float]
    peak_tflops: float | None


class Meter:
    """Measures the steps of this rank since the last row; `take` compares the ranks.

    A rank's own work is what it takes for a step without waiting for others: until it has its data, and
    from there to the end of its backward pass, before gradients of others are waited for. On a GPU the
    passes are timed by the GPU's own clock, whose marks are read when the step has ended anyway.

    Args:
        meets: ranks wait for each other all through the passes, because weights or contexts are
            spread over them; then a rank's own work is but the wait for its data.
    """

    def __init__(self, ranks: Ranks, costs: Costs, *, meets: bool) -> None:
        self.ranks, self.costs, self.meets = ranks, costs, meets
        self._on_gpu = ranks.device.type == "cuda"
        self._tokens = self._flops = 0.0
        self._busy = self._own = self._checkpoints = 0.0
        self._num_samples = self._num_steps = 0
        self._begun = 0.0
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._mark: torch.cuda.Event | None = None

    def begin(self) -> None:
        """Own work begins: a micro-batch has come."""
        self._begun = time.perf_counter()
        if self._on_gpu:
            self._mark = torch.cuda.Event(enable_timing=True)
            self._mark.record()

    def end_with(self, loss: Tensor) -> None:
        """Own work ends when the gradients of `loss` are computed, which are to be computed next."""
        if not self.meets:
            # Runs when the last gradient is there, before DistributedDataParallel's own, which waits.
            engine = Variable._execution_engine
            loss.register_hook(lambda _: engine.queue_callback(self._end))

    def _end(self) -> None:
        if self._mark is None:
            self._own += time.perf_counter() - self._begun
            return
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        self._marks.append((self._mark, mark))

    def add(self, samples: Mapping[Size, int], busy: float, wait: float) -> None:
        """A step of so many clips of each size, over all ranks, which took `busy` seconds, and of these
        `wait` for data."""
        self._num_steps += 1
        self._busy += busy
        self._own += wait
        for size, count in samples.items():
            self._num_samples += count
            self._tokens += count * self.costs.tokens.get(size, 0)
            self._flops += count * self.costs.flops.get(size, 0.0)

    def add_checkpoint(self, seconds: float) -> None:
        """A checkpoint has kept training waiting."""
        self._checkpoints += seconds

    def take(self, write_seconds: float) -> dict[str, float]:
        """Figures for a row, and a fresh start; every rank calls it.

        Args:
            write_seconds: that the last checkpoint took to write.
        """
        own = self._own + sum(begin.elapsed_time(end) for begin, end in self._marks) / 1000
        mine = (own / max(self._num_steps, 1), peak_memory_gb(self.ranks.device))
        found = self.ranks.gather(mine)
        seconds = [own for own, _ in found]
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        fastest = min(range(len(seconds)), key=seconds.__getitem__)
        share = max(self._busy, 1e-9) * self.ranks.world_size
        row: dict[str, float] = {
            "samples_per_second_per_process": float(f"{self._num_samples / share:.6g}"),
            "tokens_per_second_per_process": float(f"{self._tokens / share:.6g}"),
            "slowest_rank": slowest,
            "slowest_rank_seconds": round(seconds[slowest], 6),
            "fastest_rank": fastest,
            "fastest_rank_seconds": round(seconds[fastest], 6),
            "checkpoint_seconds": round(self._checkpoints, 3),
            "checkpoint_write_seconds": round(write_seconds, 3),
        }
        memory = [gb for _, gb in found if gb is not None]
        if memory:
            row["peak_memory_gb"] = round(max(memory), 3)
        if self.costs.peak_tflops is not None and self._flops:
            row["mfu"] = float(f"{self._flops / share / self.costs.peak_tflops / 1e12:.4g}")
            row["peak_tflops"] = self.costs.peak_tflops
        self._tokens = self._flops = self._busy = self._own = self._checkpoints = 0.0
        self._num_samples = self._num_steps = 0
        self._marks = []
        return row
