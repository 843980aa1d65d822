"""Which clips share a row of tokens: first-fit decreasing, epochs, and what is left unused."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packing import PackedOrder, pack_sizes

SIZES = [(17, 32, 32), (9, 32, 32), (5, 16, 48), (1, 32, 32), (1, 16, 16)]
TOKENS = dict(zip(SIZES, (20, 12, 7, 4, 1)))


def first_fit_decreasing(items, budget):
    """The textbook's, an item at a time."""
    bins = []
    for item in sorted(items, reverse=True):
        for members in bins:
            if sum(members) + item <= budget:
                members.append(item)
                break
        else:
            bins.append([item])
    return bins


@given(st.lists(st.integers(0, 30), min_size=5, max_size=5), st.integers(20, 60))
def test_patterns_are_those_of_first_fit_decreasing(counts, budget):
    tokens = list(TOKENS.values())
    found = Counter()
    for pattern, times in pack_sizes(counts, tokens, budget):
        found[tuple(pattern)] += times
    items = [size for size, count in zip(tokens, counts) for _ in range(count)]
    bins = first_fit_decreasing(items, budget)
    assert found == Counter(tuple(members.count(size) for size in tokens) for members in bins)


def order_of(counts, budget=24, rows_per_step=2, seed=0):
    ends = np.cumsum([0, *counts])
    rows = {s: np.arange(a, b) for s, a, b in zip(SIZES, ends, ends[1:]) if b > a}
    return PackedOrder(rows, TOKENS, budget, rows_per_step, seed)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 12), min_size=5, max_size=5).filter(any),
    st.integers(20, 60),
    st.integers(1, 4),
    st.integers(0, 1000),
)
def test_no_part_of_a_step_exceeds_its_rows(counts, budget, rows_per_step, step):
    order = order_of(counts, budget, rows_per_step)
    cuts = order.cuts(step, rows_per_step)
    assert cuts == sorted(cuts)
    assert (cuts[0], cuts[-1]) == (order.first(step), order.first(step + 1))
    for begin, end in zip(cuts, cuts[1:]):
        clips = [order.draw(g) for g in range(begin, end)]
        assert 0 < sum(TOKENS[size] for size, _, _ in clips) <= budget


def test_an_epoch_has_every_clip_once_and_each_its_own_order():
    order = order_of([5, 4, 7, 9, 11])
    epochs = []
    for epoch in range(3):
        numbers = range(epoch * order.num_clips, (epoch + 1) * order.num_clips)
        epochs.append([int(rows[place]) for _, rows, place in map(order.draw, numbers)])
    assert all(sorted(epoch) == list(range(36)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    together = []  # other clips share a row in other epochs
    for number, epoch in enumerate(epochs):
        cuts = [0, *np.cumsum(order._clips[order._epoch(number)[0]])]
        together.append({frozenset(epoch[a:b]) for a, b in zip(cuts, cuts[1:])})
    assert len(together[0] & together[1]) < len(together[0]) / 2


def test_the_share_that_is_not_used_is_counted():
    order = order_of([1, 0, 0, 1, 0], budget=24)
    assert (order.num_rows, order.unused) == (1, 0)
    order = order_of([3, 0, 0, 1, 2], budget=24)  # 20 + 4, 20 + 1 + 1, 20
    assert order.num_rows == 3
    assert order.unused == pytest.approx(1 - 66 / 72)


def test_a_clip_that_fills_more_than_a_row_is_refused():
    expected = r"data.packing.tokens=19 is less than the 20 of a clip of 17x32x32; use 20 or more"
    with pytest.raises(ValueError, match=expected):
        order_of([1, 1, 1, 1, 1], budget=19)


def test_a_million_clips_are_packed_at_once():
    order = order_of([250_000, 250_000, 250_000, 250_000, 3])
    assert order.num_clips == 1_000_003
    assert order.first(10**9) > 10**9
    assert order.batch(10**9) == sum(order.counts(10**9).values())
