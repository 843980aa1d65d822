"""Changing a given video by a text: SDEdit (Meng et al. 2022), of all of it or of a region."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sample.given import Given
from sample.pipeline import TextToVideo

_EDGE = 2  # pixels over which a region's border is blended


def kept_latents(mask: Tensor, latent_shape: tuple[int, int, int, int]) -> Tensor:
    """Which latents stay, (1 1 f h w): those none of whose pixels are to change.

    Args:
        mask: (f h w), True where the video is to change, in pixels.
        latent_shape: (c f h w).
    """
    _, f, h, w = latent_shape
    num_frames, height, width = mask.shape
    factor = (num_frames - 1) // max(1, f - 1) if f > 1 else 1
    changed = mask.float()[None, None]
    first = changed[:, :, :1].expand(-1, -1, factor, -1, -1)  # the first fills a latent frame alone
    changed = torch.cat([first[:, :, 1:], changed], dim=2)
    changed = F.max_pool3d(changed, (factor, height // h, width // w))
    return changed < 0.5


def edit(
    pipeline: TextToVideo,
    prompt: str,
    video: Tensor,
    strength: float,
    mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """A video (3 f h w) in [-1, 1] as the prompt has it.

    Args:
        video: (3 f h w) in [-1, 1].
        strength: the noise level to start from, 0.001 to 1: little changes, or everything.
        mask: (f h w), True where it may change; elsewhere the result has the video's own pixels.
        options: as `TextToVideo.__call__`.
    Raises:
        ValueError: a strength outside its range, a mask of another size, or one that is empty.
    """
    masks = None if mask is None else mask[None]
    return edit_batch(pipeline, [prompt], video[None], strength, masks, **options)[0]


def edit_batch(
    pipeline: TextToVideo,
    prompts: Sequence[str],
    videos: Tensor,
    strength: float,
    masks: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Several videos (b 3 f h w) at once, each as its prompt has it; otherwise as `edit`.

    Args:
        prompts: one per video.
        masks: (b f h w), one per video.
    """
    if not 0.001 <= strength <= 1:
        raise ValueError(f"strength={strength:g}; use 0.001 (nothing changes) to 1 (everything)")
    _, _, frames, height, width = videos.shape
    shape = pipeline.latent_shape(frames, height, width)
    kept = None
    if masks is not None:
        if masks.dtype != torch.bool:
            raise ValueError(
                f"the mask is of {masks.dtype}; expected torch.bool, True where to change"
            )
        if masks.shape[1:] != videos.shape[2:]:
            raise ValueError(
                f"the mask has shape {tuple(masks.shape[1:])}; expected ({frames} {height} {width})"
            )
        if not masks.flatten(1).any(dim=1).all():
            raise ValueError("the mask is black everywhere, so nothing would change; white changes")
        kept = torch.cat([kept_latents(mask, shape) for mask in masks]).to(pipeline.device)
    source = torch.cat([pipeline.encode(video) for video in videos])
    given = Given(source=source, strength=strength, kept=kept)
    size = {"frames": frames, "height": height, "width": width}
    made = pipeline(prompts, given=given, **{**options, **size})
    if masks is None:
        return made
    share = torch.stack([_feathered(mask) for mask in masks])[:, None]
    return share * made + (1 - share) * videos


def _feathered(mask: Tensor) -> Tensor:
    """1 inside the mask, falling towards its border, 0 outside, (f h w)."""
    size = 2 * _EDGE + 1
    outside = F.pad((~mask).float()[:, None], (_EDGE,) * 4, mode="replicate")
    near = F.avg_pool2d(outside, size, stride=1)[:, 0]
    return torch.where(mask, (1 - near).clamp(0, 1), 0.0)
