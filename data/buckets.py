"""Buckets: the sizes that the batches of one run have, a size a step, images among them.

Which bucket a step has is a function of (seed, step) alone, so all ranks and micro-batches of a
step agree, and a resumed run needs only its step. Which rows a bucket has follows from the manifest's
columns, without opening a file: of sizes that are given, a row may have several (`bucket_rows`); of
those that are made after the rows (data/native.py), each row has one (`assign_rows`).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np

from data.manifest import Manifest
from data.randomness import stream_seed

Size = tuple[int, int, int]  # num_frames, height, width in pixels
Bucket = tuple[int, ...]  # a size, and what else sets its clips apart

# Shares whose common denominator is larger are rounded to multiples of 1 / MAX_PERIOD.
MAX_PERIOD = 2**16


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

    Attributes:
        buckets: in their order; slots: how many steps of a period each has; table: which one each
            step of a period has, (period,).

    Args:
        shares: of the steps, by bucket; positive, relative to each other. Their order says nothing.
        seed: which of equally urgent buckets comes first.
        max_period: steps of a period at most, to whose multiples shares are rounded.
    Raises:
        ValueError: there is no bucket, or a share is not positive.
    """

    def __init__(
        self,
        shares: Mapping[Bucket, float | Fraction] | Mapping[Size, float],
        seed: int,
        max_period: int = MAX_PERIOD,
    ) -> None:
        if not shares or not all(0 < share < math.inf for share in shares.values()):
            raise ValueError(f"expected at least one bucket and positive shares, got {shares}")
        self.buckets: list[Bucket] = sorted(
            shares, key=lambda bucket: stream_seed(seed, "bucket-order", *bucket)
        )
        by_bucket: dict[Bucket, float | Fraction] = {**shares}
        self.slots = _whole_numbers([by_bucket[bucket] for bucket in self.buckets], max_period)
        self.table = _fair_schedule(self.slots)
        self._earlier = np.empty_like(self.table)
        for bucket, slots in enumerate(self.slots):
            self._earlier[self.table == bucket] = np.arange(slots)

    def at(self, step: int) -> tuple[Bucket, int]:
        """The bucket of a step, and how many earlier steps had the same one; step >= 0."""
        periods, slot = divmod(step, len(self.table))
        bucket = int(self.table[slot])
        return self.buckets[bucket], periods * self.slots[bucket] + int(self._earlier[slot])

    def share(self, bucket: Bucket) -> float:
        """Of all steps, in (0, 1]."""
        return self.slots[self.buckets.index(bucket)] / len(self.table)


