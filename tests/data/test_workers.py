"""Ctrl-C while worker processes are started."""

import os
import signal
import threading

import pytest

from data.workers import interrupts_deferred


def interrupted() -> bool:
    """Whether Ctrl-C inside the block is felt inside it; afterwards it must be."""
    seen = []

    def block() -> None:
        with interrupts_deferred():
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(100_000):  # time for the handler to run
                pass
            seen.append("end of the block")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return not seen


def test_an_interrupt_arrives_after_the_block():
    assert not interrupted()


def test_another_thread_cannot_let_it_through():
    running, stop = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: (running.set(), stop.wait()))
    thread.start()  # before the block: it takes signals
    running.wait()
    try:
        assert not interrupted()
    finally:
        stop.set()
        thread.join()


def test_it_works_off_the_main_thread():
    seen = []

    def run() -> None:
        with interrupts_deferred():
            seen.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen
