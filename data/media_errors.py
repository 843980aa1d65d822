"""Trying again what a network or a store may do better the next time, and saying what it cannot."""

from __future__ import annotations

import errno
import http.client
import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")

_log = logging.getLogger(__name__)
_FIRST_PAUSE, _MAX_PAUSE = 0.25, 20.0  # seconds, doubled every time
_LOGGED_TRY = 3  # a first failure or two are nothing that anybody needs to hear of
# The system's, so that processes that were forked do not all wait for the same time.
_jitter = random.SystemRandom()

_PASSING_STATUS = (408, 425, 429)  # and all of 500 and more
_PASSING_ERRNO = (
    *(errno.EIO, errno.EBUSY, errno.EAGAIN, errno.EPIPE, errno.ETIMEDOUT, errno.ECONNRESET),
    *(errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH, getattr(errno, "EREMOTEIO", -1)),
)
# By name, since their modules are extras: aiohttp, botocore, urllib3, requests, google.auth.
_PASSING_NAMES = {
    *("ClientConnectionError", "ClientPayloadError", "HTTPClientError", "ConnectionError"),
    *("ResponseParserError", "ProtocolError", "RequestException", "TransportError"),
}
_MISSING_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"}


def retrying(action: Callable[[], T], what: str, patience: float) -> T:
    """Does `action`, again and again where its error may pass, with exponential backoff and jitter.

    Errors that may pass are timeouts, broken connections, and the HTTP status 408, 425, 429 and
    5xx (RFC 9110, 6585). The pauses are drawn from [1/2, 1] of 0.25 s * 2^k, at most 20 s.

    Args:
        what: is done, for the log.
        patience: seconds from the first try after which no further one is started.
    Raises:
        FileNotFoundError, OSError, ValueError: with one line that says what it was,
            and how often it was tried.
    """
    begun = time.monotonic()
    tries = 0
    while True:
        tries += 1
        try:
            return action()
        except Exception as error:
            if not may_pass(error):
                raise plain(error) from error
            pause = min(_FIRST_PAUSE * 2 ** (tries - 1), _MAX_PAUSE) * _jitter.uniform(0.5, 1)
            waited = time.monotonic() - begun
            if waited + pause > patience:
                times = "once" if tries == 1 else f"{tries} times in {waited:.0f} s"
                raise OSError(f"{_text(error)} (tried {times})") from error
            level = logging.WARNING if tries >= _LOGGED_TRY else logging.DEBUG
            _log.log(level, "%s: %s; try %d in %.1f s", what, _text(error), tries + 1, pause)
        time.sleep(pause)


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    for cause in _causes(error):
        status = _status(cause)
        if status is not None:
            return status in _PASSING_STATUS or status >= 500
    return any(_passing_kind(cause) for cause in _causes(error))


def plain(error: Exception) -> Exception:
    """What to raise instead of an error that will not pass: a built-in one, of one line."""
    if isinstance(error, (ImportError, ValueError, IsADirectoryError)):
        return error
    causes = list(_causes(error))
    if any(type(cause).__name__ in _MISSING_CREDENTIALS for cause in causes):
        return PermissionError("no credentials found for it; see docs/remote-data.md")
    status = next(filter(None, map(_status, causes)), None)
    if isinstance(error, PermissionError) or status in (401, 403):
        return PermissionError(f"not allowed with these credentials: {_text(causes[-1])}")
    if isinstance(error, FileNotFoundError) and status in (None, 404, 410):
        # S3's "The specified bucket does not exist", Google's "bucket does not exist".
        return OSError("no such bucket") if "bucket does not" in str(error) else error
    known = isinstance(error, OSError) and error.errno and not isinstance(error, FileNotFoundError)
    return error if known else OSError(_text(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error of aiohttp, botocore, gcsfs or requests."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = getattr(error, "status", None) or getattr(error, "code", None)
        found = found or getattr(response, "status_code", None)
    text = str(found)
    return int(text) if text.isdigit() and 100 <= int(text) < 600 else None


def _passing_kind(error: BaseException) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    if any("Certificate" in name or "InvalidURL" in name for name in names):
        return False
    if isinstance(error, (TimeoutError, ConnectionError, http.client.HTTPException)):
        return True
    if isinstance(error, (FileNotFoundError, PermissionError)):
        return False
    return bool(names & _PASSING_NAMES) or getattr(error, "errno", None) in _PASSING_ERRNO


def _text(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # what fsspec calls a missing file may be a missing server
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())
    return text or type(error).__name__
