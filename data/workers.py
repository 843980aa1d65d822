"""Worker processes that leave Ctrl-C to the process that started them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Processes started inside it never see SIGINT; one that comes meanwhile arrives afterwards.

    A terminal sends Ctrl-C to a whole process group: without this every worker, even one that is
    still importing, prints a traceback of its own. A blocked signal is inherited by children.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
