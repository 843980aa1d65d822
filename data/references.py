"""Reference pictures for real clips: a frame of the same clip at another time than training sees.

The last frame of a piece is put aside as a picture of what the piece shows, and the piece ends earlier
than it did, so that no clip that is read of it comes near that frame.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.files import replacing
from data.join import rows_seen_from
from data.manifest import Manifest, write_manifest
from data.pool import Lost, run_tasks
from data.video import VideoInfo, VideoReader, VideoReadError, read_clip

PICTURES = "references"


@dataclass(frozen=True)
class Piece:
    """What is read of a row, and the picture that is made of it."""

    path: str
    start: float
    end: float | None
    crop: tuple[int, int, int, int] | None
    picture: Path


@dataclass
class Outcome:
    """Rows with a picture made here, rows that had some, and why the others have none."""

    made: int = 0
    had: int = 0
    without: dict[str, int] = field(default_factory=dict)


def put_aside(piece: Piece, keep: float, apart: float) -> float | str:
    """Writes the picture, unless it is there, and returns where the piece ends now, in seconds; or why
    there is none."""
    try:
        with VideoReader(piece.path, "pyav") as reader:
            info = reader.info
        if info.is_image:
            return "an image"
        stop = info.duration if piece.end is None else min(piece.end, info.duration)
        end = stop - apart
        if end - piece.start < keep:
            return "too short"
        if not piece.picture.exists():
            _write_last_frame(piece, info, stop)
    except VideoReadError as error:
        return error.reason
    return end


def _write_last_frame(piece: Piece, info: VideoInfo, stop: float) -> None:
    """The last frame before `stop`, in seconds, with square pixels."""
    from PIL import Image

    _, _, width, height = piece.crop or (0, 0, info.width, info.height)
    picture = read_clip(
        piece.path,
        num_frames=1,
        fps=info.fps,
        height=height,
        width=max(1, round(width * info.pixel_aspect)),
        start=max(piece.start, stop - 0.5 / info.fps),
        crop=piece.crop,
    )
    piece.picture.parent.mkdir(parents=True, exist_ok=True)
    with replacing(piece.picture) as unfinished:
        Image.fromarray(picture[:, 0].permute(1, 2, 0).numpy()).save(unfinished, format="PNG")


def add_references(
    manifest: Manifest,
    out: Path,
    *,
    keep: float = 1.0,
    apart: float = 0.5,
    workers: int | None = None,
    file_seconds: float = 180.0,
) -> Outcome:
    """Writes OUT/references/ and OUT/manifest.jsonl, which has all rows; an interrupted call goes on
    where it was, when it is repeated.

    Args:
        keep: seconds that are to be left of a piece; a shorter one gets no picture, and stays whole.
        apart: seconds between what is left of a piece and its picture.
        workers: processes; default one a core.
        file_seconds: after which a file on which a decoder hangs is given up.
    Raises:
        ValueError: a number is out of range, or the folder has another manifest's pictures, or one.
    """
    for name, value in (("keep", keep), ("apart", apart), ("file_seconds", file_seconds)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{name}={value:g}: expected a number of seconds above 0")
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    _claim(out, manifest)
    target = out / "manifest.jsonl"
    asked = [index for index, row in enumerate(manifest.rows) if not row.references]
    pictures = {index: out / _picture(manifest, index) for index in asked}
    pieces = (_piece(manifest, index, pictures[index]) for index in asked)
    number = min(workers or os.cpu_count() or 1, max(1, len(asked)))
    put = partial(put_aside, keep=keep, apart=apart)
    results = run_tasks(put, pieces, workers=number, time_limit=file_seconds)
    ends: dict[int, float] = {}
    outcome = Outcome(had=len(manifest.rows) - len(asked))
    for place, result in tqdm(results, total=len(asked), desc="references", unit="clip"):
        if isinstance(result, (int, float)):
            ends[asked[place]] = result
        else:
            reason = result.reason if isinstance(result, Lost) else result
            outcome.without[reason] = outcome.without.get(reason, 0) + 1
    outcome.made = len(ends)

    def rows() -> Iterator[dict[str, Any]]:
        for index, row in enumerate(rows_seen_from(manifest, out)):
            if index in ends:
                row |= {"end": ends[index], "references": [_picture(manifest, index)]}
            yield row

    write_manifest(target, rows())
    return outcome


def _piece(manifest: Manifest, index: int, picture: Path) -> Piece:
    row = manifest.rows[index]
    return Piece(manifest.locate(row), row.start or 0.0, row.end, row.crop, picture)


def _version(place: str) -> str:
    """A file's whole path, and what changes with its contents."""
    if "://" in place:
        return place
    place = os.path.abspath(place)
    try:
        status = os.stat(place)
    except OSError:  # reading it will say why
        return place
    return f"{place} {status.st_size} {status.st_mtime_ns}"


def _claim(out: Path, manifest: Manifest) -> None:
    """Notes down whose pictures a folder has, or compares.

    Raises:
        ValueError: they are another manifest's, or the folder has a manifest of its own.
    """
    name = str(manifest.path)
    source = name if "://" in name else os.path.realpath(name)
    note = out / "source.txt"
    if note.is_file():
        found = note.read_text().strip()
        if found != source:
            raise ValueError(f"{out} has the pictures of {found}; use another folder for {source}")
        return
    if (out / "manifest.jsonl").exists():
        raise ValueError(f"{out / 'manifest.jsonl'} would be overwritten; use another folder")
    out.mkdir(parents=True, exist_ok=True)
    with replacing(note) as unfinished:
        unfinished.write_text(f"{source}\n")


def _picture(manifest: Manifest, index: int) -> str:
    """Where a row's picture is, by what it is of: that of another manifest is never taken for it."""
    row = manifest.rows[index]
    place = manifest.locate(row)
    about = f"{_version(place)} {row.start} {row.end} {row.crop}"
    name = hashlib.sha256(about.encode()).hexdigest()[:16]
    return f"{PICTURES}/{name[:2]}/{name}.png"
