"""One manifest of several, so that a run trains on all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.manifest import Manifest, read_manifest
from data.manifest_formats import known_suffix, write_manifest


@dataclass(frozen=True)
class Counts:
    """Rows taken from a manifest, those that cannot be used, and those that say keep: false."""

    rows: int
    left_out: int
    dropped: int


def join_manifests(
    out: str | os.PathLike[str], manifests: Sequence[str], overwrite: bool = False
) -> dict[str, Counts]:
    """Writes the rows of several manifests as one, in their order; what cannot be used is logged.

    Paths are as seen from the new manifest: relative where they were relative.

    Args:
        out: a .jsonl, .csv or .parquet file.
        manifests: files or URLs.
        overwrite: a file at `out` is replaced.
    Returns:
        What was taken from each.
    Raises:
        ValueError: one is given twice or is `out` itself, none of its rows can be used, a suffix is
            unknown, or `out` is there already.
        FileNotFoundError: one is missing, or the folder of `out` is.
    """
    out = Path(out)
    known_suffix(str(out))
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent}: no such folder to write {out.name} to")
    seen: set[str] = set()
    for name in manifests:
        place = name if "://" in name else os.path.realpath(name)
        if place in seen:
            raise ValueError(f"{name} is given twice; give each manifest once")
        if place == os.path.realpath(out):
            raise ValueError(f"{name} would be overwritten; write the joined manifest elsewhere")
        seen.add(place)
    if out.exists() and not overwrite:
        raise ValueError(f"{out} is there already; give another name first, or --overwrite")
    found = [read_manifest(name) for name in manifests]
    for manifest in found:
        manifest.warn_of_bad_rows()
    rows = (row for manifest in found for row in rows_seen_from(manifest, out.parent))
    write_manifest(out, rows)
    return {
        name: Counts(len(manifest.rows), len(manifest.bad), manifest.num_dropped)
        for name, manifest in zip(manifests, found)
    }


def rows_seen_from(manifest: Manifest, folder: Path) -> Iterator[dict[str, Any]]:
    """A manifest's rows, with paths as in a manifest in `folder`."""
    for row in manifest.rows:
        values = row.model_dump(mode="json", exclude_none=True)
        values["path"] = _seen_from(folder, row.path, manifest.locate(row))
        if row.references:
            located = manifest.locate_references(row)
            values["references"] = [
                _seen_from(folder, path, place) for path, place in zip(row.references, located)
            ]
        yield values


def _seen_from(folder: Path, path: str, place: str) -> str:
    """A file's path in a manifest of `folder`.

    Args:
        path: in its own manifest; place: where that is.
    """
    if "://" in place or os.path.isabs(path):
        return place
    # Of the folder alone: a link's own name says what kind of file it is.
    real = os.path.join(os.path.realpath(os.path.dirname(place)), os.path.basename(place))
    return os.path.relpath(real, os.path.realpath(folder))
