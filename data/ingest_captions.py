"""Captions that people wrote: sidecar .txt, .json and .srt files, and columns of a manifest."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_TIME = r"(\d+):(\d\d):(\d\d)[,.](\d{1,3})"
_TIMES = re.compile(rf"^\s*{_TIME}\s*-->\s*{_TIME}", re.MULTILINE)
_MARKUP = re.compile(r"</?[a-zA-Z][^<>]*>|\{\\[^{}]*\}")  # of subtitles: <i>, <font ...>, {\an8}
_MAX_BYTES = 10 * 2**20


def written_captions(
    column: Any, sidecars: list[list[str]], start: float, end: float
) -> tuple[list[str], list[str]]:
    """All captions that a clip has, in order and each once: of its row, then of its sidecars.

    Args:
        column: `caption` of the source manifest's row: a text, or a list of texts; None without one.
        sidecars: [path, version] of each.
        start, end: of the clip in its file, in seconds, for subtitles.
    Returns:
        The captions, and what is wrong with sidecars that cannot be used.
    Raises:
        OSError: a remote one cannot be read now, but may be later.
    """
    found: list[str] = []
    problems: list[str] = []
    if column is not None:
        try:
            found += _texts(column)
        except ValueError as error:
            problems.append(f"caption: {error}")
    for path, _ in sidecars:
        try:
            found += _read_sidecar(path, start, end)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and "://" in path:
                raise
            reason = getattr(error, "strerror", None) or str(error)
            problems.append(f"{os.path.basename(path)}: {reason}")
    clean = (caption.strip() for caption in found)
    return list(dict.fromkeys(caption for caption in clean if caption)), problems


def _read_sidecar(path: str, start: float, end: float) -> list[str]:
    if "://" in path:
        from data.media_store import read_bytes

        data = read_bytes(path)
    else:
        if os.path.getsize(path) > _MAX_BYTES:
            raise ValueError("more than 10 MB, which is no caption")
        data = Path(path).read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text at byte {error.start}") from None
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".srt":
        said = " ".join(
            words for first, last, words in subtitles(text) if first < end and last > start
        )
        return [said] if said else []
    if suffix == ".json":
        try:
            return _texts(json.loads(text))
        except RecursionError:
            raise ValueError("not JSON that anybody wrote") from None
    return text.splitlines()


def _texts(value: Any) -> list[str]:
    """Captions from a text, a list of texts, or an object with either as its `caption`."""
    if isinstance(value, dict):
        value = value.get("caption", value.get("captions"))
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(each, str) for each in values):
        raise ValueError('expected a text, a list of texts, or {"caption": either}')
    return values


def subtitles(text: str) -> Iterator[tuple[float, float, str]]:
    """(start, end, words) of each subtitle of an .srt file, in seconds, without markup."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    matches = list(_TIMES.finditer(text))
    for match, following in zip(matches, [*matches[1:], None]):
        stop = len(text) if following is None else following.start()
        body = text[match.end() : stop].partition("\n")[2]
        # A blank line ends a subtitle; the number of the next one is after it.
        lines = re.split(r"\n[ \t]*\n", body)[0]
        words = " ".join(_MARKUP.sub("", lines).split())
        groups = match.groups()
        if words:
            yield _seconds(groups[:4]), _seconds(groups[4:]), words


def _seconds(parts: tuple[str, ...]) -> float:
    hours, minutes, seconds, fraction = parts
    return (
        int(hours) * 3600 + int(minutes) * 60 + int(seconds) + int(fraction) / 10 ** len(fraction)
    )
