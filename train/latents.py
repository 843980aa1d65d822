"""The latent cache: every clip through the frozen VAE once, instead of once per epoch.

A folder of safetensors shards (posterior mean and standard deviation, and which manifest rows
they are) beside an `index.json` with the fingerprint of everything the latents depend on. A cache
made from anything else is an error, never silently used. Training draws from the posterior by
counter, so a cached run sees the draws that an uncached one would.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.manifest import Manifest
from data.randomness import numpy_generator, permuted_index
from data.video import VideoReadError, to_float
from dit.vae import VAE
from sample.processes import Ranks
from sample.shards import save_tensors
from train.clips import read_row
from train.config_data import DataConfig
from train.watchdog import beat

SHARD_ROWS = 256
_BATCH = 16
_DTYPES = {"float16": torch.float16, "float32": torch.float32}
_log = logging.getLogger(__name__)


def hash_weights(module: torch.nn.Module) -> str:
    """Sixteen hex digits of names, shapes and bits of all buffers and weights not in training."""
    digest = hashlib.sha256()
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    for name, value in sorted(module.state_dict().items()):
        if name in trained:
            continue
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


class _Rows(Dataset[tuple[int, Tensor | None, str]]):
    """Manifest rows in order: (row, clip or None, why not)."""

    def __init__(self, manifest: Manifest, rows: range, data: DataConfig) -> None:
        self.manifest, self.rows, self.data = manifest, rows, data

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, str]:
        row = self.rows[index]
        try:
            return row, read_row(self.manifest, self.manifest.rows[row], self.data), ""
        except VideoReadError as error:
            return row, None, str(error)


def _as_list(items: list[Any]) -> list[Any]:
    return items


class LatentCache:
    """A cache folder for one manifest, transform, VAE and dtype.

    Args:
        folder: made when missing.
        manifest, data: the clips.
        dtype: float16 or float32, of what is stored.
    """

    def __init__(self, folder: Path, manifest: Manifest, data: DataConfig, dtype: str) -> None:
        self.folder, self.manifest, self.data, self.dtype = folder, manifest, data, dtype
        self.num_shards = -(-len(manifest.rows) // SHARD_ROWS)

    def fingerprint(self, vae: VAE) -> dict[str, str]:
        """What the latents depend on, part by part."""
        data = self.data
        return {
            "manifest": self.manifest.fingerprint(),
            "version of the media files": self._hash_files(),
            "transform": f"{data.num_frames}x{data.height}x{data.width} at {data.fps:g} fps",
            "VAE": hash_weights(vae),
            "dtype": self.dtype,
        }

    def _hash_files(self) -> str:
        """Sixteen hex digits of local files' sizes and times of change, and of the paths of all."""
        digest = hashlib.sha256()
        for row in self.manifest.rows:
            digest.update(f"{row.path}\n".encode())
            if "://" not in row.path:
                try:
                    status = os.stat(self.manifest.locate(row))
                except OSError:  # reading it will say why
                    continue
                digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]

    def shard(self, index: int) -> Path:
        return self.folder / f"shard-{index:05d}.safetensors"

    def build(self, vae: VAE, ranks: Ranks) -> None:
        """Makes the shards that are missing; every rank calls it and does its share.

        Raises:
            ValueError: the folder holds latents of something else; names which part differs.
        """
        fingerprint = self.fingerprint(vae)
        if ranks.is_main:
            self._check_or_start(fingerprint)
        ranks.barrier()
        if not ranks.is_main:
            self._check_or_start(fingerprint)
        missing = [i for i in range(self.num_shards) if not self.shard(i).exists()]
        ranks.barrier()  # nobody writes before everybody has looked
        mine = missing[ranks.rank :: ranks.world_size]
        total = sum(len(self._rows_of(i)) for i in mine)
        with tqdm(
            total=total, desc="latents", unit="clip", disable=not (ranks.is_main and total)
        ) as bar:
            for index in mine:
                self._write_shard(index, vae, ranks.device, bar)
        ranks.barrier()

    def _check_or_start(self, fingerprint: dict[str, str]) -> None:
        index = self.folder / "index.json"
        if index.is_file():
            try:
                found = dict(json.loads(index.read_text(encoding="utf-8"))["fingerprint"])
            except (ValueError, KeyError, TypeError):
                raise self._damaged(index) from None
            for part, expected in fingerprint.items():
                if found.get(part) != expected:
                    raise ValueError(
                        f"latent cache {self.folder} was made with another {part}: it has "
                        f"{found.get(part)}, this run {expected}; delete the folder or choose "
                        "another recipe.latent_cache"
                    )
            return
        # A start that was cut short leaves a dot file behind.
        if self.folder.is_dir() and any(p.name[0] != "." for p in self.folder.iterdir()):
            raise ValueError(
                f"recipe.latent_cache {self.folder} is a folder with something else in it; "
                "choose another"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".index.json.{os.getpid()}.partial"
        text = {"fingerprint": fingerprint, "num_rows": len(self.manifest.rows)}
        partial.write_text(json.dumps(text, indent=1) + "\n")
        os.replace(partial, index)

    def _rows_of(self, index: int) -> range:
        return range(len(self.manifest.rows))[index * SHARD_ROWS : (index + 1) * SHARD_ROWS]

    @torch.no_grad()
    def _write_shard(self, index: int, vae: VAE, device: torch.device, bar: tqdm[Any]) -> None:
        c, f, h, w = vae.latent_shape(self.data.num_frames, self.data.height, self.data.width)
        means, stds = [torch.empty(0, c, f, h, w)], [torch.empty(0, c, f, h, w)]
        rows: list[int] = []
        bad: dict[str, str] = {}
        loader = DataLoader(
            _Rows(self.manifest, self._rows_of(index), self.data),
            batch_size=_BATCH,
            num_workers=self.data.num_workers,
            collate_fn=_as_list,
        )
        for items in loader:
            beat()
            bad.update({str(row): reason for row, clip, reason in items if clip is None})
            good = [(row, clip) for row, clip, _ in items if clip is not None]
            if good:
                video = torch.stack([clip for _, clip in good]).to(device)
                posterior = vae.encode(to_float(video))
                means.append(posterior.mean.cpu())
                stds.append(posterior.std.cpu())
                rows.extend(row for row, _ in good)
            bar.update(len(items))
        dtype = _DTYPES[self.dtype]
        tensors = {
            "mean": torch.cat(means).to(dtype),
            "std": torch.cat(stds).to(dtype),
            "rows": torch.tensor(rows, dtype=torch.long),
        }
        path = self.shard(index)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        save_tensors(tensors, partial, {"bad": json.dumps(bad)})
        os.replace(partial, path)

    def bad(self) -> dict[int, str]:
        """Rows that could not be read, with the reason; known once the cache is built."""
        found: dict[int, str] = {}
        for index in range(self.num_shards):
            with self._reading(index), safe_open(self.shard(index), "pt") as file:
                reasons = json.loads((file.metadata() or {}).get("bad", "{}"))
            found.update({int(row): reason for row, reason in reasons.items()})
        return found

    def load(self, index: int) -> dict[str, Tensor]:
        """A shard: mean and std (n c f h w), and the rows (n,) they belong to.

        Raises:
            ValueError: it is damaged.
        """
        with self._reading(index):
            tensors = load_file(self.shard(index))
            lengths = [len(tensors[name]) for name in ("mean", "std", "rows")]
            with safe_open(self.shard(index), "pt") as file:
                num_bad = len(json.loads((file.metadata() or {}).get("bad", "{}")))
            if lengths != [len(self._rows_of(index)) - num_bad] * 3:
                raise ValueError(f"{lengths} latents")
        return tensors

    @contextmanager
    def _reading(self, index: int) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, ValueError, KeyError) as error:
            raise self._damaged(self.shard(index)) from error

    def _damaged(self, path: Path) -> ValueError:
        return ValueError(f"latent cache: {path} is damaged; delete {self.folder}, it is made anew")


