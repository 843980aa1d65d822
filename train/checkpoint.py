"""What a checkpoint is, and reading one. `train.checkpoint_writer` writes them.

A checkpoint is a folder `step-00001000`: the sharded tensors (weights, EMA, optimizer) as
torch.distributed.checkpoint writes them, to be read by any number of processes, and `state.json` (step,
config, fingerprint of the data, figures of the unfinished log interval). Nothing else is needed to go
on, because all randomness is counted, not carried.
"""

from __future__ import annotations

import errno
import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.optim import Optimizer

from sample.processes import Ranks
from train.ema import EMA
from train.recipe import TrainedGroup

_NAME = re.compile(r"step-(\d{8,})")
_SHARD = re.compile(r"__(\d+)_\d+\.distcp")


@dataclass
class TrainState:
    """Everything that training changes."""

    recipe: nn.Module
    trained: dict[str, nn.Parameter]
    groups: list[TrainedGroup]  # the same parameters, as they are clipped and updated
    optimizer: Optimizer
    ema: EMA

    def tensors(self) -> dict[str, Any]:
        """As a nested dict for torch.distributed.checkpoint; loading writes into it in place."""
        weights: dict[str, Tensor] = {name: p.detach() for name, p in self.trained.items()}
        optimizer = get_optimizer_state_dict(self.recipe, self.optimizer)
        return {"model": weights, "ema": self.ema.weights, "optimizer": optimizer}


class DamageError(ValueError):
    """A file of a checkpoint is missing, cut short or overwritten; the text names it."""


@dataclass
class Files(FileSystem):
    """torch's way to a checkpoint's files, with errors that name the file and the cause in their text:
    it is all of an error that reaches other ranks.

    What is written is on the disk when the stream is closed. FileSystemWriter's own `sync_files` is of
    no use before torch 2.12: it syncs files whose end is still in a buffer of Python's.
    """

    written: dict[str, int] = field(default_factory=dict)  # bytes by file name

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        path = Path(path)
        try:
            with super().create_stream(path, mode) as stream:
                yield stream
            if "w" in mode:
                sync(path)
                self.written[path.name] = path.stat().st_size
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            cause = _disk_error(error)
            if "w" in mode or (cause is not None and not isinstance(cause, FileNotFoundError)):
                reason = first_line(error) if cause is None else cause.strerror or str(cause)
                raise OSError(f"{describe_part(path)}: {reason}") from error
            # The rest of what torch says is about loading files that are not to be trusted.
            said = first_line(error).partition(". ")[0]
            problem = "is missing" if cause is not None else f"cannot be read ({said})"
            raise DamageError(f"{describe_part(path)} {problem}") from error

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)


def _disk_error(error: BaseException | None) -> OSError | None:
    """What the operating system said, where torch turned it into an error of its own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def first_line(error: BaseException) -> str:
    """Of an error's text, or its name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def describe_part(path: Path) -> str:
    """A file of a checkpoint by name, with the rank that wrote it."""
    shard = _SHARD.fullmatch(path.name)
    return f"{path.name} (the shard of rank {shard[1]})" if shard else path.name


def sync(path: Path) -> None:
    """Has a file, or the entries of a folder where the file system can do that, on the disk before it
    returns."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def hush() -> None:
    """Leaves out torch's warning that a single process saves as a single process. For good: what
    warnings.catch_warnings puts back is not safe while another thread warns."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def folder_name(step: int) -> str:
    """Of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints as (step, path), oldest first."""
    if not folder.is_dir():
        return []
    folders = (path for path in folder.iterdir() if path.is_dir())
    found = ((_NAME.fullmatch(path.name), path) for path in folders)
    return sorted((int(match[1]), path) for match, path in found if match)


