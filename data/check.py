"""`zoetrope data check`: reads every clip of a manifest and says which ones training would get, and
what about them may surprise."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.manifest import Manifest, Row, write_manifest
from data.manifest_formats import known_suffix
from data.pool import Lost, run_tasks
from data.video import VideoInfo, VideoReader, VideoReadError, clip_times
from data.video_file import one_line

_MAX_NAMED = 5  # examples of each surprise
_ENDS = 1 << 16  # bytes at either end of a file that are compared


@dataclass(frozen=True)
class Wanted:
    """What training will ask of each clip; `height` and `width` in pixels, None for any size.

    Raises:
        ValueError: a number is not positive.
    """

    num_frames: int
    fps: float
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        sizes = [size for size in (self.height, self.width) if size is not None]
        if self.num_frames < 1 or not 0 < self.fps <= 1000 or any(size < 1 for size in sizes):
            raise ValueError(
                f"frames, height and width must be positive and fps in (0, 1000], got "
                f"{self.num_frames}, {self.height}, {self.width} and {self.fps:g}"
            )


@dataclass(frozen=True)
class TextLimit:
    """How much of a caption the text encoder reads: `count` tokens of a text, all of them."""

    count: Callable[[str], int]
    length: int


@dataclass(frozen=True)
class Verdict:
    """Of one clip.

    Attributes:
        reason: why it is dropped; empty for one that is kept.
        info: what the file is; None where it cannot be opened.
        num_frames: of the piece, counted.
        seconds: of the piece.
        signature: the same for files with the same size, beginning and end; empty for URLs.
    """

    reason: str = ""
    info: VideoInfo | None = None
    num_frames: int = 0
    seconds: float = 0.0
    signature: str = ""

    @property
    def detail(self) -> str:
        """What it is, in words."""
        info = self.info
        if info is None:
            return ""
        length = f"{self.num_frames} frames at {info.fps:.6g} fps, {self.seconds:.3f} s"
        return (
            f"{info.width}x{info.height}, {'an image' if info.is_image else length}, {info.codec}"
        )


@dataclass(frozen=True)
class Piece:
    """What is read of a row."""

    path: str
    start: float
    end: float | None
    crop: tuple[int, int, int, int] | None
    references: tuple[str, ...] = ()


def check_clip(piece: Piece, wanted: Wanted) -> Verdict:
    """Decodes a piece, and sees whether it is enough; then the pictures of its subjects."""
    info = None
    try:
        with VideoReader(piece.path, "pyav") as reader:
            info = reader.info
            x, y, width, height = piece.crop or (0, 0, 1, 1)
            if x + width > info.width or y + height > info.height:
                where = f"crop {x},{y} {width}x{height}"
                return Verdict(f"{where} lies outside its {info.width}x{info.height}", info)
            clip_times(
                *(info,),
                num_frames=wanted.num_frames,
                fps=wanted.fps,
                start=piece.start,
                end=piece.end,
            )
            num_frames = reader.verify(piece.start, piece.end)
        for path in piece.references:
            reason = _unreadable(path)
            if reason:
                return Verdict(f"its reference {one_line(path)}: {reason}", info)
    except VideoReadError as error:
        return Verdict(error.reason, info)
    stop = info.duration if piece.end is None else min(piece.end, info.duration)
    return Verdict("", info, num_frames, stop - piece.start, _signature(piece.path))


def _unreadable(path: str) -> str:
    """Why the first picture of a file cannot be seen; empty if it can."""
    try:
        with VideoReader(path, "pyav") as reader:
            reader.read_at([0.0])
    except VideoReadError as error:
        return error.reason
    return ""


def _signature(path: str) -> str:
    """Of a local file; reading all of it would cost as much again as decoding it."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.blake2b(str(size).encode(), digest_size=16)
            digest.update(file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            digest.update(file.read(_ENDS))
    except OSError:
        return ""
    return digest.hexdigest()


@dataclass
class Findings:
    """What a check found, added up as it goes.

    Attributes:
        manifest: what is checked.
        wanted: what training will ask for.
        kept: the verdicts of kept rows, by row.
        reasons: how many rows each reason dropped, numbers in it aside.
    """

    manifest: Manifest
    wanted: Wanted
    kept: dict[int, Verdict] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def drop(self, reason: str) -> None:
        """One more row that training does not get."""
        kind = re.sub(r"\d+(\.\d+)?", "#", reason)
        self.reasons[kind] += 1
        self.examples.setdefault(kind, reason)

    @property
    def num_rows(self) -> int:
        """Of the file, but for those that it says to leave out itself."""
        return len(self.kept) + self.num_dropped

    @property
    def num_dropped(self) -> int:
        """Of these, for whatever reason."""
        return sum(self.reasons.values()) - len(self.manifest.dropped)

    def lines(self, limit: TextLimit | None) -> Iterator[str]:
        """The summary."""
        yield f"{len(self.kept)} of {self.num_rows} clips kept, {self.num_dropped} dropped"
        if self.manifest.dropped:
            yield f"beside them, left out by the manifest itself: {len(self.manifest.dropped)} rows"
        for kind, count in self.reasons.most_common():
            such = ", such as" if count > 1 else ""
            yield f"  {count:,} dropped{such}: {self.examples[kind]}"
        wanted = self.wanted
        small = [
            row
            for row in self.kept
            if _shown(self.manifest.rows[row], self.kept[row])[1] < (wanted.height or 0)
            or _shown(self.manifest.rows[row], self.kept[row])[0] < (wanted.width or 0)
        ]
        if small:
            yield (
                "smaller than asked for, which training will enlarge: "
                f"{len(small)} of the kept ones{self._examples(small)}"
            )
        yield from self._surprises()
        yield from self._duplicates()
        if limit is not None:
            yield from self._long_captions(limit)

    def _examples(self, rows: list[int]) -> str:
        lines = [self.manifest.lines[row] for row in rows[:_MAX_NAMED]]
        more = ", ..." if len(rows) > _MAX_NAMED else ""
        return f" (line{'s' if len(rows) > 1 else ''} {', '.join(map(str, lines))}{more})"

    def _surprises(self) -> Iterator[str]:
        """Rates and lengths that are not what the manifest or training takes them for."""
        slow, still, mistaken = [], [], {name: list[int]() for name in _COLUMNS}
        for number, verdict in self.kept.items():
            info, row = verdict.info, self.manifest.rows[number]
            if info is None or info.is_image:
                continue
            if self.wanted.num_frames > 1 and info.fps < self.wanted.fps * 0.99:
                slow.append(number)
            if verdict.num_frames == 1:
                still.append(number)
            for name, (measure, tolerance) in _COLUMNS.items():
                said = (row.model_extra or {}).get(name)
                whole = row.start is None and row.end is None
                if isinstance(said, (int, float)) and (
                    whole or name not in ("duration", "num_frames")
                ):
                    found = measure(verdict)
                    if abs(found - said) > tolerance * max(abs(found), abs(said)):
                        mistaken[name].append(number)
        if slow:
            yield (
                f"fewer frames per second than the {self.wanted.fps:g} asked for, so that training "
                f"sees frames twice: {len(slow)} of the kept ones{self._examples(slow)}"
            )
        if still:
            yield f"one frame only, though not images: {len(still)}{self._examples(still)}"
        for name, rows in mistaken.items():
            if rows:
                what = f"{name} in the manifest is not that of the file"
                yield f"{what}: {len(rows)} of the kept ones{self._examples(rows)}"

    def _duplicates(self) -> Iterator[str]:
        """Rows of the same piece, and rows whose files are copies."""
        pieces: dict[Any, list[int]] = {}
        for number, verdict in self.kept.items():
            row = self.manifest.rows[number]
            key = (verdict.signature or row.path, row.start, row.end, row.crop)
            pieces.setdefault(key, []).append(number)
        again = [number for rows in pieces.values() for number in rows[1:]]
        if again:
            yield (
                "the same piece of the same file, or of a copy of it, as a row before: "
                f"{len(again)} of the kept ones{self._examples(again)}"
            )

    def _long_captions(self, limit: TextLimit) -> Iterator[str]:
        """Captions of which the text encoder never sees the end."""
        over, lost, total = [], 0, 0
        for number in self.kept:
            counts = [limit.count(caption) for caption in self.manifest.rows[number].captions]
            total += sum(counts)
            if max(counts) > limit.length:
                over.append(number)
                lost += sum(max(0, count - limit.length) for count in counts)
        if over:
            yield (
                f"captions longer than the text encoder's {limit.length} tokens: {len(over)} of the "
                f"kept ones{self._examples(over)}; {lost:,} of all {total:,} tokens are lost"
            )


# What a manifest may say of a file: how it is measured, and by which share it may be off.
_COLUMNS: dict[str, tuple[Callable[[Verdict], float], float]] = {
    "fps": (lambda v: v.info.fps if v.info else 0.0, 0.01),
    "duration": (lambda v: v.info.duration if v.info else 0.0, 0.02),
    "num_frames": (lambda v: float(v.num_frames), 0.0),
    "width": (lambda v: float(v.info.width if v.info else 0), 0.0),
    "height": (lambda v: float(v.info.height if v.info else 0), 0.0),
}


def _shown(row: Row, verdict: Verdict) -> tuple[int, int]:
    """Width and height of what is meant of a picture."""
    if row.crop is not None:
        return row.crop[2], row.crop[3]
    return (verdict.info.width, verdict.info.height) if verdict.info else (0, 0)


def check_manifest(
    manifest: Manifest,
    wanted: Wanted,
    *,
    workers: int | None = None,
    file_seconds: float = 180.0,
    say: Callable[[str], None] = print,
) -> Findings:
    """Reads every clip, and says of each row whether it is kept, and if not, why.

    Args:
        manifest: to check.
        wanted: what training will ask for.
        workers: processes; default one a core.
        file_seconds: after which a file on which a decoder hangs is given up.
        say: told each line.
    Raises:
        ValueError: an argument is out of range.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    if not file_seconds > 0:
        raise ValueError(f"file_seconds={file_seconds:g} must be positive")
    found = Findings(manifest, wanted)
    for line, reason in manifest.bad:
        say(f"dropped  line {line}: {reason}")
        found.drop(reason)
    for line, reason in manifest.dropped:
        say(f"dropped  line {line}: {reason}")
        found.drop(reason.partition(": ")[2])
    pieces = (
        Piece(
            *(manifest.locate(row), row.start or 0.0, row.end, row.crop),
            manifest.locate_references(row),
        )
        for row in manifest.rows
    )
    number = min(workers or os.cpu_count() or 1, len(manifest.rows))
    verdicts = run_tasks(
        partial(check_clip, wanted=wanted), pieces, workers=number, time_limit=file_seconds
    )
    early: dict[int, Verdict | Lost] = {}
    progress = tqdm(total=len(manifest.rows), desc="checking", unit="clip", disable=None)
    with progress:
        for index, outcome in verdicts:
            early[index] = outcome
            progress.update()
            while (row := found.num_rows - len(manifest.bad)) in early:
                progress.clear()
                _judge(found, row, early.pop(row), say)
    return found


def _judge(found: Findings, row: int, outcome: Verdict | Lost, say: Callable[[str], None]) -> None:
    """Says what came of a row, and adds it up."""
    verdict = Verdict(outcome.reason) if isinstance(outcome, Lost) else outcome
    clip, line = found.manifest.rows[row], found.manifest.lines[row]
    path = one_line(clip.path)
    if clip.start is not None or clip.end is not None:
        path += f" [{clip.start or 0.0:g}, {'end' if clip.end is None else f'{clip.end:g}'}]"
    if verdict.reason:
        found.drop(verdict.reason)
        say(f"dropped  line {line}: {path}: {verdict.reason}")
        return
    found.kept[row] = verdict
    say(f"kept     line {line}: {path}: {verdict.detail}")


def check_writable(manifest: Manifest, path: Path) -> None:
    """Before the work, not after it.

    Raises:
        ValueError: no manifest can be written there, or its paths would lead elsewhere.
    """
    known_suffix(str(path))
    place = manifest.path
    if not isinstance(place, Path) or path.parent.resolve() != place.parent.resolve():
        raise ValueError(
            f"--write {path}: expected a file beside {place}, from where its paths start"
        )
    if path.resolve() == place.resolve():
        raise ValueError(f"--write {path}: is what is checked; choose another name")


def write_kept(found: Findings, path: Path) -> None:
    """A manifest of the rows that were kept, with what was measured: of their files width, height, fps
    and duration; num_frames of those that are whole files."""
    manifest = found.manifest

    def rows() -> Iterator[dict[str, Any]]:
        for number, verdict in sorted(found.kept.items()):
            row, info = manifest.rows[number], verdict.info
            assert info is not None
            measured: dict[str, Any] = {"height": info.height, "width": info.width}
            measured |= {"fps": info.fps, "duration": info.duration}
            measured["pixel_aspect"] = info.pixel_aspect
            if row.start is None and row.end is None:
                measured["num_frames"] = verdict.num_frames
            yield row.model_dump(mode="json", exclude_none=True) | measured

    write_manifest(path, rows())
