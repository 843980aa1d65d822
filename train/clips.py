"""Clips for the recipes: the training dataset, a few rows at a time, and the loader."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import signal
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.buckets import BucketSequence, Size, bucket_rows, size_name
from data.dataset import ClipDataset, StepSampler, collate
from data.manifest import Manifest, Row
from data.video import VideoReadError, read_clip
from sample.processes import Ranks
from train.config import RunConfig
from train.config_data import DataConfig
from train.stopping import STOPS
from train.watchdog import beat

_log = logging.getLogger(__name__)


class TrainingClips(ClipDataset):
    """A ClipDataset that decodes no clip twice while its memory lasts.

    Only with random_start off: then every read of a row gives the same frames.
    """

    def __init__(self, manifest: Manifest, config: RunConfig) -> None:
        data = config.data
        super().__init__(
            manifest,
            num_frames=data.num_frames,
            height=data.height,
            width=data.width,
            fps=data.fps,
            seed=config.seed,
            random_start=data.random_start,
            backend=data.backend,
            buckets=data.shares,
            batch_size=config.train.batch_size,
        )
        self._room = 0 if data.random_start else int(data.memory_gb * 1e9)  # bytes still free
        self._kept: dict[tuple[str, float | None, float | None, Size], Tensor] = {}

    def _read(self, row: Row, size: Size, position: float) -> Tensor:
        key = (row.path, row.start, row.end, size)
        if key in self._kept:
            return self._kept[key]
        video = super()._read(row, size, position)
        if video.nbytes <= self._room:
            self._kept[key] = video
            self._room -= video.nbytes
        return video

    def collate(self, samples: list[Any]) -> dict[str, Any]:
        return dict(collate(samples))


def rows_of_one_size(manifest: Manifest, data: DataConfig) -> Sequence[int]:
    """The rows for clips of data.num_frames, for validation and statistics: without buckets all of
    them; beside buckets, in what may be a mixed manifest, those that a bucket of that size has.

    Raises:
        ValueError: there is none.
    """
    if not data.buckets:
        return range(len(manifest.rows))
    size = (data.num_frames, data.height, data.width)
    (bucket,) = bucket_rows(manifest, [size], data.fps)
    return bucket.rows.tolist()


def describe_buckets(manifest: Manifest, config: RunConfig) -> list[str]:
    """A line a bucket: its share of the steps, its rows and how often a run sees each of them, and
    the rows that it leaves out; no line without buckets.

    Raises:
        ValueError: no row of the manifest is right for a bucket.
    """
    data, train = config.data, config.train
    if not data.buckets:
        return []
    sequence, lines = BucketSequence(data.shares, config.seed), []
    for bucket in bucket_rows(manifest, data.sizes, data.fps):
        share, count = sequence.share(bucket.size), len(bucket.rows)
        epochs = share * train.steps * train.batch_size / count
        name = f"bucket {size_name(bucket.size)}"
        left_out = bucket.left_out().removeprefix(f"{name}: ")
        lines.append(
            f"{name:28}{share:>16.1%}  (of steps; {count:,} rows, {epochs:,.1f} epochs"
            f"{'; ' if left_out else ''}{left_out})"
        )
    return lines


def read_row(manifest: Manifest, row: Row, data: DataConfig) -> Tensor:
    """The clip at the start of a row's piece, uint8 (3 f h w).

    Raises:
        VideoReadError: it cannot be read, or is too short.
    """
    return read_clip(
        manifest.locate(row),
        num_frames=data.num_frames,
        fps=data.fps,
        height=data.height,
        width=data.width,
        start=row.start or 0.0,
        end=row.end,
        backend=data.backend,
    )


@lru_cache(maxsize=1024)
def _warn_once(text: str) -> None:
    _log.warning("left out: %s", text)


def read_rows(
    manifest: Manifest, rows: Sequence[int], data: DataConfig
) -> tuple[list[int], Tensor]:
    """The rows that can be read, and their clips, uint8 (n 3 f h w); the others are logged."""
    kept: list[int] = []
    clips: list[Tensor] = []
    for row in rows:
        beat()
        try:
            clips.append(read_row(manifest, manifest.rows[row], data))
        except VideoReadError as error:
            _warn_once(str(error))
        else:
            kept.append(row)
    empty = torch.empty(0, 3, data.num_frames, data.height, data.width, dtype=torch.uint8)
    return kept, torch.stack(clips) if clips else empty


def make_loader(
    dataset: Dataset[Any], config: RunConfig, ranks: Ranks, start_step: int
) -> DataLoader[Any]:
    """Endless micro-batches of this rank, and of those that share its samples, from step `start_step`
    on; the main rank logs which rows its buckets leave out.

    The dataset has a `collate` of its own.
    """
    if ranks.is_main and isinstance(dataset, TrainingClips):
        for bucket in dataset.buckets:
            if bucket.left_out():
                _log.warning("%s", bucket.left_out())
    sampler = StepSampler(
        config.train.batch_size,
        config.train.grad_accum,
        ranks.data_rank,
        ranks.num_data_ranks,
        start_step,
    )
    return DataLoader(
        dataset,
        batch_sampler=sampler,  # type: ignore[arg-type] (any iterable of index lists will do)
        num_workers=config.data.num_workers,
        collate_fn=dataset.collate,  # type: ignore[attr-defined]
        pin_memory=ranks.device.type == "cuda",
        prefetch_factor=2 if config.data.num_workers else None,
        worker_init_fn=_ignore_signals,
    )


def _ignore_signals(worker: int) -> None:
    """Leaves signals that stop a run, and reach a whole process group, to the training process: it
    finishes its step first, and needs its loader for that."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Ends workers that an error left behind: they ignore the SIGTERM that Python sends its daemons
    before it waits for them, for ever."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
