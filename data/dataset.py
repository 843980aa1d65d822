"""From a manifest to batches, with every choice a pure function of (seed, sample counter).

The dataset is indexed by a global sample counter g that never ends: sample g is the same on any
rank, worker and machine, however far a run was resumed. StepSampler deals the counters of each
step out to ranks and micro-batches; data/loader.py does the rest with any number of workers. Clips
of one step have one size, which may differ from step to step (see data/buckets.py), or share rows of
tokens in several sizes (data/packing.py); data/order.py says which counter is what.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import torch
from torch.utils.data import Dataset

from data.buckets import Size, bucket_rows
from data.manifest import Manifest
from data.order import BucketOrder, SampleOrder, UniformOrder
from data.randomness import numpy_generator
from data.video import Backend, VideoReadError, read_clip
from data.video_file import one_line

_log = logging.getLogger(__name__)

# Unreadable files in a row after which something is wrong with all of them.
_MAX_SUBSTITUTES = 32
# A share is only judged over this many files (or all of them, when there are fewer): one bad file
# among the first ten says little.
_MIN_FILES = 1000


class Sample(TypedDict):
    """`video` is uint8 (3 f h w); `references` (3 k h w), if any; `bad` has (clip, reason) of what
    could not be read on the way."""

    video: torch.Tensor
    references: NotRequired[torch.Tensor]
    caption: str
    row: int
    g: int
    bad: list[tuple[str, str]]


class Batch(TypedDict):
    """`video` is uint8 (b 3 f h w); `references` (b 3 k h w), if any; `rows` and `g` are as in Sample;
    `bad` is of all samples."""

    video: torch.Tensor
    references: NotRequired[torch.Tensor]
    captions: list[str]
    rows: list[int]
    g: list[int]
    bad: list[tuple[str, str]]


class PackedBatch(Batch):
    """`video` is flat, the values of one clip after the other's; `sizes` is (b 3): frames, height and
    width of each."""

    sizes: torch.Tensor


@dataclass(frozen=True)
class ClipRequest:
    """One clip to read: all that it takes, so that any process can do it, without the manifest.

    Attributes:
        g, row, caption: of the sample that it is for.
        path, fps, start, end, crop, position, backend: as `read_clip`.
        size: frames, height and width.
        references: pictures to read with it, of its size.
    """

    g: int
    row: int
    caption: str
    path: str
    size: Size
    fps: float
    start: float
    end: float | None
    crop: tuple[int, int, int, int] | None
    position: float
    backend: Backend
    references: tuple[str, ...] = ()

    @property
    def is_here(self) -> bool:
        """Whether reading takes no time, as the video is in this process already."""
        return False

    @property
    def name(self) -> str:
        """The clip, for people: pieces of one file are different clips."""
        path = one_line(self.path)
        if not self.start and self.end is None:
            return path
        return f"{path} [{self.start:g}, {'end' if self.end is None else f'{self.end:g}'}]"

    def read(self, note: Callable[[str], None] = lambda _: None, /) -> torch.Tensor:
        """The video, uint8 (3 f h w), and behind its frames the references.

        Args:
            note: is told the path of each reference before it is touched.
        Raises:
            VideoReadError: it or a reference cannot be read, or it is too short.
        """
        num_frames, height, width = self.size
        clip = read_clip(
            self.path,
            num_frames=num_frames,
            fps=self.fps,
            height=height,
            width=width,
            start=self.start,
            end=self.end,
            crop=self.crop,
            position=self.position,
            backend=self.backend,
        )
        frames = [clip]
        for path in self.references:
            note(path)
            try:
                picture = read_clip(path, num_frames=1, fps=self.fps, height=height, width=width)
            except VideoReadError as error:
                raise VideoReadError(
                    self.path, f"its reference {one_line(path)}: {error.reason}"
                ) from None
            frames.append(picture)
        return torch.cat(frames, dim=1)


class ClipDataset(Dataset[Sample]):
    """Clips of one size, or of several, addressed by the global sample counter.

    Each epoch of len(dataset) samples is a fresh permutation of the rows; another `order` has rows and
    epochs for each size. The wording of the caption, and where in a longer piece the clip lies, are
    drawn per sample. A clip that cannot be read is replaced by another row of its size, also drawn
    from the counter, and reported in `bad`. Files are opened in the call, so the dataset can be sent to
    any worker.

    Args:
        manifest: its rows are the clips.
        num_frames, height, width, fps: of every clip, as `read_clip`; with buckets or an order only
            fps is.
        seed: of all draws.
        random_start: draw where in a longer piece the clip lies; otherwise it is at its start.
        backend: the decoder, as VideoReader; "pyav" is the quicker one for clips of a few frames.
        buckets: sizes and their shares of the steps, as BucketSequence; none for one size.
        batch_size: samples per optimizer step, over all ranks and micro-batches; buckets need it.
        order: of the samples, in place of buckets and batch_size.
        references: read the rows' reference pictures too. All samples of a step need equally many,
            as an order that knows of them (data/order.py) sees to.
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
        order: SampleOrder | None = None,
        references: bool = False,
    ) -> None:
        self.manifest = manifest
        self.references = references
        self.fps = fps
        self.seed = seed
        self.random_start = random_start
        self.backend: Backend = backend
        if order is None and buckets:
            if batch_size is None or batch_size < 1:
                raise ValueError(f"buckets need the run's batch_size, 1 or more, got {batch_size}")
            found = bucket_rows(manifest, list(buckets), fps)
            rows = {bucket.size: bucket.rows for bucket in found}
            order = BucketOrder(rows, dict.fromkeys(rows, batch_size), seed, buckets)
        if order is None:
            size = (num_frames, height, width)
            order = UniformOrder(range(len(manifest.rows)), size, batch_size or 1, seed)
        self.order = order

    def __len__(self) -> int:
        """Rows, which without buckets is samples in an epoch; counters may go on for ever."""
        return len(self.manifest.rows)

    def __getitem__(self, g: int) -> Sample:
        """Sample number `g`, any integer >= 0.

        Raises:
            ValueError: so many clips in a row cannot be read that the rest won't be either.
        """
        return read_sample(self.request, self.sample, g)

    def request(self, g: int, bad: Sequence[tuple[str, str]] = ()) -> ClipRequest:
        """What is to be read for sample number `g`.

        Args:
            bad: (clip, reason) of what has been asked for in its place and could not be read.
        Raises:
            ValueError: so many could not be read that the rest won't be either.
        """
        if len(bad) >= _MAX_SUBSTITUTES:
            clip, reason = bad[-1]
            raise ValueError(
                f"{len(bad)} clips in a row cannot be read, the last one {clip}: {reason}; "
                f"run `zoetrope data check {self.manifest.path}`"
            )
        size, rows, place = self.order.draw(g)
        if bad:
            substitute = numpy_generator(self.seed, "substitute", g, len(bad))
            place = int(substitute.integers(len(rows)))
        index = int(rows[place])
        row = self.manifest.rows[index]
        draw = numpy_generator(self.seed, "clip", g)
        caption = row.captions[int(draw.integers(len(row.captions)))]
        position = float(draw.random()) if self.random_start else 0.0
        return ClipRequest(
            g=g,
            row=index,
            caption=caption,
            path=self.manifest.locate(row),
            size=size,
            fps=self.fps,
            start=row.start or 0.0,
            end=row.end,
            crop=row.crop,
            position=position,
            backend=self.backend,
            references=self.manifest.locate_references(row) if self.references else (),
        )

    def sample(
        self, request: ClipRequest, video: torch.Tensor, bad: list[tuple[str, str]]
    ) -> Sample:
        """A request's sample, once its video is there."""
        sample = Sample(video=video, caption=request.caption, row=request.row, g=request.g, bad=bad)
        if request.references:
            sample["video"], sample["references"] = video.tensor_split([request.size[0]], dim=1)
        return sample

    def collate(self, samples: list[Sample]) -> dict[str, Any]:
        """A batch."""
        return dict(collate_packed(samples) if self.order.packed else collate(samples))


