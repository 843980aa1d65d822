"""A manifest of WebDataset tar shards that are there already, whoever wrote them.

Only headers and sidecars are read, of a remote shard by requests for parts of it. Members that
follow one another and have the same path up to the first dot of their name are one sample, as the
webdataset library has it.
"""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from data.images import IMAGE_SUFFIXES
from data.ingest_source import VIDEO_SUFFIXES
from data.manifest_formats import known_suffix, write_manifest
from data.media import Piece
from data.media_store import local_path, matching, naming, open_remote

# As of the webdataset library: folders, then the key up to the first dot, then the endings.
_MEMBER = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_CAPTION_ENDINGS = ("txt", "cap", "caption")
_CAPTION_COLUMNS = ("caption", "captions", "text")
_MAX_SIDECAR = 2**24
# Headers are small, and a sidecar mostly lies beside the next header.
_HEADER_BLOCK = 2**16
_THREADS = 16


@dataclass
class Indexed:
    """What `index_shards` found.

    Attributes:
        num_shards: that could be read.
        num_samples: with a video or an image, which are rows now, at least one each.
        num_rows: of the manifest.
        num_silent: rows among these without a caption.
        num_without_media: samples left out because they have neither.
        bad: (shard, reason) of each shard that could not be read, or not to its end, and of
            each sidecar that could not be understood.
    """

    num_shards: int = 0
    num_samples: int = 0
    num_rows: int = 0
    num_silent: int = 0
    num_without_media: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class _Sample:
    """Members of a sample: place and size by ending, and the bytes of its sidecars."""

    key: str
    media: dict[str, tuple[int, int]] = field(default_factory=dict)
    sidecars: dict[str, bytes] = field(default_factory=dict)


def index_shards(shards: Sequence[str], out: Path) -> Indexed:
    """Writes a manifest with a row for each sample of some shards, in order.

    A caption is taken from the .json (`caption`, `captions` or `text`) or else from the .txt, .cap
    or .caption; all other columns of the .json are kept. A sample that `write_shards` made of
    several rows becomes these rows again.

    Args:
        shards: paths or URLs; a name with wildcards stands for all that match. One that is named
            twice counts once.
        out: the manifest; paths in it are relative to it, URLs as they are.
    Raises:
        FileExistsError: there is a file of this name.
        FileNotFoundError: a name with wildcards matches nothing, or `out` has no folder.
        OSError, ValueError: a store cannot be listed, no shard has anything usable, or the
            manifest cannot be written.
    """
    known_suffix(str(out))
    if out.exists():
        raise FileExistsError(f"{out} is there already: choose another name, or remove it")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent}: no such folder; make it first")
    names = _each_once(name for pattern in shards for name in _expanded(pattern))
    done = Indexed()
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(_THREADS if any("://" in name for name in names) else 1) as pool:
        found = pool.map(lambda name: _index(name, out), names)
        for part, own in tqdm(found, total=len(names), desc="indexing", unit="shard", disable=None):
            rows += own
            done.num_shards += part.num_shards
            done.num_samples += part.num_samples
            done.num_silent += part.num_silent
            done.num_without_media += part.num_without_media
            done.bad += part.bad
    done.num_rows = len(rows)
    if not rows:
        detail = f"; {done.bad[0][0]}: {done.bad[0][1]}" if done.bad else ""
        raise ValueError(f"no video or image in any of the {len(names)} shards{detail}")
    write_manifest(out, rows)
    return done


def _each_once(names: Iterable[str]) -> list[str]:
    """Without those that are another name of a file before."""
    found: dict[str, str] = {}
    for name in names:
        path = local_path(name)
        found.setdefault(name if path is None else os.path.realpath(path), name)
    return list(found.values())


def _expanded(pattern: str) -> list[str]:
    if "://" in pattern:
        return matching(pattern)
    if not glob.has_magic(pattern) or os.path.exists(pattern):
        return [pattern]
    found = sorted(glob.glob(pattern))
    if not found:
        raise FileNotFoundError(f"{pattern}: no such file")
    return found


