"""How well a VAE brings clips back: PSNR and SSIM, with error bars."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from data.manifest import Manifest
from data.video import VideoReadError, read_clip, to_float, to_uint8
from eval.metrics import Estimate, mean_estimate, psnr, ssim

if TYPE_CHECKING:
    from dit.vae import VAE
    from sample.model import Model

_log = logging.getLogger(__name__)

# A clip that comes back bit for bit has no finite PSNR; it counts as this.
MAX_PSNR = 100.0

Progress = Callable[[int], object]


def read_clips(
    manifest: Manifest, *, num: int, num_frames: int, height: int, width: int, fps: float
) -> list[np.ndarray]:
    """The first `num` clips of a manifest that can be read; the others are named in the log.

    Returns:
        uint8, (f h w 3), in the manifest's order.
    Raises:
        ValueError: not one of them can be read.
    """
    clips: list[np.ndarray] = []
    reason = ""
    for row in manifest.rows:
        if len(clips) == num:
            break
        try:
            clip = read_clip(
                manifest.locate(row),
                num_frames=num_frames,
                fps=fps,
                height=height,
                width=width,
                start=row.start or 0.0,
                end=row.end,
            )
        except VideoReadError as error:
            reason = str(error)
            _log.warning("left out: %s", reason)
        else:
            clips.append(clip.permute(1, 2, 3, 0).contiguous().numpy())
    if not clips:
        raise ValueError(f"{manifest.path}: no clip to measure can be read; {reason}")
    return clips


def reconstruct(
    vae: VAE,
    clips: Sequence[np.ndarray],
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[np.ndarray]:
    """Clips through the VAE's mean and back, in float32, on the device where the VAE is.

    Args:
        clips: uint8, (f h w 3), all alike.
        progress: called with the number of clips just done.
    Returns:
        uint8, (f h w 3), as many.
    Raises:
        ValueError: the VAE cannot take clips of this size.
    """
    import torch

    device = next(vae.parameters()).device
    restored: list[np.ndarray] = []
    with torch.no_grad():
        for first in range(0, len(clips), batch_size):
            batch = np.stack(clips[first : first + batch_size])
            video = to_float(torch.from_numpy(batch).permute(0, 4, 1, 2, 3)).to(device)
            output = to_uint8(vae.decode(vae.encode(video).mean)).permute(0, 2, 3, 4, 1)
            restored += list(output.cpu().numpy())
            if progress is not None:
                progress(len(batch))
    return restored


def quality(clips: Sequence[np.ndarray], restored: Sequence[np.ndarray]) -> dict[str, Estimate]:
    """PSNR in dB and SSIM per clip, averaged over clips."""
    pairs = list(zip(clips, restored, strict=True))
    return {
        "psnr": mean_estimate([min(psnr(a, b), MAX_PSNR) for a, b in pairs]),
        "ssim": mean_estimate([ssim(a, b) for a, b in pairs]),
    }


def run_vae_suite(
    model: Model,
    clips: Sequence[np.ndarray],
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The figures of `quality` as plain JSON values.

    Args:
        clips: held-out clips, uint8 (f h w 3), all alike.
    """
    restored = reconstruct(model.vae, clips, batch_size=batch_size, progress=progress)
    scores = {name: e.to_json() for name, e in quality(clips, restored).items()}
    f, h, w, _ = clips[0].shape
    return {
        "suite": "vae",
        "num": len(clips),
        "num_frames": f,
        "height": h,
        "width": w,
        "scores": {"vae": scores},
    }
