"""Context parallelism: several processes work on one sequence of tokens, each on a part of it.

Applied to a DiT from outside. Its tokens are cut before the blocks and put together after them. In
between all layers see single tokens, except for self-attention, which exchanges what it needs:

    ulysses   all tokens of some heads, in place of some tokens of all heads, and back (Jacobs et al.
              2023, "DeepSpeed Ulysses", section 3.2); heads must divide
    gather    keys and values of all tokens, for the queries at hand

Both give each query the same softmax over the same keys as in one process. Parts may differ in
length, so there is no padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from dit.attention import Backend, Segments, attention
from dit.reuse import FeatureReuse
from dit.transformer import Block, DiT, PreparedContext
from sample.processes import Ranks

Method = Literal["auto", "ulysses", "gather"]


def cut_points(num_tokens: int, num_runs: int, parts: int) -> list[int]:
    """Where a sequence is cut into parts of nearly the same length, from 0 to num_tokens.

    Args:
        num_runs: runs of neighbouring tokens of one noise level. With several, cuts lie at multiples
            of a divisor of their length, so that a part's tokens fall into equally long runs too:
            the largest that leaves parts unequal by no more than a sixteenth.
    Raises:
        ValueError: fewer tokens than parts.
    """
    if num_tokens < parts:
        raise ValueError(
            f"{num_tokens} tokens cannot be cut into {parts} parts: use a smaller context size"
        )
    unit = 1
    if num_runs > 1:
        run = num_tokens // num_runs
        largest = max(1, num_tokens // (16 * parts))
        even = math.gcd(run, num_tokens // parts) if num_tokens % parts == 0 else 1
        fitting = [d for d in range(1, min(run, largest) + 1) if run % d == 0]
        unit = max([even, *fitting])
    units = num_tokens // unit
    return [units * part // parts * unit for part in range(parts + 1)]


class ContextGroup:
    """Processes that share sequences, and what they exchange.

    Args:
        group: of torch.distributed; this process's part is its rank in it.
        method: how attention exchanges tokens; auto is ulysses where heads divide.
    """

    def __init__(self, group: dist.ProcessGroup, method: Method = "auto") -> None:
        self.group, self.method = group, method
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.enabled = True
        self.lengths: list[int] = []  # tokens of each part, of the sequence at work

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside it every process works on whole sequences by itself."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def exchange(self, parts: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
        """Sends the k-th tensor to the k-th process; returns what each sent here, in these shapes.
        Differentiable: gradients go back the way that tensors came."""
        sent = [part.numel() for part in parts]
        received = [math.prod(shape) for shape in shapes]
        flat = torch.cat([part.flatten() for part in parts])
        result = all_to_all_single_autograd(flat, received, sent, self.group)
        pieces = result.split(received)
        return [piece.view(shape) for piece, shape in zip(pieces, shapes)]

    def gather(self, part: Tensor, dim: int) -> Tensor:
        """All processes' parts along the dimension of tokens, on each of them.

        The gradient adds up what all of them do with this part.
        """
        shapes = [(*part.shape[:dim], n, *part.shape[dim + 1 :]) for n in self.lengths]
        return torch.cat(self.exchange([part] * self.size, shapes), dim)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | Segments | None = None,
        backend: Backend = "auto",
    ) -> Tensor:
        """`dit.attention.attention` among all tokens, from and to this process's (b heads n d)."""
        if not self.enabled:
            return attention(q, k, v, mask, backend)
        divides = q.shape[1] % self.size == 0
        if self.method == "gather" or not divides:
            k, v = self.gather(torch.stack((k, v)), dim=3).unbind(0)
            return attention(q, k, v, mask, backend)
        b, heads, n, d = q.shape
        share = heads // self.size
        mine = list(torch.stack((q, k, v)).split(share, dim=2))
        shapes = [(3, b, share, length, d) for length in self.lengths]
        q, k, v = torch.cat(self.exchange(mine, shapes), dim=3).unbind(0)
        y = attention(q, k, v, mask, backend)
        back = self.exchange(list(y.split(self.lengths, dim=2)), [(b, share, n, d)] * self.size)
        return torch.cat(back, dim=1)

    def apply(self, dit: DiT) -> None:
        """Has the DiT work on this process's part of every sequence, and return all of it.

        Raises:
            ValueError: its heads do not divide, and the method is ulysses.
        """
        heads = dit.config.num_heads
        if self.method == "ulysses" and heads % self.size:
            raise ValueError(
                f"context method ulysses: {heads} heads do not divide among {self.size} processes; "
                "use gather or auto, or another context size"
            )
        whole = dit.forward_tokens

        def forward_tokens(
            tokens: Tensor,
            positions: Tensor,
            t: Tensor,
            context: Tensor | PreparedContext,
            mask: Tensor | Segments | None = None,
            segments: Segments | None = None,
            reuse: FeatureReuse | None = None,
        ) -> Tensor:
            if not self.enabled:
                return whole(tokens, positions, t, context, mask, segments, reuse)
            if segments is not None or reuse is not None:
                raise ValueError("packed rows and feature reuse need a context size of 1")
            cuts = cut_points(tokens.shape[1], t.shape[1], self.size)
            self.lengths = [end - start for start, end in zip(cuts, cuts[1:])]
            start, end = cuts[self.rank], cuts[self.rank + 1]
            levels = _levels_of_part(t, tokens.shape[1], start, end)
            part = whole(tokens[:, start:end], positions[..., start:end, :], levels, context, mask)
            return self.gather(part, dim=1)

        dit.forward_tokens = forward_tokens
        for block in dit.blocks:
            assert isinstance(block, Block)
            block.self_attention.attend = self.attention


def share(dits: Iterable[DiT], ranks: Ranks, method: Method = "auto") -> ContextGroup:
    """Has the ranks of this one's context work on the sequences of networks together.

    Raises:
        ValueError: heads do not divide, and the method is ulysses.
    """
    assert ranks.mesh is not None
    group = ContextGroup(ranks.mesh["context"].get_group(), method)
    for dit in dits:
        group.apply(dit)
    return group


def _levels_of_part(t: Tensor, num_tokens: int, start: int, end: int) -> Tensor:
    """Noise levels (b g) of all tokens as those of tokens start to end, a row for equal runs."""
    if t.shape[1] == 1:
        return t
    run = num_tokens // t.shape[1]
    unit = math.gcd(run, start, end)
    return t.repeat_interleave(run // unit, dim=1)[:, start // unit : end // unit]
