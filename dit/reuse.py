"""Leaving out most of the network at steps where its features hardly change.

First-block caching (Cheng 2024, ParaAttention's "First Block Cache"; diffusers has it as
`FirstBlockCacheConfig`), after TeaCache (Liu et al. 2024, "Timestep Embedding Tells: It's Time to
Cache for Video Diffusion Model"): the first block is cheap and tells how much the rest would change.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


class FeatureReuse:
    """Of one sampling run: what the blocks after the first one last added, for each sample.

    A sample whose first block changes its features by nearly the same as when all blocks last ran,
    has the rest of that time's changes added and the other blocks left out. Every sample decides for
    itself, so that it does not depend on its batch. Row i of every call has to be the same sample;
    calls may leave out rows at the end (guidance does, outside its interval).

    Args:
        threshold: mean absolute difference between the first block's changes, as a share of the
            mean absolute change itself; below it the other blocks are left out. 0 never does, 0.05
            to 0.2 is usual.
    Raises:
        ValueError: the threshold is negative or not a finite number.
    """

    def __init__(self, threshold: float) -> None:
        if not (math.isfinite(threshold) and threshold >= 0):
            raise ValueError(f"reuse threshold={threshold}; use a finite number, 0 or more")
        self.threshold = threshold
        self.num_evaluated = 0  # samples that went through all blocks,
        self.num_skipped = 0  # and through the first alone
        self._first: Tensor | None = None  # change by the first block when all last ran, (b n d)
        self._rest: Tensor | None = None  # change by the others then, (b n d)

    def __call__(self, x: Tensor, x_1: Tensor, others: Callable[[Tensor | None], Tensor]) -> Tensor:
        """The features after all blocks, some of them from memory.

        Args:
            x: features before the first block, (b n d); x_1: after it.
            others: runs the other blocks on the given rows (k,) of x_1, on all for None.
        Returns:
            (b n d).
        Raises:
            ValueError: x is of another size than before; the state is of one run only.
        """
        first, rest = self._state(x)
        change = x_1 - x
        distance = (change - first).float().abs().mean(dim=(1, 2))
        # NaN, where a row is new, is not below any threshold.
        share = distance / first.float().abs().mean(dim=(1, 2))
        rows = (~(share < self.threshold)).nonzero()[:, 0]
        self.num_evaluated += len(rows)
        self.num_skipped += len(x) - len(rows)
        if not len(rows):
            return x_1 + rest
        y = others(None) if len(rows) == len(x) else (x_1 + rest).index_copy(0, rows, others(rows))
        first[rows] = change[rows].detach()
        rest[rows] = (y - x_1)[rows].detach()
        return y

    def _state(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is remembered of the rows of x; NaN for those never seen."""
        known = [torch.empty_like(x[:0]) if s is None else s for s in (self._first, self._rest)]
        if known[0].shape[1:] != x.shape[1:]:
            raise ValueError(
                f"feature reuse was begun with tokens {tuple(known[0].shape[1:])} and is now given "
                f"{tuple(x.shape[1:])}; make a new one for every sampling run"
            )
        new = x.new_full((max(0, len(x) - len(known[0])), *x.shape[1:]), math.nan)
        self._first, self._rest = (torch.cat([s, new.to(s)]) if len(new) else s for s in known)
        return self._first[: len(x)], self._rest[: len(x)]
