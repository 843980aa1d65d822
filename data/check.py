"""`zoetrope data check`: reads every clip of a manifest and says which ones training would get."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data.manifest import read_manifest
from data.video import VideoReader, VideoReadError, clip_times
from data.workers import interrupts_deferred


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
class Verdict:
    """Of one clip: `reason` is empty for one that is kept, `detail` says what it is."""

    reason: str = ""
    detail: str = ""
    enlarged: bool = False


def check_clip(path: str, start: float, end: float | None, wanted: Wanted) -> Verdict:
    """Decodes the piece of `path` from `start` to `end` seconds, and sees whether it is enough."""
    try:
        with VideoReader(path, "pyav") as reader:
            info = reader.info
            clip_times(info, num_frames=wanted.num_frames, fps=wanted.fps, start=start, end=end)
            num_frames = reader.verify(start, end)
    except VideoReadError as error:
        return Verdict(reason=error.reason)
    small = info.height < (wanted.height or 0) or info.width < (wanted.width or 0)
    what = (
        "an image"
        if info.is_image
        else f"{num_frames} frames at {info.fps:.6g} fps, {info.duration:.3f} s"
    )
    detail = f"{info.width}x{info.height}, {what}, {info.codec}"
    return Verdict(detail=detail, enlarged=small)


def check_manifest(
    path: Path, wanted: Wanted, max_bad_share: float = 0.0, workers: int | None = None
) -> bool:
    """Prints kept or dropped for each row of a manifest, with the reason, and a summary.

    Args:
        path: the manifest.
        wanted: what training will ask for.
        max_bad_share: of all rows, in [0, 1].
        workers: processes; default one a core.
    Returns:
        Whether the share of dropped rows is at most `max_bad_share`.
    Raises:
        FileNotFoundError, ValueError: as read_manifest, or an argument is out of range.
    """
    if not 0 <= max_bad_share <= 1:
        raise ValueError(f"max_bad_share={max_bad_share} must be in [0, 1]")
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    manifest = read_manifest(path)
    for line, reason in manifest.bad:
        print(f"dropped  line {line}: {reason}")
    pieces = [(manifest.locate(row), row.start or 0.0, row.end) for row in manifest.rows]
    num_dropped, num_enlarged = len(manifest.bad), 0
    verdicts = _verdicts(pieces, wanted, min(workers or os.cpu_count() or 1, len(pieces)))
    progress = tqdm(verdicts, total=len(pieces), desc="checking", unit="clip", disable=None)
    for line, row, verdict in zip(manifest.lines, manifest.rows, progress, strict=True):
        if verdict.reason:
            progress.write(f"dropped  line {line}: {row.path}: {verdict.reason}")
        else:
            progress.write(f"kept     line {line}: {row.path}: {verdict.detail}")
        num_dropped += bool(verdict.reason)
        num_enlarged += verdict.enlarged

    num_rows = len(manifest.rows) + len(manifest.bad)
    print(f"{num_rows - num_dropped} of {num_rows} clips kept, {num_dropped} dropped")
    if num_enlarged:
        print(
            f"smaller than asked for, which training will enlarge: {num_enlarged} of the kept ones"
        )
    return num_dropped <= max_bad_share * num_rows


def _verdicts(
    pieces: list[tuple[str, float, float | None]], wanted: Wanted, workers: int
) -> Iterator[Verdict]:
    """A verdict a piece, in order."""
    if workers == 1:
        for piece in pieces:
            yield check_clip(*piece, wanted)
        return
    with ProcessPoolExecutor(workers) as pool:
        paths, starts, ends = zip(*pieces, strict=True)
        with interrupts_deferred():
            verdicts = pool.map(
                check_clip, paths, starts, ends, [wanted] * len(pieces), chunksize=8
            )
        try:
            yield from verdicts
        except BrokenProcessPool as error:
            raise ValueError(
                "a decoder crashed on one of the clips: use --workers 1, which stops after the "
                "last good one"
            ) from error
