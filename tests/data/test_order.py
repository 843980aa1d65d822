"""Which counters a step has, in every order: closed forms against counting, ranks, epochs, tokens."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.dataset import StepSampler
from data.native import balanced_batch
from data.order import NATIVE_PERIOD, BucketOrder, UniformOrder
from data.packing import PackedOrder
from data.randomness import Shuffle, permuted_index


def rows_of(counts):
    """Rows of sizes, numbered as in a manifest that has them one size after the other."""
    ends = np.cumsum([0, *counts])
    sizes = [(1 + 4 * k, 8, 8 + 8 * k) for k in range(len(counts))]
    return {size: np.arange(a, b) for size, a, b in zip(sizes, ends, ends[1:])}


def tokens_of(rows):
    return {size: (1 + (size[0] - 1) // 4) * size[1] * size[2] // 64 for size in rows}


counts_of_rows = st.lists(st.integers(1, 40), min_size=1, max_size=5)


@st.composite
def orders(draw):
    rows, seed = rows_of(draw(counts_of_rows)), draw(st.integers(0, 5))
    parts = draw(st.sampled_from([1, 2, 4]))
    kind = draw(st.sampled_from(["uniform", "given", "native", "packed", "references"]))
    if kind == "uniform":
        (size, of_it), *_ = rows.items()
        return UniformOrder(range(len(of_it)), size, parts * draw(st.integers(1, 5)), seed), parts
    if kind == "packed":
        tokens = tokens_of(rows)
        budget = max(tokens.values()) + draw(st.integers(0, 20))
        return PackedOrder(rows, tokens, budget, parts * draw(st.integers(1, 3)), seed), parts
    batches = {size: parts * draw(st.integers(1, 6)) for size in rows}
    given_shares = kind == "given" or (kind == "references" and draw(st.booleans()))
    shares = {size: float(draw(st.integers(1, 9))) for size in rows} if given_shares else None
    references = None
    if kind == "references":
        num_rows = sum(map(len, rows.values()))
        numbers = st.lists(st.integers(0, 2), min_size=num_rows, max_size=num_rows)
        references = np.array(draw(numbers))
    return BucketOrder(rows, batches, seed, shares, references=references), parts


@settings(deadline=None)
@given(orders(), st.integers(0, 10**7))
def test_steps_follow_each_other_without_gap_or_overlap(drawn, start):
    order, _ = drawn
    assert order.first(0) == 0
    for step in (*range(40), *range(start, start + 40)):
        assert order.batch(step) > 0
        assert order.first(step) + order.batch(step) == order.first(step + 1)
        assert order.batch(step) == sum(order.counts(step).values())
        sizes = Counter(order.draw(g)[0] for g in range(order.first(step), order.first(step + 1)))
        assert sizes == order.counts(step)
        assert order.packed or len(sizes) == 1, "one step has one bucket"


@settings(deadline=None)
@given(orders(), st.integers(0, 10**6))
def test_any_ranks_and_accumulation_deal_out_the_same_counters(drawn, start):
    order, parts = drawn
    expected = [list(range(order.first(s), order.first(s + 1))) for s in range(start, start + 6)]
    for world_size in [n for n in (1, 2, 4) if parts % n == 0]:
        grad_accum = parts // world_size
        ranks = [
            list(islice(StepSampler(order, grad_accum, rank, world_size, start), 6 * grad_accum))
            for rank in range(world_size)
        ]
        for k, numbers in enumerate(expected):
            micro = range(k * grad_accum, (k + 1) * grad_accum)
            assert [g for m in micro for rank in ranks for g in rank[m]] == numbers


@settings(deadline=None, max_examples=50)
@given(orders())
def test_every_row_is_seen_once_in_each_epoch_of_its_bucket(drawn):
    order, _ = drawn
    seen = {}
    for g in range(3 * sum(map(len, order.rows.values())) + order.first(3)):
        size, rows, place = order.draw(g)
        seen.setdefault((size, *rows), []).append(rows[place])
    for (_, *rows), found in seen.items():
        n = len(rows)
        for first in range(0, len(found) - n + 1, n):
            assert sorted(found[first : first + n]) == list(rows)


@settings(deadline=None, max_examples=50)
@given(orders(), st.integers(0, 10**9))
def test_a_sample_depends_on_no_other(drawn, g):
    order, _ = drawn
    size, rows, place = order.draw(g)
    for other in (g + 1, g // 2, 0):
        order.draw(other)
    again_size, again_rows, again = order.draw(g)
    assert (again_size, rows[place]) == (size, again_rows[again])


@given(st.integers(0, 9), st.integers(1, 30), st.lists(st.integers(0, 200), max_size=20))
def test_a_shuffle_is_a_permuted_index(seed, n, draws):
    shuffle = Shuffle(seed, n)
    assert [shuffle(g) for g in draws] == [permuted_index(seed, g, n) for g in draws]


# Native buckets: tokens and shares


@given(st.integers(1, 64), st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([1, 2, 8]))
def test_steps_carry_about_the_same_tokens(batch, base, tokens, multiple):
    budget = base * batch
    found = balanced_batch(budget, tokens, multiple)
    assert found % multiple == 0
    assert found >= multiple
    assert abs(found * tokens - budget) <= tokens * multiple / 2 or found == multiple


@settings(deadline=None)
@given(counts_of_rows, st.lists(st.integers(1, 9), min_size=5, max_size=5), st.integers(0, 3))
def test_an_epoch_of_native_buckets_sees_each_row_about_once(counts, batches, seed):
    rows = rows_of(counts)
    order = BucketOrder(rows, dict(zip(rows, batches)), seed)
    exact = sum(len(of_it) / order.batches[size] for size, of_it in rows.items())
    for size, share in ((size, order.sequence.share(size)) for size in rows):
        # A step of the bucket shows batch of its rows: in an epoch's steps, all of them once.
        assert share * exact * order.batches[size] == pytest.approx(len(rows[size]), rel=1e-3)


def test_a_tiny_bucket_among_a_million_rows_neither_starves_nor_repeats():
    rows = {(17, 64, 64): np.arange(1_000_000), (17, 96, 32): np.arange(3)}
    order = BucketOrder(rows, {(17, 64, 64): 8, (17, 96, 32): 8}, seed=0)
    steps = len(order.sequence.table)
    assert steps == NATIVE_PERIOD
    large, small = (order.mean_counts()[size] / len(rows[size]) for size in rows)  # epochs a step
    assert 0.5 < small / large < 2


def test_steps_that_cannot_be_dealt_out_are_refused():
    rows = rows_of([10, 10])
    order = BucketOrder(rows, {(1, 8, 8): 4, (5, 8, 16): 6}, 0, advice="set this to {}")
    order.check(2, 1)
    expected = (
        r"^bucket 5x8x16: its batch of 6 does not divide into 2 processes x .*=2; set this to 4$"
    )
    with pytest.raises(ValueError, match=expected):
        order.check(2, 2)
    with pytest.raises(ValueError, match=expected):
        StepSampler(order, 2, 0, 2)


def test_rows_with_equally_many_references_share_a_step_and_all_are_seen_alike():
    rows = rows_of([60, 30])
    references = np.array(([0, 0, 1, 2] * 23)[:90])
    for shares in (None, dict(zip(rows, (1.0, 2.5)))):
        order = BucketOrder(rows, dict.fromkeys(rows, 4), 0, shares, references=references)
        seen = Counter()
        for step in range(6000):
            numbers = range(order.first(step), order.first(step + 1))
            drawn = [(size, int(found[place])) for size, found, place in map(order.draw, numbers)]
            assert len({references[row] for _, row in drawn}) == 1
            seen.update(drawn)
        assert len(seen) == 90
        for size in rows:
            counts = [number for (of, _), number in seen.items() if of == size]
            assert max(counts) - min(counts) <= 4
        if shares is not None:
            assert order.share(next(iter(rows))) == pytest.approx(1 / 3.5, abs=1e-4)
        whole = sum(order.share(size, count) for size in rows for count in range(3))
        assert whole == pytest.approx(1)
