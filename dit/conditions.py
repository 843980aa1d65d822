"""What a clip is generated from, beside a text: frames that are known.

A known frame of the clip itself is held at its noise level t, 0 for a clean one, while the others come
down from t = 1 (diffusion forcing, Chen et al. 2024; DESIGN's "one idea"). A picture that is no latent
frame of the clip, a keyframe at some time or a reference of a subject, stands beside it: as tokens of
the same sequence, at t = 0, with a position along time of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit.objective import Objective
from dit.packing import Size, grid_positions
from dit.samplers import Denoiser

# Along the axis of time, in latent frames: far enough from every clip to be outside it, and from one
# another to be told apart.
REFERENCE_POSITION, REFERENCE_STEP = -16, -8


def keyframe_position(frame: int, temporal_factor: int) -> float:
    """Where a picture of frame number `frame` of a clip lies, in latent frames.

    Latent frame k > 0 holds the frames from (k - 1) * factor + 1 to k * factor, whose mean is at k.
    """
    if frame == 0:
        return 0.0
    return (frame + (temporal_factor - 1) / 2) / temporal_factor


def reference_position(number: int) -> int:
    """Where the picture of subject `number`, from 0 on, lies."""
    return REFERENCE_POSITION + number * REFERENCE_STEP


@dataclass(frozen=True)
class BesideFrames:
    """Latent frames beside a clip's own, of pictures by themselves.

    Attributes:
        latents: (b c k h w), of the clip's size.
        t: noise level of each, (b k).
        positions: along time in latent frames, (b k); see `keyframe_position`, `reference_position`.
    """

    latents: Tensor
    t: Tensor
    positions: Tensor

    def check(self, x_t: Tensor, patch_size: Size) -> None:
        """Raises ValueError: they do not fit a clip of latents x_t (b c f h w)."""
        b, c, _, h, w = x_t.shape
        k = self.latents.shape[2]
        if self.latents.shape != (b, c, k, h, w) or not self.t.shape == self.positions.shape == (
            b,
            k,
        ):
            raise ValueError(
                f"frames beside the clip have shape {tuple(self.latents.shape)}, noise levels "
                f"{tuple(self.t.shape)} and positions {tuple(self.positions.shape)}; expected "
                f"({b} {c} k {h} {w}), ({b} k) and ({b} k)"
            )
        if patch_size[0] != 1:
            raise ValueError(
                f"frames beside the clip need patches of one frame, and these have {patch_size[0]}"
            )

    def token_positions(self, grid: Size) -> Tensor:
        """Frame, row and column of each token, (b n 3).

        Args:
            grid: patches of the clip.
        """
        b, k = self.positions.shape
        places = grid_positions((k, *grid[1:]), self.positions.device).to(self.positions.dtype)
        places = places.expand(b, -1, -1).clone()
        places[..., 0] = self.positions.repeat_interleave(grid[1] * grid[2], dim=1)
        return places

    def without_references(self) -> BesideFrames | None:
        """What is no picture of a subject; itself where none is, None where all are."""
        kept = self.positions[0] > REFERENCE_POSITION
        if kept.all():
            return self
        if not kept.any():
            return None
        return BesideFrames(self.latents[:, :, kept], self.t[:, kept], self.positions[:, kept])

    def repeated(self, times: int) -> BesideFrames:
        """For a batch in which all clips come several times, one batch after the other."""
        parts = (self.latents, self.t, self.positions)
        return BesideFrames(*(part.repeat(times, *[1] * (part.ndim - 1)) for part in parts))


def with_held_frames(denoise: Denoiser, known: Tensor, levels: Tensor) -> Denoiser:
    """A denoiser that always sees some frames as they are known, whatever the sampler makes of them.

    Args:
        known: latents (b c f h w), with the noise of their levels in them.
        levels: (b f), the noise level of each known frame; NaN for a frame that is not known.
    """
    held = ~levels.isnan()

    def held_denoise(x: Tensor, t: Tensor) -> Tensor:
        t = t[:, None] if t.ndim == 1 else t
        seen = torch.where(held[:, None, :, None, None], known, x)
        return denoise(seen, torch.where(held, levels, t))

    return held_denoise


def with_known_region(
    denoise: Denoiser, objective: Objective, x_0: Tensor, noise: Tensor, known: Tensor
) -> Denoiser:
    """A denoiser to whom a part of the picture is known, which so goes straight from noise to data.

    For every sampler: it is told the right prediction there, x_0 and this noise, and the network sees
    there what a sampler makes of that.

    Args:
        x_0, noise: (b c f h w).
        known: True where x_0 is what the result has, broadcastable to (b c f h w).
    """

    def part_known(x: Tensor, t: Tensor) -> Tensor:
        x = torch.where(known, objective.add_noise(x_0, noise, t), x)
        pred = denoise(x, t)
        return torch.where(known, objective.target(x_0, noise, t).to(pred.dtype), pred)

    return part_known
