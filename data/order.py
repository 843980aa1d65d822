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

from data.buckets import MAX_PERIOD, BucketSequence, Size, size_name
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
    ) -> None:
        self.rows, self.batches, self._advice = rows, batches, advice
        if shares is None:
            by_rows = {size: Fraction(len(rows[size]), batches[size]) for size in rows}
            self.sequence = BucketSequence(by_rows, seed, NATIVE_PERIOD)
        else:
            self.sequence = BucketSequence(shares, seed, MAX_PERIOD)
        sizes = self.sequence.sizes
        by_bucket = np.array([batches[size] for size in sizes], np.int64)
        self._ends = np.concatenate([[0], by_bucket[self.sequence.table].cumsum()])
        self._shuffles = {
            size: Shuffle(stream_seed(seed, "bucket", *size), len(rows[size])) for size in sizes
        }

    def first(self, step: int) -> int:
        periods, slot = divmod(step, len(self._ends) - 1)
        return periods * int(self._ends[-1]) + int(self._ends[slot])

    def draw(self, g: int) -> tuple[Size, Sequence[int] | np.ndarray, int]:
        periods, place = divmod(g, int(self._ends[-1]))
        slot = int(np.searchsorted(self._ends, place, side="right")) - 1
        size, earlier_steps = self.sequence.at(periods * (len(self._ends) - 1) + slot)
        drawn = earlier_steps * self.batches[size] + place - int(self._ends[slot])
        return size, self.rows[size], self._shuffles[size](drawn)

    def counts(self, step: int) -> dict[Size, int]:
        size, _ = self.sequence.at(step)
        return {size: self.batches[size]}

    def mean_counts(self) -> dict[Size, float]:
        return {size: self.sequence.share(size) * self.batches[size] for size in self.rows}

    def check(self, num_ranks: int, grad_accum: int) -> None:
        parts = num_ranks * grad_accum
        for size, batch in self.batches.items():
            if batch % parts:
                raise ValueError(
                    f"bucket {size_name(size)}: its batch of {batch} does not divide into {num_ranks} "
                    f"processes x train.grad_accum={grad_accum}; {self._advice.format(parts)}"
                )
