"""Files that appear under their name only when they are complete, and that one process holds."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_log = logging.getLogger(__name__)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a name beside `path` to write to; the file there takes its place at the end of the block,
    and is removed if the block fails."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def lock(file: IO[str]) -> bool:
    """Whether the file is this process's now; always, where there is no fcntl (Windows).

    lockf, not flock: data loading workers would inherit an flock, and hold it for some seconds
    after the training process was killed.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            _log.warning("%s cannot be locked (%s); no other run may use it", file.name, error)
            return True
        return False
    return True


@contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Holds a file, made when missing and removed at the end, for this process alone.

    Raises:
        ValueError: another process holds it; `busy` says what that means.
    """
    with path.open("a") as file:
        held = lock(file)
        # Whoever held it may have removed it just then, and a third process made it anew.
        if (
            not held
            or not path.exists()
            or not os.path.samestat(path.stat(), os.fstat(file.fileno()))
        ):
            raise ValueError(busy)
        try:
            yield
        finally:
            with suppress(OSError):  # Windows does not remove what is open
                path.unlink()