def _index(shard: str, out: Path) -> tuple[Indexed, list[dict[str, Any]]]:
    """What is in one shard, and its rows."""
    done = Indexed()
    rows: list[dict[str, Any]] = []
    place = local_path(shard)
    name = shard if place is None else os.path.relpath(place, out.parent)
    try:
        with _open(shard) as file:
            for sample in _samples(file):
                own = _rows(sample, name, shard, done)
                done.num_samples += bool(own)
                done.num_without_media += not own
                done.num_silent += sum("caption" not in row for row in own)
                rows += own
        done.num_shards = 1
    except (OSError, ValueError, tarfile.TarError) as error:
        done.bad.append((shard, str(error).removeprefix(f"{shard}: ")))
    return done, rows


def _open(shard: str) -> BinaryIO:
    place = local_path(shard)
    with naming(shard):
        return open_remote(shard, _HEADER_BLOCK) if place is None else open(place, "rb")


def _samples(file: BinaryIO) -> Iterator[_Sample]:
    """The samples of a tar file, in order; where it is cut off, those before.

    Raises:
        ValueError: it is compressed, no tar file, cut off or damaged.
    """
    sample, problem = None, None
    try:
        for member in _members(file):
            match = _MEMBER.fullmatch(member.name)
            # Names with underscores are about the shard.
            if match is None or match[1].startswith("__"):
                continue
            if sample is None or sample.key != match[1]:
                if sample is not None:
                    yield sample
                sample = _Sample(match[1])
            _take(sample, member, match[2].lower(), file)
    except (ValueError, tarfile.TarError) as error:
        problem = error
    if sample is not None:
        yield sample
    if problem is not None:
        raise problem


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The files in a tar file, in order.

    Raises:
        ValueError, tarfile.TarError: as _samples.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(2) == b"\x1f\x8b":
        raise ValueError("compressed, so that nothing in it can be reached directly: unpack it")
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # or it keeps them all
            if member.offset_data + member.size > size:
                raise ValueError(f"cut off in {member.name}: it has {size} bytes")
            if member.isreg() and not member.issparse():
                yield member
        # tarfile takes anything that is no header for the end.
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise ValueError(f"damaged at byte {tar.offset}")


def _take(sample: _Sample, member: tarfile.TarInfo, endings: str, file: BinaryIO) -> None:
    """Takes note of a member."""
    ending = endings.rpartition(".")[2]
    if f".{ending}" in VIDEO_SUFFIXES or f".{ending}" in IMAGE_SUFFIXES:
        sample.media.setdefault(ending, (member.offset_data, member.size))
    elif endings in (*_CAPTION_ENDINGS, "json") and member.size <= _MAX_SIDECAR:
        at = file.tell()
        file.seek(member.offset_data)
        sample.sidecars[endings] = file.read(member.size)
        file.seek(at)


def _rows(sample: _Sample, name: str, shard: str, done: Indexed) -> list[dict[str, Any]]:
    """The rows that a sample is; none without a video or an image."""
    if not sample.media:
        return []
    # A picture beside a video is of it.
    ending = min(sample.media, key=lambda ending: f".{ending}" not in VIDEO_SUFFIXES)
    piece = str(Piece(name, *sample.media[ending], f".{ending}"))
    record: Any = {}
    if "json" in sample.sidecars:
        try:
            record = json.loads(sample.sidecars["json"])
        except ValueError as error:
            done.bad.append((shard, f"{sample.key}.json is not JSON: {error}"))
    if not isinstance(record, dict):
        record = {}
    several = record.get("rows")
    if isinstance(several, list) and several and all(isinstance(row, dict) for row in several):
        return [{"path": piece} | row | {"path": piece} for row in several]
    column, caption = _caption(sample, record)
    said = {} if caption is None else {"caption": caption}
    taken = ("path", "caption", column)
    return [{"path": piece} | said | {k: v for k, v in record.items() if k not in taken}]


def _caption(sample: _Sample, record: dict[str, Any]) -> tuple[str, str | list[str] | None]:
    """The column of the .json that is the caption, "" for none, and the caption."""
    for column in _CAPTION_COLUMNS:
        found = record.get(column)
        wordings = found if isinstance(found, list) else [found]
        if wordings and all(isinstance(each, str) and each.strip() for each in wordings):
            return column, found
    for ending in _CAPTION_ENDINGS:
        text = sample.sidecars.get(ending, b"").decode("utf-8-sig", "replace").strip()
        if text:
            return "", text
    return "", None
