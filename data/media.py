"""Where media are: local files, pieces of tar shards, and URLs, fetched into a bounded cache.

A piece of a tar shard is named by its place in it, `shards/00000.tar#1536+88213.mp4`: 88213 bytes
from byte 1536, an .mp4. So any member is reached directly, without reading what is before it.

What a URL names is fetched whole, a piece of a remote shard by one request for its bytes, and is
then a local file to every decoder. Only what is too large for the cache is read over the network.

The settings are environment variables, so that they reach worker processes however these are
started: ZOETROPE_CACHE, ZOETROPE_CACHE_GB, ZOETROPE_PATIENCE.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import urlsplit

from data.media_cache import MediaCache, NoRoomError
from data.media_store import (
    BLOCK,
    NoRangesError,
    Version,
    as_file,
    fetch,
    list_media,
    local_path,
    naming,
    number,
    open_remote,
    read_range,
    version_of,
)

__all__ = [
    "LocalMedia",
    "Piece",
    "configure",
    "find_media",
    "list_media",
    "local_copy",
    "suffix_of",
]

_log = logging.getLogger(__name__)

_PIECE = re.compile(
    r"(?P<file>.+\.tar(\?[^#]*)?)#(?P<offset>\d+)\+(?P<length>\d+)(?P<suffix>\.\w+)?"
)

_warned: set[str] = set()


class Piece(NamedTuple):
    """A member of a tar file: `length` bytes from `offset`, of the kind that `suffix` says."""

    file: str
    offset: int
    length: int
    suffix: str = ""

    @classmethod
    def parse(cls, path: str) -> Piece | None:
        """What such a path names; None for any other path."""
        match = _PIECE.fullmatch(path)
        if match is None:
            return None
        return cls(match["file"], int(match["offset"]), int(match["length"]), match["suffix"] or "")

    def __str__(self) -> str:
        return f"{self.file}#{self.offset}+{self.length}{self.suffix}"


class LocalMedia(NamedTuple):
    """A local file, or (length not None) a piece of one."""

    path: str
    offset: int = 0
    length: int | None = None

    @property
    def name(self) -> str:
        """What ffmpeg opens, and decord, which is built on it: a piece by its subfile protocol."""
        if self.length is None:
            return self.path
        place = f"start,{self.offset},end,{self.offset + self.length}"
        return f"subfile,,{place},,:file:{os.path.abspath(self.path)}"

    def open(self) -> BinaryIO:
        """Its bytes."""
        if self.length is None:
            return open(self.path, "rb")
        file = io.FileIO(self.path)
        return as_file(partial(_read_at, file, self.offset), self.length, file.close)


def configure(
    folder: str | os.PathLike[str] | None = None,
    max_bytes: int | None = None,
    patience: float | None = None,
) -> None:
    """Settings for this process and those that it starts from now on; None leaves one as it is.

    Args:
        folder: of the cache; default ~/.cache/zoetrope/media.
        max_bytes: of the cache; default 10e9, and 0 is no cache.
        patience: seconds for which a request is tried again; default 120.
    Raises:
        ValueError: a number is negative.
    """
    if (max_bytes or 0) < 0 or (patience or 0) < 0:
        raise ValueError(f"expected 0 or more, got max_bytes={max_bytes}, patience={patience}")
    if folder is not None:
        os.environ["ZOETROPE_CACHE"] = os.fspath(folder)
    if max_bytes is not None:
        os.environ["ZOETROPE_CACHE_GB"] = repr(max_bytes / 1e9)
    if patience is not None:
        os.environ["ZOETROPE_PATIENCE"] = repr(float(patience))


def find_media(path: str) -> LocalMedia | BinaryIO:
    """Where to read a path, a piece or a URL from: a local file wherever that is possible.

    Raises:
        OSError, ValueError: it cannot be reached, with one line that says why.
    """
    piece = Piece.parse(path)
    file = local_path(piece.file if piece else path)
    if file is None:
        return _fetched_piece(piece) if piece else _fetched(path)
    if piece is None:
        return LocalMedia(file)
    _check_inside(piece, os.path.getsize(file))
    return LocalMedia(file, piece.offset, piece.length)


@contextmanager
def local_copy(path: str) -> Iterator[str]:
    """A local file with what a URL names, from the cache, or if need be a temporary one.

    Raises:
        OSError, ValueError: as find_media.
    """
    with naming(path):
        found = find_media(path)
    if isinstance(found, LocalMedia) and found.length is None:
        yield found.path
        return
    opened = found.open() if isinstance(found, LocalMedia) else found
    with opened as source, tempfile.NamedTemporaryFile(suffix=suffix_of(path)) as copy:
        with naming(path):
            while block := source.read(BLOCK):
                copy.write(block)
        copy.flush()
        yield copy.name


def _fetched(url: str) -> LocalMedia | BinaryIO:
    version = version_of(url)
    try:
        copy = partial(fetch, url, size=version.size)
        return LocalMedia(_cached(url, version, version.size, copy))
    except NoRoomError as reason:
        _warn_of_no_room(reason)
        return open_remote(url)


def _fetched_piece(piece: Piece) -> LocalMedia | BinaryIO:
    version = version_of(piece.file)
    _check_inside(piece, version.size)

    def read(start: int, end: int) -> bytes:
        return read_range(piece.file, version.size, piece.offset + start, piece.offset + end)

    def copy(path: str) -> None:
        Path(path).write_bytes(read(0, piece.length))

    try:
        return LocalMedia(_cached(str(piece), version, piece.length, copy))
    except NoRoomError as reason:
        _warn_of_no_room(reason)
        return as_file(read, piece.length)
    except NoRangesError:
        whole = _fetched(piece.file)
        if not isinstance(whole, LocalMedia):
            raise
        return LocalMedia(whole.path, piece.offset, piece.length)


def _cached(url: str, version: Version, size: int | None, copy: Callable[[str], None]) -> str:
    """The cached file with one version of what a URL names, which `copy` writes to a path."""
    cache = _cache()
    key = hashlib.blake2b(f"{url}\0{version.token}".encode(), digest_size=20).hexdigest()
    name = key + suffix_of(url)
    return cache.find(name) or cache.add(name, size, copy)


def _cache() -> MediaCache:
    folder = os.environ.get("ZOETROPE_CACHE") or "~/.cache/zoetrope/media"
    return MediaCache(Path(folder).expanduser(), round(number("ZOETROPE_CACHE_GB", 10.0) * 1e9))


def _warn_of_no_room(reason: NoRoomError) -> None:
    if str(reason) not in _warned:
        _warned.add(str(reason))
        _log.warning(
            "reading over the network, not from the cache in %s: %s", _cache().folder, reason
        )


def _read_at(file: io.FileIO, base: int, start: int, end: int) -> bytes:
    file.seek(base + start)
    return file.read(end - start)


def _check_inside(piece: Piece, size: int | None) -> None:
    end = piece.offset + piece.length
    if size is not None and end > size:
        raise OSError(f"the shard is cut off, or another one: it has {size} bytes of {end}")


def suffix_of(url: str) -> str:
    """The ending of a path or URL, such as ".mp4"; empty where it has none that looks like one."""
    piece = Piece.parse(url)
    if piece is not None:
        return piece.suffix
    path = url.split("::")[0]
    path = urlsplit(path).path if path.startswith(("http://", "https://")) else path
    suffix = os.path.splitext(path)[1].lower()
    return suffix if re.fullmatch(r"\.\w{1,10}", suffix, re.ASCII) else ""
