"""A bounded folder of fetched files, which any number of processes on a machine share.

A file's name says what is in it, so that nothing in the folder ever goes out of date: what has
changed at its source has another name, and the old file is thrown out in time. Files appear whole,
by renaming. Room is reserved before anything is fetched, in a ledger that is locked while it is
changed, so that the bound holds for what is being fetched too. The files used least recently go
first; one that somebody has open stays readable until it is closed, as POSIX has it.
"""

from __future__ import annotations

import errno
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_LEDGER = "ledger"  # bytes in the folder, and reserved
_PARTIAL = ".partial"
# Thrown out down to this share of the bound, so that the folder is not listed for every file.
_AFTER_ROOM = 0.9
# A partial file that nobody has written to for so long was left behind by a process that died.
_ABANDONED_SECONDS = 3600.0


class NoRoomError(Exception):
    """The cache cannot take a file: too large, no room left by others, or a disk that is full."""


@dataclass(frozen=True)
class MediaCache:
    """The cache in a folder.

    Args:
        folder: made when the first file is added.
        max_bytes: of all files in it, those being fetched included.
    """

    folder: Path
    max_bytes: int

    def find(self, name: str) -> str | None:
        """The path of a file, which is now the one used last; None if it is not here."""
        if self.max_bytes == 0:
            return None
        path = self._path(name)
        try:
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError:  # read-only: it can be used all the same
            return str(path) if path.is_file() else None
        return str(path)

    def add(self, name: str, size: int | None, fetch: Callable[[str], None]) -> str:
        """Fetches a file that is not here.

        Args:
            name: letters and digits, and a suffix.
            size: in bytes, as far as known.
            fetch: writes the file to the path that it is given.
        Returns:
            Its path.
        Raises:
            NoRoomError: as the class says.
            Exception: whatever `fetch` raises.
        """
        if (size or 0) > self.max_bytes:
            raise NoRoomError(f"a file is larger than its bound of {self.max_bytes} bytes")
        path = self._path(name)
        partial = path.with_name(f"{name}.{size or 0}.{uuid.uuid4().hex}{_PARTIAL}")
        reserved = 0
        try:
            with self._disk_errors_as_no_room():
                partial.parent.mkdir(parents=True, exist_ok=True)
                self._reserve(size or 0, partial)
            reserved = size or 0
            with self._disk_errors_as_no_room(denied=False):
                fetch(str(partial))
            with self._disk_errors_as_no_room():
                more = partial.stat().st_size - reserved
                self._reserve(more, partial)
                reserved += more
                with self._ledger() as ledger:
                    if path.exists():  # another process was quicker
                        ledger.total -= reserved
                    os.replace(partial, path)
            reserved = 0
        finally:
            if reserved:
                with suppress(OSError), self._ledger() as ledger:
                    ledger.total -= reserved
            with suppress(OSError):
                partial.unlink(missing_ok=True)
        return str(path)

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / name

    def _reserve(self, size: int, partial: Path) -> None:
        """Room for `size` bytes more in a file whose name or size tells who counts of them."""
        with self._ledger() as ledger:
            partial.touch()
            ledger.total += size
            if ledger.total > self.max_bytes:
                ledger.total = self._throw_out(int(self.max_bytes * _AFTER_ROOM))
            if ledger.total > self.max_bytes:
                ledger.total -= size
                raise NoRoomError(
                    "files that are being fetched at the same time take all of its room"
                )

    def _throw_out(self, goal: int) -> int:
        """Removes files, used least recently first, until `goal` bytes are left; what is left."""
        finished: list[tuple[float, int, str]] = []
        total, now = 0, time.time()
        for path, found in _files(self.folder):
            size = found.st_size
            if path.endswith(_PARTIAL):
                if now - found.st_mtime > _ABANDONED_SECONDS:
                    with suppress(OSError):
                        os.unlink(path)
                    continue
                size = max(size, int(path.rsplit(".", 3)[1]))
            else:
                finished.append((found.st_mtime, size, path))
            total += size
        for _, size, path in sorted(finished):
            if total <= goal:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            total -= size
        return total

    @contextmanager
    def _disk_errors_as_no_room(self, denied: bool = True) -> Iterator[None]:
        """`denied`: so is a lack of permission, where only the folder can be what lacks it."""
        full = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
        own = {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENOLCK, errno.ENOSYS}
        try:
            yield
        except OSError as error:
            if error.errno in full or (denied and error.errno in own):
                raise NoRoomError(f"{error.strerror}") from error
            raise

    @contextmanager
    def _ledger(self) -> Iterator[_Ledger]:
        """The bytes in the folder, to be changed by one process at a time."""
        import fcntl

        with open(self.folder / _LEDGER, "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            # New, or cut off when a disk was full: counted again.
            known = text.endswith("\n") and text.strip().isdigit()
            ledger = _Ledger(int(text) if known else self._throw_out(self.max_bytes))
            try:
                yield ledger
            finally:
                _rewrite(file, f"{max(0, ledger.total)}\n")


@dataclass
class _Ledger:
    total: int


def _rewrite(file: IO[str], text: str) -> None:
    file.seek(0)
    file.truncate()
    file.write(text)
    file.flush()


def _files(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Path and status of each file in the subfolders."""
    with os.scandir(folder) as parts:
        subfolders = [part.path for part in parts if part.is_dir()]
    for subfolder in subfolders:
        with suppress(FileNotFoundError), os.scandir(subfolder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # renamed or removed meanwhile
                    yield entry.path, entry.stat()
