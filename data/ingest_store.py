"""Results of the ingest's steps on disk: what is done once is not done again."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.ingest_steps import Record, Step
from data.pool import Lost, run_tasks

# Calls a function for every list of tasks, and yields (index, results or Lost) as they are done.
Engine = Callable[..., Iterator[tuple[int, Any]]]


def local_engine(workers: int) -> Engine:
    """Processes of this machine; a model runs in this one, which may have a GPU."""

    def run(
        function: Callable[[list[Record]], Any],
        batches: list[list[Record]],
        *,
        is_model: bool,
        time_limit: float | None,
    ) -> Iterator[tuple[int, Any]]:
        processes = 0 if is_model else min(workers, len(batches))
        return run_tasks(function, batches, workers=processes, time_limit=time_limit)

    return run


class Store:
    """OUT/steps/NAME.jsonl: a line per task, {"key": of the task, "records": its results}.

    Lines are added as tasks end, so whatever stops a run, the next one goes on from there.

    Args:
        out: the folder of the results.
        retry: do anew what failed.
    """

    def __init__(self, out: Path, retry: bool = False) -> None:
        self._out, self._retry = out, retry
        (out / "steps").mkdir(parents=True, exist_ok=True)

    def run(
        self, step: Step, records: list[Record], engine: Engine, time_limit: float | None
    ) -> list[Record]:
        """The records after a step: each with the columns that the step found, one or several for
        each; those with `error`, and those that the source manifest drops, go past it."""
        keys = [
            None if "error" in record or "unwanted" in record else step.key(_task(step, record))
            for record in records
        ]
        done = self._load(step.name, {key for key in keys if key is not None})
        todo = {
            key: _task(step, record)
            for key, record in zip(keys, records)
            if key is not None and key not in done
        }
        if todo:
            done |= self._do(step, todo, engine, time_limit)
        return [
            record | found | ({"failed": step.name} if "error" in found else {})
            for key, record in zip(keys, records)
            for found in ([{}] if key is None else done[key])
        ]

    def _path(self, name: str) -> Path:
        return self._out / "steps" / f"{name}.jsonl"

    def _load(self, name: str, wanted: set[str]) -> dict[str, list[Record]]:
        found: dict[str, list[Record]] = {}
        path = self._path(name)
        if not path.exists():
            return found
        with path.open("rb") as file:
            for text in file:
                try:
                    line = json.loads(text)
                    key, records = line["key"], line["records"]
                except (ValueError, KeyError, TypeError):  # cut off when a run was killed
                    continue
                failed = any("error" in record for record in records)
                if key in wanted and not (failed and self._retry):
                    found[key] = records
        return found

    def _do(
        self, step: Step, todo: dict[str, Record], engine: Engine, time_limit: float | None
    ) -> dict[str, list[Record]]:
        keys, tasks = list(todo), list(todo.values())
        size = step.batch
        batches = [tasks[first : first + size] for first in range(0, len(tasks), size)]
        function = partial(_call, step.function, step.settings)
        outcomes = engine(function, batches, is_model=step.is_model, time_limit=time_limit)
        done: dict[str, list[Record]] = {}
        bar = tqdm(total=len(tasks), desc=step.name, unit="task", disable=None)
        with bar, _whole_lines(self._path(step.name)) as file, closing(outcomes):  # type: ignore[type-var]
            for index, results in outcomes:
                if isinstance(results, Lost):
                    results = [[{"error": results.reason}] for _ in batches[index]]
                for key, records in zip(keys[index * size :], results):
                    self._keep_thumbnail(key, records)
                    text = json.dumps({"key": key, "records": records})
                    file.write(text + "\n")
                    # As a later run will read it.
                    done[key] = json.loads(text)["records"]
                file.flush()
                bar.update(len(batches[index]))
        return done

    def _keep_thumbnail(self, key: str, records: list[Record]) -> None:
        """A picture in base64 becomes a file, by whose name it is known from then on."""
        for record in records:
            if "thumbnail" in record:
                name = f"thumbnails/{key[:2]}/{key}.jpg"
                path = self._out / name
                path.parent.mkdir(parents=True, exist_ok=True)
                partial_path = path.with_suffix(f".{os.getpid()}.partial")
                partial_path.write_bytes(base64.b64decode(record["thumbnail"]))
                os.replace(partial_path, path)
                record["thumbnail"] = name


def _call(function: Callable[[list[Record], Any], Any], settings: Any, tasks: list[Record]) -> Any:
    return function(tasks, settings)


def _task(step: Step, record: Record) -> Record:
    return {name: record[name] for name in step.inputs if record.get(name) is not None}


def _whole_lines(path: Path) -> Any:
    """The file opened for adding lines; a last one that was cut off is ended first."""
    torn = False
    if path.exists() and path.stat().st_size:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
    file = path.open("a", encoding="utf-8")
    if torn:
        file.write("\n")
    return file
