"""Packing: clips of different sizes in one row of tokens, in place of batches of one size.

Which sizes share a row is decided once, by first-fit decreasing (Johnson 1973; Krell et al. 2021,
"Efficient Sequence Packing without Cross-contamination", who count sizes as here): a million clips of
few sizes make few patterns, and every epoch has the same number of rows. Which clips fill the patterns,
and in which order the rows come, is drawn anew in each epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from data.buckets import Size, size_name
from data.order import SampleOrder, check_divides
from data.randomness import Shuffle, numpy_generator, stream_seed


class PackedOrder(SampleOrder):
    """A number of packed rows a step; each epoch has every clip once.

    Rows of tokens are dealt out one after the other, across epochs: a step may end one epoch and begin
    the next. So nothing is repeated to fill a last step.

    Args:
        rows: of the manifest, of each size.
        tokens: of a clip of each size.
        budget: tokens of a packed row at most.
        rows_per_step: packed rows of a step, over all ranks and micro-batches.
    Raises:
        ValueError: a clip has more tokens than a packed row.
    """

    packed = True

    def __init__(
        self,
        rows: Mapping[Size, np.ndarray],
        tokens: Mapping[Size, int],
        budget: int,
        rows_per_step: int,
        seed: int,
    ) -> None:
        self.rows, self.budget, self.rows_per_step = rows, budget, rows_per_step
        self.sizes = sorted(rows, key=lambda size: (-tokens[size], size))
        largest = self.sizes[0]
        if tokens[largest] > budget:
            raise ValueError(
                f"data.packing.tokens={budget} is less than the {tokens[largest]} of a clip of "
                f"{size_name(largest)}; use {tokens[largest]} or more"
            )
        counts = [len(rows[size]) for size in self.sizes]
        patterns = pack_sizes(counts, [tokens[size] for size in self.sizes], budget)
        self._patterns = np.array([pattern for pattern, _ in patterns])  # (patterns, sizes)
        times = np.array([number for _, number in patterns])
        # Of each pattern, its first row, and how many clips of each size are in rows before that.
        self._first_row = np.concatenate([[0], times.cumsum()])
        used = (self._patterns * times[:, None]).cumsum(axis=0)
        self._used = np.concatenate([np.zeros_like(used[:1]), used[:-1]])
        self._clips = self._patterns.sum(axis=1).repeat(times)  # of each row
        self.num_clips, self.num_rows = sum(counts), int(times.sum())
        self._seed = stream_seed(seed, "packing")
        self._shuffles = {
            size: Shuffle(stream_seed(seed, "packing", *size), len(rows[size])) for size in rows
        }
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        total = sum(count * tokens[size] for count, size in zip(counts, self.sizes))
        self.unused = 1 - total / (self.num_rows * budget)  # share of the rows' tokens

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the packed rows in an epoch, and how many of its clips come before each, with
        all of them at the end."""
        if epoch not in self._epochs:
            while len(self._epochs) > 1:
                del self._epochs[next(iter(self._epochs))]
            order = numpy_generator(self._seed, "rows", epoch).permutation(self.num_rows)
            self._epochs[epoch] = order, np.concatenate([[0], self._clips[order].cumsum()])
        return self._epochs[epoch]

    def _begin(self, row: int) -> int:
        """The first counter of the packed row of that number, counted over all epochs."""
        epoch, slot = divmod(row, self.num_rows)
        return epoch * self.num_clips + int(self._epoch(epoch)[1][slot])

    def first(self, step: int) -> int:
        return self._begin(step * self.rows_per_step)

    def cuts(self, step: int, parts: int) -> list[int]:
        begin, rows = step * self.rows_per_step, self.rows_per_step // parts
        return [self._begin(begin + part * rows) for part in range(parts + 1)]

    def draw(self, g: int) -> tuple[Size, Sequence[int] | np.ndarray, int]:
        epoch, place = divmod(g, self.num_clips)
        order, begins = self._epoch(epoch)
        slot = int(np.searchsorted(begins, place, side="right")) - 1
        row = int(order[slot])
        pattern = self._pattern_of(row)
        counts = self._patterns[pattern]
        ends = counts.cumsum()
        in_row = place - int(begins[slot])
        which = int(np.searchsorted(ends, in_row, side="right"))
        size = self.sizes[which]
        number = self._used[pattern, which] + (row - self._first_row[pattern]) * counts[which]
        number = int(number + in_row - (ends[which] - counts[which]))
        drawn = epoch * len(self.rows[size]) + number
        return size, self.rows[size], self._shuffles[size](drawn)

    def _pattern_of(self, row: int | np.ndarray) -> np.ndarray:
        return np.searchsorted(self._first_row, row, side="right") - 1

    def counts(self, step: int) -> dict[Size, int]:
        found = np.zeros(len(self.sizes), np.int64)
        for number in range(step * self.rows_per_step, (step + 1) * self.rows_per_step):
            epoch, slot = divmod(number, self.num_rows)
            found += self._patterns[self._pattern_of(self._epoch(epoch)[0][slot])]
        return {size: int(count) for size, count in zip(self.sizes, found) if count}

    def mean_counts(self) -> dict[Size, float]:
        share = self.rows_per_step / self.num_rows
        return {size: len(rows) * share for size, rows in self.rows.items()}

    def check(self, num_ranks: int, grad_accum: int) -> None:
        check_divides(self.rows_per_step, num_ranks, grad_accum)


def pack_sizes(
    counts: Sequence[int], tokens: Sequence[int], budget: int
) -> list[tuple[list[int], int]]:
    """First-fit decreasing: patterns of how many clips of each size share a row, and how many rows
    have each.

    Args:
        counts: clips of each size.
        tokens: of a clip of each size, falling, at most `budget`.
        budget: tokens of a row.
    """
    left, found = list(counts), []
    while any(left):
        pattern, room = [0] * len(left), budget
        for k, (count, size) in enumerate(zip(left, tokens)):
            pattern[k] = min(count, room // size)
            room -= pattern[k] * size
        times = min(count // used for count, used in zip(left, pattern) if used)
        left = [count - times * used for count, used in zip(left, pattern)]
        found.append((pattern, times))
    return found