def find_newest(folder: Path, ranks: Ranks) -> tuple[int, Path, dict[str, Any]] | None:
    """The newest complete checkpoint as (step, path, state.json), or None; the main rank's answer on
    every rank, as a network disk may show them different folders for a while. Every rank calls it.

    Raises:
        ValueError: a file of it is missing or cut short.
    """
    found, error = None, None
    if ranks.is_main:
        try:
            checkpoints = list_checkpoints(folder)
            if checkpoints:
                step, path = checkpoints[-1]
                found = step, read_state(path)
                problem = find_damage(path)
                if found[1].get("step") != step:
                    problem = f"state.json is of step {found[1].get('step')}"
                if problem is not None:
                    raise damaged(path, problem)
        except (ValueError, OSError) as reason:
            error = reason
    ranks.agree(error)
    found = ranks.gather(found)[0]
    return None if found is None else (found[0], folder / folder_name(found[0]), found[1])


def read_state(path: Path) -> dict[str, Any]:
    """The state.json of a checkpoint.

    Raises:
        ValueError: it is damaged.
    """
    problem = "holds something else"
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if isinstance(state, dict) and isinstance(state.get("config"), dict):
            return state
    except FileNotFoundError:
        problem = "is missing"
    except ValueError:
        problem = "is cut short or overwritten"
    raise damaged(path, f"state.json {problem}")


def find_damage(path: Path) -> str | None:
    """What is missing or cut short among the files of torch.distributed.checkpoint, or None."""
    try:
        metadata = _reader(path).read_metadata()
        ends: dict[str, int] = {}
        for part in (metadata.storage_data or {}).values():
            ends[part.relative_path] = max(
                part.offset + part.length, ends.get(part.relative_path, 0)
            )
    except DamageError as error:
        return str(error)
    except (AttributeError, TypeError):
        return ".metadata holds something else"
    return missing_parts(path, ends)


def missing_parts(path: Path, sizes: dict[str, int]) -> str | None:
    """Which files of a checkpoint are not there in full, by name and size in bytes, or None."""
    problems = []
    for name, size in sorted(sizes.items()):
        file = path / name
        if not file.is_file():
            problems.append(f"{describe_part(file)} is missing")
        elif file.stat().st_size < size:
            there = file.stat().st_size
            problems.append(f"{describe_part(file)} is cut short at {there} of {size} bytes")
    more = [f"{len(problems) - 3} more"] if len(problems) > 3 else []
    return ", ".join(problems[:3] + more) or None


def damaged(path: Path, problem: str) -> ValueError:
    """What to say of a checkpoint that cannot be read."""
    before = [other.name for _, other in list_checkpoints(path.parent) if other.name < path.name]
    rest = f"goes on from {before[-1]}" if before else "starts anew"
    return ValueError(
        f"checkpoint {path} is damaged: {problem}; delete that folder, and the same command {rest}"
    )


def _reader(path: Path) -> FileSystemReader:
    reader = FileSystemReader(path)
    reader.fs = Files()
    return reader


@torch.no_grad()
def load_checkpoint(path: Path, state: TrainState, ranks: Ranks) -> None:
    """Restores weights, EMA and optimizer, bit for bit, also from another number of processes.
    Every rank calls it, and the same happens on all of them.

    Raises:
        ValueError: a file of it is missing or cut short, or it is of other networks.
        OSError: it cannot be read.
    """
    hush()
    tensors = state.tensors()
    try:
        load(tensors, storage_reader=_reader(path), no_dist=ranks.mesh is None)
    except CheckpointException as failed:
        error = failed.failures[min(failed.failures)][0]
        if isinstance(error, (OSError, MemoryError, torch.OutOfMemoryError)):
            raise error from failed
        if isinstance(error, DamageError):
            raise damaged(path, str(error)) from failed
        raise ValueError(
            f"checkpoint {path} does not fit the networks of this run ({first_line(error)}); go back "
            "to the version that wrote it, or train into another folder (out=...)"
        ) from failed
    set_optimizer_state_dict(state.recipe, state.optimizer, tensors["optimizer"])
    state.ema.load(tensors["ema"])
