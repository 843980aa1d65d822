"""Reconstruction FVD: the Fréchet distance between features of clips and of their reconstructions."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from eval.metrics import Estimate

if TYPE_CHECKING:
    import torch

_LARGEST = 1e100  # of a feature
NUM_RESAMPLES = 200  # fewer than for means: each one needs a decomposition

PixelRange = Literal["255", "unit"]


def _factor(features: np.ndarray) -> np.ndarray:
    """A with A^T A the unbiased covariance of features (n d), of no more than d rows."""
    centred = (features - features.mean(axis=0)) / np.sqrt(len(features) - 1)
    return centred if len(centred) <= centred.shape[1] else np.linalg.qr(centred)[1]


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Squared Fréchet distance of two normal distributions fitted to features (Dowson and Landau 1982,
    eq. 6; Unterthiner et al. 2018 for video).

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). The eigenvalues of S1 S2 = A^T A B^T B are the squares
    of the singular values of A B^T, so their roots are found without the root of a matrix, exactly
    also where there are fewer clips than dimensions and the covariances are singular.

    Args:
        first, second: finite, (n d) and (m d), at least 2 rows each; float64 inside.
    Raises:
        ValueError: shapes do not fit, too few rows, or values that are not finite.
    """
    x, y = (np.asarray(z, dtype=np.float64) for z in (first, second))
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(
            f"got features of shapes {x.shape} and {y.shape}, expected (n d) and (m d) with at least 2 "
            "rows"
        )
    if not x.shape[1]:
        raise ValueError(f"got features of shape {x.shape}, without a dimension to compare")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("the features have values that are NaN or infinite")
    if max(np.abs(x).max(), np.abs(y).max()) > _LARGEST:
        raise ValueError(f"the features have values beyond {_LARGEST:g}, whose squares overflow")
    a, b = _factor(x), _factor(y)
    roots = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    means = np.square(x.mean(axis=0) - y.mean(axis=0)).sum()
    return float(max(0.0, means + np.square(a).sum() + np.square(b).sum() - 2 * roots))


def frechet_estimate(first: np.ndarray, second: np.ndarray, *, seed: int = 0) -> Estimate:
    """`frechet_distance` of clips and their reconstructions with a bootstrap interval over clips.

    A resample has clips twice, which moves the distance itself: the interval is the spread of the
    resamples around their mean, put around the figure. NaN for fewer than 2 clips.

    Args:
        first, second: features (n d), row k of both from the same clip.
        seed: of the resampling.
    """
    num = len(first)
    if num < 2:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    value = frechet_distance(first, second)
    rng = np.random.default_rng(seed)
    draws = [rng.integers(num, size=num) for _ in range(NUM_RESAMPLES)]
    values = np.array([frechet_distance(first[draw], second[draw]) for draw in draws])
    low, high = np.quantile(values - values.mean(), [0.025, 0.975])
    return Estimate(value, max(0.0, value + float(low)), value + float(high), num)


class Extractor:
    """A video network from a TorchScript file, from clips to features.

    The module is called with float32 video (b 3 f h w), RGB in [0, 255] ("255") or [-1, 1] ("unit"),
    and returns features (b d). If its forward has arguments named `rescale`, `resize` and
    `return_features`, as the published I3D for FVD has, they are all given: resize and
    return_features True, rescale True for pixels in [0, 255] and False for [-1, 1].

    Args:
        path: what torch.jit.save wrote. It is a program, and is run.
        device: where to.
        pixels: the range that the module expects.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not TorchScript.
    """

    def __init__(
        self, path: Path, device: str | torch.device = "cpu", *, pixels: PixelRange = "255"
    ) -> None:
        import torch

        if not path.is_file():
            what = "is a folder" if path.is_dir() else "no such file"
            raise FileNotFoundError(f"--fvd-extractor {path}: {what}; expected a TorchScript file")
        try:
            with warnings.catch_warnings():  # that TorchScript is deprecated: such files exist
                warnings.simplefilter("ignore", FutureWarning)
                warnings.simplefilter("ignore", DeprecationWarning)
                self.module: Any = torch.jit.load(str(path), map_location=device).eval()
            names = {argument.name for argument in self.module.forward.schema.arguments}
        except (RuntimeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"--fvd-extractor {path}: not a TorchScript module ({type(error).__name__}); expected "
                "one that torch.jit.save wrote, from video (b 3 f h w) to features (b d)"
            ) from None
        self.path, self.device, self.pixels = path, torch.device(device), pixels
        known = {"rescale": pixels == "255", "resize": True, "return_features": True}
        self.options = {name: value for name, value in known.items() if name in names}

    def __call__(self, clips: Sequence[np.ndarray]) -> np.ndarray:
        """Features (n d) in float64 of clips, uint8 (f h w 3), all alike.

        Raises:
            ValueError: the module refuses them, or returns something else.
        """
        import torch

        from data.video import to_float

        video = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).to(self.device)
        video = to_float(video) if self.pixels == "unit" else video.float()
        shape = f"video of {len(clips)} x 3 x {' x '.join(map(str, video.shape[2:]))}"
        try:
            with torch.no_grad():
                features = self.module(video.contiguous(), **self.options)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # TorchScript's messages are a traceback with the cause last
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise ValueError(
                f"--fvd-extractor {self.path}: fails on {shape} ({reason}); it may need more frames or "
                "another size"
            ) from None
        if not isinstance(features, torch.Tensor) or features.ndim != 2:
            got = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features)
            raise ValueError(
                f"--fvd-extractor {self.path}: returned {got} for {shape}, expected features "
                f"({len(clips)} d)"
            )
        if len(features) != len(clips) or not torch.isfinite(features).all():
            raise ValueError(
                f"--fvd-extractor {self.path}: features of shape {tuple(features.shape)} for "
                f"{shape} are not finite, or not {len(clips)} rows"
            )
        return features.double().cpu().numpy()
