"""States of a frozen text encoder, computed once for every caption of a manifest.

A state behind the last that is visible and not zero is not kept: padding, which encoders make much of,
comes back when it is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.manifest import Manifest
from sample.processes import Ranks
from train.cache_folder import CHECKSUMS, CacheFolder, checksum, hash_weights, open_shard
from train.watchdog import beat

SHARD_CAPTIONS = 1024
_BATCH = 16


class TextCache(CacheFolder):
    """The folder `text` in a latent cache.

    Args:
        folder: of the latent cache.
        manifest: whose captions they are; the empty caption is always among them.
        dtype: float16 or float32, of what is stored.
    """

    def __init__(self, folder: Path, manifest: Manifest, dtype: str) -> None:
        super().__init__(folder / "text", "text cache")
        self.dtype = dtype
        self.captions = sorted({"", *(text for row in manifest.rows for text in row.captions)})
        self._place = {caption: place for place, caption in enumerate(self.captions)}

    def fingerprint(self, text: nn.Module) -> dict[str, str]:
        """What the states depend on, part by part."""
        captions = hashlib.sha256("\0".join(self.captions).encode("utf-8", "surrogatepass"))
        config: Any = text.config
        about = hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:8]
        return {
            "set of captions": captions.hexdigest()[:16],
            "text encoder": f"{hash_weights(text)} {about}",
            "dtype": self.dtype,
        }

    def build(self, text: Any, ranks: Ranks) -> None:
        """Makes the shards that are missing; every rank calls it and does its share.

        Args:
            text: frozen, and on the ranks' device.
        Raises:
            ValueError: the folder holds states of something else; names which part differs.
        """
        self.claim(self.fingerprint(text), ranks)
        count = -(-len(self.captions) // SHARD_CAPTIONS)
        mine = self.missing(count, ranks)[ranks.rank :: ranks.world_size]
        hidden = not (ranks.is_main and mine)
        total = sum(len(self._of(k)) for k in mine)
        with tqdm(total=total, desc="texts", unit="caption", disable=hidden) as bar:
            for index in mine:
                self._make(index, text, ranks.device, bar)
        ranks.barrier()

    def _of(self, index: int) -> list[str]:
        return self.captions[index * SHARD_CAPTIONS : (index + 1) * SHARD_CAPTIONS]

    @torch.no_grad()
    def _make(self, index: int, text: Any, device: torch.device, bar: tqdm[Any]) -> None:
        captions, dtype = self._of(index), getattr(torch, self.dtype)
        parts: list[Tensor] = []
        shown: list[int] = []
        width = 0
        for first in range(0, len(captions), _BATCH):
            beat()
            some = captions[first : first + _BATCH]
            with torch.autocast(device.type, enabled=False):
                states, mask = text(text.tokenize(some).to(device))
            width = states.shape[1]
            for state, visible in zip(states.to(dtype).cpu(), mask.cpu()):
                shown.append(int(visible.sum()))
                used = visible & (state != 0).any(dim=-1)
                length = int(used.nonzero().max()) + 1 if used.any() else 0
                parts.append(state[:length])
            bar.update(len(some))
        tensors = {
            "states": torch.cat(parts),
            "ends": torch.tensor([len(part) for part in parts]).cumsum(0),
            "visible": torch.tensor(shown),
            CHECKSUMS: torch.tensor([checksum(part) for part in parts]),
        }
        self.write(index, tensors, {"width": width})

    def read(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States (b m d) and context_mask (b m) of captions, as the encoder gives them.

        Raises:
            ValueError: bytes are not those that were written.
        """
        found = [self._read(self._place[caption]) for caption in captions]
        width = max(width for _, _, width in found)
        states = torch.zeros(len(found), width, found[0][0].shape[-1], dtype=found[0][0].dtype)
        for row, (state, _, _) in zip(states, found):
            row[: len(state)] = state
        visible = torch.tensor([count for _, count, _ in found])
        return states, torch.arange(width) < visible[:, None]

    def _read(self, place: int) -> tuple[Tensor, int, int]:
        index, row = divmod(place, SHARD_CAPTIONS)
        with self.reading(index):
            file = open_shard(self.shard(index))
            ends = self._ends(index)
            begin = int(ends[row - 1]) if row else 0
            states = file.get_slice("states")[begin : int(ends[row])]
            if checksum(states) != int(file.get_slice(CHECKSUMS)[row]):
                raise ValueError("checksum")
            return states, int(file.get_slice("visible")[row]), self._width(index)

    def _ends(self, index: int) -> np.ndarray:
        return open_shard(self.shard(index)).get_tensor("ends").numpy()

    def _width(self, index: int) -> int:
        return int(self.about(index)["width"])
