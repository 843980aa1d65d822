"""The ingest's steps through Ray Data, on a cluster or on a local Ray."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from data.pool import Lost, Note, TaskPool

_BATCHES = 16  # lists of tasks per block, at most
_STORE_BYTES = 200 * 2**20  # of a local Ray: records are small


@contextmanager
def ray_engine(address: str | None, workers: int | None) -> Iterator[Callable[..., Any]]:
    """An engine (data/ingest_store.py) that runs the same functions through Ray Data.

    Args:
        address: of a cluster, as ray.init takes it; None: the one in use or in RAY_ADDRESS, or a
            local Ray, which ends with the ingest. zoetrope must be installed on all its nodes, and
            local paths lead to the same files there.
        workers: tasks at once; default one a CPU.
    Raises:
        ValueError: Ray is not installed.
        ConnectionError: no cluster at that address.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError("--engine ray needs Ray: pip install 'zoetrope[ray]'") from error
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, address, workers)
    try:
        yield functools.partial(_run, workers)
    finally:
        if ours:
            ray.shutdown()


def _connect(ray: Any, address: str | None, workers: int | None) -> None:
    address = address or os.environ.get("RAY_ADDRESS")
    if address is not None:
        try:
            place = re.fullmatch(r"(?:ray://)?\[?([^/\]]+)\]?:(\d+)", address)
            if place is not None:  # Ray itself would try for minutes
                socket.create_connection((place[1], int(place[2])), timeout=10).close()
            ray.init(address=address, log_to_driver=False)
        except OSError as error:  # ConnectionError is one
            raise ConnectionError(f"--address {address}: no Ray cluster answers there") from error
        return
    ray.init(
        num_cpus=workers,
        object_store_memory=_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )


def _run(
    workers: int | None,
    function: Callable[[Any], Any],
    batches: list[Any],
    *,
    is_model: bool,
    time_limit: float | None,
) -> Iterator[tuple[int, Any]]:
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # of a plan for every step
    rows = [{"index": index, "tasks": json.dumps(tasks)} for index, tasks in enumerate(batches)]
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0)) if is_model else 0
    processes = max(1, gpus) if is_model else workers or int(resources.get("CPU", 1))
    # Blocks small enough that all processes have something to do.
    size = max(1, min(_BATCHES, len(rows) // (2 * processes)))
    dataset = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // size))
    if is_model:
        keeper: Any = _Keeper
        found = dataset.map_batches(
            keeper,
            fn_constructor_args=(function,),
            batch_size=size,
            compute=ray.data.ActorPoolStrategy(size=min(processes, len(rows))),
            num_gpus=1 if gpus else 0,
        )
    else:
        call: Any = functools.partial(_call_all, function, time_limit)
        tasks = ray.data.TaskPoolStrategy(processes)
        found = dataset.map_batches(call, batch_size=size, num_cpus=1, compute=tasks)
    for row in found.iter_rows():
        outcome = json.loads(row["outcome"])
        yield int(row["index"]), Lost(outcome["lost"]) if "lost" in outcome else outcome["results"]


class _Keeper:
    """A process of Ray's that keeps a model."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        results = [self._function(json.loads(tasks)) for tasks in batch["tasks"]]
        return {"index": batch["index"], "outcome": [json.dumps({"results": r}) for r in results]}


@functools.cache
def _pool() -> TaskPool:
    """One process below this one of Ray's, for all steps. Decoders may hang or crash in it, as they
    do locally: a process of Ray's that dies would take the other tasks of its block with it."""
    # A new process imports the main module, which here is Ray's, and takes seconds.
    vars(sys.modules["__main__"]).pop("__file__", None)
    return TaskPool(_apply, 1)


def _apply(work: tuple[Callable[[Any], Any], Any], note: Note) -> Any:
    function, task = work
    return function(task)


def _call_all(
    function: Callable[[Any], Any], time_limit: float | None, batch: dict[str, Any]
) -> dict[str, Any]:
    """Outcomes as JSON text."""
    pool = _pool()
    pool.time_limit = time_limit
    outcomes = []
    for text in batch["tasks"]:
        pool.submit(0, (function, json.loads(text)))
        ended: list[tuple[Any, Any]] = []
        while not ended:
            ended = pool.poll(1.0)
        outcome = ended[0][1]
        if isinstance(outcome, BaseException):
            raise outcome
        lost = isinstance(outcome, Lost)
        outcomes.append(json.dumps({"lost": outcome.reason} if lost else {"results": outcome}))
    return {"index": batch["index"], "outcome": outcomes}
