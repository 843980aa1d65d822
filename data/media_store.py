"""Remote files through fsspec: what they are, their bytes, lists of them, and writing them.

Every request is tried again where its error may pass (see data/media_errors.py). File systems are
made in the process that uses them, so that all of this may be used before and after a fork.
"""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from data.media_errors import retrying

# What a store says about a file is believed for so long: a reader opens its file several times.
_FRESH_SECONDS = 10.0
BLOCK = 4 * 2**20  # bytes a request, where a file is read over the network
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "http": "http", "https": "http"}
# Any of these that a store gives says which version of a file it is; names without dashes and case.
_VERSION_KEYS = (
    *("size", "etag", "lastmodified", "mtime", "updated", "created", "generation", "versionid"),
    *("md5hash", "contentmd5", "digest", "crc32c", "crc", "datetime", "checksum"),
)

_MAX_KNOWN = 10_000

_known: dict[str, tuple[float, Version]] = {}
# Never collected: in a forked process that would close connections that its parent still uses.
_filesystems: dict[int, Any] = {}


class Version(NamedTuple):
    """Of a remote file: its size in bytes, where the store says it, and what tells it apart."""

    size: int | None
    token: str


class NoRangesError(ValueError):
    """A server that sends whole files alone."""

    def __init__(self) -> None:
        super().__init__(
            "its server does not send parts of files, and it is too large for the cache: "
            "raise ZOETROPE_CACHE_GB"
        )


def patience() -> float:
    """Seconds for which a request is tried again."""
    return number("ZOETROPE_PATIENCE", 120.0)


def number(variable: str, default: float) -> float:
    """A number from the environment.

    Raises:
        ValueError: it is none, or negative.
    """
    text = os.environ.get(variable) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise ValueError(f"{variable}={text}: expected a number, 0 or more")
    return value


def local_path(path: str) -> str | None:
    """The local path that a path or a file:// URL is; None for anything remote."""
    if "://" not in path:
        return path
    if path.startswith(("file://", "local://")) and "::" not in path:
        from fsspec.implementations.local import LocalFileSystem

        return cast(str, LocalFileSystem._strip_protocol(path))
    return None


def version_of(url: str) -> Version:
    """Size and version of a remote file, as its store has it now or had it a moment ago.

    Raises:
        OSError, ValueError: it cannot be reached, with one line that says why.
    """
    now = time.monotonic()
    before = _known.get(url)
    if before is not None and now - before[0] < _FRESH_SECONDS:
        return before[1]
    info = _request(url, "info")
    if info.get("type") == "directory":
        raise IsADirectoryError("a directory")
    facts = {re.sub(r"[-_]", "", key).lower(): str(value) for key, value in info.items()}
    token = "\0".join(f"{key}={facts[key]}" for key in _VERSION_KEYS if key in facts)
    size = info.get("size")
    if len(_known) >= _MAX_KNOWN:
        _known.clear()
    version = Version(None if size is None else int(size), token)
    _known[url] = (now, version)
    return version


def fetch(url: str, path: str, size: int | None) -> None:
    """Copies a remote file of `size` bytes to a local path.

    Raises:
        OSError, ValueError: as version_of.
    """

    def attempt() -> None:
        filesystem, inside = _filesystem(url)
        filesystem.get_file(inside, path)
        found = os.path.getsize(path)
        if size is not None and found != size:
            _known.pop(url, None)  # perhaps it has just changed
            raise ConnectionError(f"got {found} of {size} bytes")

    retrying(attempt, f"fetching {url}", patience())


def read_range(url: str, size: int | None, start: int, end: int) -> bytes:
    """Bytes [start, end) of a remote file of `size` bytes, in one request.

    Raises:
        NoRangesError: the server sends whole files alone.
        OSError, ValueError: as version_of.
    """

    def attempt() -> bytes:
        filesystem, inside = _filesystem(url)
        if url.startswith(("http://", "https://")):
            data = _http_range(filesystem, url, size, start, end)
        else:
            data = filesystem.cat_file(inside, start=start, end=end)
        if len(data) != end - start:
            raise ConnectionError(f"got {len(data)} of {end - start} bytes")
        return data

    return retrying(attempt, f"reading {url}", patience()) if end > start else b""


def _http_range(filesystem: Any, url: str, size: int | None, start: int, end: int) -> bytes:
    """As read_range; fsspec's file object alone looks whether the answer is the part asked for."""
    if size is None:
        raise NoRangesError
    with filesystem.open(url, size=size, cache_type="none") as file:
        file.seek(start)
        try:
            return file.read(end - start)
        except ValueError as error:
            raise NoRangesError from error


def open_remote(url: str, block: int = BLOCK) -> BinaryIO:
    """A remote file, read as it is needed: `block` bytes a request, each tried again if need be.

    Raises:
        OSError, ValueError: as version_of, or the server does not say the size.
    """
    size = version_of(url).size
    if size is None:
        raise OSError("its server does not say how large it is, and it is not in the cache")
    return as_file(partial(read_range, url, size), size, block=block)


