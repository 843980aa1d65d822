"""The order of training: which sample counters a step has, and which row and size each of them is.

Every order is a pure function of (seed, step), in closed form: nothing is counted along, no rank or
worker is asked, and a resumed run needs only its step. The counters of a step are neighbours, and a
step begins where the one before ends, so that every counter is in one step. A step is cut into equal
parts, one for each micro-batch of each rank; so all ranks have the same number of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from data.buckets import MAX_PERIOD, Bucket, BucketSequence, Size, size_name
from data.randomness import Shuffle, permuted_index, stream_seed

# Of shares that follow from numbers of rows: so many steps make a bucket of one row in a million no
# more frequent than it ought to be.
NATIVE_PERIOD = 2**18


class SampleOrder(ABC):
    """See the head of this file.

    Attributes:
        rows: of the manifest, that each size draws from.
        packed: whether clips of several sizes share a micro-batch.
    """

    packed = False
    rows: Mapping[Size, Sequence[int] | np.ndarray]

    @abstractmethod
    def first(self, step: int) -> int:
        """The lowest counter of a step; step >= 0."""

    def batch(self, step: int) -> int:
        """How many samples a step has, over all ranks and micro-batches."""
        return self.first(step + 1) - self.first(step)

    def cuts(self, step: int, parts: int) -> list[int]:
        """Counters that cut a step into parts: part k has those from cuts[k] up to cuts[k + 1]."""
        first = self.first(step)
        size = self.batch(step) // parts
        return [first + size * part for part in range(parts + 1)]

    @abstractmethod
    def draw(self, g: int) -> tuple[Size, Sequence[int] | np.ndarray, int]:
        """The size of sample `g`, the rows that it may be of, and the place of its own in these."""

    @abstractmethod
    def counts(self, step: int) -> dict[Size, int]:
        """How many samples of each size a step has."""

    @abstractmethod
    def mean_counts(self) -> dict[Size, float]:
        """The same for the mean step."""

    @abstractmethod
    def check(self, num_ranks: int, grad_accum: int) -> None:
        """Raises ValueError: a step cannot be dealt out evenly; says what to set."""


def check_divides(number: int, num_ranks: int, grad_accum: int) -> None:
    parts = num_ranks * grad_accum
    if number % parts:
        raise ValueError(
            f"batch_size={number} cannot be dealt out to {num_ranks} ranks x {grad_accum} "
            f"micro-batches: use a multiple of {parts}"
        )


class UniformOrder(SampleOrder):
    """One size, and a number of samples a step; each epoch is a permutation of the rows.

    Args:
        rows: of the manifest, that samples are of.
        batch_size: samples per step, over all ranks and micro-batches.
    """

    def __init__(
        self, rows: Sequence[int] | np.ndarray, size: Size, batch_size: int, seed: int
    ) -> None:
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rows = {size: rows}

    def first(self, step: int) -> int:
        return step * self.batch_size

    def draw(self, g: int) -> tuple[Size, Sequence[int] | np.ndarray, int]:
        rows = self.rows[self.size]
        return self.size, rows, permuted_index(self.seed, g, len(rows))

    def counts(self, step: int) -> dict[Size, int]:
        return {self.size: self.batch_size}

    def mean_counts(self) -> dict[Size, float]:
        return {self.size: float(self.batch_size)}

    def check(self, num_ranks: int, grad_accum: int) -> None:
        check_divides(self.batch_size, num_ranks, grad_accum)


class BucketOrder(SampleOrder):
    """One bucket a step, each with a number of samples, rows and epochs of its own.

    Args:
        rows: of each bucket.
        batches: samples per step, of each bucket.
        shares: of the steps, relative to each other; None: each bucket as often as an epoch of its
            rows is long, so that all rows are seen equally often.
        advice: what to change where a batch cannot be dealt out; {} is the multiple it has to be.
        references: how many reference pictures each row of the manifest has: those of a bucket that
            have equally many are then a bucket of their own. None: it does not matter.

    Attributes:
        sequence: the bucket of every step.
        batches: as given.
    """

    def __init__(
        self,
        rows: Mapping[Size, np.ndarray],
        batches: Mapping[Size, int],
        seed: int,
        shares: Mapping[Size, float] | None = None,
        advice: str = "use a multiple of {}",
        references: np.ndarray | None = None,
    ) -> None:
        self.rows, self.batches, self._advice = rows, batches, advice
        self._rows = _parted(rows, references)
        weights: dict[Bucket, Fraction] = {}
        for bucket, part in self._rows.items():
            size = _size(bucket)
            if shares is None:
                weights[bucket] = Fraction(len(part), batches[size])
            else:
                weights[bucket] = Fraction(str(shares[size])) * Fraction(len(part), len(rows[size]))
        period = NATIVE_PERIOD if shares is None else MAX_PERIOD
        self.sequence = BucketSequence(weights, seed, period)
        buckets = self.sequence.buckets
        by_bucket = np.array([batches[_size(bucket)] for bucket in buckets], np.int64)
        self._ends = np.concatenate([[0], by_bucket[self.sequence.table].cumsum()])
        self._shuffles = {
            bucket: Shuffle(stream_seed(seed, "bucket", *bucket), len(self._rows[bucket]))
            for bucket in buckets
        }

    def first(self, step: int) -> int:
        periods, slot = divmod(step, len(self._ends) - 1)
        return periods * int(self._ends[-1]) + int(self._ends[slot])

    def draw(self, g: int) -> tuple[Size, Sequence[int] | np.ndarray, int]:
        periods, place = divmod(g, int(self._ends[-1]))
        slot = int(np.searchsorted(self._ends, place, side="right")) - 1
        bucket, earlier_steps = self.sequence.at(periods * (len(self._ends) - 1) + slot)
        size = _size(bucket)
        drawn = earlier_steps * self.batches[size] + place - int(self._ends[slot])
        return size, self._rows[bucket], self._shuffles[bucket](drawn)

    def counts(self, step: int) -> dict[Size, int]:
        size = _size(self.sequence.at(step)[0])
        return {size: self.batches[size]}

    def mean_counts(self) -> dict[Size, float]:
        return {size: self.share(size) * self.batches[size] for size in self.rows}

    def share(self, size: Size, references: int | None = None) -> float:
        """Of all steps, in [0, 1], those of a size; of rows with so many reference pictures alone."""
        return sum(
            self.sequence.share(bucket)
            for bucket in self._rows
            if _size(bucket) == size and references in (None, sum(bucket[3:]))
        )

    def check(self, num_ranks: int, grad_accum: int) -> None:
        parts = num_ranks * grad_accum
        for size, batch in self.batches.items():
            if batch % parts:
                raise ValueError(
                    f"bucket {size_name(size)}: its batch of {batch} does not divide into {num_ranks} "
                    f"processes x train.grad_accum={grad_accum}; {self._advice.format(parts)}"
                )


def _size(bucket: Bucket) -> Size:
    num_frames, height, width = bucket[:3]
    return num_frames, height, width


def _parted(
    rows: Mapping[Size, np.ndarray], references: np.ndarray | None
) -> dict[Bucket, np.ndarray]:
    """The rows of each bucket: a size, and behind it the number of reference pictures, if any."""
    if references is None:
        return {**rows}
    parts: dict[Bucket, np.ndarray] = {}
    for size, of_it in rows.items():
        found = references[of_it]
        for count in np.unique(found).tolist():
            parts[(*size, count) if count else size] = of_it[found == count]
    return parts
