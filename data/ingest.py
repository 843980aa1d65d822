"""`zoetrope data ingest`: from a folder of raw video to a manifest that trains.

    OUT/manifest.jsonl   a row per clip with all that was measured, `keep` and `drop_reasons`
    OUT/report.html      what became of every file, with pictures and histograms
    OUT/steps/           the results of the steps, by which a repeated call goes on or re-selects
    OUT/thumbnails/      the report's pictures

Probe, scenes, letterbox, measures (data/ingest_steps.py) look at media, and each clip's results are
kept. Filters, duplicates and captions (data/ingest_select.py) choose among them.
"""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.captioner import check_captioner
from data.embeddings import check_clip
from data.ingest_config import IngestConfig
from data.ingest_report import write_report
from data.ingest_select import (
    count_kinds,
    derive,
    filter_reasons,
    lacks_caption,
    manifest_row,
    mark_duplicates,
    settle_captions,
)
from data.ingest_source import Source, find_source
from data.ingest_steps import Record, Step, caption_step, media_steps, model_steps
from data.ingest_store import Engine, Store, local_engine
from data.manifest_formats import write_manifest
from data.scenes import check_scene_detection


@dataclass(frozen=True)
class Ingested:
    """What came of it.

    Attributes:
        manifest, report: the files.
        source: what was found.
        records: of all clips, in the manifest's order.
    """

    manifest: Path
    report: Path
    source: Source
    records: list[Record]

    @property
    def num_kept(self) -> int:
        return sum(not record["drop_reasons"] for record in self.records)

    @property
    def drop_counts(self) -> Counter[str]:
        """Dropped clips by the first words of each of their reasons."""
        return count_kinds(self.records)

    def __str__(self) -> str:
        lines = [f"{self.source.size}, {len(self.records)} clips, {self.num_kept} kept"]
        lines += [f"  dropped  {count:6}  {what}" for what, count in self.drop_counts.most_common()]
        if self.drop_counts.total() > len(self.records) - self.num_kept:
            lines.append("  (a clip with several reasons is counted under each)")
        if self.source.skipped:
            counts = self.source.skipped_kinds.most_common(8)
            kinds = ", ".join(f"{count} {kind}" for kind, count in counts)
            unit = "rows" if self.source.is_manifest else "files"
            lines.append(f"  skipped  {len(self.source.skipped):6}  other {unit}: {kinds}")
        return "\n".join([*lines, str(self.manifest), str(self.report)])


def ingest(
    src: str,
    out: str | os.PathLike[str],
    config: IngestConfig,
    *,
    engine: str = "local",
    address: str | None = None,
    workers: int | None = None,
    retry: bool = False,
) -> Ingested:
    """Measures, selects and captions all clips of `src`; a repeated call goes on where it stopped.

    Args:
        src: a folder, a file, a manifest, or the URL of a folder.
        out: folder for the results; made when it is not there. Not `src` itself, and none that has
            a manifest.jsonl of another origin.
        config: settings and thresholds.
        engine: "local" or "ray".
        address: of a Ray cluster.
        workers: processes; default one a core; 0: everything in this process, without time limits.
        retry: try again what failed before.
    Raises:
        FileNotFoundError, ValueError: nothing to ingest, or something the config asks for is
            missing; `out` would overwrite what ingest did not make.
        OSError: `out` cannot be made.
    """
    out = check_out(src, os.fspath(out))
    check_tools(config)
    source = find_source(src, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        store = Store(out, retry)
    except OSError as error:
        raise OSError(f"the folder {out} cannot be made: {error.strerror}") from None
    records = [dict(record) for record in source.files]
    with _engine(engine, address, workers) as run:
        for step in media_steps(config):
            records = store.run(step, records, run, config.time_limit)
        derive(records, out)
        _select(records, config, store, run)
    manifest, report = out / "manifest.jsonl", out / "report.html"
    write_manifest(manifest, (manifest_row(record) for record in records))
    write_report(report, src, source, records, config)
    return Ingested(manifest, report, source, records)


def check_out(src: str, out: str) -> Path:
    """The folder for the results, if nothing of the user's would be lost in it.

    Raises:
        ValueError: it is empty, a file, the source, or has a manifest that ingest did not make.
    """
    if not out:
        raise ValueError("OUT is empty; expected a folder for the results")
    folder, manifest = Path(out), Path(out, "manifest.jsonl")
    place = src.removeprefix("file://")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"OUT {out} is a file; expected a folder for the results")
    if os.path.realpath(place) == os.path.realpath(folder):
        raise ValueError(f"OUT {out} is the source itself; choose another OUT")
    if os.path.realpath(place) == os.path.realpath(manifest):
        raise ValueError(f"{manifest} is the source and would be overwritten; choose another OUT")
    if manifest.exists() and not (folder / "steps").is_dir():
        raise ValueError(
            f"{manifest} is there, and no ingest made it (there is no {folder / 'steps'}); "
            "choose another OUT"
        )
    return folder


def check_tools(config: IngestConfig) -> None:
    """Before hours of work: is all there that the config asks for?

    Raises:
        FileNotFoundError, ValueError: something is missing, and how to come by it.
    """
    check_scene_detection(config.scenes)
    missing = [name for name in ("cv2", "imagehash") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"ingest needs {' and '.join(missing)}: pip install 'zoetrope[ingest]'")
    if config.duplicates.clip is not None:
        check_clip(config.duplicates.clip)
    if config.captions.captioner is not None:
        check_captioner(config.captions.captioner)


@contextmanager
def _engine(engine: str, address: str | None, workers: int | None) -> Iterator[Engine]:
    if workers is not None and workers < 0:
        raise ValueError(f"workers={workers} must not be negative")
    if engine == "ray":
        from data.ray_engine import ray_engine

        with ray_engine(address, workers) as run:
            yield run
    elif engine != "local":
        raise ValueError(f"--engine {engine}: expected local or ray")
    elif address is not None:
        raise ValueError("--address is that of a Ray cluster: use it with --engine ray")
    else:
        yield local_engine((os.cpu_count() or 1) if workers is None else workers)


def _select(records: list[Record], config: IngestConfig, store: Store, run: Engine) -> None:
    """Decides on every clip. What people wrote is read for all; models see the clips that passed
    everything before them. A clip that cannot get a caption any more is no better copy of any."""
    for record in records:
        record["drop_reasons"] = filter_reasons(record, config.filters)

    def update(step: Step, concerns: Callable[[Record], Any]) -> None:
        some = [record for record in records if "unwanted" not in record and concerns(record)]
        for record, after in zip(some, store.run(step, some, run, config.time_limit), strict=True):
            record.update(after)
            if "error" in after:
                record["drop_reasons"] = filter_reasons(record, config.filters)

    embed, write = model_steps(config)
    update(caption_step(), lambda record: record["sidecars"] or "column" in record)
    for record in records:
        if write is None and lacks_caption(record, config.captions):
            settle_captions(record, config.captions)
    if embed is not None:
        update(embed, lambda record: not record["drop_reasons"])
    mark_duplicates(records, config.duplicates)
    if write is not None:
        recaption = config.captions.recaption
        update(
            write,
            lambda record: not record["drop_reasons"] and (recaption or not record.get("written")),
        )
    for record in records:
        settle_captions(record, config.captions)
