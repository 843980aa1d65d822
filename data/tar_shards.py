"""Writes WebDataset tar shards: the media of a manifest in a few large files.

    OUT/00000.tar        one sample per media file: 000000012.mp4, 000000012.json, 000000012.txt
    OUT/00000.json       what is in the shard, and what could not be read; written after it
    OUT/manifest.jsonl   the rows, with paths into the shards; written last

The tar files are those of the webdataset library: the members of a sample follow one another and
have its key up to the first dot. Same sources, same bytes: no times, no owners.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from data.manifest import Manifest, read_manifest
from data.media import Piece, suffix_of
from data.media_store import local_path, read_bytes, upload, version_of
from data.video_file import VideoReadError, open_bytes, reporting

_BLOCK = tarfile.BLOCKSIZE
_END = bytes(2 * _BLOCK)
_COPY = 2**20  # bytes copied at once
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


@dataclass
class Sharded:
    """What `write_shards` did.

    Attributes:
        manifest: where it is; nothing is written if there is no row.
        num_shards, num_files, num_rows: that it refers to.
        bad: (path, reason) of each source file that could not be read.
        num_bad_rows: rows that are left out because their file could not be read.
        num_dropped: rows that the manifest itself says to leave out, with `keep: false`.
        num_unusable: rows that are left out because they make no sense, such as without a caption.
        num_over: shards of more than `shard_bytes`, each of one file.
    """

    manifest: str
    num_shards: int = 0
    num_files: int = 0
    num_rows: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    num_bad_rows: int = 0
    num_dropped: int = 0
    num_unusable: int = 0
    num_over: int = 0


def parse_bytes(text: str) -> int:
    """A number of bytes from what a user types, such as 500MB, 1.5GB, 1GiB or 4096.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _UNITS or not float(match[1]) * _UNITS[match[2]] >= 1:
        raise ValueError(f"{text}: expected a size such as 1GB, 500MB or 1GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def write_shards(path: str | os.PathLike[str], out: str, shard_bytes: int) -> Sharded:
    """Writes the media of a manifest as tar shards, and the manifest that refers to them.

    A file is stored once, however many rows refer to it; rows keep their order and their columns,
    and a column `source` tells where the file was. A shard has at most `shard_bytes`, or one file.
    A call that was interrupted continues, when it is repeated, after the last complete shard.

    Args:
        path: the manifest, or its URL.
        out: a folder, or its URL.
        shard_bytes: at most in one shard.
    Raises:
        FileNotFoundError, OSError, ValueError: the manifest cannot be read, or the folder not be
            written, or it holds the shards of another manifest or size, or a manifest.jsonl that
            this call does not make.
    """
    folder = _Folder(out)
    folder.check_not_of(os.fspath(path))
    manifest = read_manifest(path)
    manifest.warn_of_bad_rows()
    files: dict[str, list[int]] = {}
    for index, row in enumerate(manifest.rows):
        files.setdefault(manifest.locate(row), []).append(index)
    writer = _Writer(manifest, list(files.items()), folder, shard_bytes)
    done = Sharded(f"{out.rstrip('/')}/manifest.jsonl", num_files=len(files))
    done.num_dropped, done.num_unusable = manifest.num_dropped, len(manifest.bad)
    local = [p for row in manifest.rows for p in manifest.locate_references(row) if "://" not in p]
    if local and "://" in out:
        raise ValueError(
            f"{path}: {len(local)} reference pictures, such as {local[0]}, are on this machine, and "
            "shards hold clips alone; put them where the shards go, and their URLs into the manifest"
        )
    lines: list[tuple[int, str]] = []
    number = first = 0
    with tqdm(total=len(files), desc="writing shards", unit="file", disable=None) as progress:
        while first < len(files):
            shard = writer.shard(number, first, progress)
            lines += [(index, json.dumps(row, ensure_ascii=False)) for index, row in shard["rows"]]
            done.bad += [(name, reason) for name, reason in shard["bad"]]
            done.num_over += shard.get("over", False)
            number, first = number + 1, shard["next"]
    done.num_shards = number
    done.num_files -= len(done.bad)
    done.num_rows = len(lines)
    done.num_bad_rows = len(manifest.rows) - len(lines)
    if lines:
        folder.write_manifest(b"".join(f"{line}\n".encode() for _, line in sorted(lines)))
    return done


class _Folder:
    """A local folder, or one at a URL, in which files appear when they are complete."""

    def __init__(self, place: str) -> None:
        self._place = place.rstrip("/") or "/"
        self._manifest = f"{self._place}/manifest.jsonl"
        self._remote = "://" in place
        if place.startswith(("http://", "https://")):
            raise ValueError(
                f"{place}: expected a local folder, s3:// or gs://; HTTP is for reading"
            )

    def __str__(self) -> str:
        return self._place

    def check_not_of(self, source: str) -> None:
        """
        Raises:
            ValueError: `source`, or any manifest of no shards, is where that of the shards will be.
        """
        if _resolved(source) == _resolved(self._manifest):
            raise ValueError(
                f"{source}: the manifest of the shards would take its place; use another folder"
            )
        if self.read("00000.json") is None and self.size("manifest.jsonl") is not None:
            self._refuse_manifest()

    def write_manifest(self, text: bytes) -> None:
        """
        Raises:
            ValueError: another one is there.
        """
        there = self.read("manifest.jsonl")
        if there is None:
            with self.writing("manifest.jsonl") as file:
                file.write(text)
        elif there != text:
            self._refuse_manifest()

    def _refuse_manifest(self) -> None:
        raise ValueError(
            f"{self._manifest} is there already, and not the one of these shards; use another "
            "folder, or move that file"
        )

    def read(self, name: str) -> bytes | None:
        """What is in a file; None if there is none."""
        try:
            return read_bytes(f"{self._place}/{name}")
        except FileNotFoundError:
            return None

    def size(self, name: str) -> int | None:
        """A file's bytes; None if there is none."""
        place = f"{self._place}/{name}"
        try:
            return version_of(place).size if self._remote else os.path.getsize(place)
        except FileNotFoundError:
            return None

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """A file to write, which takes its place at the end; it does not if an error is raised."""
        if not self._remote:
            os.makedirs(self._place, exist_ok=True)
        folder = None if self._remote else self._place
        with tempfile.NamedTemporaryFile(
            dir=folder, prefix=f".{name}.", suffix=".partial", delete=False
        ) as file:
            partial = Path(file.name)
            try:
                yield file  # type: ignore[misc]
                file.close()
                if self._remote:
                    upload(partial, f"{self._place}/{name}")
                else:
                    partial.chmod(0o666 & ~_umask())
                    os.replace(partial, f"{self._place}/{name}")
            finally:
                partial.unlink(missing_ok=True)


def _resolved(place: str) -> str:
    """The same for all local names of a file; a URL as it is."""
    path = local_path(place)
    return place if path is None else os.path.realpath(path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@dataclass(frozen=True)
class _Writer:
    """
    Attributes:
        files: path and rows of each.
    """

    manifest: Manifest
    files: list[tuple[str, list[int]]]
    folder: _Folder
    shard_bytes: int

    def shard(self, number: int, first: int, progress: tqdm) -> dict[str, Any]:
        """The record of a shard that begins with file number `first`, written if it is not there."""
        name = f"{number:05d}"
        origin = {"manifest": self.manifest.fingerprint(), "shard_bytes": self.shard_bytes}
        text = self.folder.read(f"{name}.json")
        record = json.loads(text) if text else None
        if record is not None and record.get("origin") != origin:
            raise ValueError(
                f"{self.folder} holds the shards of another manifest or shard size; use another "
                "folder, or delete it"
            )
        whole = record is not None and record["bytes"] == self.folder.size(f"{name}.tar")
        if record is not None and whole and record["first"] == first:
            progress.update(record["next"] - first)
            return record
        with self.folder.writing(f"{name}.tar") as file:
            record = {"origin": origin, "first": first} | self._write(file, name, first, progress)
        with self.folder.writing(f"{name}.json") as file:
            file.write(json.dumps(record, ensure_ascii=False).encode())
        return record

    def _write(self, out: BinaryIO, name: str, first: int, progress: tqdm) -> dict[str, Any]:
        rows: list[tuple[int, dict[str, Any]]] = []
        bad: list[tuple[str, str]] = []
        number = first
        for path, indices in self.files[first:]:
            begun = out.tell()
            columns = [_columns(self.manifest, index) for index in indices]
            try:
                with closing(open_bytes(path)) as source:
                    size = source.seek(0, os.SEEK_END)
                    source.seek(0)
                    sidecars = _sidecars(columns)
                    needed = sum(_padded(len(data)) for data in sidecars.values())
                    if begun and begun + _padded(size) + needed + len(_END) > self.shard_bytes:
                        break
                    key, suffix = f"{number:09d}", suffix_of(path) or ".bin"
                    offset = _add(out, key + suffix, _blocks(path, source, size), size)
            except VideoReadError as error:
                out.seek(begun)
                out.truncate()
                bad.append((path, error.reason))
            else:
                for ending, data in sidecars.items():
                    _add(out, key + ending, [data], len(data))
                piece = str(Piece(f"{name}.tar", offset, size, suffix))
                rows += [(i, {"path": piece} | cells) for i, cells in zip(indices, columns)]
            number += 1
            progress.update()
        out.write(_END)
        over = out.tell() > self.shard_bytes
        out.write(bytes(-out.tell() % tarfile.RECORDSIZE))
        return {"next": number, "bytes": out.tell(), "over": over, "rows": rows, "bad": bad}


def _columns(manifest: Manifest, index: int) -> dict[str, Any]:
    """All of a row but its path, which becomes its source; its references stay where they are."""
    row = manifest.rows[index]
    columns = row.model_dump(mode="json", exclude_none=True)
    if row.references:
        places = manifest.locate_references(row)
        columns["references"] = [p if "://" in p else os.path.abspath(p) for p in places]
    return columns | {"source": columns.get("source", columns.pop("path"))}


def _sidecars(columns: list[dict[str, Any]]) -> dict[str, bytes]:
    """The members beside a file, by their endings; `columns` is of each of its rows."""
    captions = columns[0]["caption"]
    first = captions if isinstance(captions, str) else captions[0]
    record = columns[0] if len(columns) == 1 else {"rows": columns}
    return {".json": json.dumps(record, ensure_ascii=False).encode(), ".txt": first.encode()}


def _blocks(path: str, source: BinaryIO, size: int) -> Iterator[bytes]:
    """The first `size` bytes of a file.

    Raises:
        VideoReadError: it cannot be read, or has fewer by now.
    """
    left = size
    while left:
        with reporting(path):
            block = source.read(min(left, _COPY))
        if not block:
            raise VideoReadError(path, f"it ended after {size - left} of {size} bytes")
        yield block
        left -= len(block)


def _add(out: BinaryIO, name: str, blocks: Iterable[bytes], size: int) -> int:
    """Writes a member; where its bytes begin."""
    member = tarfile.TarInfo(name)
    member.size = size
    out.write(member.tobuf(tarfile.GNU_FORMAT))  # that format has no limit of 8 GiB
    offset = out.tell()
    for block in blocks:
        out.write(block)
    out.write(bytes(-size % _BLOCK))
    return offset


def _padded(size: int) -> int:
    """Bytes of a member in the tar file, with its header."""
    return _BLOCK + size + -size % _BLOCK
