"""A folder of tensors that were computed once: named by what they depend on, and checked when read.

`index.json` holds the fingerprint, part by part, of everything that the tensors depend on. Shards are
safetensors files, each written in one step, so that a build that was cut short goes on where it
stopped. Every item in a shard has a checksum, which every read of it compares.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.files import replacing
from sample.processes import Ranks
from sample.shards import save_tensors

CHECKSUMS = "crc32"


class CacheFolder:
    """One such folder.

    Args:
        folder: made when missing.
        kind: what is in it, for messages.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind

    def shard(self, index: int) -> Path:
        return self.folder / f"shard-{index:05d}.safetensors"

    def claim(
        self, fingerprint: Mapping[str, str], ranks: Ranks, earlier: Mapping[str, str] | None = None
    ) -> None:
        """Opens the folder, or begins it; every rank calls it.

        Args:
            earlier: what folders of an earlier version have for some part, and mean the same.
        Raises:
            ValueError: it holds something else; names which part of the fingerprint differs.
        """
        error = None
        if ranks.is_main:
            try:
                self._check_or_start(fingerprint, earlier or {})
            except (OSError, ValueError) as reason:
                error = reason
        ranks.agree(error)

    def _check_or_start(self, fingerprint: Mapping[str, str], earlier: Mapping[str, str]) -> None:
        index = self.folder / "index.json"
        if index.is_file():
            try:
                found = dict(json.loads(index.read_text(encoding="utf-8"))["fingerprint"])
            except (ValueError, KeyError, TypeError):
                raise self._damaged(index, self.folder) from None
            for part in [*fingerprint, *found]:
                same = found.get(part) == fingerprint.get(part)
                if not same and (part not in earlier or found.get(part) != earlier[part]):
                    raise ValueError(
                        f"{self.kind} {self.folder} was made with another {part}: it has "
                        f"{found.get(part)}, this run {fingerprint.get(part)}; delete the folder or "
                        "choose another"
                    )
            return
        # A start that was cut short leaves a dot file behind; the states of texts have a folder inside.
        if self.folder.is_dir():
            others = [p for p in self.folder.iterdir() if p.name[0] != "." and p.name != "text"]
            if others:
                raise ValueError(
                    f"{self.kind} {self.folder} is a folder with something else in it; choose another"
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(index) as partial:
            partial.write_text(json.dumps({"fingerprint": dict(fingerprint)}, indent=1) + "\n")

    def missing(self, num_shards: int, ranks: Ranks) -> list[int]:
        """The shards that are to be made; the same on every rank, as nobody writes meanwhile."""
        found = [k for k in range(num_shards) if not self.shard(k).exists()]
        ranks.barrier()
        return found

    def write(self, index: int, tensors: dict[str, Tensor], about: Mapping[str, Any]) -> None:
        """A shard, in one step.

        Args:
            tensors: by name; CHECKSUMS of them is among them.
            about: kept beside them.
        """
        with replacing(self.shard(index)) as partial:
            save_tensors(tensors, partial, {"about": json.dumps(about)})

    def about(self, index: int) -> dict[str, Any]:
        """What was kept beside the tensors of a shard.

        Raises:
            ValueError: the shard is damaged.
        """
        with self.reading(index):
            return dict(json.loads((open_shard(self.shard(index)).metadata() or {})["about"]))

    @contextmanager
    def reading(self, index: int) -> Iterator[None]:
        """Turns what damage raises into one line."""
        try:
            yield
        except FileNotFoundError as error:
            path = self.shard(index)
            raise ValueError(
                f"{self.kind}: {path} is missing; the same command makes it"
            ) from error
        except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise self._damaged(self.shard(index), self.shard(index)) from error

    def _damaged(self, path: Path, remove: Path) -> ValueError:
        return ValueError(f"{self.kind}: {path} is damaged; delete {remove}, it is made anew")


def hash_weights(module: torch.nn.Module) -> str:
    """Sixteen hex digits of names, shapes and bits of all buffers and weights not in training."""
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    return hash_tensors({k: v for k, v in module.state_dict().items() if k not in trained})


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Sixteen hex digits of names, shapes and bits."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def checksum(*tensors: Tensor) -> int:
    """CRC-32 of the tensors' bytes, one after the other."""
    found = 0
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().flatten()
        found = zlib.crc32(flat.view(torch.uint8).numpy().data, found)
    return found


def open_shard(path: Path) -> Any:
    """A shard, mapped into memory: what is read of it can be given back to the system."""
    status = os.stat(path)
    return _mapped(path, status.st_ino, status.st_mtime_ns)


@lru_cache(maxsize=512)
def _mapped(path: Path, *version: int) -> Any:
    return safe_open(path, "pt")