def _whole_numbers(shares: Sequence[float | Fraction], max_period: int) -> list[int]:
    """Whole numbers in the ratio of the shares, as they are written in decimals."""
    exact = [Fraction(str(share)) for share in shares]
    scale = math.lcm(*(share.denominator for share in exact))
    numbers = [int(share * scale) for share in exact]
    common = math.gcd(*numbers)
    numbers = [number // common for number in numbers]
    total = sum(numbers)
    if total <= max_period:
        return numbers
    return [max(1, round(Fraction(number * max_period, total))) for number in numbers]


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
    images, seconds = image_rows(manifest), row_seconds(manifest)
    found = []
    for size in sizes:
        moving = size[0] > 1
        excluded = images & moving
        short = ~excluded & moving & ~_has_room(seconds, size[0], fps)
        rows = np.flatnonzero(~excluded & ~short)
        bucket = BucketRows(size, rows, len(images), int(short.sum()), int(excluded.sum()))
        if not len(rows):
            raise ValueError(
                f"{manifest.path} at {fps:g} fps has nothing for {bucket.left_out()}; add longer "
                "videos, or ask for fewer frames"
            )
        found.append(bucket)
    return found


@dataclass(frozen=True)
class Assignment:
    """The one bucket of each row.

    Attributes:
        sizes: of the buckets.
        of_row: the index in `sizes` of each row's bucket, (n,) int64; -1 for none.
        left_out: how many rows have none, by the reason.
    """

    sizes: list[Size]
    of_row: np.ndarray
    left_out: dict[str, int]

    def rows(self) -> dict[Size, np.ndarray]:
        """The rows of each bucket that has any, ascending."""
        found = {size: np.flatnonzero(self.of_row == k) for k, size in enumerate(self.sizes)}
        return {size: rows for size, rows in found.items() if len(rows)}


def assign_rows(manifest: Manifest, sizes: Sequence[Size], fps: float) -> Assignment:
    """The bucket of each row: the longest that it has room for at `fps`, of these the one whose
    aspect is nearest to the row's own (in ratio), by the manifest's columns. Images have one frame.

    Raises:
        ValueError: no row has a bucket.
    """
    images, seconds, aspects = (f(manifest) for f in (image_rows, row_seconds, row_aspects))
    lengths = np.array(sorted({size[0] for size in sizes}))
    fits = np.stack([_has_room(seconds, int(n), fps) & (~images | (n == 1)) for n in lengths])
    known = images | np.isfinite(seconds) | (lengths[-1] == 1)
    fits[0] |= lengths[0] == 1  # one frame is in every row
    longest = len(lengths) - 1 - np.argmax(fits[::-1], axis=0)
    of_row = np.full(len(images), -1, np.int64)
    usable = fits.any(axis=0) & known & ~np.isnan(aspects)
    for number, length in enumerate(lengths):
        buckets = [k for k, size in enumerate(sizes) if size[0] == length]
        rows = np.flatnonzero(usable & (longest == number))
        logs = np.log([sizes[k][2] / sizes[k][1] for k in buckets])
        distance = np.abs(np.log(aspects[rows])[:, None] - logs)
        of_row[rows] = np.array(buckets)[distance.argmin(axis=1)]
    shortest = f"are too short for {lengths[0]} frames at {fps:g} fps"
    reasons = {
        "have no width and height in the manifest": np.isnan(aspects),
        "have no duration in the manifest": ~known,
        "are images, for which num_frames needs a 1": images,
        shortest: np.ones_like(images),
    }
    left, left_out = of_row < 0, {}
    for reason, applies in reasons.items():
        if (left & applies).any():
            left_out[reason] = int((left & applies).sum())
        left = left & ~applies
    if (of_row < 0).all():
        why = "; ".join(f"{count:,} {reason}" for reason, count in left_out.items())
        raise ValueError(
            f"{manifest.path}: none of its {len(images):,} rows has a bucket: {why}. `zoetrope data "
            "check --write` and `zoetrope data ingest` measure width, height and duration"
        )
    return Assignment(list(sizes), of_row, left_out)


class SizesOfRun(Protocol):
    """What `row_sizes` asks of a run's data section."""

    @property
    def sizes(self) -> Sequence[Size]: ...
    @property
    def fps(self) -> float: ...
    @property
    def native(self) -> object | None: ...


def row_sizes(manifest: Manifest, data: SizesOfRun) -> np.ndarray:
    """The index in `data.sizes` of the one size that training reads each row in, (n,) int64; -1 for
    rows that it does not read.

    Raises:
        ValueError: rows may have several sizes, as those of data.buckets may.
    """
    if data.native is not None:
        return assign_rows(manifest, data.sizes, data.fps).of_row
    if len(data.sizes) > 1:
        raise ValueError(
            "data.buckets may draw a row in several sizes; use data.native, where each row has one"
        )
    (bucket,) = bucket_rows(manifest, data.sizes, data.fps)
    of_row = np.full(len(manifest.rows), -1, np.int64)
    of_row[bucket.rows] = 0
    return of_row


def _has_room(seconds: np.ndarray, num_frames: int, fps: float) -> np.ndarray:
    """As clip_times: the last frame must appear before the piece stops."""
    return seconds - (num_frames - 1) / fps > 1e-6


def image_rows(manifest: Manifest) -> np.ndarray:
    """Which rows are still images, bool (n,): by the ending of the path, or a num_frames of 1."""
    return manifest.images | (manifest.column("num_frames") == 1)


def row_seconds(manifest: Manifest) -> np.ndarray:
    """At most how long each row's piece is, by the manifest alone, (n,); infinite where that says
    nothing.

    From start and end, and the measured duration, or num_frames / fps where that is more: columns
    are rounded. Whether they are of the file or of the piece is not known, so that nothing is
    taken off for `start`.
    """
    duration, num_frames, fps = (_positive(manifest, n) for n in ("duration", "num_frames", "fps"))
    measured = np.fmax(duration, num_frames / fps)
    piece = manifest.column("end") - np.nan_to_num(manifest.column("start"))
    shortest = np.fmin(piece, measured)
    return np.where(np.isnan(shortest), np.inf, shortest)


def row_aspects(manifest: Manifest) -> np.ndarray:
    """Width / height of each row's picture as it is shown, after its crop, (n,); NaN if not known."""
    sides = [
        np.where(np.isnan(crop), _positive(manifest, side), crop)
        for side in ("width", "height")
        for crop in (_positive(manifest, f"crop_{side}"),)
    ]
    pixel_aspect = _positive(manifest, "pixel_aspect")
    return sides[0] / sides[1] * np.where(np.isnan(pixel_aspect), 1.0, pixel_aspect)


def _positive(manifest: Manifest, column: str) -> np.ndarray:
    """A column, NaN where it is not positive."""
    values = manifest.column(column)
    return np.where(values > 0, values, np.nan)
