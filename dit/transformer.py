"""The diffusion transformer: one sequence of tokens, each with its position and its own noise level.

The block is Wan's (Wan Team 2025, "Wan: Open and Advanced Large-Scale Video Generative Models",
section 4.2; `WanTransformer3DModel` in diffusers is the reference that tests/parity compares with):
adaLN-single modulation, RMS-normalised q and k, 3D rotary positions, ungated text cross-attention.
An image is the clip with f = 1; there is no second code path.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from dit.attention import Backend, Segments
from dit.conditions import BesideFrames
from dit.layers import (
    GELU,
    Attention,
    KeysValues,
    gated_add,
    modulate,
    rotary_table,
    timestep_embedding,
)
from dit.packing import from_patches, grid_positions, num_patches, pack, to_patches
from dit.reuse import FeatureReuse
from dit.sizes import Depth, Size


class DiTConfig(BaseModel):
    """Size of a DiT. `in_channels` are latent channels, `context_dim` the text encoder's width."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    in_channels: Size
    context_dim: Size
    dim: Size
    num_blocks: Depth
    num_heads: Size
    mlp_dim: Size
    patch_size: tuple[Size, Size, Size] = (1, 2, 2)
    freq_dim: Size = 256
    rope_theta: float = 10_000.0
    eps: float = 1e-6

    @model_validator(mode="after")
    def _heads_fit(self) -> "DiTConfig":
        if self.dim % self.num_heads:
            raise ValueError(f"dim={self.dim} does not divide into num_heads={self.num_heads}")
        if (self.dim // self.num_heads) % 2 or self.dim // self.num_heads < 6:
            raise ValueError(
                f"dim / num_heads = {self.dim // self.num_heads}: rotary positions over time, height "
                "and width need an even number of at least 6"
            )
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim={self.freq_dim} must be even (sine and cosine halves)")
        return self

    def num_flops(self, num_tokens: int, num_context: int, num_levels: int = 1) -> int:
        """Multiplications and additions in the matrix products of one clip's forward pass.

        A product of (n, k) and (k, l) matrices takes 2 n k l. With d = dim, n tokens, m text states:

            a block     q, k, v and out of self-attention     4 * 2 n d d
                        its scores, and their sums of values  2 * 2 n n d
                        q and out of cross-attention          2 * 2 n d d
                        k and v of the text                   2 * 2 m d d
                        scores, and sums of values            2 * 2 n m d
                        the two layers of the MLP             2 * 2 n d mlp_dim
            around it   patches in and out                    2 * 2 n d p, p values in a patch
                        the text's two layers                 2 m (context_dim + d) d
                        the time's three, per noise level     2 (freq_dim + d + 6 d) d

        A training step takes three times as many: the backward pass has two products for each.

        Args:
            num_tokens: patches of the clip; num_context: text states, padding included.
            num_levels: 1, or a clip's patches along time when each has a noise level of its own.
        """
        d, n, m = self.dim, num_tokens, num_context
        patch = self.in_channels * math.prod(self.patch_size)
        block = 12 * n * d * d + 4 * n * n * d + 4 * m * d * d + 4 * n * m * d
        block += 4 * n * d * self.mlp_dim
        text = 2 * m * (self.context_dim + d) * d
        time = 2 * num_levels * (self.freq_dim + 7 * d) * d
        return self.num_blocks * block + 4 * n * d * patch + text + time


class Block(nn.Module):
    """Self-attention, text cross-attention and MLP; the first and last are modulated by t."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim, eps = config.dim, config.eps
        self.modulation = nn.Parameter(torch.zeros(6, dim))
        self.norm_1 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.self_attention = Attention(dim, config.num_heads, eps)
        self.norm_2 = nn.LayerNorm(dim, eps)
        self.cross_attention = Attention(dim, config.num_heads, eps)
        self.norm_3 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.mlp = Mlp(dim, config.mlp_dim, act_layer=GELU)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        rotary: tuple[Tensor, Tensor],
        context: Tensor | KeysValues,
        mask: Tensor | Segments | None = None,
        segments: Segments | None = None,
    ) -> Tensor:
        """Tokens in, tokens out, (b n d).

        Args:
            modulation: (b g 6 d), a row for each run of n / g tokens.
            rotary: from `rotary_table`.
            context: text (b m d), or its keys and values.
            mask: which of the text a token sees, and segments: which tokens; as for `attention`.
        """
        modulation = (self.modulation + modulation).to(x.dtype)
        shift_1, scale_1, gate_1, shift_3, scale_3, gate_3 = modulation.unbind(2)  # each (b g d)
        y = modulate(self.norm_1(x), shift_1, scale_1)
        x = gated_add(x, self.self_attention(y, y, rotary, segments), gate_1)
        x = x + self.cross_attention(self.norm_2(x), context, mask=mask)
        return gated_add(x, self.mlp(modulate(self.norm_3(x), shift_3, scale_3)), gate_3)


@dataclass(frozen=True)
class PreparedContext:
    """A text as the blocks' cross-attention sees it: the same at every step of a sampling."""

    keys_values: tuple[KeysValues, ...]  # one per block
    mask: Tensor | None  # (b 1 1 m); None where there is no padding

    def rows(self, rows: Tensor | slice) -> "PreparedContext":
        """That of some clips of the batch."""
        pairs = tuple((k[rows], v[rows]) for k, v in self.keys_values)
        return PreparedContext(pairs, None if self.mask is None else self.mask[rows])


class DiT(nn.Module):
    """Predicts the objective's target for noisy latents, given their noise levels and a text."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        dim, patch_volume = config.dim, math.prod(config.patch_size)
        self.patch_embedding = nn.Linear(config.in_channels * patch_volume, dim)
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.text_embedding = nn.Sequential(
            nn.Linear(config.context_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_blocks)])
        self.head_norm = nn.LayerNorm(dim, config.eps, elementwise_affine=False)
        self.head_modulation = nn.Parameter(torch.zeros(2, dim))
        self.head = nn.Linear(dim, config.in_channels * patch_volume)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier linears; gates and head start at zero, so a fresh DiT predicts zero (adaLN-zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in (*self.time_embedding, *self.text_embedding):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        for module in (self.time_projection[1], self.head):
            nn.init.zeros_(module.weight)  # type: ignore[arg-type]

    def use_attention(self, backend: Backend) -> None:
        """Chooses the kernel of every attention; see dit/attention.py."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = backend

    def prepare_context(
        self, context: Tensor, context_mask: Tensor | None = None
    ) -> PreparedContext:
        """Does once what every step does to the text; `forward` takes the result as its context.

        Args:
            context: text states (b m context_dim).
            context_mask: (b m), True where there is text; None where all of it is.
        """
        context = self.text_embedding(context.to(_dtype(self.text_embedding)))
        pairs = []
        for block in self.blocks:
            assert isinstance(block, Block)
            pairs.append(block.cross_attention.keys_values(context))
        mask = None if context_mask is None or context_mask.all() else context_mask[:, None, None]
        return PreparedContext(tuple((k.contiguous(), v.contiguous()) for k, v in pairs), mask)

    def forward_tokens(
        self,
        tokens: Tensor,
        positions: Tensor,
        t: Tensor,
        context: Tensor | PreparedContext,
        mask: Tensor | Segments | None = None,
        segments: Segments | None = None,
        reuse: FeatureReuse | None = None,
    ) -> Tensor:
        """One sequence of patches in, one out; everything a token is, it carries with it.

        Args:
            tokens: patches (b n p), p = in_channels * patch volume.
            positions: (n 3) or (b n 3), frame, row and column of each token.
            t: noise levels in [0, 1], (b g): runs of n / g neighbouring tokens share one.
            context: text states (b m context_dim), or from `prepare_context`.
            mask: which of the text a token sees: (b 1 1 m), or runs of tokens and of texts, or None
                for all of it. A prepared context has its own.
            segments: runs of tokens that see each other; None when all tokens do.
            reuse: of this sampling run.
        Returns:
            (b n p).
        """
        config = self.config
        time = timestep_embedding(t, config.freq_dim)
        time = self.time_embedding(time.to(_dtype(self.time_embedding)))  # (b g d)
        modulation = self.time_projection(time.to(_dtype(self.time_projection)))
        modulation = modulation.unflatten(-1, (6, config.dim))  # (b g 6 d)
        rotary = rotary_table(positions, config.dim // config.num_heads, config.rope_theta)
        if isinstance(context, Tensor):
            context = self.text_embedding(context.to(_dtype(self.text_embedding)))
        x = self.patch_embedding(tokens.to(_dtype(self.patch_embedding)))  # (b n d)
        if reuse is None:
            x = self._run(slice(None), x, modulation, rotary, context, mask, segments)
        else:
            assert segments is None
            x = self._run_with_reuse(reuse, x, modulation, rotary, context, mask)
        shift, scale = (self.head_modulation + time[:, :, None]).to(x.dtype).unbind(2)
        return self.head(modulate(self.head_norm(x), shift, scale))

    def _run(
        self,
        which: slice,
        x: Tensor,
        modulation: Tensor,
        rotary: tuple[Tensor, Tensor],
        context: Tensor | PreparedContext,
        mask: Tensor | Segments | None = None,
        segments: Segments | None = None,
    ) -> Tensor:
        """x (b n d) through some of the blocks; the rest is what they take."""
        blocks = list(self.blocks)[which]
        if isinstance(context, PreparedContext):
            texts, mask = context.keys_values[which], context.mask
        else:
            texts = [context] * len(blocks)
        for block, text in zip(blocks, texts, strict=True):
            x = block(x, modulation, rotary, text, mask, segments)
        return x

    def _run_with_reuse(
        self,
        reuse: FeatureReuse,
        x: Tensor,
        modulation: Tensor,
        rotary: tuple[Tensor, Tensor],
        context: Tensor | PreparedContext,
        mask: Tensor | Segments | None,
    ) -> Tensor:
        """x (b n d) through the first block, and through the others where `reuse` wants that."""
        x_1 = self._run(slice(1), x, modulation, rotary, context, mask)

        def others(rows: Tensor | None) -> Tensor:
            if rows is None:
                return self._run(slice(1, None), x_1, modulation, rotary, context, mask)
            text = context[rows] if isinstance(context, Tensor) else context.rows(rows)
            words = mask[rows] if isinstance(mask, Tensor) else None
            return self._run(slice(1, None), x_1[rows], modulation[rows], rotary, text, words)

        return reuse(x, x_1, others)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        context: Tensor | PreparedContext,
        context_mask: Tensor | None = None,
        *,
        beside: BesideFrames | None = None,
        reuse: FeatureReuse | None = None,
    ) -> Tensor:
        """Prediction for noisy latents.

        Args:
            x_t: noisy latents (b c f h w).
            t: noise level in [0, 1], one per clip (b,) or one per latent frame (b f).
            context: text states (b m context_dim), or what `prepare_context` made of them.
            context_mask: (b m), True where there is text, at least one True per clip; None where
                all of it is. A prepared context has its own.
            beside: frames that the clip's are to be seen with; nothing is predicted for them.
            reuse: to leave out blocks at some steps of a sampling run; None runs all of them.
        Returns:
            Like x_t, in the dtype of the weights or of autocast.
        Raises:
            ValueError: x_t does not divide into patches, t fits neither form, or the frames beside it
                do not fit x_t.
        """
        b, _, f, h, w = x_t.shape
        patch_size = self.config.patch_size
        grid = num_patches((f, h, w), patch_size)
        if t.shape not in ((b,), (b, f)):
            raise ValueError(f"t has shape {tuple(t.shape)}; expected ({b},) or ({b}, {f})")
        # A patch of several frames takes the noise level of its first one.
        t = t[:, None] if t.ndim == 1 else t[:, :: patch_size[0]]
        if isinstance(context, PreparedContext):
            assert context_mask is None
        mask = None if context_mask is None else context_mask[:, None, None]
        tokens, positions = to_patches(x_t, patch_size), grid_positions(grid, x_t.device)
        if beside is not None:
            beside.check(x_t, patch_size)
            t = torch.cat([t.expand(b, grid[0]), beside.t], dim=1)
            tokens = torch.cat(
                [tokens, to_patches(beside.latents.to(x_t.dtype), patch_size)], dim=1
            )
            positions = torch.cat(
                [positions.expand(b, -1, -1), beside.token_positions(grid)], dim=1
            )
        tokens = self.forward_tokens(tokens, positions, t, context, mask, reuse=reuse)
        return from_patches(tokens[:, : prod(grid)], patch_size, grid)

    def forward_packed(
        self,
        clips: Sequence[Tensor],
        t: Sequence[Tensor] | Tensor,
        contexts: Sequence[tuple[Tensor, Tensor | None]],
    ) -> list[Tensor]:
        """`forward` for clips of different sizes, in one row of tokens without padding.

        Args:
            clips: noisy latents, (c f h w) each.
            t: noise levels in [0, 1], one () or one per latent frame (f,), for each clip.
            contexts: text states (m context_dim) and context_mask (m,) or None, for each clip.
        Returns:
            The predictions, each like its clip.
        Raises:
            ValueError: other numbers of clips, t and contexts, latents that do not divide into
                patches, t that fits neither form, or a clip without text.
        """
        row = pack(clips, t, contexts, self.config.patch_size)
        tokens = self.forward_tokens(
            row.tokens, row.positions, row.t, row.context, row.context_segments, row.segments
        )
        return row.unpack(tokens, self.config.patch_size)


def _dtype(module: nn.Module) -> torch.dtype:
    """Of the weights: networks in bfloat16 run without autocast too."""
    return next(module.parameters()).dtype
