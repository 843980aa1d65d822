"""Several VAEs on the same clips: every figure per clip, then with intervals, by motion, and in pairs.

Clips are taken one batch at a time and nothing of their size is kept, only figures and features.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.frechet import frechet_estimate
from eval.metrics import Estimate, mean_estimate, paired_difference, psnr, ssim, temporal_psnr
from eval.vae_suite import MAX_PSNR, as_clips, as_video, full_precision, round_trip

if TYPE_CHECKING:
    from torch import Tensor

    from dit.perceptual import PerceptualDistance
    from dit.vae import VAE
    from eval.frechet import Extractor

GROUPS = ("still", "middle", "fast")
_FRAMES_PIXELS = 2**20  # pixels that the perceptual distance is given at once

Progress = Callable[[str, int], object]  # a VAE's name, clips just done


@dataclass(frozen=True)
class Judges:
    """What is measured beside PSNR, SSIM and temporal PSNR.

    Attributes:
        perceptual: LPIPS, on the device of the VAEs.
        extractor: of features for FVD.
        tile, overlap: of a decoding in blended tiles, in latents, to compare with the exact one.
    """

    perceptual: PerceptualDistance | None = None
    extractor: Extractor | None = None
    tile: int | None = None
    overlap: int = 0


@dataclass
class Column:
    """One VAE: figures per clip by name, and features of its reconstructions, one (b d) a batch."""

    figures: dict[str, list[float]] = field(default_factory=dict)
    features: list[np.ndarray] = field(default_factory=list)

    def add(self, name: str, values: Iterable[float]) -> None:
        self.figures.setdefault(name, []).extend(values)


@dataclass
class Measured:
    """What `measure` found.

    Attributes:
        clips: where each clip is.
        motion: of each clip, see `motion`; empty for single frames.
        features: of the clips, one (b d) a batch.
        columns: by the VAE's name.
    """

    clips: list[str]
    motion: list[float]
    features: list[np.ndarray]
    columns: dict[str, Column]


def motion(clip: np.ndarray) -> float:
    """Mean absolute difference of neighbouring frames, in levels of 255; NaN for a single frame.

    Args:
        clip: uint8, (f h w 3).
    """
    if len(clip) < 2:
        return math.nan
    steps = [np.abs(b.astype(np.int16) - a).mean() for a, b in itertools.pairwise(clip)]
    return float(np.mean(steps))


def measure(
    vaes: Mapping[str, VAE],
    clips: Iterable[tuple[str, np.ndarray]],
    *,
    batch_size: int,
    judges: Judges | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Every figure of every VAE for every clip; protocol as `eval.vae_cli.protocol` says.

    Args:
        vaes: in float32, by name.
        clips: where each clip is, and the clip, uint8 (f h w 3), all alike; taken as they are needed.
    Raises:
        ValueError: a VAE cannot take clips of this size or gives values that are not finite, or a
            judge refuses them.
    """
    judges = judges or Judges()
    found = Measured([], [], [], {name: Column() for name in vaes})
    left = iter(clips)
    while batch := list(itertools.islice(left, batch_size)):
        names, originals = [name for name, _ in batch], [clip for _, clip in batch]
        if judges.extractor is not None:
            found.features.append(judges.extractor(originals))
        for name, vae in vaes.items():
            _measure_batch(found.columns[name], name, vae, originals, judges, len(found.clips))
            if progress is not None:
                progress(name, len(batch))
        found.clips += names
        if len(originals[0]) > 1:
            found.motion += map(motion, originals)
    return found


