"""Rows of a manifest as a file holds them: JSONL, CSV and Parquet, read and written."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data.files import replacing

_SUFFIXES = (".jsonl", ".csv", ".parquet")
# Columns whose CSV cells are text, even when they look like a number.
_TEXT_COLUMNS = ("path",)

# What is wrong with a row; its record; or its JSON text, nobody has looked into yet.
Found = str | dict[str, Any] | bytes


def read_records(path: Path, name: str) -> Iterator[tuple[int, Found]]:
    """(line, what was found there), from 1; in Parquet lines are the rows' numbers.

    Args:
        path: a local file.
        name: what it is called in errors; its suffix says what it is.
    Raises:
        ValueError: another suffix, or not readable as a whole.
    """
    kinds = {".jsonl": _jsonl_records, ".csv": _csv_records, ".parquet": _parquet_records}
    return kinds[known_suffix(name)](path, name)


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
    suffix = known_suffix(str(path))
    with replacing(path) as partial:
        if suffix == ".jsonl":
            with partial.open("w", encoding="utf-8") as file:
                for row in rows:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        elif suffix == ".csv":
            _write_csv(partial, list(rows))
        else:
            _write_parquet(partial, list(rows))


def known_suffix(name: str) -> str:
    """The suffix of a manifest's path or URL.

    Raises:
        ValueError: it is none that a manifest may have.
    """
    suffix = os.path.splitext(name)[1].lower()
    if suffix not in _SUFFIXES:
        raise ValueError(f"manifest {name}: expected one of {', '.join(_SUFFIXES)}, got '{suffix}'")
    return suffix


def _jsonl_records(path: Path, name: str) -> Iterator[tuple[int, Found]]:
    with path.open("rb") as file:
        for line, text in enumerate(file, start=1):
            text = text.strip()
            if text:
                yield line, text


def _csv_records(path: Path, name: str) -> Iterator[tuple[int, Found]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restkey="", strict=True)
        try:
            for cells in reader:
                if "" in cells and any(cells[""] or ()):
                    names = len(reader.fieldnames or ())
                    yield reader.line_num, f"more cells than the {names} columns: quote commas"
                else:
                    values = {key: _csv_value(key, cell) for key, cell in cells.items() if key}
                    yield reader.line_num, values
        except csv.Error as error:
            at = f"line {reader.line_num} is not CSV: {error}"
            raise ValueError(f"manifest {name}: {at}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"manifest {name}: not UTF-8 text {_bad_byte(path)}") from error


def _bad_byte(path: Path) -> str:
    """Where a file stops being UTF-8 text; a stream's error counts from its last buffer."""
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError as error:
        return f"at byte {error.start}"
    return "at its end"


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


def _parquet_records(path: Path, name: str) -> Iterator[tuple[int, Found]]:
    parquet = _pyarrow_parquet(name)
    try:
        with parquet.ParquetFile(path) as file:
            line = 0
            for batch in file.iter_batches(batch_size=4096):
                for record in batch.to_pylist():
                    line += 1
                    yield line, record
    except (OSError, ValueError) as error:  # pyarrow's own errors are among these
        raise ValueError(f"manifest {name}: not readable as Parquet: {error}") from error


def _pyarrow_parquet(name: str) -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ValueError(
            f"manifest {name}: Parquet needs pyarrow: pip install 'zoetrope[parquet]'"
        ) from error
    return parquet


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
    parquet = _pyarrow_parquet(str(path))
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