class CachedLatents(Dataset[Any]):
    """Posteriors and captions by global sample counter: the same rows and wordings in the same
    order as a ClipDataset of the same seed gives, as long as every clip can be read.

    Args:
        cache: built.
        seed: of the run.
        max_bad_share: of the clips that could not be read, above which there is no dataset.
    Raises:
        ValueError: no clip, or too few of them, could be read.
    """

    def __init__(self, cache: LatentCache, seed: int, max_bad_share: float) -> None:
        self.manifest, self.seed = cache.manifest, seed
        bad = cache.bad()
        for reason in bad.values():
            _log.warning("left out: %s", reason)
        share = len(bad) / len(cache.manifest.rows)
        if share > max_bad_share:
            raise ValueError(
                f"{len(bad)} of {len(cache.manifest.rows)} clips cannot be read, a share of "
                f"{share:.3f}, more than data.max_bad_share={max_bad_share}; run "
                f"`zoetrope data check {cache.manifest.path}`"
            )
        self._shards = [cache.load(i) for i in range(cache.num_shards)]
        self._places = [
            (shard, place, row)
            for shard, tensors in enumerate(self._shards)
            for place, row in enumerate(tensors["rows"].tolist())
        ]
        if not self._places:
            raise ValueError(f"no clip of {cache.manifest.path} could be read")

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, g: int) -> dict[str, Any]:
        shard, place, row = self._places[permuted_index(self.seed, g, len(self))]
        captions = self.manifest.rows[row].captions
        choice = 0
        if len(captions) > 1:
            choice = int(numpy_generator(self.seed, "clip", g).integers(len(captions)))
        tensors = self._shards[shard]
        return {
            "mean": tensors["mean"][place],
            "std": tensors["std"][place],
            "caption": captions[choice],
            "row": row,
            "g": g,
        }

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "mean": torch.stack([item["mean"] for item in items]),
            "std": torch.stack([item["std"] for item in items]),
            "captions": [item["caption"] for item in items],
            "rows": [item["row"] for item in items],
            "g": [item["g"] for item in items],
        }
