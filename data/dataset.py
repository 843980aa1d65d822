"""From a manifest to batches, with every choice a pure function of (seed, sample counter).

The dataset is indexed by a global sample counter g that never ends: sample g is the same on any
rank, worker and machine, however far a run was resumed. StepSampler deals the counters of each
step out to ranks and micro-batches; a DataLoader with any number of workers does the rest. Clips
of one step have one size, which may differ from step to step (see data/buckets.py).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypedDict

import numpy as np
import torch
from torch.utils.data import Dataset

from data.buckets import BucketRows, BucketSequence, Size, bucket_rows
from data.manifest import Manifest, Row
from data.randomness import numpy_generator, permuted_index, stream_seed
from data.video import Backend, VideoReadError, read_clip

_log = logging.getLogger(__name__)

# Unreadable files in a row after which something is wrong with all of them.
_MAX_SUBSTITUTES = 32
# A share is only judged over this many files (or all of them, when there are fewer): one bad file
# among the first ten says little.
_MIN_FILES = 1000


class Sample(TypedDict):
    """`video` is uint8 (3 f h w); `bad` has (clip, reason) of what could not be read on the way."""

    video: torch.Tensor
    caption: str
    row: int
    g: int
    bad: list[tuple[str, str]]


class Batch(TypedDict):
    """`video` is uint8 (b 3 f h w); `rows` and `g` are as in Sample; `bad` is of all samples."""

    video: torch.Tensor
    captions: list[str]
    rows: list[int]
    g: list[int]
    bad: list[tuple[str, str]]


class ClipDataset(Dataset[Sample]):
    """Clips of one size, or of one size per step, addressed by the global sample counter.

    Each epoch of len(dataset) samples is a fresh permutation of the rows. With buckets, step
    g // batch_size has one of them, which has rows and epochs of its own. The wording of the
    caption, and where in a longer piece the clip lies, are drawn per sample. A clip that cannot be
    read is replaced by another row, also drawn from the counter, and reported in `bad`. Files are
    opened in the call, so the dataset can be sent to any worker.

    Args:
        manifest: its rows are the clips.
        num_frames, height, width, fps: of every clip, as `read_clip`; with buckets only fps is.
        seed: of all draws.
        random_start: draw where in a longer piece the clip lies; otherwise it is at its start.
        backend: the decoder, as VideoReader; "pyav" is the quicker one for clips of a few frames.
        buckets: sizes and their shares of the steps, as BucketSequence; none for one size.
        batch_size: samples per optimizer step, over all ranks and micro-batches; buckets need it.
    Raises:
        ValueError: a bucket has no row that is right for it, a share is not positive, or there are
            buckets without batch_size.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        num_frames: int,
        height: int,
        width: int,
        fps: float,
        seed: int,
        random_start: bool = True,
        backend: Backend = "auto",
        buckets: Mapping[Size, float] | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.manifest = manifest
        self.num_frames = num_frames
        self.height = height
        self.width = width
        self.fps = fps
        self.seed = seed
        self.random_start = random_start
        self.backend: Backend = backend
        self.buckets: list[BucketRows] = []
        if buckets:
            if batch_size is None or batch_size < 1:
                raise ValueError(f"buckets need the run's batch_size, 1 or more, got {batch_size}")
            self._batch_size = batch_size
            self._sequence = BucketSequence(buckets, seed)
            self.buckets = bucket_rows(manifest, list(buckets), fps)
            self._rows = {bucket.size: bucket.rows for bucket in self.buckets}

    def __len__(self) -> int:
        """Rows, which without buckets is samples in an epoch; counters may go on for ever."""
        return len(self.manifest.rows)

    def __getitem__(self, g: int) -> Sample:
        """Sample number `g`, any integer >= 0.

        Raises:
            ValueError: so many clips in a row cannot be read that the rest won't be either.
        """
        bad: list[tuple[str, str]] = []
        size, rows, place = self._draw(g)
        for attempt in range(1, _MAX_SUBSTITUTES + 1):
            index = int(rows[place])
            row = self.manifest.rows[index]
            draw = numpy_generator(self.seed, "clip", g)
            caption = row.captions[int(draw.integers(len(row.captions)))]
            position = float(draw.random()) if self.random_start else 0.0
            try:
                video = self._read(row, size, position)
            except VideoReadError as error:
                bad.append((_clip_name(error.path, row), error.reason))
                substitute = numpy_generator(self.seed, "substitute", g, attempt)
                place = int(substitute.integers(len(rows)))
            else:
                return Sample(video=video, caption=caption, row=index, g=g, bad=bad)
        clip, reason = bad[-1]
        raise ValueError(
            f"{len(bad)} clips in a row cannot be read, the last one {clip}: {reason}; "
            f"run `zoetrope data check {self.manifest.path}`"
        )

    def _draw(self, g: int) -> tuple[Size, Sequence[int] | np.ndarray, int]:
        """The size of sample `g`, the rows it may be of, and which of these it is."""
        if not self.buckets:
            size = (self.num_frames, self.height, self.width)
            return size, range(len(self)), permuted_index(self.seed, g, len(self))
        step, in_batch = divmod(g, self._batch_size)
        size, earlier_steps = self._sequence.at(step)
        drawn, rows = earlier_steps * self._batch_size + in_batch, self._rows[size]
        return size, rows, permuted_index(stream_seed(self.seed, "bucket", *size), drawn, len(rows))

    def _read(self, row: Row, size: Size, position: float) -> torch.Tensor:
        num_frames, height, width = size
        return read_clip(
            self.manifest.locate(row),
            num_frames=num_frames,
            fps=self.fps,
            height=height,
            width=width,
            start=row.start or 0.0,
            end=row.end,
            position=position,
            backend=self.backend,
        )


