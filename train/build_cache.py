"""`zoetrope data latents`: a latent cache without a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data.manifest import read_manifest
from data.video import parse_size
from sample import processes
from sample.model import load_model, read_model_file
from train.config_data import DataConfig
from train.latent_cache import LatentCache
from train.text_cache import TextCache

_PATIENCE = 7 * 86400.0  # seconds: nobody knows how much longer others' shards take


def data_section(
    manifest: str, model: Path, workers: int, given: dict[str, Any], run: DataConfig | None
) -> DataConfig:
    """How clips are cut.

    Args:
        model: a model folder, whose clips' size and rate are the default.
        given: frames, fps and size, as the command was told, or None each.
        run: of a run's config, which says all of it.
    Raises:
        ValueError: the run's config cuts clips at random, or a number is out of range.
    """
    if run is not None:
        if run.random_start:
            raise ValueError("a cache holds each row's start: set data.random_start=false")
        return run.model_copy(update={"manifest": manifest, "num_workers": workers})
    info = read_model_file(model).info
    height, width = parse_size(given["size"]) if given["size"] else (info.height, info.width)
    try:
        return DataConfig(
            manifest=manifest,  # type: ignore[arg-type] (a URL stays text)
            num_frames=info.num_frames if given["frames"] is None else given["frames"],
            height=height,
            width=width,
            fps=info.fps if given["fps"] is None else given["fps"],
            num_workers=workers,
            random_start=False,
        )
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise ValueError(f"{name}: {first['msg']}, got {first['input']!r}") from None


def build_cache(
    out: Path,
    data: DataConfig,
    model: Path,
    dtype: str,
    text: bool,
    device: str,
    retry: bool = False,
    stills: int = 0,
    references: bool = False,
) -> str:
    """Builds what of a cache is missing; called by every process that torchrun started.

    Args:
        retry: make those shards anew in which clips are missing that could not be read.
        stills, references: see `LatentCache`.
    Returns:
        What was done, on the main rank; nothing on others.
    Raises:
        ValueError: `out` holds something else, no clip could be read, or the model has no such parts.
    """
    ranks = processes.start(device, None, timeout=_PATIENCE)
    manifest = read_manifest(data.manifest)
    if ranks.is_main:
        manifest.warn_of_bad_rows()
    parts = load_model(model, ranks.device, vae_only=not text)
    cache = LatentCache(out, manifest, data, dtype, stills=stills, references=references)
    parts.vae.to(ranks.device).float()
    cache.build(parts.vae, ranks, retry=retry)
    lines = []
    if text and parts.text is not None:
        if parts.text.config.trainable:
            lines.append("the text encoder is trained with the DiT: its states are not cached")
        else:
            texts = TextCache(out, manifest, dtype)
            parts.text.to(ranks.device)
            texts.build(parts.text, ranks)
            lines.append(f"states of {len(texts.captions):,} captions")
    bad = cache.bad() if ranks.is_main else {}
    count = sum(len(shard.rows) for shard in cache.shards)
    processes.stop()
    if not ranks.is_main:
        return ""
    if len(bad) == count:
        raise ValueError(f"none of the {count} clips of {data.manifest} could be read")
    lines.insert(0, f"{out}: latents of {count - len(bad):,} clips in {len(cache.shards)} shards")
    skipped = len(manifest.rows) - count
    lines += [f"left out, as no size fits them: {skipped:,} rows"] if skipped else []
    lines += [f"left out: {reason}" for reason in bad.values()]
    lines += ["the same with --retry tries these again"] if bad else []
    return "\n".join(lines)
