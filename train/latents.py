"""Training from cached latents: the same rows, wordings and draws in the same order as from video."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data.dataset import ClipDataset, ClipRequest, described, flatten, read_sample
from data.video_file import VideoReadError
from train.clips import TrainingClips
from train.latent_cache import LatentCache, read_posterior
from train.stills import num_stills
from train.text_cache import TextCache

if TYPE_CHECKING:
    from train.recipe_dit import DiTRecipe

_log = logging.getLogger(__name__)

# The captions that the network sees, of samples by number: some are dropped.
ShownCaptions = Callable[[Sequence[int], Sequence[str]], list[str]]


@dataclass(frozen=True)
class LatentRequest(ClipRequest):
    """A clip's place in the cache.

    Attributes:
        shard, place: where it lies.
        reason: why it is not there; empty if it is.
        kept: the cache's tensors where all of them are in memory, (n 2 c f h w).
    """

    shard: Path = Path()
    place: int = 0
    reason: str = ""
    kept: Tensor | None = field(default=None, compare=False)

    @property
    def is_here(self) -> bool:
        return self.kept is not None or bool(self.reason)

    def read(self, note: Any = None, /) -> Tensor:
        """Mean and standard deviation, (2 c f h w)."""
        if self.reason:
            raise VideoReadError(self.path, self.reason)
        return read_posterior(self.shard, self.place) if self.kept is None else self.kept


def cached_latents(recipe: DiTRecipe) -> CachedLatents:
    """The dataset of a run with recipe.latent_cache, which is built where it is not; with the states of
    the captions, if the text encoder is frozen. Every rank calls it.

    Raises:
        ValueError: the cache is of something else, or damaged.
    """
    options, data, ranks = recipe.options, recipe.config.data, recipe.ranks
    assert options.latent_cache is not None
    manifest = recipe.data.train
    cache = LatentCache(
        *(options.latent_cache, manifest, data, options.cache_dtype, recipe.quarantine),
        stills=num_stills(options.tasks),
        references=recipe.config.gives_references,
    )
    recipe.vae.to(ranks.device)
    cache.build(recipe.vae, ranks)
    texts = None
    if not any(p.requires_grad for p in recipe.text.parameters()):
        texts = TextCache(options.latent_cache, manifest, options.cache_dtype)
        recipe.text.to(ranks.device)
        texts.build(recipe.text, ranks)
    clips = TrainingClips(manifest, recipe.config, recipe.order)
    memory = data.memory_gb * 1e9
    return CachedLatents(cache, clips, data.max_bad_share, memory, texts, recipe.shown)


class CachedLatents:
    """Posteriors and captions by global sample counter.

    Args:
        cache: built.
        clips: the dataset whose samples they are, with random_start off.
        max_bad_share: of the clips that could not be read, above which there is no dataset.
        memory: bytes; a cache that is no larger is read once, and kept.
        texts: built; None where the text encoder runs in every step.
        shown: which captions the network sees; needed with texts.
    Raises:
        ValueError: no clip, or too few of them, could be read; or the cache is damaged.
    """

    def __init__(
        self,
        cache: LatentCache,
        clips: ClipDataset,
        max_bad_share: float,
        memory: float = 0.0,
        texts: TextCache | None = None,
        shown: ShownCaptions | None = None,
    ) -> None:
        self.cache, self.clips, self.manifest = cache, clips, clips.manifest
        self.texts, self.shown = texts, shown
        self.bad = cache.bad()
        for reason in self.bad.values():
            _log.warning("left out: %s", reason)
        num_rows = sum(len(shard.rows) for shard in cache.shards)
        share = len(self.bad) / num_rows
        if share > max_bad_share:
            raise ValueError(
                f"{len(self.bad)} of {num_rows} clips cannot be read, a share of {share:.3f}, more "
                f"than data.max_bad_share={max_bad_share}; run `zoetrope data check "
                f"{cache.manifest.path}`"
            )
        if len(self.bad) == num_rows:
            raise ValueError(f"no clip of {cache.manifest.path} could be read")
        self._kept: dict[int, Tensor] = {}
        if cache.num_bytes() <= memory:
            for index, shard in enumerate(cache.shards):
                for place, row in enumerate(shard.rows.tolist()):
                    if row not in self.bad:
                        self._kept[row] = read_posterior(cache.shard(index), place)

    def __len__(self) -> int:
        """Rows."""
        return len(self.clips)

    def __getitem__(self, g: int) -> dict[str, Any]:
        """Sample number `g`; see ClipDataset."""
        return read_sample(self.request, self.sample, g)

    def request(self, g: int, bad: Sequence[tuple[str, str]] = ()) -> LatentRequest:
        asked = self.clips.request(g, bad)
        shard, place = self.cache.places[asked.row].tolist()
        return LatentRequest(
            **vars(asked),
            shard=self.cache.shard(shard),
            place=place,
            reason=self.bad.get(asked.row, ""),
            kept=self._kept.get(asked.row),
        )

    def sample(
        self, request: LatentRequest, posterior: Tensor, bad: list[tuple[str, str]]
    ) -> dict[str, Any]:
        behind = int(self.cache.num_references[request.row])
        end = posterior.shape[2] - behind
        clip, stills, references = posterior.tensor_split([end - self.cache.stills, end], dim=2)
        about = {"caption": request.caption, "row": request.row, "g": request.g, "bad": bad}
        mean, std = clip
        pictures = {"stills": stills, "references": references}
        return {"mean": mean, "std": std, **pictures, "size": request.size, **about}

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        packed = self.clips.order.packed
        join = flatten if packed else torch.stack
        batch: dict[str, Any] = {
            "mean": join([sample["mean"] for sample in samples]),
            "std": join([sample["std"] for sample in samples]),
            **described(samples),
        }
        for name in ("stills", "references"):
            if samples[0][name].shape[2]:
                batch[name] = torch.stack([sample[name] for sample in samples])
        if packed:
            batch["sizes"] = torch.tensor([sample["size"] for sample in samples])
        if self.texts is not None and self.shown is not None:
            captions = self.shown(batch["g"], batch["captions"])
            batch["context"], batch["context_mask"] = self.texts.read(captions)
        return batch
