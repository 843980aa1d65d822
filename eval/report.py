"""A report page that needs nothing beside it: videos, prompts, curves and the score table.

`write_report` makes one .html file with everything inside; only videos too large to carry along
are linked to instead, relative to the page.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.files import replacing
from eval.tables import Table

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }
.videos { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: 1rem; }
figure { margin: 0; }
figcaption { font-size: .85rem; }
video, img.still, img.pixels { width: 100%; image-rendering: pixelated; background: #eee; }
img.pixels { width: auto; max-width: 100%; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: left; }
td { font-variant-numeric: tabular-nums; }
td small, .facts { color: #666; }
"""


# What is drawn of a log, by words in its keys. Where the errors with the right and with shuffled
# captions part, the text is being used; a falling loss does not show that.
_CURVES = {
    "loss": ("loss",),
    "error of x_0 at t = .95, with right and shuffled captions": (
        "x_0_error/t=0.95",
        "x_0_error_shuffled/t=0.95",
    ),
}


@dataclass(frozen=True)
class ReportVideo:
    """A video or a .png on the page, and what stands under it."""

    path: Path
    prompt: str
    note: str = ""


def _data_url(content: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a log.jsonl; a last line cut off by a crash is dropped.

    Raises:
        ValueError: a line before the last is not a JSON object.
        FileNotFoundError: no such file.
    """
    rows: list[dict[str, Any]] = []
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}, line {number}: not JSON ({error}); expected log.jsonl"
            ) from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: got {line[:40]!r}, expected a JSON object")
        rows.append(row)
    return rows


def _series(
    rows: Sequence[Mapping[str, Any]], wanted: Sequence[str]
) -> dict[str, tuple[list, list]]:
    """Finite numbers over steps, for every key that contains one of the words in `wanted`."""
    series: dict[str, tuple[list, list]] = {}
    for row in rows:
        for key, value in row.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if number and math.isfinite(value) and "step" in row and any(w in key for w in wanted):
                steps, values = series.setdefault(key, ([], []))
                steps.append(row["step"])
                values.append(value)
    return series


def curves_svg(
    rows: Sequence[Mapping[str, Any]], *, title: str, wanted: Sequence[str] = ("loss",)
) -> bytes | None:
    """Curves over training steps as an SVG file's content, or None when there is nothing to draw.

    Args:
        rows: of a log.jsonl, each with "step" and numbers under other keys.
        title: above the plot.
        wanted: keys that contain one of these words are drawn, up to 12 of them.
    """
    # Figure, not pyplot: no global state and no display is looked for.
    from matplotlib.figure import Figure

    series = dict(list(_series(rows, wanted).items())[:12])
    if not series:
        return None
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for key, (steps, values) in series.items():
        axes.plot(steps, values, label=key, linewidth=1.2, marker="." if len(steps) < 30 else "")
    if all(min(values) > 0 for _, values in series.values()):
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_title(title)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _video_html(video: ReportVideo, page: Path, max_embedded_bytes: int) -> str:
    content = video.path.read_bytes()
    is_picture = video.path.suffix == ".png"
    if len(content) <= max_embedded_bytes:
        source = _data_url(content, "image/png" if is_picture else "video/mp4")
    else:
        source = Path(os.path.relpath(video.path, page.parent)).as_posix()
    note = f"<br><small>{html.escape(video.note)}</small>" if video.note else ""
    shown = f'<video src="{html.escape(source)}" autoplay loop muted playsinline controls></video>'
    if is_picture:
        shown = f'<img class="still" src="{html.escape(source)}" alt="{html.escape(video.prompt)}">'
    return f"<figure>{shown}<figcaption>{html.escape(video.prompt)}{note}</figcaption></figure>"


def _table_html(table: Table) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row) + "</tr>"

    body = "\n".join(cells("td", row) for row in table.rows)
    facts = f'<p class="facts">{html.escape(table.facts)}</p>' if table.facts else ""
    return (
        f"<h3>{html.escape(table.title)}</h3>{facts}<table><thead>{cells('th', table.header)}"
        f"</thead><tbody>{body}</tbody></table>"
    )


def write_report(
    path: str | Path,
    *,
    title: str,
    intro: str = "",
    videos: Mapping[str, Sequence[ReportVideo]] | None = None,
    tables: Sequence[Table] = (),
    logs: Mapping[str, Path] | None = None,
    picture: Path | None = None,
    max_embedded_bytes: int = 1_000_000,
) -> Path:
    """Write the page in one step.

    Args:
        path: of the .html; its folder is made.
        title, intro: plain text.
        videos: .mp4 and .png files in groups; a group's name stands above it.
        tables: in order; `eval.tables` makes them from results.
        logs: name -> log.jsonl, drawn as curves; empty logs are left out.
        picture: a .png to embed, such as the contact sheet.
        max_embedded_bytes: a larger video is linked to, not embedded.
    Returns:
        The path.
    Raises:
        FileNotFoundError: a video, a log or the picture is missing.
        ValueError: a log is not a log.jsonl.
    """
    path = Path(path)
    parts = [f"<h1>{html.escape(title)}</h1>"]
    if intro:
        parts.append(f"<p>{html.escape(intro)}</p>")
    for name, group in (videos or {}).items():
        figures = "\n".join(_video_html(v, path, max_embedded_bytes) for v in group)
        parts.append(f'<h2>{html.escape(name)}</h2>\n<div class="videos">{figures}</div>')
    if tables:
        parts.append("<h2>Scores</h2>")
        parts += [_table_html(table) for table in tables]
    curves = []
    for name, log in (logs or {}).items():
        for what, wanted in _CURVES.items():
            svg = curves_svg(read_log(log), title=f"{name}: {what}", wanted=wanted)
            if svg is not None:
                alt = html.escape(f"{name}: {what} over training steps")
                curves.append(f'<p><img alt="{alt}" src="{_data_url(svg, "image/svg+xml")}"></p>')
    if curves:
        parts += ["<h2>Training</h2>", *curves]
    if picture is not None:
        source = _data_url(Path(picture).read_bytes(), "image/png")
        parts.append(
            f'<h2>Frame by frame</h2><p><img class="pixels" alt="frames" src="{source}"></p>'
        )
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path
