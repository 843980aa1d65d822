"""Clips for the recipes: the training dataset, a few rows at a time, and the loader."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.buckets import Size, bucket_rows
from data.dataset import ClipDataset, ClipRequest, Sample, StepSampler
from data.loader import ClipLoader
from data.manifest import Manifest
from data.order import SampleOrder
from sample.processes import Ranks
from train.config import RunConfig
from train.config_data import DataConfig
from train.sizes import left_out
from train.stopping import STOPS
from train.watchdog import beat

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeptRequest(ClipRequest):
    """A request for a clip that is in memory."""

    video: Tensor = field(kw_only=True)

    @property
    def is_here(self) -> bool:
        return True

    def read(self, note: Any = None, /) -> Tensor:
        return self.video


def _piece(request: ClipRequest) -> tuple[Any, ...]:
    piece = request.path, request.start, request.end, request.crop, request.size
    return (*piece, request.references)


class TrainingClips(ClipDataset):
    """A ClipDataset that decodes no clip twice while its memory lasts.

    Only with random_start off: then every read of a row gives the same frames.
    """

    def __init__(self, manifest: Manifest, config: RunConfig, order: SampleOrder) -> None:
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
            order=order,
            references=config.gives_references,
        )
        self._room = 0 if data.random_start else int(data.memory_gb * 1e9)  # bytes still free
        self._kept: dict[tuple[Any, ...], Tensor] = {}

    def request(self, g: int, bad: Sequence[tuple[str, str]] = ()) -> ClipRequest:
        request = super().request(g, bad)
        video = self._kept.get(_piece(request))
        return request if video is None else KeptRequest(**vars(request), video=video)

    def sample(self, request: ClipRequest, video: Tensor, bad: list[tuple[str, str]]) -> Sample:
        if video.nbytes <= self._room and _piece(request) not in self._kept:
            self._kept[_piece(request)] = video
            self._room -= video.nbytes
        return super().sample(request, video, bad)


def rows_of_one_size(manifest: Manifest, data: DataConfig) -> Sequence[int]:
    """The rows for clips of data.num_frames, for validation and statistics: those that a bucket of
    that size has.

    Raises:
        ValueError: there is none.
    """
    (bucket,) = bucket_rows(manifest, [data.base_size], data.fps)
    return bucket.rows.tolist()


def row_request(
    manifest: Manifest,
    row: int,
    data: DataConfig,
    size: Size,
    g: int = 0,
    references: bool = False,
) -> ClipRequest:
    """The clip of a size at the start of a row's piece.

    Args:
        g: what the request is to be known by.
        references: behind it the pictures of its subjects.
    """
    found = manifest.rows[row]
    return ClipRequest(
        g=g,
        row=row,
        caption="",
        path=manifest.locate(found),
        size=size,
        fps=data.fps,
        start=found.start or 0.0,
        end=found.end,
        crop=found.crop,
        position=0.0,
        backend=data.backend,
        references=manifest.locate_references(found) if references else (),
    )


@lru_cache(maxsize=1024)
def _warn_once(text: str) -> None:
    _log.warning("left out: %s", text)


@dataclass(frozen=True)
class Unread:
    """In place of a clip that could not be read."""

    g: int
    reason: str
    path: str = ""
    name: str = ""
    references: tuple[str, ...] = ()
    is_here: bool = True

    def read(self, note: Any = None, /) -> None:
        return None


class GivenRows:
    """The clips of some rows, by place, each by itself: what cannot be read is not replaced.

    Args:
        references: behind each clip's frames the pictures of its subjects.
    """

    def __init__(
        self,
        manifest: Manifest,
        rows: Sequence[int] | np.ndarray,
        data: DataConfig,
        size: Size,
        references: bool = False,
    ) -> None:
        self.manifest, self.rows, self.data, self.size = manifest, rows, data, size
        self.references = references

    def request(self, place: int, bad: Sequence[tuple[str, str]] = ()) -> ClipRequest | Unread:
        if bad:
            return Unread(place, f"{bad[0][0]}: {bad[0][1]}")
        row = int(self.rows[place])
        return row_request(self.manifest, row, self.data, self.size, place, self.references)

    def sample(self, request: Any, video: Tensor | None, bad: list[tuple[str, str]]) -> Any:
        return request, video

    def collate(self, samples: list[Any]) -> dict[str, Any]:
        """Places and videos (3 f h w) of what could be read, and (place, reason) of the others."""
        good = [(request.g, video) for request, video in samples if video is not None]
        return {
            "places": [place for place, _ in good],
            "videos": [video for _, video in good],
            "unread": [(request.g, request.reason) for request, video in samples if video is None],
        }


def read_rows(
    manifest: Manifest,
    rows: Sequence[int],
    data: DataConfig,
    quarantine: dict[str, str],
    references: bool = False,
) -> tuple[list[int], Tensor, list[Tensor]]:
    """The rows that can be read, their clips, uint8 (n 3 f h w), and if asked for the pictures of the
    subjects of each, (3 k h w); the others are logged.

    Args:
        quarantine: as `make_loader`; with data.num_workers no file can hold up a run here either.
    """
    loader = ClipLoader(
        GivenRows(manifest, rows, data, data.base_size, references),
        [[place] for place in range(len(rows))],
        workers=min(data.num_workers, len(rows)),
        file_seconds=data.file_seconds,
        signals=tuple(STOPS),
        quarantine=quarantine,
    )
    size = data.base_size
    kept, clips, pictures = [], [torch.empty(0, 3, *size, dtype=torch.uint8)], []
    for items in loader:
        beat()
        for _, reason in items["unread"]:
            _warn_once(reason)
        kept += [rows[place] for place in items["places"]]
        for video in items["videos"]:
            clip, behind = video.tensor_split([size[0]], dim=1)
            clips.append(clip[None])
            pictures.append(behind.clone())  # a view would keep the clip
    return kept, torch.cat(clips), pictures


def make_loader(
    dataset: Any,
    config: RunConfig,
    ranks: Ranks,
    start_step: int,
    quarantine: dict[str, str] | None = None,
    order: SampleOrder | None = None,
) -> ClipLoader:
    """Endless micro-batches of this rank, and of those that share its samples, from step `start_step`
    on; the main rank logs which rows its buckets leave out.

    Args:
        quarantine: files that are not to be touched, and why; what costs a worker is added.
        order: the dataset's, which says what each step has; None: train.batch_size samples.
    """
    if ranks.is_main:
        for line in left_out(dataset.manifest, config):
            _log.warning("%s", line)
    sampler = StepSampler(
        order or config.train.batch_size,
        config.train.grad_accum,
        ranks.data_rank,
        ranks.num_data_ranks,
        start_step,
    )
    return ClipLoader(
        dataset,
        sampler,
        workers=config.data.num_workers,
        prefetch=config.data.prefetch,
        file_seconds=config.data.file_seconds,
        memory_limit=config.data.worker_memory_gb * 1e9,
        signals=tuple(STOPS),  # they reach a whole process group, and a run finishes its step first
        pin=ranks.device if ranks.device.type == "cuda" else None,
        quarantine=quarantine,
    )
