"""Attention: the one function of the project, softmax(q k^T / sqrt(d)) v, and the kernels behind it.

    plain   two matrix products and a softmax
    sdpa    torch.nn.functional.scaled_dot_product_attention
    varlen  torch.nn.attention.varlen: packed runs without padding; CUDA, float16 and bfloat16
    flex    torch.nn.attention.flex_attention: block-sparse masks; compiled on CUDA, on a CPU slow
            and without gradients
    auto    sdpa, except: plain for few keys on a CPU; varlen for packed runs where it works,
            otherwise each run by itself

Which keys a query may see is a mask, or `Segments` where several clips share a row.
"""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

Backend = Literal["auto", "plain", "sdpa", "varlen", "flex"]

# On a CPU two plain matmuls beat the fused kernel, whose backward pass is slow, up to so many keys
# (docs/benchmarks.md): in bfloat16 by far, but the scores are kept for the backward pass, and beyond
# this take too much memory.
CPU_PLAIN_KEYS = {torch.bfloat16: 2048, torch.float32: 512, torch.float64: 512}
# Scores computed at once: few enough to be still in the cache when the softmax comes.
CPU_PLAIN_SCORES = 2**21


class Segments:
    """Runs of neighbouring tokens in one packed row: query run i sees key run i and nothing else.

    A token's segment id is the number of its run. `q_ids` (n,) and `k_ids` (m,) hold them, `q_ends`
    and `k_ends` (runs + 1,) the borders between runs from 0 on, int32.

    Args:
        q_lengths: tokens in each run of queries.
        k_lengths: tokens in each run of keys, as many runs; a run without keys gives zeros.
        device: of the tensors to attend to.
    """

    def __init__(
        self, q_lengths: Sequence[int], k_lengths: Sequence[int], device: torch.device
    ) -> None:
        assert len(q_lengths) == len(k_lengths)
        self.q_lengths, self.k_lengths = tuple(q_lengths), tuple(k_lengths)
        self.q_ids, self.q_ends = _ids_and_ends(self.q_lengths, device)
        self.k_ids, self.k_ends = _ids_and_ends(self.k_lengths, device)

    @cached_property
    def block_mask(self) -> Any:
        """For flex attention; built once, as every block of the network sees the same runs."""
        from torch.nn.attention.flex_attention import create_block_mask

        q_ids, k_ids = self.q_ids, self.k_ids
        sizes = None, None, len(q_ids), len(k_ids)
        return create_block_mask(lambda b, h, i, j: q_ids[i] == k_ids[j], *sizes, q_ids.device)


def _ids_and_ends(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    counts = torch.tensor(lengths)
    ids = torch.arange(len(lengths)).repeat_interleave(counts)
    ends = F.pad(counts.cumsum(0), (1, 0)).int()
    return ids.to(device), ends.to(device)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | Segments | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Softmax attention.

    Args:
        q: (b heads n d); k and v: (b heads m d).
        mask: (b 1 1 m), True where a key may be seen; or the runs of a packed row, with b = 1; or
            None, and every query sees every key.
        backend: the kernel; see above.
    Returns:
        (b heads n d), in v's dtype.
    Raises:
        ValueError: the backend does not work on this device or dtype.
    """
    if isinstance(mask, Segments):
        assert q.shape[0] == 1
        if backend == "auto" and _varlen_works(q):
            backend = "varlen"
        if backend in ("auto", "plain", "sdpa"):
            runs = (
                q.split(mask.q_lengths, dim=2),
                *(x.split(mask.k_lengths, dim=2) for x in (k, v)),
            )
            return torch.cat([attention(*run, backend=backend) for run in zip(*runs)], dim=2)
        return _varlen(q, k, v, mask) if backend == "varlen" else _flex(q, k, v, mask)
    if backend == "auto":
        few = q.device.type == "cpu" and k.shape[-2] <= CPU_PLAIN_KEYS.get(q.dtype, 0)
        backend = "plain" if few else "sdpa"
    match backend:
        case "plain":
            return _plain(q, k, v, mask)
        case "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        case "varlen":
            return _varlen(q, k, v, mask)
        case "flex":
            return _flex(q, k, v, mask)


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """In pieces of some clips, or of some heads of one clip."""
    b, heads, n, _ = q.shape
    at_once = max(1, CPU_PLAIN_SCORES // max(1, n * k.shape[2]))  # heads, of one clip or several
    if b * heads > at_once:
        dim, size = (1, at_once) if b == 1 else (0, max(1, at_once // heads))
        qs, ks, vs = (x.split(size, dim) for x in (q, k, v))
        masks = [mask] * len(qs) if b == 1 or mask is None else mask.expand(b, 1, 1, -1).split(size)
        return torch.cat([_plain(*of) for of in zip(qs, ks, vs, masks, strict=True)], dim)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    # It computes in float32 in any case; given the dtype, autocast on a GPU does not write float32.
    return scores.softmax(dim=-1, dtype=scores.dtype) @ v


def _varlen_works(q: Tensor) -> bool:
    half = q.dtype in (torch.float16, torch.bfloat16)
    return q.is_cuda and half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def _varlen(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Segments | None) -> Tensor:
    """A batch is a packed row as well: a run per clip, and masked keys left out."""
    if not _varlen_works(q):
        raise ValueError(
            f"attention backend varlen got {str(q.dtype).removeprefix('torch.')} with head size "
            f"{q.shape[-1]} on {q.device.type}; it needs float16 or bfloat16, a head size that is "
            "a multiple of 8 up to 256, and CUDA; use auto"
        )
    return varlen_rows(q, k, v, mask)


def varlen_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Segments | None) -> Tensor:
    """Lays (b heads n d) tensors out as torch's varlen_attn wants them, and its result back."""
    from torch.nn.attention.varlen import varlen_attn

    b, n, m = q.shape[0], q.shape[2], k.shape[2]
    q, k, v = (rearrange(x, "b heads n d -> (b n) heads d") for x in (q, k, v))
    if isinstance(mask, Segments):
        ends, longest = (mask.q_ends, mask.k_ends), (max(mask.q_lengths), max(mask.k_lengths))
    else:
        seen = torch.full((b,), m, device=q.device)
        if mask is not None:
            visible = mask.expand(b, 1, 1, m).flatten()
            seen, k, v = visible.view(b, m).sum(dim=1), k[visible], v[visible]
        k_ends = F.pad(seen.cumsum(0), (1, 0)).int()
        q_ends = torch.arange(0, b * n + 1, n, device=q.device, dtype=torch.int32)
        ends, longest = (q_ends, k_ends), (n, m)
    y = varlen_attn(q, k, v, *ends, *longest)
    assert isinstance(y, Tensor)
    return rearrange(y, "(b n) heads d -> b heads n d", b=b)


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Segments | None) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    on_cpu = q.device.type == "cpu"
    if on_cpu and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("attention backend flex has no gradients on a CPU; use auto")
    block_mask = None
    if isinstance(mask, Segments):
        block_mask = mask.block_mask
    elif mask is not None:
        visible = mask.expand(len(q), 1, 1, k.shape[2])[:, 0, 0]
        sizes = len(q), None, q.shape[2], k.shape[2]
        block_mask = create_block_mask(lambda b, h, i, j: visible[b, j], *sizes, q.device)
    # Compiling for a CPU takes longer than the tiny inputs that anyone gives it there.
    run = flex_attention if on_cpu else _compiled_flex()
    return run(q, k, v, block_mask=block_mask)
