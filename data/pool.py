"""Tasks in processes that may hang, crash or grow, with every task accounted for.

Media files reach decoders written in C, which on a damaged file may never return, or take their
process with them. Each worker here is at one task at a time and has a pipe of its own, so that
whichever worker is lost, it is known which task was to blame, and no other task is touched.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import signal
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any, TypeVar

from data.pipes import receive, send
from data.workers import interrupts_deferred

T = TypeVar("T")
R = TypeVar("R")

# Told to a function that takes one: what it is at, which then counts as begun just now.
Note = Callable[[Any], None]

_TRIES = 2  # of a task whose process dies: the first death may have been for want of memory
_STARTS = 3  # of a process whose server is gone
_START_SECONDS = 300.0  # for a worker's imports, on a busy machine or a slow file system
# Of a task that is sent to a worker that may be sending itself: what fits into any pipe's buffer, or
# both would wait for each other.
_MAX_AHEAD_BYTES = 16384


@dataclass(frozen=True)
class Lost:
    """What came of a task whose process died or took too long.

    Attributes:
        reason: in one line.
        at: what the task last noted that it was at; None if it noted nothing.
    """

    reason: str
    at: Any = None


_pools: weakref.WeakSet[TaskPool] = weakref.WeakSet()


@atexit.register
def _end_workers() -> None:
    """Ends what an error left behind. Python sends its daemons a SIGTERM and waits for them, for ever
    where they ignore it."""
    for pool in list(_pools):
        pool._over = True
        for worker in list(pool._running):
            worker.process.kill()


@dataclass(frozen=True)
class _Task:
    key: Any
    pickled: bytes
    tries: int = 1


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    born: float
    ready: bool = False
    tasks: deque[_Task] = field(default_factory=deque)  # it is at the first
    since: float = 0.0
    at: Any = None


@dataclass(eq=False)
class TaskPool:
    """Workers that are given tasks, and outcomes as they come; used from one thread.

    Processes are started when tasks need them, clean ones (no threads, no CUDA context and no locks
    of this process), so that a lost one can be replaced at any time.

    Args:
        function: picklable; called in a worker with (task, note).
        workers: processes, at least 1.
        time_limit: seconds that a task may take from its start, or from its last note, on.
        memory_limit: bytes that a worker may grow by; one that did is replaced after its task.
        signals: that workers ignore, beside SIGINT.
        ahead: tasks that a worker is given beside the one that it is at, so that it need not wait
            for the next while its result is taken.
    """

    function: Callable[[Any, Note], Any]
    workers: int
    time_limit: float | None = None
    memory_limit: float | None = None
    signals: tuple[int, ...] = ()
    ahead: int = 0
    _waiting: deque[_Task] = field(default_factory=deque)
    _running: list[_Worker] = field(default_factory=list)
    _over: bool = False

    def __post_init__(self) -> None:
        _pools.add(self)

    def submit(self, key: Any, task: Any) -> None:
        """Takes a task, whose outcome `poll` will give under `key`."""
        self._waiting.append(_Task(key, pickle.dumps(task)))

    @property
    def num_open(self) -> int:
        """Tasks without an outcome."""
        return len(self._waiting) + sum(len(worker.tasks) for worker in self._running)

    def poll(self, timeout: float, wake: Connection | None = None) -> list[tuple[Any, Any]]:
        """(key, outcome) of the tasks that ended; waits for at most `timeout` seconds, and not on when
        something else has happened.

        An outcome is the function's result, a Lost, or the exception that it raised.

        Args:
            wake: ends the waiting as soon as there is something to read from it.
        Raises:
            RuntimeError: a worker cannot even start.
        """
        self._deal_out()
        now = time.monotonic()
        limits = [self._deadline(worker) for worker in self._running]
        until = min([now + timeout, *limits])
        pipes: list[Any] = [worker.pipe for worker in self._running]
        ready = wait([*pipes, *([] if wake is None else [wake])], max(0.0, until - now))
        outcomes: list[tuple[Any, Any]] = []
        for worker in list(self._running):
            if worker.pipe in ready:
                outcomes += self._hear(worker)
            elif time.monotonic() >= self._deadline(worker) and not worker.pipe.poll():
                outcomes += self._give_up(worker)
        return outcomes

    def close(self) -> None:
        """Ends all workers, whatever they are at; there will be no others."""
        self._over = True
        for worker in self._running:
            worker.process.kill()
        for worker in self._running:
            worker.process.join()
            worker.pipe.close()
        self._running.clear()
        self._waiting.clear()

    def _deal_out(self) -> None:
        for worker in self._running:
            if self._waiting and not worker.tasks:
                self._assign(worker)
        while self._waiting and len(self._running) < self.workers:
            worker = self._start()
            self._running.append(worker)
            self._assign(worker)
        for worker in self._running:
            while self._waiting and len(worker.tasks) <= self.ahead:
                if len(self._waiting[0].pickled) > _MAX_AHEAD_BYTES:
                    return
                self._assign(worker)

    def _assign(self, worker: _Worker) -> None:
        task = self._waiting.popleft()
        if not worker.tasks:
            worker.at, worker.since = None, time.monotonic()
        try:
            worker.pipe.send_bytes(task.pickled)
        except OSError:  # it has just ended: its pipe says so too, and then the task goes elsewhere
            task = replace(task, tries=task.tries - 1) if not worker.tasks else task
        worker.tasks.append(task)

    def _start(self) -> _Worker:
        if self._over:
            raise RuntimeError("this pool is closed")
        method = "spawn" if sys.platform == "win32" else "forkserver"
        context = multiprocessing.get_context(method)
        if method == "forkserver":  # of effect for the first pool of this process: imports once
            context.set_forkserver_preload([self.function.__module__, "data.video_read"])
        ours, theirs = context.Pipe()
        for attempt in range(_STARTS):
            process = context.Process(
                target=_work,
                args=(theirs, self.function, self.memory_limit, self.signals, dict(os.environ)),
                daemon=True,
            )
            try:
                with interrupts_deferred(), _without_main():
                    process.start()
                break
            except (EOFError, ConnectionError) as error:
                # A signal to all processes of a run ends the server too; the next start begins another.
                if attempt == _STARTS - 1:
                    raise RuntimeError(f"a worker process cannot be started: {error!r}") from None
        theirs.close()
        return _Worker(process, ours, time.monotonic())

    def _deadline(self, worker: _Worker) -> float:
        if not worker.ready:
            return worker.born + _START_SECONDS
        if not worker.tasks or self.time_limit is None:
            return float("inf")
        return worker.since + self.time_limit

    def _hear(self, worker: _Worker) -> list[tuple[Any, Any]]:
        try:
            kind, value = receive(worker.pipe)
        except (EOFError, OSError):
            return self._bury(worker)
        except Exception as error:  # what a result raises where it is put together again
            kind, value = "done", error
        worker.ready, worker.since = True, time.monotonic()
        if kind == "note":
            worker.at = value
        elif kind != "ready":
            task, worker.at = worker.tasks.popleft(), None
            if kind == "last":
                self._drop(worker)
            return [(task.key, value)]
        return []

    def _drop(self, worker: _Worker) -> None:
        """A worker is no more; the tasks that it has are for others."""
        self._running.remove(worker)
        worker.pipe.close()
        self._waiting.extendleft(reversed(worker.tasks))

    def _bury(self, worker: _Worker) -> list[tuple[Any, Any]]:
        """A worker has ended by itself, most likely because of its task."""
        worker.process.join()
        code = worker.process.exitcode or 0
        task = worker.tasks.popleft() if worker.tasks else None
        self._drop(worker)
        if not worker.ready:
            raise RuntimeError(f"a worker process ended while it started, with exit code {code}")
        if task is None:
            return []
        if task.tries < _TRIES:
            self._waiting.appendleft(replace(task, tries=task.tries + 1))
            return []
        how = f"signal {_signal_name(-code)}" if code < 0 else f"exit code {code}"
        return [(task.key, Lost(f"the process that read it died twice, of {how}", worker.at))]

    def _give_up(self, worker: _Worker) -> list[tuple[Any, Any]]:
        worker.process.kill()
        worker.process.join()
        if not worker.ready:
            raise RuntimeError(f"a worker process did not start in {_START_SECONDS:g} s")
        task = worker.tasks.popleft()
        self._drop(worker)
        return [(task.key, Lost(f"it took longer than {self.time_limit:g} s", worker.at))]


def run_tasks(
    function: Callable[[T], R],
    tasks: Iterable[T],
    *,
    workers: int,
    time_limit: float | None = None,
) -> Iterator[tuple[int, R | Lost]]:
    """Calls `function` for every task; yields (index, outcome) as they are done, in any order.

    Args:
        function: of one argument; picklable, as the tasks and the results are.
        workers: processes; with 0 everything happens here, and a time limit is not kept.
        time_limit: seconds for one task.
    Raises:
        Exception: what `function` raised.
        RuntimeError: a worker cannot even start.
    """
    if workers < 1:
        for index, task in enumerate(tasks):
            yield index, function(task)
        return
    pool = TaskPool(_Plain(function), workers, time_limit)
    numbered = iter(enumerate(tasks))
    try:
        while True:
            # No further ahead than this: tasks may be an endless stream, or large.
            while pool.num_open < 2 * workers and (following := next(numbered, None)) is not None:
                pool.submit(*following)
            if not pool.num_open:
                return
            for index, outcome in pool.poll(1.0):
                if isinstance(outcome, BaseException):
                    raise outcome
                yield index, outcome
    finally:
        pool.close()


@dataclass(frozen=True)
class _Plain:
    """A function that notes nothing."""

    function: Callable[[Any], Any]

    def __call__(self, task: Any, note: Note) -> Any:
        return self.function(task)


@contextmanager
def _without_main() -> Iterator[None]:
    """Processes started inside it do not run the script of this one, which they otherwise would, to
    have its functions: it need not be written for that, and they start sooner."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _work(
    pipe: Connection,
    function: Callable[[Any, Note], Any],
    memory_limit: float | None,
    signals: tuple[int, ...],
    environment: dict[str, str],
) -> None:
    """What a worker does: tasks from the pipe, until its other end is closed."""
    os.environ.update(environment)  # the server that forked it has that of its own start
    for number in (signal.SIGINT, *signals):
        signal.signal(number, signal.SIG_IGN)

    def note(at: Any) -> None:
        send(pipe, ("note", at))

    at_start, is_new = _resident_bytes(), True
    try:
        while True:
            try:
                task = pipe.recv()
                if is_new:  # only now, as the first task may have made it import much
                    send(pipe, ("ready", None))
                    is_new = False
                outcome = function(task, note)
            except (EOFError, BrokenPipeError):
                raise
            except Exception as error:  # of the function; or of a task whose class is not to be had
                outcome = _sendable(error)
            last = memory_limit is not None and _resident_bytes() - at_start > memory_limit
            try:
                send(pipe, ("last" if last else "done", outcome))
            except (pickle.PicklingError, TypeError, AttributeError) as error:
                send(pipe, ("last" if last else "done", _sendable(error)))
            if last:
                return
    except (EOFError, OSError):  # the process that asked is gone
        return


def _sendable(error: Exception) -> Exception:
    """The error, or its text where it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever an error's own pickling raises
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _resident_bytes() -> float:
    """What this process has in RAM; on systems that do not say, the most that it ever had."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
