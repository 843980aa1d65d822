"""How well a VAE brings clips back: the round trip, and PSNR and SSIM of one VAE with error bars.

`eval.vae_compare` has more figures, and several VAEs side by side.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from data.manifest import Manifest
from data.video import VideoReadError, read_clip, to_float, to_uint8
from eval.metrics import Estimate, mean_estimate, psnr, ssim

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dit.vae import VAE
    from sample.model import Model

_log = logging.getLogger(__name__)

# A clip that comes back bit for bit has no finite PSNR; it counts as this.
MAX_PSNR = 100.0

# Pixels, over all frames of all clips, that a VAE is given at once; its wide early layers take some
# hundred times as many numbers.
PART_PIXELS = 2**22

Progress = Callable[[int], object]


def iter_clips(
    manifest: Manifest,
    *,
    num: int,
    num_frames: int,
    height: int,
    width: int,
    fps: float,
    quiet: bool = False,
) -> Iterator[tuple[str, np.ndarray]]:
    """The first `num` clips of a manifest that can be read, one at a time; the others are named in the
    log, unless `quiet`.

    Yields:
        Where the clip is, and the clip: uint8, (f h w 3), in the manifest's order.
    Raises:
        ValueError: not one of them can be read.
    """
    found, reason = 0, ""
    for row in manifest.rows:
        if found == num:
            return
        place = manifest.locate(row)
        try:
            clip = read_clip(
                place,
                num_frames=num_frames,
                fps=fps,
                height=height,
                width=width,
                start=row.start or 0.0,
                end=row.end,
            )
        except VideoReadError as error:
            reason = str(error)
            if not quiet:
                _log.warning("left out: %s", reason)
        else:
            found += 1
            yield place, clip.permute(1, 2, 3, 0).contiguous().numpy()
    if not found:
        raise ValueError(f"{manifest.path}: no clip to measure can be read; {reason}")


def read_clips(
    manifest: Manifest, *, num: int, num_frames: int, height: int, width: int, fps: float
) -> list[np.ndarray]:
    """All of `iter_clips` at once."""
    size: dict[str, Any] = {"num_frames": num_frames, "height": height, "width": width}
    return [clip for _, clip in iter_clips(manifest, num=num, fps=fps, **size)]


def batch_for(num_frames: int, height: int, width: int) -> int:
    """Clips at a time: 32, fewer when they are large."""
    return max(1, min(32, PART_PIXELS // (num_frames * height * width)))


def round_trip(vae: VAE, video: Tensor) -> tuple[Tensor, Tensor]:
    """The posterior's mean (b c f' h' w') of video (b 3 f h w), and its decoding like the video.

    More than PART_PIXELS pixels go through in chunks of frames and in tiles, where the VAE can, with
    the result of the whole clip and memory for a part.
    """
    from dit.vae_parts import decode_in_parts, encode_in_parts

    f, h, w = video.shape[2:]
    vae.latent_shape(f, h, w)
    parts: dict[str, int] = {}
    if video[:, 0].numel() > PART_PIXELS:
        frames = max(1, PART_PIXELS // (len(video) * h * w))
        parts["chunk"] = max(1, frames // vae.temporal_factor)
        if h * w * vae.temporal_factor > PART_PIXELS and vae.halos is not None:
            side = math.isqrt(PART_PIXELS // vae.temporal_factor) // vae.spatial_factor
            parts["tile"] = max(1, side)
    try:
        latents = encode_in_parts(vae, video, **parts).mean
    except ValueError:  # it cannot work in parts, or not in this direction
        latents = vae.encode(video).mean
    try:
        return latents, decode_in_parts(vae, latents, **parts)
    except ValueError:
        return latents, vae.decode(latents)


@contextmanager
def full_precision() -> Iterator[None]:
    """No gradients, and convolutions in float32 on GPUs that would round it to TF32."""
    import torch

    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def as_video(clips: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Clips, uint8 (f h w 3), as video (b 3 f h w) in [-1, 1]."""
    import torch

    return to_float(torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).to(device))


def as_clips(video: Tensor, *, vae: str = "the VAE", first: int = 0) -> list[np.ndarray]:
    """Decoded video (b 3 f h w) as clips, uint8 (f h w 3), clamped and rounded.

    Args:
        vae, first: the VAE's name, and the number of the first clip, for the message.
    Raises:
        ValueError: it has NaN or infinite pixels.
    """
    broken = (~video.isfinite()).flatten(1).any(1).nonzero()
    if len(broken):
        raise ValueError(
            f"{vae} gives NaN or infinite pixels for clip {first + int(broken[0]) + 1}; its weights "
            "are damaged or its training diverged"
        )
    return list(to_uint8(video).permute(0, 2, 3, 4, 1).contiguous().cpu().numpy())


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
        ValueError: the VAE cannot take clips of this size, or its output is not finite.
    """
    device = next(vae.parameters()).device
    restored: list[np.ndarray] = []
    with full_precision():
        for first in range(0, len(clips), batch_size):
            video = as_video(clips[first : first + batch_size], device)
            restored += as_clips(round_trip(vae, video)[1], first=first)
            if progress is not None:
                progress(len(video))
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
