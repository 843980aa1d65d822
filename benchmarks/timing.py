"""Timing: calls that take turns, medians, the first third of the calls dropped; and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def median_ms(
    runs: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, float]:
    """Median milliseconds of each call. They take turns, so that whatever else the machine does
    meanwhile slows all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            _wait(device)
            begun = time.perf_counter()
            run()
            _wait(device)
            times[name].append(1000 * (time.perf_counter() - begun))
    return {name: statistics.median(each[repeats // 3 :]) for name, each in times.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def resident(what: str) -> int:
    """Bytes of this process, on Linux: VmRSS now, VmHWM at the most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def matmul_rate(dtype: torch.dtype, device: torch.device, repeats: int = 9) -> float:
    """FLOPs per second of one large matrix product, what this machine can do at best."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype).unbind(0)
    ms = median_ms({"matmul": lambda: a @ b}, repeats, device)["matmul"]
    return 2 * n**3 / (ms / 1000)
