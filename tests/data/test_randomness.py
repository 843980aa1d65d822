import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.randomness import generator, numpy_generator, permuted_index, stream_seed

counters = st.lists(st.one_of(st.integers(), st.text(max_size=5)), max_size=4)


@given(st.integers(), counters)
def test_a_seed_is_63_bits(seed, values):
    assert 0 <= stream_seed(seed, *values) < 2**63


@given(st.integers(), counters, st.integers(), counters)
def test_different_names_are_different_streams(seed_a, a, seed_b, b):
    same = stream_seed(seed_a, *a) == stream_seed(seed_b, *b)
    assert same == ((seed_a, *a) == (seed_b, *b))


def test_what_could_be_confused_is_not():
    seeds = {
        stream_seed(1, 23),
        stream_seed(12, 3),
        stream_seed(123),
        stream_seed(1, "23"),
        stream_seed(1, 2, 3),
        stream_seed(1, "2", 3),
        stream_seed(1, "", 23),
    }
    assert len(seeds) == 7


def test_streams_never_change():
    # Changing these changes every run that is resumed and every world that is rendered again.
    assert stream_seed(0) == 4774516902939907285
    assert stream_seed(1, 2, "a") == 7626855555217695314


def test_integers_of_numpy_are_integers():
    assert stream_seed(np.int64(5), np.int32(7)) == stream_seed(5, 7)


@pytest.mark.parametrize("value", [1.0, None, b"x"])
def test_other_types_are_refused(value):
    with pytest.raises(TypeError, match="integers and strings"):
        stream_seed(0, value)


def test_generators_repeat_and_differ():
    assert torch.equal(
        torch.randn(8, generator=generator(3, "t", 5)),
        torch.randn(8, generator=generator(3, "t", 5)),
    )
    assert not torch.equal(
        torch.randn(8, generator=generator(3, "t", 5)),
        torch.randn(8, generator=generator(3, "t", 6)),
    )
    assert numpy_generator(3, 5).random() == numpy_generator(3, 5).random()
    assert numpy_generator(3, 5).random() != numpy_generator(3, 6).random()


def test_neighbouring_streams_are_unrelated():
    draws = np.array([numpy_generator(0, g).random() for g in range(2000)])
    assert abs(draws.mean() - 0.5) < 0.03
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.1


@settings(max_examples=30)
@given(st.integers(0, 2**40), st.integers(1, 50), st.integers(0, 5))
def test_every_epoch_visits_every_item_once(seed, n, epoch):
    visited = [permuted_index(seed, g, n) for g in range(epoch * n, (epoch + 1) * n)]
    assert sorted(visited) == list(range(n))


def test_epochs_and_seeds_are_shuffled_differently():
    def order(seed, epoch):
        return tuple(permuted_index(seed, g, 100) for g in range(epoch * 100, epoch * 100 + 100))

    assert len({order(0, 0), order(0, 1), order(1, 0), tuple(range(100))}) == 4


@pytest.mark.parametrize(("g", "n"), [(-1, 5), (0, 0)])
def test_out_of_range_is_refused(g, n):
    with pytest.raises(ValueError, match="n >= 1 and g >= 0"):
        permuted_index(0, g, n)


def test_rendering_workers_need_no_torch():
    code = "import sys, data.randomness, data.video; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
