"""How the training module is spread over the processes that torchrun started."""

from __future__ import annotations

from sample.processes import Ranks, micro_batch_size, start, stop

__all__ = ["Ranks", "micro_batch_size", "start", "stop"]