def collate(samples: list[Sample]) -> Batch:
    """A batch of samples of one size, which all samples of a step have but of a packed one."""
    video = torch.stack([sample["video"] for sample in samples])
    batch = Batch(video=video, **described(samples))
    if "references" in samples[0]:
        pictures = [sample["references"] for sample in samples]  # type: ignore
        batch["references"] = torch.stack(pictures)
    return batch


def collate_packed(samples: list[Sample]) -> PackedBatch:
    """A batch of samples of any sizes."""
    videos = [sample["video"] for sample in samples]
    sizes = torch.tensor([video.shape[1:] for video in videos])
    return PackedBatch(video=flatten(videos), sizes=sizes, **described(samples))


def flatten(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors of any shapes as one: all their values, one after the other."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def described(samples: Sequence[Any]) -> dict[str, Any]:
    """What a batch says of its samples, beside what was read."""
    return {
        "captions": [sample["caption"] for sample in samples],
        "rows": [sample["row"] for sample in samples],
        "g": [sample["g"] for sample in samples],
        "bad": [entry for sample in samples for entry in sample["bad"]],
    }


def read_sample(
    ask: Callable[[int, list[tuple[str, str]]], Any],
    make: Callable[[Any, Any, list[tuple[str, str]]], Any],
    g: int,
) -> Any:
    """Sample number `g`, read here: what cannot be read is asked for anew, and named in the sample.

    Args:
        ask, make: a dataset's `request` and `sample`.
    """
    bad: list[tuple[str, str]] = []
    while True:
        request = ask(g, bad)
        try:
            return make(request, request.read(), bad)
        except VideoReadError as error:
            bad.append((request.name, error.reason))


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
    ranks' micro-batches of step s together are counters [s * batch_size, (s + 1) * batch_size), or
    those that an order says. So what a step sees does not depend on the number of ranks, and a
    resumed run needs only its step. For ClipLoader.

    Args:
        batch_size: samples per optimizer step, over all ranks and micro-batches; or the order that
            says which each step has.
        grad_accum: micro-batches per step.
        rank, world_size: this process and how many there are.
        start_step: the first step to deal out.
    Raises:
        ValueError: a step cannot be dealt out evenly, or a number is out of range.
    """

    def __init__(
        self,
        batch_size: int | SampleOrder,
        grad_accum: int,
        rank: int,
        world_size: int,
        start_step: int = 0,
    ) -> None:
        too_few = isinstance(batch_size, int) and batch_size < 1
        if too_few or grad_accum < 1 or start_step < 0 or not 0 <= rank < world_size:
            raise ValueError(
                f"expected batch_size >= 1, grad_accum >= 1, start_step >= 0 and 0 <= rank < "
                f"world_size, got {batch_size}, {grad_accum}, {start_step}, {rank} of {world_size}"
            )
        order = batch_size
        if isinstance(order, int):
            order = UniformOrder((), (1, 1, 1), order, seed=0)
        order.check(world_size, grad_accum)
        self._order, self._grad_accum, self._rank = order, grad_accum, rank
        self._world_size, self._start_step = world_size, start_step

    def __iter__(self) -> Iterator[list[int]]:
        step = self._start_step
        while True:
            cuts = self._order.cuts(step, self._grad_accum * self._world_size)
            for micro in range(self._grad_accum):
                part = micro * self._world_size + self._rank
                yield list(range(cuts[part], cuts[part + 1]))
            step += 1