def _clip_name(path: str, row: Row) -> str:
    """Names a clip for people: pieces of one file are different clips."""
    if row.start is None and row.end is None:
        return path
    return f"{path} [{row.start or 0.0:g}, {'end' if row.end is None else f'{row.end:g}'}]"


def collate(samples: list[Sample]) -> Batch:
    """A batch of samples of one size, which all samples of a step have."""
    return Batch(
        video=torch.stack([sample["video"] for sample in samples]),
        captions=[sample["caption"] for sample in samples],
        rows=[sample["row"] for sample in samples],
        g=[sample["g"] for sample in samples],
        bad=[entry for sample in samples for entry in sample["bad"]],
    )


class BadFiles:
    """Counts the clips that could not be read, logs each once, and stops a run with too many.

    The share is of different clips: bad ones by all seen, once `min(ceil(num_files / world_size),
    1000)` have been seen; before that, by that number.

    Args:
        num_files: rows of the manifest.
        max_bad_share: in [0, 1]; more than this raises.
        world_size: processes that the files are dealt out to; each has a BadFiles of its own.
    """

    def __init__(self, num_files: int, max_bad_share: float, world_size: int = 1) -> None:
        if num_files < 1 or not 0 <= max_bad_share <= 1:
            raise ValueError(
                f"max_bad_share must be in [0, 1] and num_files positive, "
                f"got {max_bad_share} and {num_files}"
            )
        self.num_files = num_files
        self.max_bad_share = max_bad_share
        self.counts: dict[str, int] = {}
        self.reasons: dict[str, str] = {}
        self._min_seen = min(-(-num_files // world_size), _MIN_FILES)
        self._good_rows: set[int] = set()

    @property
    def share(self) -> float:
        """Bad clips as a share of the clips seen so far."""
        seen = len(self.counts) + len(self._good_rows)
        return len(self.counts) / max(seen, self._min_seen)

    def add(self, bad: Iterable[tuple[str, str]], rows: Iterable[int] = ()) -> None:
        """Takes note of a batch.

        Args:
            bad: its (clip, reason) pairs.
            rows: the rows that could be read.
        Raises:
            ValueError: the share of bad clips is now above `max_bad_share`.
        """
        self._good_rows.update(rows)
        for clip, reason in bad:
            if clip not in self.counts:
                _log.warning("skipping %s: %s", clip, reason)
                self.reasons[clip] = reason
            self.counts[clip] = self.counts.get(clip, 0) + 1
        if self.share > self.max_bad_share:
            raise ValueError(
                f"{len(self.counts)} of the clips cannot be read, a share of {self.share:.3f}, "
                f"more than data.max_bad_share={self.max_bad_share}: run `zoetrope data check` on "
                f"the manifest, or raise data.max_bad_share"
            )


class StepSampler:
    """Deals out sample counters: an endless iterator of batches for one rank.

    Batch number s * grad_accum + m is micro-batch m of step s (counting from `start_step`); all
    ranks' micro-batches of step s together are counters [s * batch_size, (s + 1) * batch_size).
    So what a step sees does not depend on the number of ranks, and a resumed run needs only its
    step. For `DataLoader(batch_sampler=...)`.

    Args:
        batch_size: samples per optimizer step, over all ranks and micro-batches.
        grad_accum: micro-batches per step.
        rank, world_size: this process and how many there are.
        start_step: the first step to deal out.
    Raises:
        ValueError: batch_size cannot be dealt out evenly, or a number is out of range.
    """

    def __init__(
        self, batch_size: int, grad_accum: int, rank: int, world_size: int, start_step: int = 0
    ) -> None:
        if batch_size < 1 or grad_accum < 1 or start_step < 0 or not 0 <= rank < world_size:
            raise ValueError(
                f"expected batch_size >= 1, grad_accum >= 1, start_step >= 0 and 0 <= rank < "
                f"world_size, got {batch_size}, {grad_accum}, {start_step}, {rank} of {world_size}"
            )
        parts = grad_accum * world_size
        if batch_size % parts:
            raise ValueError(
                f"batch_size={batch_size} cannot be dealt out to {world_size} ranks x "
                f"{grad_accum} micro-batches: use a multiple of {parts}"
            )
        self.micro_batch_size = batch_size // parts
        self._batch_size, self._grad_accum = batch_size, grad_accum
        self._rank, self._world_size, self._start_step = rank, world_size, start_step

    def __iter__(self) -> Iterator[list[int]]:
        step = self._start_step
        while True:
            for micro in range(self._grad_accum):
                part = micro * self._world_size + self._rank
                first = step * self._batch_size + part * self.micro_batch_size
                yield list(range(first, first + self.micro_batch_size))
            step += 1
