"""Manifests: the list of clips that a dataset is, a row a clip, in JSONL, CSV or Parquet.

A row that cannot be used is left out and named with its line and reason; it never stops the rest.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

_log = logging.getLogger(__name__)
_MAX_NAMED = 20  # rows left out that are named one by one
_SUFFIXES = (".jsonl", ".csv", ".parquet")
# Columns whose CSV cells are text, even when they look like a number.
_TEXT_COLUMNS = ("path",)


class Row(BaseModel):
    """One clip. Columns that are not named here are kept in `model_extra`.

    Attributes:
        path: relative to the manifest, absolute, or a URL that fsspec opens.
        caption: what the clip shows, or a list of wordings to draw from.
        start, end: the piece of the file that is meant, in seconds; None is the file's own.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    path: str = Field(min_length=1)
    caption: str | list[str]
    start: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    end: float | None = Field(default=None, allow_inf_nan=False)

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


@dataclass(frozen=True)
class Manifest:
    """The usable rows of a manifest file, and what is wrong with the others.

    Attributes:
        path: the file.
        rows: the usable rows, in order.
        lines: the line in the file of each of `rows` (the row's number in Parquet), from 1.
        bad: (line, reason) of each row that was left out.
    """

    path: Path
    rows: list[Row]
    lines: list[int]
    bad: list[tuple[int, str]] = field(default_factory=list)

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
    def root(self) -> Path:
        """The folder that relative paths start from."""
        return self.path.parent

    def locate(self, row: Row) -> str:
        """Where the clip of `row` is: a path that can be opened from here, or a URL."""
        return row.path if "://" in row.path else str(self.root / row.path)

    def fingerprint(self) -> str:
        """32 hex digits that change when any usable row does, and not with the file's place."""
        digest = hashlib.blake2b(digest_size=16)
        for row in self.rows:
            digest.update(json.dumps(row.model_dump(), sort_keys=True, default=str).encode())
            digest.update(b"\n")
        return digest.hexdigest()


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Reads and validates a manifest.

    Empty CSV cells, nulls and NaNs are missing values. In a CSV, a caption may be a JSON list, and
    cells of unknown columns that are JSON numbers, booleans, lists or objects are read as such.

    Args:
        path: a .jsonl, .csv or .parquet file.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another suffix, unreadable as a whole, or without a single usable row.
    """
    path = Path(path)
    suffix = _known_suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"no manifest at {path}: expected a .jsonl, .csv or .parquet file")
    records = {".jsonl": _jsonl_records, ".csv": _csv_records, ".parquet": _parquet_records}
    rows: list[Row] = []
    lines: list[int] = []
    bad: list[tuple[int, str]] = []
    for line, record in records[suffix](path):
        if isinstance(record, str):
            bad.append((line, record))
            continue
        try:
            rows.append(Row.model_validate(_without_missing(record)))
            lines.append(line)
        except ValidationError as error:
            bad.append((line, _reason(error)))
    if not rows:
        detail = f"; line {bad[0][0]}: {bad[0][1]}" if bad else ""
        raise ValueError(f"manifest {path}: none of its {len(bad)} rows can be used{detail}")
    return Manifest(path, rows, lines, bad)


def write_manifest(path: str | os.PathLike[str], rows: Iterable[dict[str, Any]]) -> None:
    """Writes `rows` as a .jsonl, .csv or .parquet file, which appears only when complete.

    Args:
        path: where to; the suffix decides the format.
        rows: JSON-able dicts. In CSV, lists and dicts are written as JSON. In Parquet, where a
            column has one type, captions become lists as soon as one of them is a list.
    Raises:
        ValueError: another suffix, or (Parquet) a column that mixes types.
    """
    path = Path(path)
    suffix = _known_suffix(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if suffix == ".jsonl":
            with partial.open("w", encoding="utf-8") as file:
                for row in rows:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        elif suffix == ".csv":
            _write_csv(partial, list(rows))
        else:
            _write_parquet(partial, list(rows))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _known_suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise ValueError(f"manifest {path}: expected one of {', '.join(_SUFFIXES)}, got '{suffix}'")
    return suffix


def _jsonl_records(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line, record), or (line, what is wrong with it)."""
    with path.open("rb") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                record = json.loads(text.decode("utf-8-sig"))
            except UnicodeDecodeError:
                yield line, "not UTF-8 text"
            except (ValueError, RecursionError) as error:
                yield line, f"not JSON: {error}"
            else:
                found = type(record).__name__
                wrong = f"expected a JSON object, got {found}"
                yield line, record if isinstance(record, dict) else wrong


def _csv_records(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"manifest {path}: not UTF-8 text at byte {error.start}") from error
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey="", strict=True)
    try:
        for cells in reader:
            if "" in cells and any(cells[""] or ()):
                names = len(reader.fieldnames or ())
                yield reader.line_num, f"more cells than the {names} columns: quote commas"
            else:
                yield (
                    reader.line_num,
                    {column: _csv_value(column, cell) for column, cell in cells.items() if column},
                )
    except csv.Error as error:
        raise ValueError(f"manifest {path}: line {reader.line_num} is not CSV: {error}") from error


def _csv_value(column: str, cell: str | None) -> Any:
    if cell is None or not cell.strip():
        return None
    if column in _TEXT_COLUMNS or (column == "caption" and not cell.lstrip().startswith("[")):
        return cell
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    # A quoted or null word is somebody's text, not JSON that write_manifest wrote.
    return cell if value is None or isinstance(value, str) else value


def _parquet_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    parquet = _pyarrow_parquet(path)
    try:
        file = parquet.ParquetFile(path)
        line = 0
        for batch in file.iter_batches():
            for record in batch.to_pylist():
                line += 1
                yield line, record
    except (OSError, ValueError) as error:  # pyarrow's own errors are among these
        raise ValueError(f"manifest {path}: not readable as Parquet: {error}") from error


def _pyarrow_parquet(path: Path) -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ValueError(
            f"manifest {path}: Parquet needs pyarrow: pip install 'zoetrope[parquet]'"
        ) from error
    return parquet


def _without_missing(record: dict[str, Any]) -> dict[str, Any]:
    def missing(value: Any) -> bool:
        return value is None or (isinstance(value, float) and math.isnan(value))

    return {column: value for column, value in record.items() if not missing(value)}


def _reason(error: ValidationError) -> str:
    """The first thing wrong with a row, in one line."""
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "missing":
        return f"no {name}"
    if not name:
        return first["msg"].removeprefix("Value error, ")
    expected = {
        "path": "expected text, not empty",
        "caption": "expected text, or a list of texts, not empty",
        "start": "expected seconds, 0 or more",
        "end": "expected seconds",
    }
    found = repr(first["input"])
    return f"{name}: {expected.get(name, first['msg'])}, got {found[:80]}"


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in rows:
            cells = [row.get(column) for column in columns]
            writer.writerow(
                [
                    json.dumps(cell, ensure_ascii=False)
                    if isinstance(cell, (list, dict, bool))
                    else cell
                    for cell in cells
                ]
            )


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    parquet = _pyarrow_parquet(path)
    import pyarrow

    columns = dict.fromkeys(column for row in rows for column in row)
    table = {column: [row.get(column) for row in rows] for column in columns}
    captions = table.get("caption", [])
    if any(isinstance(caption, list) for caption in captions):
        table["caption"] = [[c] if isinstance(c, str) else c for c in captions]
    try:
        parquet.write_table(pyarrow.table(table), path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"manifest {path}: not writable as Parquet: {error}") from error
