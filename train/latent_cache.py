"""The latent cache: every clip through the frozen VAE once, instead of once per epoch.

A folder of shards (posterior mean and standard deviation of the clips of some rows, all of one size) as
`train.cache_folder` has them. A cache made from anything else is an error, never silently used.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.buckets import Size, row_sizes, size_name
from data.loader import ClipLoader
from data.manifest import Manifest
from data.video import to_float
from dit.vae import VAE
from sample.pipeline import MAX_BATCH_CELLS
from sample.processes import Ranks
from train.cache_folder import (
    CHECKSUMS,
    CacheFolder,
    checksum,
    hash_tensors,
    hash_weights,
    open_shard,
)
from train.clips import GivenRows
from train.config_data import DataConfig
from train.stills import cut_stills
from train.stopping import STOPS
from train.watchdog import beat

SHARD_ROWS = 256
SHARD_PIXELS = 2**31  # fewer rows of large clips: a shard is in memory while it is made
_BATCH = 16
_DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Shard:
    """Which rows a shard is of, their size, and how many reference pictures each has."""

    size: Size
    rows: np.ndarray
    references: int


class LatentCache(CacheFolder):
    """A cache folder for one manifest, transform, VAE and dtype.

    Args:
        folder: made when missing.
        manifest, data: the clips; each row has one size, and its clip is at the row's start.
        dtype: float16 or float32, of what is stored.
        quarantine: files that are not to be touched, and why; what costs a worker is added.
        stills: single frames of each clip that are encoded by themselves, as pictures are; their
            latents lie behind the clip's. See train/tasks.py.
        references: whether those of the pictures of its subjects lie behind these.
    Raises:
        ValueError: rows may have several sizes.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        data: DataConfig,
        dtype: str,
        quarantine: dict[str, str] | None = None,
        stills: int = 0,
        references: bool = False,
    ) -> None:
        super().__init__(folder, "latent cache")
        self.stills, self.references = stills, references
        self.manifest, self.data, self.dtype = manifest, data, dtype
        self._quarantine = {} if quarantine is None else quarantine
        self.of_row = row_sizes(manifest, data)  # index in data.sizes, -1 for rows not in training
        self.num_references = manifest.num_references * references  # of each row
        self.shards: list[Shard] = []
        # Of each row, its shard and its place among that shard's rows.
        self.places = np.full((len(self.of_row), 2), -1, np.int64)
        for k, size in enumerate(data.sizes):
            count = max(1, min(SHARD_ROWS, SHARD_PIXELS // int(np.prod(size))))
            for number in np.unique(self.num_references).tolist():
                rows = np.flatnonzero((self.of_row == k) & (self.num_references == number))
                for first in range(0, len(rows), count):
                    part = rows[first : first + count]
                    self.places[part, 0] = len(self.shards)
                    self.places[part, 1] = np.arange(len(part))
                    self.shards.append(Shard(size, part, number))

    def fingerprint(self, vae: VAE) -> dict[str, str]:
        """What the latents depend on, part by part."""
        data = self.data
        sizes = size_name(data.sizes[0])
        if data.native is not None:
            layout = hashlib.sha256(f"{data.sizes} {self.of_row.tolist()}".encode())
            sizes = f"{len(data.sizes)} native sizes ({layout.hexdigest()[:8]})"
        return {
            "list of clips": self._hash_clips(),
            "version of the media files": self._hash_files(),
            "transform": f"{sizes} at {data.fps:g} fps"
            + (f", {self.stills} still(s)" if self.stills else "")
            + (", references" if self.references else ""),
            "VAE": hash_tensors(vae.encoding_state()),
            "dtype": self.dtype,
        }

    def _hash_clips(self) -> str:
        """Sixteen hex digits of what is read of each row; captions and measurements do not matter."""
        digest = hashlib.sha256()
        for row in self.manifest.rows:
            pictures = f" {row.references}" if self.references and row.references else ""
            text = f"{row.path!r} {row.start} {row.end} {row.crop}{pictures}\n"
            digest.update(text.encode())
        return digest.hexdigest()[:16]

    def _hash_files(self) -> str:
        """Sixteen hex digits of local files' sizes and times of change."""
        digest = hashlib.sha256()
        for path in self._files():
            if "://" not in path:
                try:
                    status = os.stat(path.partition("#")[0] if ".tar#" in path else path)
                except OSError:  # reading it will say why
                    continue
                digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]

    def _files(self) -> dict[str, None]:
        """All that is read, each once."""
        found: dict[str, None] = {}
        for row in self.manifest.rows:
            found[self.manifest.locate(row)] = None
            if self.references:
                found.update(dict.fromkeys(self.manifest.locate_references(row)))
        return found

    def build(self, vae: VAE, ranks: Ranks, retry: bool = False) -> None:
        """Makes the shards that are missing; every rank calls it and does its share.

        Args:
            retry: those too in which clips are missing that could not be read.
        Raises:
            ValueError: the folder holds latents of something else, and which part differs is named; or
                the VAE cannot take clips of a size.
        """
        for shard in self.shards:
            vae.latent_shape(*shard.size)  # raises, before the folder has a name, what does not fit
        self.claim(self.fingerprint(vae), ranks, earlier={"VAE": hash_weights(vae)})
        wanted = self.missing(len(self.shards), ranks)
        if retry:
            there = [k for k in range(len(self.shards)) if k not in set(wanted)]
            wanted = sorted([*wanted, *(k for k in there if self.about(k)["bad"])])
            ranks.barrier()  # nobody writes before everybody has looked
        mine = wanted[ranks.rank :: ranks.world_size]
        total = sum(len(self.shards[k].rows) for k in mine)
        hidden = not (ranks.is_main and total)
        with tqdm(total=total, desc="latents", unit="clip", disable=hidden) as bar:
            for index in mine:
                self._make(index, vae, ranks.device, bar)
        ranks.barrier()

    @torch.no_grad()
    def _make(self, index: int, vae: VAE, device: torch.device, bar: tqdm[Any]) -> None:
        shard, dtype = self.shards[index], _DTYPES[self.dtype]
        c, f, h, w = vae.latent_shape(*shard.size)
        shape = (len(shard.rows), c, f + self.stills + shard.references, h, w)
        means, stds = (torch.zeros(shape, dtype=dtype) for _ in range(2))
        sums = torch.zeros(len(shard.rows), dtype=torch.int64)
        bad: dict[str, str] = {}
        batch = max(1, min(_BATCH, MAX_BATCH_CELLS // int(np.prod(shard.size))))
        numbers = [list(range(k, min(k + batch, len(sums)))) for k in range(0, len(sums), batch)]
        loader = ClipLoader(
            GivenRows(self.manifest, shard.rows, self.data, shard.size, self.references),
            numbers,
            workers=self.data.num_workers,
            file_seconds=self.data.file_seconds,
            memory_limit=self.data.worker_memory_gb * 1e9,
            signals=tuple(STOPS),
            quarantine=self._quarantine,
        )
        for items in loader:
            beat()
            bad.update({str(shard.rows[place]): reason for place, reason in items["unread"]})
            if items["places"]:
                together = torch.stack(items["videos"]).to(device)
                video, pictures = together.tensor_split([shard.size[0]], dim=2)
                rows = shard.rows[items["places"]].tolist()
                stills = [*cut_stills(video, rows, self.stills), *pictures.split(1, dim=2)]
                with torch.autocast(device.type, enabled=False):
                    # A picture is a clip of one frame, encoded by itself.
                    every = [video, *(still for still in stills if still.shape[2])]
                    parts = [vae.encode(to_float(part)) for part in every]
                mean = torch.cat([part.mean for part in parts], dim=2).to(dtype).cpu()
                std = torch.cat([part.std for part in parts], dim=2).to(dtype).cpu()
                for k, place in enumerate(items["places"]):
                    means[place], stds[place] = mean[k], std[k]
                    sums[place] = checksum(mean[k], std[k])
            bar.update(len(items["places"]) + len(items["unread"]))
        tensors = {"mean": means, "std": stds, CHECKSUMS: sums}
        self.write(index, tensors, {"rows": shard.rows.tolist(), "bad": bad})

    def bad(self) -> dict[int, str]:
        """Rows that could not be read, with the reason; known once the cache is built.

        Raises:
            ValueError: a shard is damaged, or of other rows.
        """
        found: dict[int, str] = {}
        for index, shard in enumerate(self.shards):
            about = self.about(index)
            with self.reading(index):
                file = open_shard(self.shard(index))
                shapes = [
                    file.get_slice(name).get_shape()[0] for name in ("mean", "std", CHECKSUMS)
                ]
                if about["rows"] != shard.rows.tolist() or shapes != [len(shard.rows)] * 3:
                    raise ValueError(f"rows {about['rows']}, {shapes} latents")
                found.update({int(row): str(reason) for row, reason in about["bad"].items()})
        return found

    def num_bytes(self) -> int:
        """Of all shards."""
        return sum(self.shard(k).stat().st_size for k in range(len(self.shards)))


def read_posterior(path: Path, place: int) -> Tensor:
    """Mean and standard deviation of one clip, (2 c f h w), as they are stored.

    Raises:
        ValueError: its bytes are not those that were written.
    """
    with CacheFolder(path.parent, "latent cache").reading(int(path.stem.rpartition("-")[2])):
        file = open_shard(path)
        both = [file.get_slice(name)[place] for name in ("mean", "std")]
        if checksum(*both) != int(file.get_slice(CHECKSUMS)[place]):
            raise ValueError("checksum")
        return torch.stack(both)
