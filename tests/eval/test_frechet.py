import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from eval.frechet import Extractor, frechet_distance, frechet_estimate


def exact_sample(mean, covariance, num, seed):
    """Rows whose mean and unbiased covariance are exactly these."""
    dim = len(mean)
    rows = np.random.default_rng(seed).normal(size=(num, dim))
    rows -= rows.mean(axis=0)
    rows = rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows.T).reshape(dim, dim)).T)
    return rows @ np.linalg.cholesky(covariance).T + mean


def reference(x, y):
    a, b = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(a @ b).real
    return np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(a + b - 2 * root)


def test_normal_distributions_with_common_axes_have_a_closed_form():
    first, second = np.array([4.0, 1.0, 9.0]), np.array([1.0, 25.0, 9.0])
    x = exact_sample([1.0, 2.0, 3.0], np.diag(first), 50, 0)
    y = exact_sample([1.0, 0.0, 3.0], np.diag(second), 70, 1)
    expected = 4.0 + np.sum((np.sqrt(first) - np.sqrt(second)) ** 2)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-10)


def test_one_dimension_is_the_distance_of_means_and_deviations():
    x, y = (exact_sample([m], np.array([[s * s]]), 9, 3) for m, s in ((2.0, 3.0), (5.0, 0.5)))
    assert frechet_distance(x, y) == pytest.approx(9 + 2.5**2, rel=1e-10)


def test_it_agrees_with_the_root_of_a_matrix():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(200, 12)) @ rng.normal(size=(12, 12)) + 1
    y = rng.normal(size=(150, 12)) @ rng.normal(size=(12, 12))
    assert frechet_distance(x, y) == pytest.approx(reference(x, y), rel=1e-8)


@pytest.mark.parametrize("num", [2, 5, 12])
def test_fewer_clips_than_dimensions_are_exact_too(num):
    """Zero rows and columns change nothing, so a small problem is put into many dimensions."""
    rng = np.random.default_rng(num)
    x, y = rng.normal(size=(num, 4)), rng.normal(size=(num, 4)) * 2 + 1
    turn, _ = np.linalg.qr(rng.normal(size=(30, 30)))
    wide = [np.pad(z, ((0, 0), (0, 26))) @ turn for z in (x, y)]
    assert frechet_distance(*wide) == pytest.approx(frechet_distance(x, y), rel=1e-9)


def test_equal_features_have_no_distance_and_a_shift_its_square():
    x = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(x, x + 3) == pytest.approx(54, rel=1e-5)


def test_the_interval_is_around_the_figure_and_repeatable():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(60, 5))
    y = x + rng.normal(size=(60, 5))
    estimate = frechet_estimate(x, y)
    assert 0 <= estimate.low < estimate.value < estimate.high
    assert estimate == frechet_estimate(x, y)
    assert estimate.num == 60
    assert frechet_estimate(x[:1], y[:1]).num == 0


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((3, 2)), np.zeros((3, 4)), r"expected \(n d\) and \(m d\)"),
        (np.zeros((1, 2)), np.zeros((3, 2)), "at least 2 rows"),
        (np.full((3, 2), np.nan), np.zeros((3, 2)), "NaN or infinite"),
        (np.zeros((3, 0)), np.zeros((3, 0)), "without a dimension"),
        (np.full((3, 2), 1e170), np.zeros((3, 2)), "whose squares overflow"),
    ],
)
def test_features_that_do_not_fit_are_refused(x, y, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(x, y)


class Means(nn.Module):
    def forward(self, video: torch.Tensor) -> torch.Tensor:
        return video.mean(dim=[2, 3, 4])


class Published(nn.Module):
    """The arguments of the published I3D."""

    def forward(
        self,
        x: torch.Tensor,
        rescale: bool = False,
        resize: bool = False,
        return_features: bool = False,
    ) -> torch.Tensor:
        if rescale:
            x = 2 * x / 255 - 1
        means = x.mean(dim=[2, 3, 4])
        return torch.cat([means, means * 0 + int(resize)], 1) if return_features else means[:, :1]


class Flat(nn.Module):
    def forward(self, video: torch.Tensor) -> torch.Tensor:
        return video.mean(dim=[1, 2, 3, 4])


class Broken(nn.Module):
    def forward(self, video: torch.Tensor) -> torch.Tensor:
        return video.mean(dim=[2, 3, 4]) / 0


class Long(nn.Module):
    def forward(self, video: torch.Tensor) -> torch.Tensor:
        return video[:, :, 15].mean(dim=[2, 3])


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extractors")

    def saved(kind):
        path = folder / f"{kind.__name__}.pt"
        with warnings.catch_warnings():  # newer versions of torch would have it otherwise
            warnings.simplefilter("ignore")
            torch.jit.script(kind()).save(path)
        return path

    return saved


CLIPS = [np.full((4, 8, 8, 3), value, np.uint8) for value in (0, 102, 255)]


@pytest.mark.parametrize(("pixels", "expected"), [("255", [0, 102, 255]), ("unit", [-1, -0.2, 1])])
def test_an_extractor_gets_pixels_in_its_range(scripts, pixels, expected):
    features = Extractor(scripts(Means), pixels=pixels)(CLIPS)
    assert features.dtype == np.float64
    np.testing.assert_allclose(features, np.repeat([expected], 3, axis=0).T, atol=1e-5)


@pytest.mark.parametrize("pixels", ["255", "unit"])
def test_the_published_network_is_asked_for_features_of_the_same_pixels(scripts, pixels):
    features = Extractor(scripts(Published), pixels=pixels)(CLIPS)
    assert features.shape == (3, 6)
    np.testing.assert_allclose(features[:, 0], [-1, -0.2, 1], atol=1e-5)
    assert (features[:, 3:] == 1).all()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Flat, r"returned \(3,\) for video of 3 x 3 x 4 x 8 x 8"),
        (Broken, "are not finite"),
        (Long, "fails on video of 3 x 3 x 4 x 8 x 8"),
    ],
)
def test_an_extractor_that_breaks_its_promise_is_named(scripts, kind, message):
    extractor = Extractor(scripts(kind))
    with pytest.raises(ValueError, match=message) as caught:
        extractor(CLIPS)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_extractors_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        Extractor(tmp_path / "gone.pt")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        Extractor(tmp_path)
    for content in (b"", b"no zip", b"PK\x03\x04 cut short"):
        path = tmp_path / "x.pt"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a TorchScript module") as caught:
            Extractor(path)
        assert "\n" not in str(caught.value)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="not a TorchScript module"):
        Extractor(tmp_path / "weights.pt")
