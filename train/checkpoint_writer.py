"""Writing checkpoints while training goes on.

`Checkpointer.save` copies the state into the CPU's memory and returns; a thread writes the copy. That
is what torch.distributed.checkpoint.async_save does too, but by default it talks over the process
group of the training and waits for its CUDA stream, and it has no step after the writing.

The marker of a complete checkpoint is its name. Everything is written to `.step-00001000.partial`;
when all ranks' files and the folder are on the disk, and their sizes compared, the main rank renames
it. On file systems that ranks can share a rename is one step: after a crash or a power cut the
checkpoint is there and whole, or it is not there. A marker file inside would do as much, and leave
folders behind that look like checkpoints.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from sample.processes import Ranks
from train.checkpoint import (
    Files,
    TrainState,
    first_line,
    folder_name,
    hush,
    list_checkpoints,
    missing_parts,
    sync,
)
from train.config import TrainConfig

_log = logging.getLogger(__name__)


class Checkpointer:
    """Writes the checkpoints of a run, one at a time, and removes those that are not to be kept. Every
    rank makes one and calls `save` at the same steps.

    An error of the thread raises an OSError with one line, the same on every rank, from the next `save`
    or `finish`. `failed` says at any time, on this rank, that there is one, so that the ranks can agree
    on a step at which they call `save` together.

    Attributes:
        blocked_seconds: for which the last `save` kept the training waiting.
        write_seconds: that the last complete checkpoint took to write.
    """

    def __init__(self, folder: Path, config: TrainConfig, ranks: Ranks) -> None:
        """Clears what an interrupted run left behind.

        Args:
            folder: the run's checkpoints folder; no other run may write to it.
        """
        self.folder, self.config, self.ranks = folder, config, ranks
        self.blocked_seconds = self.write_seconds = 0.0
        self._pending: Future[None] | None = None
        # The thread's exchanges must not get between those of the training.
        self._group: Any = None if ranks.mesh is None else dist.new_group(backend="gloo")
        self._on_gpu = ranks.device.type == "cuda"
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        hush()
        if ranks.is_main:
            for leftover in folder.glob(".step-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        ranks.barrier()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Waits for what is being written: an error elsewhere is no reason to lose it."""
        self._thread.shutdown()

    @property
    def writing(self) -> bool:
        """Whether the thread is at work."""
        return self._pending is not None and not self._pending.done()

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written, of which `save` or `finish` will tell."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def finish(self) -> None:
        """Waits until the last checkpoint is written.

        Raises:
            OSError: it could not be; earlier ones are left as they are.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    @torch.no_grad()
    def save(self, step: int, state: TrainState, extra: dict[str, Any], *, wait: bool) -> None:
        """Writes the checkpoint after `step` steps, once the one before it is written.

        Args:
            extra: json-able values for state.json.
            wait: until it is written, as when the process is about to end.
        Raises:
            OSError: this one, or the one before, cannot be written; earlier ones are left as they are.
        """
        begin = time.perf_counter()
        self.finish()
        tensors = state.tensors()
        text = json.dumps({"step": step, **extra}, indent=1) + "\n"
        if wait or not self.config.async_checkpoints:
            self._write(step, tensors, text)
        else:
            tensors = stage(tensors, pin=self._on_gpu)
            if self._on_gpu:
                torch.cuda.current_stream().synchronize()
            self._pending = self._thread.submit(self._write, step, tensors, text)
        self.blocked_seconds = time.perf_counter() - begin

    def _write(self, step: int, tensors: dict[str, Any], text: str) -> None:
        """Writes and publishes a checkpoint; the same happens on every rank."""
        begin = time.perf_counter()
        if self._on_gpu:
            torch.cuda.set_device(self.ranks.device)  # a thread starts with the first one
        final = self.folder / folder_name(step)
        partial = self.folder / f".{final.name}.partial"
        files = Files()
        # Without copying ahead: it would use the CUDA stream of the training.
        writer = FileSystemWriter(partial, sync_files=False, per_thread_copy_ahead=0)
        writer.fs = files
        reason: str | None = None
        interrupt: BaseException | None = None
        try:
            no_dist = self._group is None
            save(tensors, storage_writer=writer, process_group=self._group, no_dist=no_dist)
        except CheckpointException as error:
            causes = [cause for cause, _ in error.failures.values()]
            interrupt = next((c for c in causes if isinstance(c, KeyboardInterrupt)), None)
            reason = "; ".join(sorted({first_line(cause) for cause in causes}))
        written = {
            name: size for files in self._gather(files.written) for name, size in files.items()
        }
        if self.ranks.is_main:
            try:
                if reason is None:
                    self._publish(partial, final, text, written)
            except Exception as error:
                reason = first_line(error)
            if reason is not None:
                shutil.rmtree(partial, ignore_errors=True)
        reason = self._gather(reason)[0]
        if interrupt is not None:  # of somebody who does not want to wait for this
            raise interrupt
        if reason is not None:
            full = any(os.strerror(number) in reason for number in (errno.ENOSPC, errno.EDQUOT))
            remedy = "make room" if full else "see to that"
            raise OSError(
                f"{final}: the checkpoint cannot be written ({reason}); {remedy}, and the same "
                "command goes on from the one before"
            )
        self.write_seconds = time.perf_counter() - begin

    def _gather(self, value: Any) -> list[Any]:
        """What every rank has, by rank, over the thread's own process group."""
        if self._group is None:
            return [value]
        found: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(found, value, group=self._group)
        return found

    def _publish(self, partial: Path, final: Path, text: str, written: dict[str, int]) -> None:
        """Gives a checkpoint that all ranks have written its name, and removes old ones."""
        problem = missing_parts(partial, written)
        if problem is not None:
            raise OSError(f"{problem}, as seen by rank 0; all nodes must share the folder")
        with Files().create_stream(partial / "state.json", "w") as file:
            file.write(text)
        sync(partial)
        if final.exists():
            _discard(final)
        os.replace(partial, final)
        sync(self.folder)
        every = self.config.keep_every
        for step, old in list_checkpoints(self.folder)[: -self.config.keep_checkpoints]:
            if every is None or step % every:
                _discard(old)


def _discard(path: Path) -> None:
    """Removes a checkpoint; a crash in between leaves nothing that looks like one."""
    hidden = path.with_name(f".{path.name}.old")
    try:
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(path, hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        _log.warning("%s cannot be removed (%s)", path, error.strerror)


def stage(value: Any, *, pin: bool) -> Any:
    """A copy of nested tensors in the CPU's memory; sharded ones stay sharded.

    Args:
        pin: copy into page-locked memory, at the full speed of the bus, which torch keeps for the
            next time; the copies are not complete before the CUDA stream is.
    """
    if isinstance(value, Tensor):
        return torch.empty_like(value, device="cpu", pin_memory=pin).copy_(value, non_blocking=pin)
    if isinstance(value, dict):
        return {key: stage(nested, pin=pin) for key, nested in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(stage(nested, pin=pin) for nested in value)
    return value
