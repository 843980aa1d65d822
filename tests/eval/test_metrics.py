import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from eval.metrics import difference, mean_estimate, proportion, psnr, ssim


def pictures(seed, noise, shape=(3, 24, 30, 3)):
    rng = np.random.default_rng(seed)
    rows = np.linspace(0, 6, shape[1])[None, :, None, None]
    a = 128 + 90 * np.sin(rows + rng.uniform(0, 6, size=(shape[0], 1, shape[2], 3)))
    b = a + rng.normal(scale=noise, size=shape)
    return a.clip(0, 255).astype(np.uint8), b.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("noise", [1.0, 10.0, 80.0])
def test_psnr_and_ssim_agree_with_scikit_image(noise):
    a, b = pictures(int(noise), noise)
    assert psnr(a, b) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=255), abs=1e-9)
    reference = [
        structural_similarity(
            x,
            y,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
            channel_axis=-1,
        )
        for x, y in zip(a, b)
    ]
    assert ssim(a, b) == pytest.approx(np.mean(reference), abs=1e-9)


def test_equal_pictures_are_perfect_and_different_shapes_are_refused():
    a, b = pictures(0, 5)
    assert psnr(a, a) == math.inf
    assert ssim(a, a) == pytest.approx(1)
    assert ssim(a, b) == pytest.approx(ssim(b, a))
    with pytest.raises(ValueError, match="expected two alike"):
        psnr(a, b[:, 1:])
    with pytest.raises(ValueError, match="11x11"):
        ssim(a[:, :8], b[:, :8])


@pytest.mark.parametrize("kind", ["proportion", "mean"])
def test_the_interval_covers_the_truth_95_percent_of_the_time(kind):
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        if kind == "proportion":
            estimate = proportion(rng.random(200) < 0.7)
            covered += estimate.low <= 0.7 <= estimate.high
        else:
            estimate = mean_estimate(rng.exponential(2.0, size=60))
            covered += estimate.low <= 2.0 <= estimate.high
    # 400 trials of 95% have a standard deviation of 1.1 points; the percentile bootstrap of a
    # skewed mean is known to fall a little short.
    assert 0.90 <= covered / 400 <= 0.985


def test_more_clips_make_a_narrower_interval():
    few, many = proportion([True, False] * 25), proportion([True, False] * 450)
    assert few.value == many.value == 0.5
    assert many.high - many.low == pytest.approx((few.high - few.low) / math.sqrt(18), rel=0.15)


def test_a_difference_that_all_clips_share_is_not_certain_either():
    same = difference([True] * 300, [True] * 300)
    assert same.value == 0
    assert -0.02 < same.low < 0 < same.high < 0.02
    mixed = difference([True] * 10, [True] * 5 + [False] * 5)
    assert mixed.value == 0.5
    assert 0 < mixed.low < 0.5 < mixed.high < 1


def test_unanimous_outcomes_are_not_certain():
    all_right, all_wrong = proportion([True] * 200), proportion([False] * 200)
    assert all_right.value == all_right.high == 1
    assert all_right.low == pytest.approx(0.9817, abs=1e-4)  # Clopper-Pearson
    assert all_wrong.value == all_wrong.low == 0
    assert all_wrong.high == pytest.approx(1 - all_right.low)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_a_proportion_lies_in_its_interval_and_comes_back_the_same(outcomes):
    estimate = proportion(outcomes)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert estimate == proportion(outcomes)
    assert estimate.num == len(outcomes)


def test_nothing_measured_is_no_number():
    for estimate in (proportion([]), mean_estimate([])):
        assert estimate.num == 0
        assert str(estimate) == "n/a"
        assert json.loads(json.dumps(estimate.to_json()))["value"] is None


def test_a_mean_over_nan_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        mean_estimate([1.0, math.nan])
