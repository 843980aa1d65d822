"""In which sizes a run sees its clips: the order of its samples, and what that is said to be."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from data.buckets import Size, assign_rows, bucket_rows, size_name
from data.manifest import Manifest
from data.native import balanced_batch, waste_of
from data.order import BucketOrder, SampleOrder, UniformOrder
from data.packing import PackedOrder
from train.config import RunConfig

NumTokens = Callable[[Size], int]


def sample_order(manifest: Manifest, config: RunConfig, num_tokens: NumTokens) -> SampleOrder:
    """Which samples each step of a run has.

    Args:
        num_tokens: of a clip of a size.
    Raises:
        ValueError: a bucket has no row, or no row has a bucket; or a clip is larger than a packed row.
    """
    data, seed, batch_size = config.data, config.seed, config.train.batch_size
    references = manifest.num_references if config.gives_references else None
    if references is not None and len(references) and not references.any():
        raise ValueError(
            f"recipe.tasks.references is above 0, but no row of {manifest.path} has reference "
            "pictures; add them (docs/given.md), or leave it out"
        )
    if data.buckets:
        rows = {bucket.size: bucket.rows for bucket in bucket_rows(manifest, data.sizes, data.fps)}
        return BucketOrder(
            *(rows, given_batches(config), seed, data.shares),
            advice="set train.batch_size, or that of data.buckets, to a multiple of {}",
            references=references,
        )
    if data.native is None:
        found = bucket_rows(manifest, [data.base_size], data.fps) if manifest.rows else []
        rows = found[0].rows if found else ()  # a plan counts without a manifest
        size = data.base_size
        if references is None or not references.any():
            return UniformOrder(rows, size, batch_size, seed)
        return BucketOrder(
            *({size: np.asarray(rows)}, {size: batch_size}, seed),
            advice="set train.batch_size to a multiple of {}",
            references=references,
        )
    rows = assign_rows(manifest, data.sizes, data.fps).rows()
    if data.packing is not None:
        tokens = {size: num_tokens(size) for size in rows}
        return PackedOrder(rows, tokens, data.packing.tokens, batch_size, seed)
    return BucketOrder(
        *(rows, native_batches(config, list(rows), num_tokens), seed),
        advice="set data.native.batch_multiple to a multiple of {}",
        references=references,
    )


def given_batches(config: RunConfig) -> dict[Size, int]:
    """Clips per step, of each of data.buckets."""
    return {b.size: b.batch_size or config.train.batch_size for b in config.data.buckets}


def native_batches(config: RunConfig, sizes: list[Size], num_tokens: NumTokens) -> dict[Size, int]:
    """Clips per step, of each of data.native's sizes: about the same tokens for all."""
    assert config.data.native is not None
    budget = num_tokens(config.data.base_size) * config.train.batch_size
    multiple = config.data.native.batch_multiple
    return {size: balanced_batch(budget, num_tokens(size), multiple) for size in sizes}


def expected_counts(config: RunConfig, num_tokens: NumTokens) -> dict[Size, float]:
    """How many clips of each size the mean step has, where the manifest is not to be read: those of
    data.native are taken to be equally frequent, in steps or, packed, in clips."""
    data, batch_size = config.data, config.train.batch_size
    if data.packing is not None:
        tokens = sum(map(num_tokens, data.sizes))
        return dict.fromkeys(data.sizes, batch_size * data.packing.tokens / tokens)
    if data.native is not None:
        batches = native_batches(config, data.sizes, num_tokens)
        return {size: batch / len(batches) for size, batch in batches.items()}
    if not data.buckets:
        return {data.base_size: float(batch_size)}
    total = sum(data.shares.values())
    return {size: data.shares[size] / total * n for size, n in given_batches(config).items()}


def heaviest(config: RunConfig, num_tokens: NumTokens) -> tuple[Size, float]:
    """The size of the steps that take the most memory, and how many of its clips there are in them for
    each of train.batch_size. Packed rows are taken for clips of data's own size."""
    data, batch_size = config.data, config.train.batch_size
    if data.packing is not None:
        return data.base_size, data.packing.tokens / num_tokens(data.base_size)
    if data.native is not None:
        batches = native_batches(config, data.sizes, num_tokens)
        size = max(batches, key=lambda size: (batches[size] * num_tokens(size), math.prod(size)))
        return size, batches[size] / batch_size
    batches = given_batches(config) or {data.base_size: batch_size}
    size = max(batches, key=lambda size: batches[size] * math.prod(size))
    return size, batches[size] / batch_size


