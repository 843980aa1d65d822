"""Batches in order, read ahead by worker processes that may be lost without losing a sample.

A file on which a decoder hangs or dies costs its worker, is quarantined with the reason, and is
replaced as any file that cannot be read is: by another row, drawn from the same counter. What a
batch holds so depends on the counters and the files alone, not on workers or their number.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from typing import Any, Protocol

import numpy as np
import torch

from data.dataset import read_sample
from data.pool import Lost, Note, TaskPool
from data.video_file import VideoReadError, one_line

QUARANTINED = "quarantined: "  # begins the reason of a file that cost a worker


class Request(Protocol):
    """What one sample needs read; sent to a worker, unless `is_here`."""

    @property
    def path(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def references(self) -> Sequence[str]: ...  # other files that are read with it

    @property
    def is_here(self) -> bool: ...

    def read(self, note: Note = ..., /) -> Any: ...  # note is told the path of such a file before


class Source(Protocol):
    """A dataset: see ClipDataset, whose methods these are."""

    def request(self, g: int, bad: Sequence[tuple[str, str]] = (), /) -> Any: ...

    def sample(self, request: Any, value: Any, bad: list[tuple[str, str]], /) -> Any: ...

    def collate(self, samples: list[Any], /) -> dict[str, Any]: ...


class ClipLoader:
    """Iterates over batches; every iteration starts anew, with processes of its own.

    Args:
        dataset: what is read.
        batches: sample counters of each batch; may be endless.
        workers: processes; with 0 everything is read when it is asked for, and no limit is kept.
        prefetch: batches that are read ahead; these, and a file per worker, are in memory.
        file_seconds: that a worker may take for one file, before it is abandoned.
        memory_limit: bytes that a worker may grow by; one that did is replaced after its file.
        signals: that workers ignore, beside SIGINT: those after which a run still needs them.
        pin: the GPU to which batches will go, if any: they are put into page-locked memory.
        quarantine: paths or names of files that are not to be touched, and why; files that cost a
            worker are added.
    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        dataset: Source,
        batches: Iterable[list[int]],
        *,
        workers: int = 0,
        prefetch: int = 2,
        file_seconds: float | None = None,
        memory_limit: float | None = None,
        signals: tuple[int, ...] = (),
        pin: torch.device | None = None,
        quarantine: MutableMapping[str, str] | None = None,
    ) -> None:
        if workers < 0 or prefetch < 1 or (file_seconds is not None and not file_seconds > 0):
            raise ValueError(
                "expected workers >= 0, prefetch >= 1 and file_seconds > 0, got "
                f"{workers}, {prefetch} and {file_seconds}"
            )
        self.dataset, self.batches, self.workers = dataset, batches, workers
        self.prefetch, self.file_seconds, self.memory_limit = prefetch, file_seconds, memory_limit
        self.signals, self.pin = signals, pin
        self.quarantine: MutableMapping[str, str] = {} if quarantine is None else quarantine

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self.workers:
            for numbers in self.batches:
                read = [read_sample(self.ask, self.dataset.sample, g) for g in numbers]
                yield self._finish(read)
            return
        reader = _Reader(self)
        try:
            yield from reader.batches()
        finally:
            reader.close()

    def ask(self, g: int, bad: list[tuple[str, str]]) -> Any:
        """The request for a sample, past files in quarantine, which are added to `bad`."""
        while True:
            request = self.dataset.request(g, bad)
            files = (request.path, request.name, *request.references)
            reasons = [self.quarantine[file] for file in files if file in self.quarantine]
            if not reasons:
                return request
            bad.append((request.name, reasons[0]))

    def _finish(self, samples: list[Any]) -> dict[str, Any]:
        batch = self.dataset.collate(samples)
        if self.pin is None:
            return batch
        return {k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


@dataclass
class _Batch:
    """One that is being read: its samples by place, None as long as they are not there."""

    samples: list[Any]
    num_missing: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_missing = len(self.samples)


@dataclass(frozen=True)
class _Key:
    batch: _Batch
    place: int
    g: int
    request: Any
    bad: list[tuple[str, str]]


class _Reader:
    """A thread that keeps the workers busy, and batches in order."""

    def __init__(self, loader: ClipLoader) -> None:
        self.loader = loader
        self._open: deque[_Batch] = deque()  # in order; taken from the front when complete
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._exhausted = self._closing = False
        self._wake, self._waker = Pipe(duplex=False)
        self._thread = threading.Thread(target=self._run, name="clip loader", daemon=True)
        self._thread.start()

    def batches(self) -> Iterator[dict[str, Any]]:
        while True:
            with self._changed:
                # With a limit, because the main thread must see signals.
                while not self._is_ready():
                    self._changed.wait(1.0)
                if not self._open and self._error is None:
                    return
                if self._error is not None and not (self._open and not self._open[0].num_missing):
                    raise self._error
                samples = self._open.popleft().samples
            self._nudge()
            yield samples[0]

    def close(self) -> None:
        self._closing = True
        self._nudge()
        self._thread.join()
        self._wake.close()
        self._waker.close()

    def _is_ready(self) -> bool:
        if self._open and not self._open[0].num_missing:
            return True
        return self._error is not None or (self._exhausted and not self._open)

    def _nudge(self) -> None:
        self._waker.send_bytes(b"x")

    def _run(self) -> None:
        loader = self.loader
        pool = TaskPool(
            _read,
            loader.workers,
            loader.file_seconds,
            loader.memory_limit,
            loader.signals,
            ahead=1,
        )
        try:
            if loader.pin is not None:
                torch.cuda.set_device(loader.pin)
            numbers = iter(loader.batches)
            while not self._closing:
                self._fill(pool, numbers)
                for key, outcome in pool.poll(60.0, self._wake):
                    self._take(pool, key, outcome)
                while self._wake.poll():
                    self._wake.recv_bytes()
        except BaseException as error:  # the thread that asks for batches raises it
            with self._changed:
                self._error = error
                self._changed.notify_all()
        finally:
            pool.close()

    def _fill(self, pool: TaskPool, numbers: Iterator[list[int]]) -> None:
        while not self._exhausted and len(self._open) < self.loader.prefetch:
            following = next(numbers, None)
            if following is None:
                with self._changed:
                    self._exhausted = True
                    self._changed.notify_all()
                return
            batch = _Batch([None] * len(following))
            with self._changed:
                self._open.append(batch)
            for place, g in enumerate(following):
                self._ask(pool, batch, place, g, [])

    def _ask(
        self, pool: TaskPool, batch: _Batch, place: int, g: int, bad: list[tuple[str, str]]
    ) -> None:
        request = self.loader.ask(g, bad)
        key = _Key(batch, place, g, request, bad)
        if not request.is_here:
            pool.submit(key, request)
            return
        try:
            value = request.read()
        except VideoReadError as error:
            value = error
        self._take(pool, key, value)

    def _take(self, pool: TaskPool, key: _Key, outcome: Any) -> None:
        request, bad = key.request, key.bad
        if isinstance(outcome, Lost):
            reason, file = QUARANTINED + outcome.reason, outcome.at or request.path
            if file != request.path:  # a picture, which other clips may share
                reason += f" (its reference {one_line(file)})"
            self.loader.quarantine[file] = reason
            bad.append((request.name, reason))
        elif isinstance(outcome, VideoReadError):
            bad.append((request.name, outcome.reason))
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            value = torch.from_numpy(outcome) if isinstance(outcome, np.ndarray) else outcome
            self._put(key, self.loader.dataset.sample(request, value, bad))
            return
        self._ask(pool, key.batch, key.place, key.g, bad)

    def _put(self, key: _Key, sample: Any) -> None:
        batch = key.batch
        batch.samples[key.place] = sample
        if batch.num_missing > 1:
            batch.num_missing -= 1
            return
        finished = self.loader._finish(batch.samples)
        with self._changed:
            batch.samples, batch.num_missing = [finished], 0
            self._changed.notify_all()


def _read(request: Request, note: Note) -> Any:
    """In a worker. Tensors go back as arrays: their bytes through the pipe, with nothing shared that
    a worker could leave behind."""
    torch.set_num_threads(1)
    value = request.read(note)
    return value.numpy() if isinstance(value, torch.Tensor) else value
