"""Manifests: the list of clips that a dataset is, a row a clip, in JSONL, CSV or Parquet.

A row that cannot be used is left out and named with its line and reason; it never stops the rest.
Rows are kept as text, and made into objects when they are asked for: a million of them take a few
hundred MB, and reach another process as one block.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, overload

import numpy as np
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from data.images import is_image_path
from data.manifest_formats import known_suffix, read_records, write_manifest
from data.video_file import one_line

__all__ = [
    "Manifest",
    "Place",
    "PlaceField",
    "Row",
    "Rows",
    "as_place",
    "read_manifest",
    "write_manifest",
]

_log = logging.getLogger(__name__)
_DROPPED = "dropped: "
_MAX_NAMED = 20  # rows left out that are named one by one

# Columns that `Manifest.column` gives as numbers for all rows at once.
MEASURED = ("num_frames", "height", "width", "fps", "duration", "pixel_aspect")
NUMBERS = ("start", "end", "crop_width", "crop_height", *MEASURED)

Crop = tuple[NonNegativeInt, NonNegativeInt, PositiveInt, PositiveInt]


class Row(BaseModel):
    """One clip. Columns that are not named here are kept in `model_extra`.

    Attributes:
        path: relative to the manifest, absolute, or a URL that fsspec opens.
        caption: what the clip shows, or a list of wordings to draw from.
        start, end: the piece of the file that is meant, in seconds; None is the file's own.
        crop: the part of the picture that is meant, (x, y, width, height) in pixels of the upright
            picture; None is all of it.
        references: pictures of the subjects that the clip shows, in the order in which its captions
            name them; each where `path` could be. None is no picture.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    path: str = Field(min_length=1)
    caption: str | list[str]
    start: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    end: float | None = Field(default=None, allow_inf_nan=False)
    crop: Crop | None = None
    references: tuple[Annotated[str, Field(min_length=1)], ...] | None = None

    @field_validator("caption")
    @classmethod
    def _says_something(cls, caption: str | list[str]) -> str | list[str]:
        wordings = [caption] if isinstance(caption, str) else caption
        if not wordings or not all(wording.strip() for wording in wordings):
            raise ValueError("empty")
        return caption

    @model_validator(mode="after")
    def _has_length(self) -> Row:
        if self.end is not None and self.end <= (self.start or 0.0):
            raise ValueError(f"end={self.end:g} is not after start={self.start or 0.0:g}")
        return self

    @property
    def captions(self) -> list[str]:
        """All wordings."""
        return [self.caption] if isinstance(self.caption, str) else self.caption


