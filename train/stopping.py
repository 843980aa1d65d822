"""Signals that ask a run to stop: it ends its step, writes a checkpoint, and exits with a code that
says whether it wants to go on."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

EXIT_REQUEUE = 75  # EX_TEMPFAIL: start me again, and I go on
EXIT_INTERRUPTED = 128 + signal.SIGINT

# What schedulers send before they take a machine away; SIGUSR1 is what Slurm users choose for it.
PREEMPTIONS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
STOPS = [signal.SIGINT, *PREEMPTIONS]


def leave_on_preemptions() -> None:
    """For as long as there is nothing to save: the process ends at once, to be started again."""
    for number in PREEMPTIONS:
        signal.signal(number, lambda *_: sys.exit(EXIT_REQUEUE))


def ignore_preemptions() -> None:
    """For a process that is on its way out already."""
    for number in PREEMPTIONS:
        signal.signal(number, signal.SIG_IGN)


@dataclass
class Stop:
    """Set by the first signal of STOPS that this process gets."""

    signal: int | None = None

    @property
    def interrupted(self) -> bool:
        """By Ctrl-C: whoever did that is there, and no scheduler need start the run again."""
        return self.signal == signal.SIGINT


@contextmanager
def catch_signals() -> Iterator[Stop]:
    """Inside it the first signal of STOPS only takes note. Later ones of PREEMPTIONS do nothing:
    schedulers send one with a warning, and another when the time is up, while the last checkpoint is
    being written. A later Ctrl-C acts as it would outside."""
    stop = Stop()
    before: dict[int, Any] = {number: signal.getsignal(number) for number in STOPS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        stop.signal = number
        restore()
        ignore_preemptions()

    for number in STOPS:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        restore()
