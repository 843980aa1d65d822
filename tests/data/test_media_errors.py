import errno

import pytest

from data import media_errors
from data.media_errors import may_pass, retrying


class Answered(Exception):
    def __init__(self, status):
        self.status = status


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_some_statuses_pass(status):
    error = FileNotFoundError("as fsspec has it")
    error.__cause__ = Answered(status)
    assert may_pass(error)


@pytest.mark.parametrize(
    "error",
    [
        *(Answered(404), Answered(403), Answered(400), OSError(errno.ENOSPC, "full"), KeyError()),
        *(FileNotFoundError(), PermissionError(), ValueError(), IsADirectoryError()),
    ],
)
def test_others_do_not(error):
    assert not may_pass(error)


@pytest.mark.parametrize(
    "error", [TimeoutError(), ConnectionResetError(), OSError(errno.EIO, ""), BrokenPipeError()]
)
def test_broken_connections_pass(error):
    assert may_pass(error)


def test_pauses_grow_and_patience_ends(monkeypatch):
    clock, pauses = [0.0], []

    def sleep(seconds):
        pauses.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(media_errors.time, "sleep", sleep)
    monkeypatch.setattr(media_errors.time, "monotonic", lambda: clock[0])

    def fails():
        raise ConnectionResetError(errno.ECONNRESET, "reset\nby peer")

    with pytest.raises(OSError, match=r"^reset by peer \(tried 1\d times in 1\d\d s\)$"):
        retrying(fails, "test", 120)
    for k, pause in enumerate(pauses):
        usual = min(0.25 * 2**k, 20)
        assert usual / 2 <= pause <= usual
    assert clock[0] <= 120
    with pytest.raises(OSError, match=r"\(tried once\)$"):
        retrying(fails, "test", 0)
