"""Buckets: the sizes that the batches of one run have, a size a step, images among them.

Which bucket a step has is a function of (seed, step) alone, so all ranks and micro-batches of a
step agree, and a resumed run needs only its step.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from data.images import is_image_path
from data.manifest import Manifest, Row
from data.randomness import stream_seed

Size = tuple[int, int, int]  # num_frames, height, width in pixels

# Shares whose common denominator is larger are rounded to multiples of 1 / _MAX_PERIOD.
_MAX_PERIOD = 2**16


def size_name(size: Size) -> str:
    """Such as "17x64x64": frames, height, width."""
    return "x".join(map(str, size))


class BucketSequence:
    """The bucket of every step: a schedule of one period, repeated for ever.

    After any number of steps each bucket has had its share of them to within one step, where
    independent draws would be off by the square root of their number, and a low-discrepancy
    sequence by its logarithm. The schedule is that of a fairly shared processor (Baruah et al.
    1996): the i-th step of a bucket with w of P steps falls into [floor(i P / w),
    ceil((i + 1) P / w)), earliest end first. Being a table, it also says how many steps a bucket
    had before any step, so that nothing need be counted along.

    Args:
        shares: of the steps, by size; positive, relative to each other. Their order says nothing.
        seed: which of equally urgent buckets comes first.
    Raises:
        ValueError: there is no bucket, or a share is not positive.
    """

    def __init__(self, shares: Mapping[Size, float], seed: int) -> None:
        if not shares or not all(0 < share < math.inf for share in shares.values()):
            raise ValueError(f"expected at least one bucket and positive shares, got {shares}")
        self.sizes = sorted(shares, key=lambda size: stream_seed(seed, "bucket-order", *size))
        self._slots = _whole_numbers([shares[size] for size in self.sizes])
        self._table = _fair_schedule(self._slots)
        self._earlier = np.empty_like(self._table)
        for bucket, slots in enumerate(self._slots):
            self._earlier[self._table == bucket] = np.arange(slots)

    def at(self, step: int) -> tuple[Size, int]:
        """The bucket of a step, and how many earlier steps had the same one; step >= 0."""
        periods, slot = divmod(step, len(self._table))
        bucket = int(self._table[slot])
        return self.sizes[bucket], periods * self._slots[bucket] + int(self._earlier[slot])

    def share(self, size: Size) -> float:
        """Of all steps, in (0, 1]."""
        return self._slots[self.sizes.index(size)] / len(self._table)


def _whole_numbers(shares: Sequence[float]) -> list[int]:
    """Whole numbers in the ratio of the shares, as they are written in decimals."""
    exact = [Fraction(str(share)) for share in shares]
    scale = math.lcm(*(share.denominator for share in exact))
    numbers = [int(share * scale) for share in exact]
    common = math.gcd(*numbers)
    numbers = [number // common for number in numbers]
    total = sum(numbers)
    if total <= _MAX_PERIOD:
        return numbers
    return [max(1, round(Fraction(number * _MAX_PERIOD, total))) for number in numbers]


def _fair_schedule(slots: Sequence[int]) -> np.ndarray:
    """Which bucket each step of a period has, (sum(slots),): bucket k has slots[k] of them."""
    period = sum(slots)
    windows = sorted(
        (i * period // count, -(-(i + 1) * period // count), bucket)
        for bucket, count in enumerate(slots)
        for i in range(count)
    )
    schedule = np.empty(period, np.int64)
    open_windows: list[tuple[int, int]] = []  # end, bucket
    opened = 0
    for slot in range(period):
        while opened < period and windows[opened][0] <= slot:
            heapq.heappush(open_windows, windows[opened][1:])
            opened += 1
        _, schedule[slot] = heapq.heappop(open_windows)
    return schedule


@dataclass(frozen=True)
class BucketRows:
    """The rows that a bucket draws from.

    Attributes:
        size: the bucket's.
        rows: their indices in the manifest, ascending, (n,) int64, n > 0.
        num_rows: of the whole manifest.
        num_short: rows left out because the manifest itself says that they are too short.
        num_images: rows left out because they are images, and the bucket has several frames.
    """

    size: Size
    rows: np.ndarray
    num_rows: int
    num_short: int
    num_images: int

    def left_out(self) -> str:
        """Why rows are left out, in one line; empty where none are."""
        counts = [(self.num_short, "are too short"), (self.num_images, "are images")]
        first, *rest = [(n, why) for n, why in counts if n] or [(0, "")]
        if not first[0]:
            return ""
        more = "".join(f", {n:,} {why}" for n, why in rest)
        return f"bucket {size_name(self.size)}: {first[0]:,} of {self.num_rows:,} rows {first[1]}{more}"


def bucket_rows(manifest: Manifest, sizes: Sequence[Size], fps: float) -> list[BucketRows]:
    """Which rows each bucket draws from, in the order of `sizes`.

    A bucket of one frame takes every row, images and videos alike; one of more frames those that
    are not images and that the manifest does not call too short at `fps`.

    Raises:
        ValueError: a bucket is left without a row.
    """
    images = np.array([is_image(row) for row in manifest.rows])
    room = np.array([seconds_of(row) for row in manifest.rows])
    found = []
    for size in sizes:
        moving = size[0] > 1
        excluded = images & moving
        # As clip_times: the last frame must appear before the piece stops.
        short = ~excluded & moving & (room - (size[0] - 1) / fps <= 1e-6)
        rows = np.flatnonzero(~excluded & ~short)
        bucket = BucketRows(size, rows, len(images), int(short.sum()), int(excluded.sum()))
        if not len(rows):
            raise ValueError(
                f"{manifest.path} at {fps:g} fps has nothing for {bucket.left_out()}; add longer "
                "videos, or ask for fewer frames"
            )
        found.append(bucket)
    return found


def is_image(row: Row) -> bool:
    """Whether a row is a still image: by the ending of its path, or a measured num_frames of 1."""
    return is_image_path(row.path) or _measured(row, "num_frames") == 1


def seconds_of(row: Row) -> float:
    """At most how long a row's piece is, by the manifest alone; infinite where that says nothing.

    From start and end, and the measured duration, or num_frames / fps where that is more: columns
    are rounded. Whether they are of the file or of the piece is not known, so that nothing is
    taken off for `start`.
    """
    start = row.start or 0.0
    piece = math.inf if row.end is None else row.end - start
    duration, num_frames, fps = (_measured(row, key) for key in ("duration", "num_frames", "fps"))
    counted = num_frames / fps if num_frames and fps else 0.0
    return min(piece, max(duration or 0.0, counted) or math.inf)


def _measured(row: Row, column: str) -> float | None:
    """A positive number of a column that the manifest may have; None for anything else."""
    value = (row.model_extra or {}).get(column)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        return None
    return float(value)