def list_media(url: str) -> Iterator[tuple[str, int]]:
    """URL and size in bytes (-1 where the store does not say) of all files below `url`, sorted.

    Raises:
        FileNotFoundError: there is none.
        OSError, ValueError: as version_of.
    """
    if "::" in url:
        raise ValueError(f"{url}: expected the URL of one folder, not a chain of several")
    with naming(url):
        # Of an HTTP server each folder is a request, whose errors fsspec leaves out.
        strict = {"on_error": "raise"} if url.startswith(("http://", "https://")) else {}
        found = _request(url, "find", detail=True, **strict)
        if not found:
            raise FileNotFoundError
        filesystem, _ = _filesystem(url)
    for name in sorted(found):
        size = found[name].get("size")
        yield filesystem.unstrip_protocol(name), -1 if size is None else int(size)


def matching(url: str) -> list[str]:
    """The URLs that one with wildcards (*, ?, [...]) stands for, sorted; any other stands for itself.

    Raises:
        FileNotFoundError: there is none.
        OSError, ValueError: as version_of.
    """
    if not any(sign in url.partition("://")[2] for sign in "*["):
        return [url]
    http = url.startswith(("http://", "https://"))
    by_walking = http or re.match(r"s3a?://[^*?[]*/[*?[]", url)  # else S3 looks for a prefix
    with naming(url):
        # Or a folder that cannot be listed for a moment is one without files.
        found = _request(url, "glob", **({"on_error": "raise"} if by_walking else {}))
        filesystem, _ = _filesystem(url)
        if not found:
            raise FileNotFoundError
    return [filesystem.unstrip_protocol(name) for name in sorted(found)]


def read_bytes(url: str) -> bytes:
    """All that a URL or a local path names, as it is now.

    Raises:
        OSError, ValueError: as version_of.
    """
    path = local_path(url)
    with naming(url):
        return _request(url, "cat_file") if path is None else Path(path).read_bytes()


def upload(path: str | os.PathLike[str], url: str) -> None:
    """Puts a local file at a URL.

    Raises:
        OSError, ValueError: as version_of.
    """

    def attempt() -> None:
        filesystem, inside = _filesystem(url)
        filesystem.put_file(os.fspath(path), inside)

    with naming(url):
        retrying(attempt, f"writing {url}", patience())
    _known.pop(url, None)


@contextmanager
def naming(url: str) -> Iterator[None]:
    """Puts the URL before what an error says."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{url}: no such file or folder") from error
    except OSError as error:
        raise type(error)(f"{url}: {error.strerror or error}") from error


def _request(url: str, method: str, **arguments: Any) -> Any:
    """What one call to the file system of a URL gives."""

    def attempt() -> Any:
        filesystem, inside = _filesystem(url)
        return getattr(filesystem, method)(inside, **arguments)

    return retrying(attempt, f"{method} of {url}", patience())


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the name in it; fsspec keeps one for each process."""
    from fsspec.core import url_to_fs

    protocol = url.partition("://")[0]
    try:
        filesystem, inside = url_to_fs(url, **_options(protocol))
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        hint = f"pip install 'zoetrope[{extra}]'" if extra else str(error)
        raise ValueError(f"{protocol}:// needs an extra: {hint}") from error
    except ValueError as error:
        if not str(error).startswith("Protocol not known"):
            raise
        name = str(error).rpartition(" ")[2]
        raise ValueError(
            f"{name}:// is not known to fsspec; expected s3://, gs://, http://, https:// or "
            "another that it knows"
        ) from error
    _filesystems[id(filesystem)] = filesystem
    return filesystem, inside


def _options(protocol: str) -> dict[str, Any]:
    """What fsspec is told where its own defaults do not do."""
    if protocol in ("s3", "s3a", "gs", "gcs"):
        return {"use_listings_cache": False}  # or a changed file looks as it did when listed
    if protocol in ("http", "https"):
        import aiohttp
        from fsspec.config import conf

        # aiohttp gives up after five minutes however well a download goes.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=15, sock_read=30)
        own = conf.get("http", {}) | conf.get("https", {})
        return {"client_kwargs": {"timeout": timeout} | dict(own.get("client_kwargs", {}))}
    return {}


def as_file(
    read: Callable[[int, int], bytes],
    size: int,
    close: Callable[[], None] | None = None,
    block: int = BLOCK,
) -> BinaryIO:
    """A file of `size` bytes, of which `read(start, end)` gives any part."""
    raw = _Ranges(read, size, close)
    return cast(BinaryIO, io.BufferedReader(raw, block))


class _Ranges(io.RawIOBase):
    def __init__(
        self, read: Callable[[int, int], bytes], size: int, close: Callable[[], None] | None
    ) -> None:
        self._read, self._size, self._close, self._at = read, size, close, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        data = self._read(self._at, end) if end > self._at else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed and self._close is not None:
            self._close()
        super().close()
