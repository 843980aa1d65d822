"""Latents to tokens and back, and clips of different sizes in one row of tokens."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from dit.attention import Segments

Size = tuple[int, int, int]  # frames, height, width


def num_patches(size: Size, patch_size: Size) -> Size:
    """Patches along frames, height and width of latents (f, h, w).

    Raises:
        ValueError: the latents do not divide into patches.
    """
    if any(s % p for s, p in zip(size, patch_size)):
        wanted, patches = ("x".join(map(str, sizes)) for sizes in (size, patch_size))
        raise ValueError(f"latents of {wanted} do not divide into patches of {patches}")
    f, h, w = (s // p for s, p in zip(size, patch_size))
    return f, h, w


def grid_positions(grid: Size, device: torch.device) -> Tensor:
    """Frame, row and column of each token of a clip of `grid` patches, (n 3)."""
    return torch.cartesian_prod(*(torch.arange(size, device=device) for size in grid))


def to_patches(x: Tensor, patch_size: Size) -> Tensor:
    """Latents (b c f h w) -> tokens (b n p), frame by frame, row by row; p = c * patch volume."""
    pf, ph, pw = patch_size
    pattern = "b c (f pf) (h ph) (w pw) -> b (f h w) (c pf ph pw)"
    return rearrange(x, pattern, pf=pf, ph=ph, pw=pw)


def from_patches(tokens: Tensor, patch_size: Size, grid: Size) -> Tensor:
    """The head's tokens (b n p) -> (b c f h w); in them a patch's channels come last, as in Wan."""
    (pf, ph, pw), (f, h, w) = patch_size, grid
    pattern = "b (f h w) (pf ph pw c) -> b c (f pf) (h ph) (w pw)"
    return rearrange(tokens, pattern, pf=pf, ph=ph, pw=pw, f=f, h=h, w=w)


class PackedRow(NamedTuple):
    """Several clips as one row of n tokens, their texts as one of m; no padding in either."""

    tokens: Tensor  # (1 n p)
    positions: Tensor  # (1 n 3)
    t: Tensor  # (1 g): runs of n / g tokens share a noise level
    context: Tensor  # (1 m d)
    segments: Segments  # clips among themselves
    context_segments: Segments  # clips and their texts
    grids: tuple[Size, ...]  # patches of each clip

    def unpack(self, tokens: Tensor, patch_size: Size) -> list[Tensor]:
        """The head's tokens (1 n p) as one (c f h w) per clip."""
        clips = tokens.split(self.segments.q_lengths, dim=1)
        return [
            from_patches(c, patch_size, grid)[0] for c, grid in zip(clips, self.grids, strict=True)
        ]


def pack(
    clips: Sequence[Tensor],
    t: Sequence[Tensor] | Tensor,
    contexts: Sequence[tuple[Tensor, Tensor | None]],
    patch_size: Size,
) -> PackedRow:
    """Puts clips into one row; see `DiT.forward_packed` for the arguments and what is raised."""
    if not clips or not len(clips) == len(t) == len(contexts):
        raise ValueError(
            f"{len(clips)} clips with {len(t)} noise levels and {len(contexts)} contexts; give one "
            "of each per clip, and at least one clip"
        )
    device = clips[0].device
    sizes = [(clip.shape[1], clip.shape[2], clip.shape[3]) for clip in clips]
    grids = [num_patches(size, patch_size) for size in sizes]
    lengths = [math.prod(grid) for grid in grids]
    # The longest run of tokens that divides every frame of every clip: all runs are equally long, as
    # in a batch of equal clips, and so the network needs no other way to spread noise levels.
    run = math.gcd(*(h * w for _, h, w in grids))
    levels = [_levels(*each, patch_size[0]) for each in zip(t, sizes)]
    runs = [level.repeat_interleave(h * w // run) for level, (_, h, w) in zip(levels, grids)]
    texts = [_visible(*context, number) for number, context in enumerate(contexts)]
    return PackedRow(
        tokens=torch.cat([to_patches(clip[None], patch_size) for clip in clips], dim=1),
        positions=torch.cat([grid_positions(grid, device) for grid in grids])[None],
        t=torch.cat(runs)[None],
        context=torch.cat(texts)[None],
        segments=Segments(lengths, lengths, device),
        context_segments=Segments(lengths, [len(text) for text in texts], device),
        grids=tuple(grids),
    )


def _levels(t: Tensor, size: Size, pf: int) -> Tensor:
    """One noise level per patch along time."""
    f = size[0]
    if t.shape not in ((), (f,)):
        raise ValueError(
            f"t has shape {tuple(t.shape)} for a clip of {f} frames; expected () or ({f},)"
        )
    return t.expand(f)[::pf]


def _visible(context: Tensor, mask: Tensor | None, number: int) -> Tensor:
    """The text states (m d) that are not masked."""
    text = context if mask is None else context[mask]
    if not len(text):
        raise ValueError(f"clip {number} has no text: its context_mask is False everywhere")
    return text
