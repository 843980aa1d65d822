"""Randomness as a pure function of counters.

Data order, crops, captions, t and noise are all drawn from streams named by
(seed, counters...), never from the state of a generator that somebody carries along. So
resuming at step n needs only n, and a sample is the same on any rank or worker.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def stream_seed(seed: int, *counters: int | str) -> int:
    """A 63-bit seed for the stream named by `seed` and `counters`.

    A BLAKE2b hash of the values, with their types and lengths, so that (1, 23), (12, 3) and
    ("1", 23) are unrelated streams, and neighbouring counters are as unrelated as distant ones.

    Args:
        seed: the run's seed, any integer.
        counters: integers (step, sample index, ...) and strings (what the stream is for).
    Returns:
        An integer in [0, 2**63).
    Raises:
        TypeError: a value is neither an integer nor a string.
    """
    digest = hashlib.blake2b(digest_size=8)
    for value in (seed, *counters):
        if isinstance(value, str):
            kind, text = "s", value
        elif isinstance(value, (int, np.integer)):
            kind, text = "i", str(int(value))
        else:
            raise TypeError(f"stream_seed takes integers and strings, got {value!r}")
        encoded = text.encode()
        digest.update(f"{kind}{len(encoded)}:".encode() + encoded)
    return int.from_bytes(digest.digest(), "little") >> 1


def generator(
    seed: int, *counters: int | str, device: str | torch.device = "cpu"
) -> torch.Generator:
    """A fresh `torch.Generator` on `device` for the stream (seed, counters...)."""
    import torch  # here, so that rendering workers can use this module with numpy alone

    return torch.Generator(device=device).manual_seed(stream_seed(seed, *counters))


def numpy_generator(seed: int, *counters: int | str) -> np.random.Generator:
    """A fresh numpy generator for the stream (seed, counters...)."""
    return np.random.default_rng(stream_seed(seed, *counters))


@lru_cache(maxsize=16)  # 8 bytes an item: 80 MB for ten million
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return numpy_generator(seed, "permutation", epoch).permutation(n)


class Shuffle:
    """`permuted_index` of one stream, for many streams side by side: each keeps the permutations of
    the two epochs that it was asked for last.

    Args:
        seed, n: as `permuted_index`.
    """

    def __init__(self, seed: int, n: int) -> None:
        self.seed, self.n = seed, n
        self._epochs: dict[int, np.ndarray] = {}

    def __call__(self, g: int) -> int:
        epoch, position = divmod(g, self.n)
        if epoch not in self._epochs:
            while len(self._epochs) > 1:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = _permutation.__wrapped__(self.seed, epoch, self.n)
        return int(self._epochs[epoch][position])


def permuted_index(seed: int, g: int, n: int) -> int:
    """The `g`-th draw from range(n): an endless stream, freshly shuffled in each epoch.

    Draws [e*n, (e+1)*n) are a permutation of range(n), for every epoch e.

    Args:
        seed: names the stream.
        g: global sample counter, >= 0.
        n: number of items, >= 1.
    Returns:
        An index in [0, n).
    Raises:
        ValueError: g is negative or n is not positive.
    """
    if n < 1 or g < 0:
        raise ValueError(f"permuted_index needs n >= 1 and g >= 0, got n={n}, g={g}")
    epoch, position = divmod(g, n)
    return int(_permutation(seed, epoch, n)[position])