class Rows(Sequence[Row]):
    """Rows as JSON text, with their numbers beside them."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._text = bytearray()
        self._ends = array("q")
        self._numbers = {name: array("d") for name in NUMBERS}
        self._images = array("b")
        self._num_references = array("H")
        for row in rows:
            self.add(row, row.model_dump_json(exclude_none=True).encode())

    def add(self, row: Row, text: bytes) -> None:
        """A row, and the JSON text that it is read from again."""
        self._text += text
        self._ends.append(len(self._text))
        extra = row.model_extra or {}
        cropped = row.crop[2:] if row.crop else (None, None)
        values = (row.start, row.end, *cropped, *map(extra.get, MEASURED))
        for numbers, value in zip(self._numbers.values(), values):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                value = math.nan
            numbers.append(value)
        self._images.append(is_image_path(row.path))
        self._num_references.append(len(row.references or ()))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> Rows: ...

    def __getitem__(self, index: int | slice) -> Row | Rows:
        if isinstance(index, slice):
            return Rows(self[i] for i in range(*index.indices(len(self))))
        number = range(len(self))[index]
        begin = self._ends[number - 1] if number else 0
        text = bytes(self._text[begin : self._ends[number]])
        try:
            row = Row.model_validate_json(text)
        except ValidationError:  # text that is not Unicode, which strict JSON cannot hold
            row = Row.model_validate(json.loads(text))
        extra = row.model_extra or {}
        for name in [name for name, value in extra.items() if _is_missing(value)]:
            del extra[name]
        return row

    def column(self, name: str) -> np.ndarray:
        return np.array(self._numbers[name])

    @property
    def images(self) -> np.ndarray:
        return np.array(self._images, bool)

    @property
    def num_references(self) -> np.ndarray:
        return np.array(self._num_references, np.int64)


Place = Path | str  # a URL stays text: a Path would lose one of its slashes


def as_place(path: str | os.PathLike[str]) -> Place:
    """A local path, or a URL as it is."""
    text = os.fspath(path)
    return text if "://" in text else Path(text)


def _place(value: Any) -> Any:
    if not isinstance(value, (str, Path)):
        raise PydanticCustomError("path_type", "Input is not a valid path")
    return as_place(value)


PlaceField = Annotated[Place, BeforeValidator(_place)]  # of a pydantic model


@dataclass(frozen=True)
class Manifest:
    """The usable rows of a manifest file, and what is wrong with the others.

    Attributes:
        path: the file, or its URL.
        rows: the usable rows, in order.
        lines: the line in the file of each of `rows` (the row's number in Parquet), from 1.
        bad: (line, reason) of each row that was left out.
        dropped: (line, path and reason) of each row that the manifest itself says to leave out, with
            `keep: false`; the reasons are those in its column drop_reasons.
    """

    path: Place
    rows: Rows
    lines: list[int]
    bad: list[tuple[int, str]] = field(default_factory=list)
    dropped: list[tuple[int, str]] = field(default_factory=list)

    @property
    def num_dropped(self) -> int:
        """Rows that the manifest itself says to leave out."""
        return len(self.dropped)

    def warn_of_bad_rows(self, max_bad_share: float = 1.0) -> None:
        """Logs the rows that were left out: the first ones by line and reason, and their number.

        Args:
            max_bad_share: of all rows, in [0, 1].
        Raises:
            ValueError: more than that share cannot be used.
        """
        for line, reason in self.bad[:_MAX_NAMED]:
            _log.warning("%s:%d left out: %s", self.path, line, reason)
        if len(self.bad) > _MAX_NAMED:
            _log.warning("%s: %d rows left out in all", self.path, len(self.bad))
        count = len(self.bad) + len(self.rows)
        if len(self.bad) > max_bad_share * count:
            raise ValueError(
                f"{len(self.bad)} of the {count} rows of {self.path} cannot be used, more than "
                f"data.max_bad_share={max_bad_share}; mend them or raise it"
            )

    @property
    def root(self) -> Place:
        """The folder that relative paths start from."""
        return self.path.parent if isinstance(self.path, Path) else self.path.rpartition("/")[0]

    def locate(self, row: Row) -> str:
        """Where the clip of `row` is: a path that can be opened from here, or a URL."""
        return self._locate(row.path)

    def locate_references(self, row: Row) -> tuple[str, ...]:
        """Where the pictures of its subjects are."""
        return tuple(self._locate(path) for path in row.references or ())

    def _locate(self, path: str) -> str:
        if "://" in path or os.path.isabs(path):
            return path
        return f"{self.root}/{path}" if isinstance(self.root, str) else str(self.root / path)

    def column(self, name: str) -> np.ndarray:
        """A number of every row, float64 (n,), NaN where a row has none; `name` is of NUMBERS."""
        return self.rows.column(name)

    @property
    def images(self) -> np.ndarray:
        """Whether each row is a still image by the ending of its path, bool (n,)."""
        return self.rows.images

    @property
    def num_references(self) -> np.ndarray:
        """How many reference pictures each row has, int64 (n,)."""
        return self.rows.num_references

    def fingerprint(self) -> str:
        """32 hex digits that change when any usable row does, and not with the file's place."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for row in self.rows:
            values = row.model_dump()
            for name in ("crop", "references"):  # as of manifests that know of none
                if values[name] is None:
                    del values[name]
            digest.update(json.dumps(values, sort_keys=True, default=str).encode())
            digest.update(b"\n")
        return digest.hexdigest()


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Reads and validates a manifest.

    Empty CSV cells, nulls and NaNs are missing values. In a CSV, a caption may be a JSON list, and
    cells of unknown columns that are JSON numbers, booleans, lists or objects are read as such.

    Args:
        path: a .jsonl, .csv or .parquet file, or its URL.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another suffix, unreadable as a whole, or without a single usable row.
    """
    place = as_place(path)
    known_suffix(str(place))
    rows = Rows()
    lines: list[int] = []
    bad: list[tuple[int, str]] = []
    dropped: list[tuple[int, str]] = []
    with _local(place) as file:
        for line, found in read_records(file, str(place)):
            row, text, reason = _understand(found)
            if row is not None:
                rows.add(row, text)
                lines.append(line)
            else:
                (dropped if reason.startswith(_DROPPED) else bad).append((line, reason))
    if not rows:
        detail = f"; {len(dropped)} say keep: false" if dropped else ""
        detail += f"; line {bad[0][0]}: {bad[0][1]}" if bad else ""
        count = len(bad) + len(dropped)
        raise ValueError(f"manifest {place}: none of its {count} rows can be used{detail}")
    return Manifest(
        place, rows, lines, bad, [(n, why.removeprefix(_DROPPED)) for n, why in dropped]
    )


@contextmanager
def _local(place: Place) -> Iterator[Path]:
    """The manifest as a local file."""
    if isinstance(place, str):
        from data.media import local_copy

        with local_copy(place) as path:
            yield Path(path)
        return
    if not place.is_file():
        raise FileNotFoundError(f"no manifest at {place}: expected a .jsonl, .csv or .parquet file")
    yield place


def _understand(found: str | dict[str, Any] | bytes) -> tuple[Row | None, bytes, str]:
    """A row with its JSON text; or why it is left out, after _DROPPED where it says so itself."""
    if isinstance(found, bytes):
        try:  # in one go, which is several times as quick
            row = Row.model_validate_json(found)
            if "keep" not in (row.model_extra or {}):
                return row, found, ""
        except ValidationError:
            pass
        found = _parse(found)
    if isinstance(found, str):
        return None, b"", found
    record = {column: value for column, value in found.items() if not _is_missing(value)}
    keep = record.get("keep", True)
    if not isinstance(keep, bool):
        return None, b"", f"keep: expected true or false, got {keep!r:.80}"
    if not keep:
        reasons = record.get("drop_reasons") or ["no reason given"]
        text = "; ".join(map(str, reasons)) if isinstance(reasons, list) else str(reasons)
        return None, b"", f"{_DROPPED}{one_line(str(record.get('path')))}: {text}"
    try:
        row = Row.model_validate(record)
    except ValidationError as error:
        return None, b"", _reason(error)
    return row, json.dumps(record, default=str).encode(), ""


def _parse(text: bytes) -> dict[str, Any] | str:
    """The JSON object in a line, or what is wrong with it."""
    try:
        record = json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return "not UTF-8 text"
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    if not isinstance(record, dict):
        return f"expected a JSON object, got {type(record).__name__}"
    return record


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _reason(error: ValidationError) -> str:
    """The first thing wrong with a row, in one line."""
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "missing":
        return f"no {name}"
    if not name:
        return first["msg"].removeprefix("Value error, ")
    found = f"{first['input']!r:.80}"
    if first["type"] == "string_unicode":
        advice = "; rename the file" if name == "path" else ""
        return f"{name}: not Unicode text, got {found}{advice}"
    expected = {
        "path": "expected text, not empty",
        "caption": "expected text, or a list of texts, not empty",
        "start": "expected seconds, 0 or more",
        "end": "expected seconds",
        "crop": "expected [x, y, width, height] in pixels",
    }
    return f"{name}: {expected.get(name, first['msg'])}, got {found}"