def _measure_batch(
    column: Column,
    name: str,
    vae: VAE,
    originals: Sequence[np.ndarray],
    judges: Judges,
    first: int,
) -> None:
    from dit.vae_parts import blend_psnr

    with full_precision():
        video = as_video(originals, next(vae.parameters()).device)
        latents, output = round_trip(vae, video)
        restored = as_clips(output, vae=name, first=first)
        pairs = list(zip(originals, restored))
        column.add("psnr", (min(psnr(a, b), MAX_PSNR) for a, b in pairs))
        column.add("ssim", (ssim(a, b) for a, b in pairs))
        if len(originals[0]) > 1:
            column.add("temporal_psnr", (min(temporal_psnr(a, b), MAX_PSNR) for a, b in pairs))
        if judges.perceptual is not None:
            column.add("lpips", lpips(judges.perceptual, video, as_video(restored, video.device)))
        if judges.tile is not None:
            parts = {"tile": judges.tile, "overlap": judges.overlap}
            found = blend_psnr(vae, latents, **parts, whole=output).tolist()
            column.add("blend_psnr", (min(value, MAX_PSNR) for value in found))
    if judges.extractor is not None:
        column.features.append(judges.extractor(restored))


def lpips(perceptual: PerceptualDistance, first: Tensor, second: Tensor) -> list[float]:
    """The distance of each pair of videos (b 3 f h w) in [-1, 1], some frames at a time."""
    import torch
    from einops import rearrange

    f, h, w = first.shape[2:]
    frames = [rearrange(v, "b c f h w -> (b f) c 1 h w") for v in (first, second)]
    step = max(1, _FRAMES_PIXELS // (h * w))
    pieces = [perceptual(a, b) for a, b in zip(*(each.split(step) for each in frames))]
    return rearrange(torch.cat(pieces).double(), "(b f) -> b f", f=f).mean(1).tolist()


def estimates(measured: Measured, kept: np.ndarray | None = None) -> dict[str, dict[str, Estimate]]:
    """Figures by VAE and name, over all clips or those with the given numbers; FVD among them."""
    kept = np.arange(len(measured.clips)) if kept is None else kept
    originals = np.concatenate(measured.features)[kept] if measured.features else None
    found = {}
    for name, column in measured.columns.items():
        found[name] = {
            figure: mean_estimate(np.array(values)[kept])
            for figure, values in column.figures.items()
        }
        if originals is not None:
            restored = np.concatenate(column.features)[kept]
            found[name]["fvd"] = frechet_estimate(originals, restored)
    return found


def motion_groups(values: Sequence[float]) -> tuple[tuple[float, float], dict[str, np.ndarray]]:
    """The terciles of motion, and the numbers of the clips in each group: up to the first boundary,
    up to the second, beyond. Clips of equal motion are never parted, so groups may differ in size."""
    array = np.asarray(values, dtype=np.float64)
    low, high = (float(q) for q in np.quantile(array, [1 / 3, 2 / 3]))
    member = np.digitize(array, [low, high], right=True)
    return (low, high), {name: np.flatnonzero(member == k) for k, name in enumerate(GROUPS)}


def differences(measured: Measured) -> dict[str, dict[str, Estimate]]:
    """The first VAE's figures minus each other's, over the same clips, by the other's name."""
    (_, first), *others = measured.columns.items()
    return {
        name: {
            figure: paired_difference(values, other.figures[figure])
            for figure, values in first.figures.items()
        }
        for name, other in others
    }


def as_json(measured: Measured) -> dict[str, Any]:
    """The figures of one size as plain JSON values."""

    def plain(found: Mapping[str, Mapping[str, Estimate]]) -> dict[str, Any]:
        return {
            name: {figure: estimate.to_json() for figure, estimate in figures.items()}
            for name, figures in found.items()
        }

    results: dict[str, Any] = {
        "num": len(measured.clips),
        "scores": plain(estimates(measured)),
        "differences": plain(differences(measured)),
        "motion": None,
        "clips": [
            {"clip": clip, "vaes": {name: _row(c, k) for name, c in measured.columns.items()}}
            for k, clip in enumerate(measured.clips)
        ],
    }
    if len(measured.motion) >= len(GROUPS):
        boundaries, groups = motion_groups(measured.motion)
        scores = {name: plain(estimates(measured, kept)) for name, kept in groups.items()}
        results["motion"] = {"boundaries": list(boundaries), "scores": scores}
    for row, value in zip(results["clips"], measured.motion):
        row["motion"] = value
    return results


def _row(column: Column, number: int) -> dict[str, float]:
    return {figure: values[number] for figure, values in column.figures.items()}
