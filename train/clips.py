"""Clips for the recipes: the training dataset, a few rows at a time, and the loader."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.dataset import ClipDataset, StepSampler, collate
from data.manifest import Manifest, Row
from data.video import VideoReadError, read_clip
from train.config import DataConfig, RunConfig
from train.distributed import Ranks

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
        )
        clip_bytes = 3 * data.num_frames * data.height * data.width
        self._room = 0 if data.random_start else int(data.memory_gb * 1e9) // clip_bytes
        self._kept: dict[tuple[str, float | None, float | None], Tensor] = {}

    def _read(self, row: Row, position: float) -> Tensor:
        key = (row.path, row.start, row.end)
        if key in self._kept:
            return self._kept[key]
        video = super()._read(row, position)
        if len(self._kept) < self._room:
            self._kept[key] = video
        return video

    def collate(self, samples: list[Any]) -> dict[str, Any]:
        return dict(collate(samples))


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
    """Endless micro-batches of this rank, from step `start_step` on.

    The dataset has a `collate` of its own.
    """
    sampler = StepSampler(
        config.train.batch_size, config.train.grad_accum, ranks.rank, ranks.world_size, start_step
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
    """Leaves Ctrl-C and SIGTERM, which reach a whole process group, to the training process: it
    finishes its step first, and needs its loader for that."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
