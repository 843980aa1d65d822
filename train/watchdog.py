"""Names the rank that holds up a run, instead of a hang.

Training beats: `beat("waiting for data", step)` says what this rank does from now on. A thread of every
rank tells the others through the process group's store; when nothing has beaten anywhere for
`train.stall_timeout` seconds, one line says who is behind and where, each rank leaves its stacks in
the run's folder, and all end, for torchrun or a scheduler to start them again.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from sample.processes import Ranks
from train.agreement import ranks_text

EXIT_STALLED = 70  # EX_SOFTWARE
_CHECKS = 8  # in stall_timeout seconds
_MAX_INTERVAL = 15.0  # seconds between them
_PATIENCE = 10.0  # seconds to write what a stalled rank leaves behind


class _Beat(NamedTuple):
    phase: str
    step: int | None
    count: int  # of phases so far
    time: float


_now = _Beat("starting", None, 0, time.monotonic())


def beat(phase: str | None = None, step: int | None = None) -> None:
    """Says that this rank is getting on.

    Args:
        phase: what it does from here on, as in "it is ..."; all ranks go through the same phases.
            None inside a long one, as often as something of it is done.
        step: of training, counted as in the log; by default the one before.
    """
    global _now
    last, now = _now, time.monotonic()
    if phase is None:
        _now = last._replace(time=now)
    else:
        _now = _Beat(phase, last.step if step is None else step, last.count + 1, now)


@dataclass(frozen=True)
class Report:
    """What a rank tells the others of itself."""

    rank: int
    host: str
    phase: str
    step: int | None
    progress: list[int]  # phases, then exchanges among ranks, begun: all ranks have the same ones
    seconds: float  # since the last beat
    number: int  # of the report
    silent: bool = False  # no new one came


def describe_stall(reports: Sequence[Report]) -> str:
    """Which ranks are behind, and in what, from a report of every rank."""
    silent = [r for r in reports if r.silent]
    least = min(r.progress for r in reports)
    behind = silent or [r for r in reports if r.progress == least]
    ranks = ranks_text([r.rank for r in behind])
    first = max(behind, key=lambda r: r.seconds)
    hosts = ", ".join(sorted({r.host for r in behind})[:8])
    many = len(behind) > 1
    doing = first.phase if first.step is None else f"{first.phase} in step {first.step}"
    others = len(reports) - len(behind)
    waiting = f"; the other {others} wait{'s' * (others == 1)} for {'them' if many else 'it'}"
    if silent:
        return (
            f"{ranks} ({hosts}) {'give' if many else 'gives'} no sign of life, last {doing}"
            f"{waiting if others else ''}"
        )
    if len(reports) == 1:
        return f"this process ({hosts}) has been {doing} for {first.seconds:.0f} s"
    if not others:
        return (
            f"all {len(reports)} ranks have been {doing} for {first.seconds:.0f} s, as far as each "
            "other: an exchange among them does not end, so look at the network and the GPUs"
        )
    has = "have" if many else "has"
    return f"{ranks} ({hosts}) {has} been {doing} for {first.seconds:.0f} s{waiting}"


@contextmanager
def watching(ranks: Ranks, out: Path, timeout: float) -> Iterator[None]:
    """Inside it a stall ends this process, and every other rank's.

    Args:
        out: the run's folder.
        timeout: seconds without a beat of any rank.
    """
    beat()
    watchdog = Watchdog(ranks, out / "stalls", timeout)
    watchdog.start()
    try:
        yield
    finally:
        watchdog.ended.set()
        watchdog.join(_PATIENCE)


def record_exchanges() -> None:
    """Has NCCL keep a list of its latest exchanges, and write it when one of them times out; to be
    called before the process group is made."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


