"""The diffusion transformer: one sequence of tokens, each with its position and its own noise level.

The block is Wan's (Wan Team 2025, "Wan: Open and Advanced Large-Scale Video Generative Models",
section 4.2; `WanTransformer3DModel` in diffusers is the reference that tests/parity compares with):
adaLN-single modulation, RMS-normalised q and k, 3D rotary positions, ungated text cross-attention.
An image is the clip with f = 1; there is no second code path.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator
from timm.layers.activations import GELUTanh
from timm.layers.mlp import Mlp
from torch import Tensor, nn

# Fused attention wins once the score matrix no longer fits a CPU's cache; below that its backward
# pass is slower than two plain matmuls (docs/benchmarks.md).
CPU_PLAIN_ATTENTION_TOKENS = 512


class DiTConfig(BaseModel):
    """Size of a DiT. `in_channels` are latent channels, `context_dim` the text encoder's width."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    in_channels: PositiveInt
    context_dim: PositiveInt
    dim: PositiveInt
    num_blocks: PositiveInt
    num_heads: PositiveInt
    mlp_dim: PositiveInt
    patch_size: tuple[PositiveInt, PositiveInt, PositiveInt] = (1, 2, 2)
    freq_dim: PositiveInt = 256
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


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of 1000 * t, cosines first (Vaswani et al. 2017, section 3.5).

    Args:
        t: noise levels in [0, 1], any shape.
        dim: even number of features.
    Returns:
        float32, shape of t plus (dim,).
    """
    frequencies = torch.exp(
        -math.log(10_000.0) / (dim // 2) * torch.arange(dim // 2, device=t.device)
    )
    angles = 1000.0 * t.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotary_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines for 3D rotary positions (Su et al. 2021, eq. 34, one axis per share).

    Height and width take 2 * (head_dim // 6) features each, time the rest, as in Wan.

    Args:
        positions: (..., n, 3), the frame, row and column of each token; may be fractional.
    Returns:
        cos and sin, each float32 (..., n, head_dim / 2).
    """
    side = 2 * (head_dim // 6)
    angles = []
    for axis, dim in enumerate((head_dim - 2 * side, side, side)):
        exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float64) / dim
        angles.append(positions[..., axis, None].double() * theta**-exponents)
    table = torch.cat(angles, dim=-1)
    return table.cos().float(), table.sin().float()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates neighbouring feature pairs of x (b heads n d) by the table's angles (n d/2)."""
    cos, sin = (table.to(x.dtype) for table in rotary)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of (b heads n d) tensors; mask (b 1 1 m) is True where a key may be seen."""
    if q.device.type != "cpu" or k.shape[-2] > CPU_PLAIN_ATTENTION_TOKENS:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1).to(v.dtype) @ v


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (b n d) times 1 + scale plus shift, both (b g d): token groups of n / g share a row."""
    groups = x.unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift[:, :, None], groups, 1 + scale[:, :, None]).flatten(1, 2)


def gated_add(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """x + gate * update, with gate (b g d) shared by token groups as in `modulate`."""
    groups = (tensor.unflatten(1, (gate.shape[1], -1)) for tensor in (x, update))
    residual, update = groups
    return torch.addcmul(residual, update, gate[:, :, None]).flatten(1, 2)


class RMSNorm(nn.RMSNorm):
    """torch's, with the gain in the input's dtype, without which there is no fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head attention with RMS-normalised q and k over the full width (Wan, section 4.2)."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps=eps)
        self.norm_k = RMSNorm(dim, eps=eps)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)
        q, k, v = (rearrange(y, "b n (k d) -> b k n d", k=self.num_heads) for y in (q, k, v))
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        y = attention(q.to(v.dtype), k.to(v.dtype), v, mask)
        return self.out(rearrange(y, "b k n d -> b n (k d)"))


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
        self.mlp = Mlp(dim, config.mlp_dim, act_layer=GELUTanh)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        rotary: tuple[Tensor, Tensor],
        context: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """x (b n d), modulation (b g 6 d), context (b m d), mask (b 1 1 m) -> (b n d)."""
        modulation = (self.modulation + modulation).to(x.dtype)
        shift_1, scale_1, gate_1, shift_3, scale_3, gate_3 = modulation.unbind(2)  # each (b g d)
        y = modulate(self.norm_1(x), shift_1, scale_1)
        x = gated_add(x, self.self_attention(y, y, rotary), gate_1)
        x = x + self.cross_attention(self.norm_2(x), context, mask=mask)
        return gated_add(x, self.mlp(modulate(self.norm_3(x), shift_3, scale_3)), gate_3)


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

    def forward_tokens(
        self, tokens: Tensor, positions: Tensor, t: Tensor, context: Tensor, context_mask: Tensor
    ) -> Tensor:
        """One sequence of patches in, one out; everything a token is, it carries with it.

        Args:
            tokens: patches (b n p), p = in_channels * patch volume.
            positions: (n, 3), frame, row and column of each token.
            t: noise levels in [0, 1], (b g): runs of n / g neighbouring tokens share one.
            context: text states (b m context_dim).
            context_mask: (b m), True where there is text.
        Returns:
            (b n p).
        """
        config = self.config
        time = self.time_embedding(timestep_embedding(t, config.freq_dim))  # (b g d)
        modulation = self.time_projection(time).unflatten(-1, (6, config.dim))  # (b g 6 d)
        rotary = rotary_table(positions, config.dim // config.num_heads, config.rope_theta)
        context, mask = self.text_embedding(context), context_mask[:, None, None]
        x = self.patch_embedding(tokens)  # (b n d)
        for block in self.blocks:
            x = block(x, modulation, rotary, context, mask)
        shift, scale = (self.head_modulation + time[:, :, None]).to(x.dtype).unbind(2)
        return self.head(modulate(self.head_norm(x), shift, scale))

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor, context_mask: Tensor) -> Tensor:
        """Prediction for noisy latents.

        Args:
            x_t: noisy latents (b c f h w).
            t: noise level in [0, 1], one per clip (b,) or one per latent frame (b f).
            context: text states (b m context_dim).
            context_mask: (b m), True where there is text; at least one True per clip.
        Returns:
            Like x_t.
        Raises:
            ValueError: x_t does not divide into patches, or t fits neither form.
        """
        b, _, f, h, w = x_t.shape
        pf, ph, pw = self.config.patch_size
        if f % pf or h % ph or w % pw:
            raise ValueError(f"latents of {f}x{h}x{w} do not divide into patches of {pf}x{ph}x{pw}")
        if t.shape not in ((b,), (b, f)):
            raise ValueError(f"t has shape {tuple(t.shape)}; expected ({b},) or ({b}, {f})")
        # A patch of several frames takes the noise level of its first one.
        t = t[:, None] if t.ndim == 1 else t[:, ::pf]
        sizes = {"pf": pf, "ph": ph, "pw": pw}
        grid = (torch.arange(size, device=x_t.device) for size in (f // pf, h // ph, w // pw))
        positions = torch.cartesian_prod(*grid)
        tokens = rearrange(x_t, "b c (f pf) (h ph) (w pw) -> b (f h w) (c pf ph pw)", **sizes)
        tokens = self.forward_tokens(tokens, positions, t, context, context_mask)
        grid_shape = {"f": f // pf, "h": h // ph, "w": w // pw}
        return rearrange(
            tokens,
            "b (f h w) (pf ph pw c) -> b c (f pf) (h ph) (w pw)",
            **sizes,
            **grid_shape,
        )
