"""What the blocks of the transformer are made of: positions, noise levels, norms, attention."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dit.attention import Backend, Segments, attention


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
        positions: (n 3) or (b n 3), the frame, row and column of each token; may be fractional.
    Returns:
        cos and sin, each float32 (n d/2) or (b 1 n d/2), for (b heads n d) tensors.
    """
    side = 2 * (head_dim // 6)
    angles = []
    for axis, dim in enumerate((head_dim - 2 * side, side, side)):
        exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float64) / dim
        angles.append(positions[..., axis, None].double() * theta**-exponents)
    table = torch.cat(angles, dim=-1)
    table = table[:, None] if table.ndim == 3 else table
    return table.cos().float(), table.sin().float()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates neighbouring feature pairs of x (b heads n d) by the table's angles (n d/2)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    pairs = x.to(wide).unflatten(-1, (-1, 2))
    cos, sin = (table.to(wide) for table in rotary)
    if torch.compiler.is_compiling():  # no kernels for complex numbers, but these fuse
        even, odd = pairs.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:  # four times quicker than steps of two through memory
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return turned.flatten(-2).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (b n d) times 1 + scale plus shift, both (b g d): token groups of n / g share a row."""
    groups = x.unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift[:, :, None], groups, 1 + scale[:, :, None]).flatten(1, 2)


def gated_add(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """x + gate * update, with gate (b g d) shared by token groups as in `modulate`."""
    groups = (tensor.unflatten(1, (gate.shape[1], -1)) for tensor in (x, update))
    residual, update = groups
    return torch.addcmul(residual, update, gate[:, :, None]).flatten(1, 2)


class GELU(nn.Module):
    """x Phi(x), with the tanh approximation of Phi (Hendrycks & Gimpel 2016, section 2)."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return F.gelu(x, approximate="tanh")
        # (1 + tanh u) / 2 is the sigmoid of 2 u, whose compiled kernel is three times as quick.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        double_u = wide * (1 + 0.044715 * wide * wide) * math.sqrt(8 / math.pi)
        return (wide * double_u.sigmoid()).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) * gain in float32, for CPUs: torch has no kernel of its own there, and its chain of
    steps goes through memory twice as often."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = (norm.square() / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, gain, scale)
        return (x.to(wide) * scale).mul_(gain).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, gain, scale = ctx.saved_tensors
        unit, grad = x * scale, grad.to(scale.dtype)  # scale makes both wide
        grad_unit = grad * gain
        along = torch.linalg.vecdot(grad_unit, unit)[..., None] / x.shape[-1]
        grad_x = torch.addcmul(grad_unit, unit, along, value=-1).mul_(scale)
        return grad_x.to(x.dtype), (grad * unit).flatten(0, -2).sum(0).to(gain.dtype), None


class RMSNorm(nn.RMSNorm):
    """torch's, by its quickest way: on a GPU its kernel, which needs the gain in the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.eps is not None
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[return-value]
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


KeysValues = tuple[Tensor, Tensor]  # each (b heads m d)


class Attention(nn.Module):
    """Multi-head attention with RMS-normalised q and k over the full width (Wan, section 4.2)."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.backend: Backend = "auto"
        self.attend = attention  # replaced where several processes share a sequence
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps=eps)
        self.norm_k = RMSNorm(dim, eps=eps)

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (k d) -> b k n d", k=self.num_heads)

    def keys_values(self, context: Tensor) -> KeysValues:
        """What queries see of context (b m d)."""
        return self._heads(self.norm_k(self.k(context))), self._heads(self.v(context))

    def forward(
        self,
        x: Tensor,
        context: Tensor | KeysValues,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | Segments | None = None,
    ) -> Tensor:
        q = self._heads(self.norm_q(self.q(x)))
        k, v = self.keys_values(context) if isinstance(context, Tensor) else context
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        y = self.attend(q.to(v.dtype), k.to(v.dtype), v, mask, self.backend)
        return self.out(rearrange(y, "b k n d -> b n (k d)"))
