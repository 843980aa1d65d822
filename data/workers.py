"""Worker processes that leave Ctrl-C to the process that started them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Processes started inside it never see SIGINT; one that comes meanwhile arrives afterwards.

    A terminal sends Ctrl-C to a whole process group: without this every worker, even one that is
    still importing, prints a traceback of its own. A blocked signal is inherited by children. It
    is not enough for this process, where any other thread may take the signal and the main thread
    then runs its handler; hence a handler that waits.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    arrived: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    if in_main:
        signal.signal(signal.SIGINT, lambda number, _: arrived.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if in_main:
            signal.signal(signal.SIGINT, handler)
            if arrived:
                signal.raise_signal(signal.SIGINT)