class Watchdog(threading.Thread):
    """The thread; see `watching`."""

    def __init__(self, ranks: Ranks, folder: Path, timeout: float) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.ranks, self.folder, self.timeout = ranks, folder, timeout
        self.interval = min(timeout / _CHECKS, _MAX_INTERVAL)
        self.ended = threading.Event()
        self._number = 0
        self._seen: dict[int, tuple[int, float]] = {}  # rank: number of its last report, since when
        self._store: Any = None
        if ranks.mesh is not None:
            # A connection of its own: a request of the main thread may block the one that exists.
            store = dist.distributed_c10d._get_default_store().clone()
            store.set_timeout(timedelta(seconds=max(1.0, 2 * self.interval)))
            self._store = dist.PrefixStore("zoetrope-watchdog", store)  # type: ignore[attr-defined]

    def run(self) -> None:
        while True:
            mine = self._tell()
            if mine.seconds < self.timeout / 2:
                self._seen.clear()
            else:
                reports = self._ask(mine)
                if mine.seconds >= self.timeout and not any(map(self._gets_on, reports)):
                    self._end(reports)
            if self.ended.wait(self.interval):
                return

    def _gets_on(self, report: Report) -> bool:
        return not report.silent and report.seconds < self.timeout - self.interval

    def _tell(self) -> Report:
        """This rank's report, told to the others."""
        now, self._number = _now, self._number + 1
        progress = [now.count, _num_exchanges(self.ranks)]
        seconds = time.monotonic() - now.time
        about = (self.ranks.rank, socket.gethostname(), now.phase, now.step)
        report = Report(*about, progress, seconds, self._number)
        self._request(lambda store: store.set(str(report.rank), json.dumps(asdict(report))))
        return report

    def _ask(self, mine: Report) -> list[Report]:
        """The last report of every rank.

        A process that stands still as a whole, thread and all, tells nothing new: its reports are
        silent after it was asked for some time.
        """
        keys = [str(rank) for rank in range(self.ranks.world_size)]
        texts = self._request(lambda store: store.multi_get(keys))
        if texts is None:  # a single process; or the store has gone, and rank 0 with it
            return [mine]
        reports, now = [], time.monotonic()
        for report in (Report(**json.loads(text)) for text in texts):
            number, since = self._seen.get(report.rank, (None, now))
            since = since if number == report.number else now
            self._seen[report.rank] = (report.number, since)
            silent = report.rank != mine.rank and now - since > 2 * self.interval
            reports.append(replace(report, silent=silent))
        return reports

    def _request(self, request: Callable[[Any], Any]) -> Any:
        """What the store answers; None without one, or where it does not."""
        try:
            return None if self._store is None else request(self._store)
        except RuntimeError:
            return None

    def _end(self, reports: Sequence[Report]) -> None:
        """Says what has happened, once for all ranks, and ends this process."""
        if self._request(lambda store: store.add("spoken", 1)) in (None, 1):
            print(
                f"zoetrope: error: stalled: {describe_stall(reports)}. Stacks are in {self.folder}; "
                f"all processes end with {EXIT_STALLED}, and the same command goes on from the newest "
                "checkpoint (train.stall_timeout sets the seconds)",
                file=sys.stderr,
                flush=True,
            )
        # In a thread, for the disk may be what hangs. The others need an interval to get here, before
        # torchrun ends them because this process has gone.
        leave = threading.Thread(target=self._leave_stacks, daemon=True)
        leave.start()
        leave.join(_PATIENCE)
        if self._store is not None:
            time.sleep(1 + self.interval)
        for worker in multiprocessing.active_children():
            worker.kill()
        os._exit(EXIT_STALLED)

    def _leave_stacks(self) -> None:
        name = f"rank-{self.ranks.rank}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"{name}.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            if self.ranks.device.type == "cuda" and self._store is not None:
                # For `torchfrtrace --prefix nccl_trace_rank_ FOLDER`.
                trace = torch._C._distributed_c10d._dump_nccl_trace()  # type: ignore[attr-defined]
                (self.folder / f"nccl_trace_rank_{self.ranks.rank}").write_bytes(trace)
        except OSError as error:
            print(f"no stacks of {name}: {error}", file=sys.stderr, flush=True)


def _num_exchanges(ranks: Ranks) -> int:
    """How many exchanges with others this rank has begun, in all groups that count them."""
    if ranks.mesh is None:
        return 0
    total = 0
    for group in list(dist.distributed_c10d._world.pg_map):
        try:
            total += group._get_sequence_number_for_group()  # type: ignore[attr-defined]
        except RuntimeError:  # one of a backend that does not count
            continue
    return total
