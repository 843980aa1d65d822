"""The histograms of the ingest's report."""

import re

import numpy as np
import pytest

from data.charts import axis_of, histogram
from data.ingest_report import _length


def bars(svg, colour="#c3c8d0"):
    return [float(x) for x in re.findall(rf'<rect x="([\d.]+)"[^>]*{colour}', svg)]


def test_the_axis_covers_the_values_and_no_more():
    values = [0.1, 0.2, 0.3, *[0.15] * 500, 0.9]
    svg = histogram("motion", values, values[:2], {"min_motion": 0.2, "max_motion": 2})
    assert ">0.1<" in svg
    assert ">0.9<" in svg  # the maximum, not a percentile
    assert "log scale" not in svg
    assert "min_motion 0.2, max_motion 2 is beyond" in svg
    assert svg.count("#c62b22") == 2  # one line, and the words
    assert min(bars(svg)) == 8
    assert max(bars(svg)) > 310


def test_more_than_two_decades_are_on_a_log_scale_with_zeros_apart():
    values = np.array([0, 0, 0.001, 0.01, 1.0])
    svg = histogram("x", values.tolist(), [], {"low": 0.0005, "mid": 0.1, "under": -1})
    assert "log scale" in svg
    assert "0 | 0.001" in svg
    assert "low 0.0005, mid 0.1, under -1 is below" in svg
    assert len(bars(svg)) == 4
    axis = axis_of(values)
    places = axis.places(values)
    assert places[0] == places[1] == 0
    assert np.allclose(np.diff(places[2:]), [37 / 120, 37 / 60])
    assert 0 < axis.place_of_mark(0.0005, 0.0) < places[2]


@pytest.mark.parametrize("value", [0.0, 25.0, -3.0])
def test_one_value_has_an_axis(value):
    svg = histogram("x", [value] * 3, [], {"limit": value})
    assert len(bars(svg)) == 1
    assert f"limit {value:g}" in svg
    assert "beyond" not in svg


def test_every_value_is_in_a_bar():
    rng = np.random.default_rng(0)
    for spread in (0.1, 1.0, 5.0):
        values = np.exp(spread * rng.normal(size=1000))
        axis = axis_of(values)
        places = axis.places(values)
        assert places.min() >= -1e-9
        assert places.max() <= 1 + 1e-9


@pytest.mark.parametrize(("seconds", "words"), [(0, "0.0 s"), (90, "1.5 min"), (5400, "1.5 h")])
def test_lengths_are_in_words(seconds, words):
    assert _length(seconds) == words