def left_out(manifest: Manifest, config: RunConfig) -> list[str]:
    """Which rows no bucket has, or a bucket has not: a line each, with the reasons.

    Raises:
        ValueError: a bucket has no row, or no row has a bucket.
    """
    data = config.data
    if data.native is None:
        found = bucket_rows(manifest, data.sizes, data.fps)
        return [bucket.left_out() for bucket in found if bucket.left_out()]
    assigned = assign_rows(manifest, data.sizes, data.fps)
    counts = assigned.left_out
    if not counts:
        return []
    reasons = "; ".join(f"{count:,} {reason}" for reason, count in counts.items())
    total, num_rows = sum(counts.values()), len(assigned.of_row)
    return [f"{total:,} of {num_rows:,} rows are in no bucket: {reasons}"]


def describe_sizes(
    manifest: Manifest, config: RunConfig, order: SampleOrder, num_tokens: NumTokens
) -> list[str]:
    """A line a bucket: its share of the steps, its batch and tokens, its rows and how often a run sees
    each of them; or, packed, a line a size. Then what is wasted. For
    every run, which rows are left out.

    Raises:
        ValueError: as `sample_order`.
    """
    data, steps = config.data, config.train.steps
    missing = [f"{'left out':28}{line}" for line in left_out(manifest, config)]
    if isinstance(order, UniformOrder):
        return missing
    means, lines = order.mean_counts(), []
    clips = sum(means.values())
    for size in [size for size in data.sizes if size in means]:
        count, tokens = len(order.rows[size]), num_tokens(size)
        epochs = steps * means[size] / count
        about = f"{count:,} rows, {epochs:,.1f} epochs"
        if isinstance(order, BucketOrder):
            name, share = f"bucket {size_name(size)}", order.share(size)
            batch = order.batches[size]
            what = f"of steps; {batch:,} clips, {batch * tokens:,} tokens; {about}"
            if config.gives_references:
                counts = np.unique(manifest.num_references[order.rows[size]]).tolist()
                shares = [f"{order.share(size, n):.1%} with {n}" for n in counts]
                what += f"; references: {', '.join(shares)}"
                missing += _few_rows(manifest, order, size, counts)
        else:
            name, share = f"size {size_name(size)}", means[size] / clips
            what = f"of clips; {tokens:,} tokens; {about}"
        lines.append(f"{name:28}{share:>16.1%}  ({what})")
    if isinstance(order, PackedOrder):
        lines.append(
            f"{'packing':28}{1 - order.unused:>16.1%}  (of a row's {order.budget:,} tokens are used, "
            f"{order.unused:.1%} are not; {clips:,.1f} clips a step, {order.num_clips:,} in "
            f"{order.num_rows:,} rows an epoch)"
        )
    lines += describe_waste(manifest, config, order)
    return lines + missing


def _few_rows(manifest: Manifest, order: BucketOrder, size: Size, counts: list[int]) -> list[str]:
    """What to say of rows with so many references that a batch has some of them several times."""
    numbers = manifest.num_references[order.rows[size]]
    few = [(n, rows) for n in counts if (rows := int((numbers == n).sum())) < order.batches[size]]
    return [
        f"{'few rows':28}{rows:,} rows of {size_name(size)} have {n} references, and a batch has "
        f"{order.batches[size]:,} clips: it repeats them"
        for n, rows in few
    ]


def describe_waste(manifest: Manifest, config: RunConfig, order: SampleOrder) -> list[str]:
    """What the mean sample does not show of its row, where the manifest says how large rows are."""
    waste = waste_of(manifest, order.rows, order.mean_counts(), config.data.fps)
    cut = {"of pictures": waste.pixels, "of videos' seconds, outside one clip": waste.seconds}
    return [
        f"{'cut off':28}{share:>16.1%}  ({text})"
        for text, share in cut.items()
        if not math.isnan(share)
    ]
