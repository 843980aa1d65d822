"""`zoetrope data show`: training batches as moving pictures on one page, to look at before paying."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data.files import replacing

_MIN_SIDE = 96  # smaller pictures are shown larger, pixel by pixel

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem; max-width: 90rem; color: #222; }}
h2 {{ margin: 2rem 0 .3rem; font-size: 1.1rem; }}
.clips {{ display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }}
figure {{ margin: 0; max-width: 24rem; }}
img {{ image-rendering: pixelated; max-width: 100%; display: block; }}
figcaption {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
small {{ color: #666; }}
.bad {{ color: #a00; }}
</style>
<h1>{title}</h1>
<p>{intro}</p>
{body}
</html>
"""


@dataclass(frozen=True)
class ShownClip:
    """A clip as the model gets it.

    Attributes:
        video: uint8 RGB (f h w 3).
        caption: the one that was drawn.
        source: the file, and where in it.
    """

    video: np.ndarray
    caption: str
    source: str


@dataclass(frozen=True)
class ShownBatch:
    """A step's clips, or some of them.

    Attributes:
        title: which step, size and number.
        clips: in the order of training.
        bad: (clip, reason) of what could not be read on the way.
    """

    title: str
    clips: Sequence[ShownClip]
    bad: Sequence[tuple[str, str]] = ()


def animation(video: np.ndarray, fps: float) -> bytes:
    """An endless WebP of uint8 RGB frames (f h w 3), lossless if they are small; one frame is a still
    picture."""
    height, width = video.shape[1:3]
    factor = max(1, -(-_MIN_SIDE // min(height, width)))
    size = (width * factor, height * factor)
    frames = [Image.fromarray(frame).resize(size, Image.Resampling.NEAREST) for frame in video]
    file = io.BytesIO()
    options = {"lossless": factor > 1, "quality": 80, "method": 0}
    if len(frames) > 1:
        duration = max(1, round(1000 / fps))
        options |= {"save_all": True, "append_images": frames[1:], "duration": duration, "loop": 0}
    frames[0].save(file, "webp", **options)
    return file.getvalue()


def write_page(
    path: Path, title: str, intro: str, batches: Iterable[ShownBatch], fps: float
) -> None:
    """Writes the page in one step; pictures are inside it.

    Args:
        intro: in plain text.
        fps: at which clips are shown.
    """
    body = "\n".join(_section(batch, fps) for batch in batches)
    page = _PAGE.format(title=html.escape(title), intro=html.escape(intro), body=body)
    with replacing(path) as partial:
        partial.write_text(page, encoding="utf-8", errors="backslashreplace")


def _section(batch: ShownBatch, fps: float) -> str:
    figures = []
    for clip in batch.clips:
        f, h, w = clip.video.shape[:3]
        picture = base64.b64encode(animation(clip.video, fps)).decode()
        length = "an image" if f == 1 else f"{f} frames"
        figures.append(
            f'<figure><img src="data:image/webp;base64,{picture}" alt="">'
            f"<figcaption>{html.escape(clip.caption)}\n"
            f"<small>{w}x{h}, {length}; {html.escape(clip.source)}</small></figcaption></figure>"
        )
    bad = "".join(
        f'<p class="bad">not readable, replaced: {html.escape(name)}: {html.escape(reason)}</p>'
        for name, reason in batch.bad
    )
    clips = "\n".join(figures)
    return f'<h2>{html.escape(batch.title)}</h2>{bad}<div class="clips">\n{clips}\n</div>'
