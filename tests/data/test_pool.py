"""Tasks that hang, crash and grow, beside ones that do not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data.pool import Lost, TaskPool, run_tasks


def behave(task):
    kind, value = task
    if kind == "hang":
        time.sleep(600)
    if kind == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "exit":
        os._exit(3)
    if kind == "raise":
        raise KeyError(value)
    if kind == "once":  # dies the first time
        if not os.path.exists(value):
            open(value, "w").close()
            os._exit(1)
        return "second try"
    return value * 2


def crash_after_a_note(task, note):
    for file in range(task + 1):
        note(f"file {file}")
        time.sleep(0.3)
    if task == 3:
        time.sleep(600)
    return os.getpid()


def grow(task, note):
    if task == 1:
        grow.kept = bytearray(300_000_000)  # type: ignore[attr-defined]
    return os.getpid()


def drained(pool):
    found = {}
    while pool.num_open:
        found.update(pool.poll(1.0))
    pool.close()
    return found


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_task_has_its_result(workers):
    found = dict(run_tasks(behave, [("good", k) for k in range(50)], workers=workers))
    assert found == {k: 2 * k for k in range(50)}


def test_what_hangs_and_crashes_is_lost_and_nothing_else():
    tasks = [("good", 1), ("hang", 0), ("crash", 0), ("good", 2), ("exit", 0), ("good", 3)]
    found = dict(run_tasks(behave, tasks, workers=2, time_limit=2.0))
    assert {k: v for k, v in found.items() if not isinstance(v, Lost)} == {0: 2, 3: 4, 5: 6}
    assert found[1] == Lost("it took longer than 2 s")
    assert found[2] == Lost("the process that read it died twice, of signal SIGSEGV")
    assert found[4] == Lost("the process that read it died twice, of exit code 3")


def test_a_process_that_dies_once_is_forgiven(tmp_path):
    found = dict(run_tasks(behave, [("once", str(tmp_path / "seen"))], workers=1))
    assert found == {0: "second try"}


def test_a_function_that_raises_ends_it_and_the_workers():
    with pytest.raises(KeyError, match="boom"):
        list(run_tasks(behave, [("good", 1), ("raise", "boom")], workers=2))


def test_a_note_restarts_the_clock_and_names_the_place():
    pool = TaskPool(crash_after_a_note, 1, time_limit=1.0)
    pool.submit("long", 5)  # 1.8 s in all, of which no part takes 1 s
    pool.submit("stuck", 3)
    found = drained(pool)
    assert isinstance(found["long"], int)
    assert found["stuck"] == Lost("it took longer than 1 s", at="file 3")


def behave_alone(task, note):
    return behave(task)


@pytest.mark.parametrize("ahead", [1, 3])
def test_what_waits_at_a_worker_that_is_lost_is_not_to_blame(ahead):
    pool = TaskPool(behave_alone, 1, time_limit=2.0, ahead=ahead)
    tasks = [("hang", 0), ("good", 1), ("crash", 0), ("good", 2), ("good", 3), ("exit", 0)]
    for number, task in enumerate(tasks):
        pool.submit(number, task)
    found = drained(pool)
    assert {k: v for k, v in found.items() if not isinstance(v, Lost)} == {1: 2, 3: 4, 4: 6}
    assert found[0] == Lost("it took longer than 2 s")
    assert found[2] == Lost("the process that read it died twice, of signal SIGSEGV")
    assert found[5] == Lost("the process that read it died twice, of exit code 3")


def echo(task, note):
    return task, np.full((3, 1_000_000), 7, np.uint8), np.arange(12).reshape(3, 4)[:, ::2]


def test_large_tasks_and_results_do_not_wait_for_each_other():
    """Both ways are larger than any pipe's buffer."""
    pool = TaskPool(echo, 1, time_limit=30.0, ahead=1)
    for number in range(4):
        pool.submit(number, bytes(2_000_000))
    for task, large, strided in drained(pool).values():
        assert task == bytes(2_000_000)
        assert large.flags.writeable
        assert (large == 7).all()
        assert strided.tolist() == [[0, 2], [4, 6], [8, 10]]


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_worker_that_grows_is_replaced_and_loses_nothing(ahead):
    pool = TaskPool(grow, 1, memory_limit=200e6, ahead=ahead)
    for k in range(4):
        pool.submit(k, k)
    found = drained(pool)
    assert found[0] == found[1] != found[2]
    assert found[2] == found[3]


def test_tasks_are_taken_as_they_are_needed():
    taken = []

    def endless():
        k = 0
        while True:
            taken.append(k)
            yield ("good", k)
            k += 1

    results = run_tasks(behave, endless(), workers=2)
    for _ in range(10):
        next(results)
    results.close()
    assert len(taken) < 20


def survive(task, note):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    return "here"


def test_workers_leave_signals_to_the_process_that_started_them():
    pool = TaskPool(survive, 1, signals=(signal.SIGTERM, signal.SIGUSR1))
    pool.submit(0, None)
    assert drained(pool) == {0: "here"}


def run_script(path, *lines):
    """What a script of these lines does, in a process of its own."""
    path.write_text("\n".join(["from math import sqrt", "from data.pool import run_tasks", *lines]))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, path]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_script_need_not_guard_against_its_workers(tmp_path):
    run = run_script(tmp_path / "s.py", "print(dict(run_tasks(sqrt, [4.0, 9.0], workers=1)))")
    assert run.stdout == "{0: 2.0, 1: 3.0}\n", run.stderr


def test_a_task_that_a_worker_cannot_have_is_an_error(tmp_path):
    lines = ("class Mine: pass", "list(run_tasks(sqrt, [Mine()], workers=1))")
    run = run_script(tmp_path / "s.py", *lines)
    assert run.returncode == 1
    assert "Can't get attribute 'Mine'" in run.stderr.splitlines()[-1]
