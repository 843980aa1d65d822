import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from eval.metrics import (
    difference,
    mean_estimate,
    paired_difference,
    proportion,
    psnr,
    ssim,
    temporal_psnr,
)
from eval.tables import cell


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


def test_known_noise_has_a_known_psnr():
    a = np.full((5, 32, 32, 3), 100, np.uint8)
    signs = np.random.default_rng(0).choice([-4, 4], size=a.shape)
    assert psnr(a, (a + signs).astype(np.uint8)) == pytest.approx(20 * math.log10(255 / 4))
    noise = np.random.default_rng(1).normal(scale=10, size=(5, 64, 64, 3))
    noisy = (a[:, :1, :1] + noise).round().astype(np.uint8)
    # Rounding adds the variance of a uniform distribution, 1/12.
    expected = 10 * math.log10(255**2 / (100 + 1 / 12))
    assert psnr(np.full(noisy.shape, 100, np.uint8), noisy) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("function", [psnr, ssim, temporal_psnr])
def test_long_clips_in_pieces_give_the_same_figure(function, monkeypatch):
    a, b = pictures(3, 12, shape=(7, 24, 30, 3))
    whole = function(a, b)
    for pixels in (1, 2 * 24 * 30, 3 * 24 * 30):
        monkeypatch.setattr("eval.metrics._PIECE", pixels)
        assert function(a, b) == pytest.approx(whole, rel=1e-12)


def test_temporal_psnr_sees_flicker_and_not_what_stays():
    a, _ = pictures(4, 0, shape=(6, 16, 16, 3))
    a = a // 2 + 40
    assert temporal_psnr(a, a + np.uint8(7)) == math.inf
    pattern = np.random.default_rng(0).integers(0, 20, size=a.shape[1:]).astype(np.uint8)
    assert temporal_psnr(a, a + pattern) == math.inf
    flicker = a.copy()
    flicker[::2] += np.uint8(3)  # every change is off by 3
    assert temporal_psnr(a, flicker) == pytest.approx(20 * math.log10(255 / 3))
    assert psnr(a, flicker) == pytest.approx(20 * math.log10(255 / 3) + 10 * math.log10(2))


def test_temporal_psnr_is_that_of_frame_differences():
    a, b = pictures(6, 15, shape=(5, 20, 20, 3))
    changes = [np.diff(clip.astype(float), axis=0) for clip in (a, b)]
    expected = peak_signal_noise_ratio(*changes, data_range=255)
    assert temporal_psnr(a, b) == pytest.approx(expected, abs=1e-9)
    # Noise of its own in every frame counts twice in a difference.
    assert temporal_psnr(a, b) == pytest.approx(psnr(a, b) - 10 * math.log10(2), abs=0.2)


def test_a_single_frame_does_not_flicker():
    a, b = pictures(1, 5, shape=(1, 16, 16, 3))
    assert math.isnan(temporal_psnr(a, b))
    with pytest.raises(ValueError, match="expected two alike"):
        temporal_psnr(a, b[:, 1:])


def test_paired_differences_are_sharper_than_the_figures():
    rng = np.random.default_rng(0)
    hard = rng.normal(30, 8, size=100)  # what makes a clip hard is common to both
    first, second = hard + 1 + rng.normal(0, 0.1, 100), hard + rng.normal(0, 0.1, 100)
    gain = paired_difference(first, second)
    assert gain.value == pytest.approx(1, abs=0.05)
    assert 0.9 < gain.low < gain.high < 1.1
    apart = mean_estimate(first)
    assert apart.high - apart.low > 20 * (gain.high - gain.low)
    assert paired_difference(second, first).value == pytest.approx(-gain.value)
    assert paired_difference([], []).num == 0
    with pytest.raises(ValueError, match="expected the same clips"):
        paired_difference([1.0], [1.0, 2.0])


def test_a_single_clip_has_no_interval():
    estimate = mean_estimate([31.5])
    assert (estimate.value, estimate.num) == (31.5, 1)
    assert estimate.to_json() == {"value": 31.5, "low": None, "high": None, "num": 1}
    assert str(estimate) == "31.500 N=1"
    assert cell(estimate.to_json()) == "31.5 N=1"
    assert cell(mean_estimate([-2.0, -2.0]).to_json(), sign=True) == "-2.000 [-2.000, -2.000] N=2"
    assert cell(mean_estimate([12.25]).to_json(), sign=True, large=2) == "+12.25 N=1"
