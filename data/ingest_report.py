"""The ingest's report: one static page of what became of every file, with pictures and histograms.

Everything that comes from files or captions is escaped. Pictures lie in thumbnails/ beside it.
"""

from __future__ import annotations

import html
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from data.charts import histogram
from data.files import replacing
from data.ingest_config import BOUNDS, IngestConfig
from data.ingest_select import count_kinds, kind_of, name_of
from data.ingest_source import Source

Record = dict[str, Any]

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em;
       color: #1d2129; background: #fff }
h1, h2, h3 { line-height: 1.2 } h2 { margin-top: 2em; border-bottom: 1px solid #ccc }
table { border-collapse: collapse } td, th { padding: .2em .8em .2em 0; text-align: left;
       vertical-align: top } td.n { text-align: right; font-variant-numeric: tabular-nums }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(21em, 1fr)); gap: 1.2em }
.clip { border: 1px solid #ddd; border-radius: 4px; padding: .6em; overflow-wrap: anywhere }
.clip img { width: 100%; display: block; background: #eee }
.clip .dim, .dim { color: #68707c; font-size: .87em } .clip p { margin: .3em 0 }
.clip .caption { max-height: 9em; overflow: auto; white-space: pre-wrap }
.why { color: #a3211a } .charts { display: flex; flex-wrap: wrap; gap: 1.2em }
.pair { border: 1px solid #ddd; border-radius: 4px; padding: .6em; margin: 0 0 1em }
.pair > div { display: inline-block; width: 48%; vertical-align: top; overflow-wrap: anywhere }
.pair img { max-width: 100% }
svg text { font: 11px system-ui, sans-serif; fill: #444 }
"""


def write_report(
    path: Path, src: str, source: Source, records: Sequence[Record], config: IngestConfig
) -> None:
    """Writes the page, which appears only when complete.

    Args:
        path: where to; `thumbnail` of the records is relative to its folder.
        src: what was ingested, as the user named it.
        source: what was found there.
        records: of all clips, decided upon.
        config: as used.
    """
    most = config.report_clips
    kept = [record for record in records if not record["drop_reasons"]]
    dropped = defaultdict(list)
    for record in records:
        for kind in dict.fromkeys(map(kind_of, record["drop_reasons"])):
            dropped[kind].append(record)
    unreadable = dropped.pop("not readable", [])
    duplicates = dropped.pop("duplicate", [])
    parts = [
        _totals(src, source, records, kept),
        _histograms(records, kept, config),
        _section("Kept", len(kept), _clips(kept, most)),
    ]
    for kind, some in sorted(dropped.items(), key=lambda item: -len(item[1])):
        parts.append(_section(f"Dropped: {kind}", len(some), _clips(some, most)))
    parts += [
        _section("Duplicates", len(duplicates), _some(duplicates, most, _pair)),
        _section("Not readable", len(unreadable), _unreadable(unreadable, most)),
        _section("Captions that could not be used", *_caption_problems(records, most)),
        _section("Skipped", len(source.skipped), _skipped(source, most)),
    ]
    title = f"Ingest of {_text(os.path.basename(src.rstrip('/')) or src)}"
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    with replacing(path) as partial:
        partial.write_text(page, encoding="utf-8", errors="replace")


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _section(title: str, count: int, body: str) -> str:
    return f"<h2>{_text(title)} ({count})</h2>\n{body}" if count else ""


def _table(rows: Iterable[Sequence[object]], head: Sequence[str] = ()) -> str:
    """Numbers are set to the right."""

    def cell(value: object) -> str:
        number = isinstance(value, int)
        return f'<td class="n">{value}</td>' if number else f"<td>{_text(value)}</td>"

    top = "<tr>" + "".join(f"<th>{_text(name)}</th>" for name in head) + "</tr>" if head else ""
    return (
        f"<table>{top}"
        + "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
        + "</table>"
    )


def _totals(src: str, source: Source, records: Sequence[Record], kept: Sequence[Record]) -> str:
    reasons = count_kinds(records)
    num_sidecars = sum(len(record["sidecars"]) for record in source.files)
    seconds = [sum(record.get("seconds", 0.0) for record in some) for some in (records, kept)]
    rows: list[Sequence[object]] = [
        ("source", src),
        (
            "rows of a manifest" if source.is_manifest else "media files",
            source.size if source.is_manifest else len(source.files),
        ),
        ("sidecar files beside them", num_sidecars),
        (
            "other rows, skipped" if source.is_manifest else "other files, skipped",
            len(source.skipped),
        ),
        ("clips", len(records)),
        ("kept", len(kept)),
        ("video", f"{_length(seconds[0])}, kept {_length(seconds[1])}"),
    ]
    rows += [(f"dropped: {kind}", count) for kind, count in reasons.most_common()]
    note = '<p class="dim">A clip with several reasons is counted under each.</p>'
    overlap = reasons.total() > len(records) - len(kept)
    return _table(rows) + (note if overlap else "")


def _length(seconds: float) -> str:
    for name, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.1f} s"


def _histograms(records: Sequence[Record], kept: Sequence[Record], config: IngestConfig) -> str:
    """Of everything that a filter looks at, with its thresholds, and of captions and sizes."""
    limits: dict[str, dict[str, float]] = defaultdict(dict)
    for bound in BOUNDS:
        limit = getattr(config.filters, bound.key)
        if limit is not None:
            limits[bound.column][bound.key] = float(limit)
    titles = {
        "seconds": "length of clips, seconds",
        "shown_width": "width, pixels",
        "shown_height": "height, pixels",
        "fps": "frames per second",
        "motion": "motion, diagonals per second",
        "jerk": "jerk, diagonals per second and frame",
        "sharpness": "sharpness",
        "black": "share of black frames",
        "frozen": "share of frozen frames",
        "text": "share covered by text",
        "logo": "share covered by a logo",
    }
    charts = []
    for column, title in titles.items():
        values, chosen = ([r[column] for r in some if column in r] for some in (records, kept))
        charts.append(histogram(title, values, chosen, limits[column]))
    words, chosen = (
        [float(len(text.split())) for record in some for text in _captions(record)]
        for some in (records, kept)
    )
    charts.append(histogram("length of captions, words", words, chosen, {}))
    key = (
        '<p class="dim">Grey: all clips. Blue: those that are kept. Red: the thresholds. '
        "Top right: the clips of the highest bar.</p>"
    )
    return f'<h2>What was measured</h2>{key}<div class="charts">{"".join(charts)}</div>'


def _captions(record: Record) -> list[str]:
    caption = record.get("caption", [])
    return [caption] if isinstance(caption, str) else caption


def _some(records: Sequence[Any], most: int, show: Callable[[Any], str]) -> str:
    """The first `most`, and how many more there are."""
    more = f"<p>{len(records) - most} more, in manifest.jsonl</p>" if len(records) > most else ""
    return "".join(show(record) for record in records[:most]) + more


def _clips(records: Sequence[Record], most: int) -> str:
    more = f"<p>{len(records) - most} more, in manifest.jsonl</p>" if len(records) > most else ""
    return f'<div class="clips">{"".join(map(_clip, records[:most]))}</div>{more}'


def _picture(record: Record) -> str:
    if "thumbnail" not in record:
        return ""
    return f'<img loading="lazy" alt="" src="{_text(record["thumbnail"])}">'


def _clip(record: Record) -> str:
    return f'<div class="clip">{_about(record)}{_why(record)}</div>'


def _about(record: Record) -> str:
    """A picture, the name, the size and the captions."""
    facts = []
    if "shown_width" in record:
        facts.append(f"{record['shown_width']}x{record['shown_height']}")
    if "seconds" in record:
        facts += [f"{record['seconds']:.2f} s", f"{record['fps']:.4g} fps"]
    facts += [f"{n} {record[n]:.3g}" for n in ("motion", "jerk", "sharpness") if n in record]
    if record.get("crop") and "width" in record:
        facts.append("cropped from {}x{}".format(record["width"], record["height"]))
    captions = "".join(f'<p class="caption">{_text(text)}</p>' for text in _captions(record))
    head = f'{_picture(record)}<p>{_text(name_of(record))}</p><p class="dim">{", ".join(facts)}</p>'
    return head + captions


def _why(record: Record) -> str:
    return "".join(f'<p class="why">{_text(reason)}</p>' for reason in record["drop_reasons"])


def _pair(record: Record) -> str:
    """A duplicate beside the clip that is kept for it."""
    other = record["duplicate"]
    return (
        f'<div class="pair"><div><b>kept</b>{_about(other)}</div> '
        f"<div><b>dropped</b>{_about(record)}</div>{_why(record)}</div>"
    )


def _unreadable(records: Sequence[Record], most: int) -> str:
    rows = [(name_of(record), record["failed"], record["error"]) for record in records[:most]]
    more = f"<p>{len(records) - most} more, in manifest.jsonl</p>" if len(records) > most else ""
    return _table(rows, ("clip", "step", "reason")) + more


def _caption_problems(records: Sequence[Record], most: int) -> tuple[int, str]:
    rows = [
        (name_of(record), problem)
        for record in records
        for problem in record.get("caption_problems", [])
    ]
    more = f"<p>{len(rows) - most} more, in manifest.jsonl</p>" if len(rows) > most else ""
    return len(rows), _table(rows[:most], ("clip", "problem")) + more


def _skipped(source: Source, most: int) -> str:
    counts = _table(
        source.skipped_kinds.most_common(),
        ("reason", "rows") if source.is_manifest else ("ending", "files"),
    )
    rows = source.skipped[:most]
    left = len(source.skipped) - most
    more = f"<p>{left} more</p>" if left > 0 else ""
    return counts + "<h3>Which</h3>" + _table(rows, ("file", "why")) + more
