"""The contact sheet: one picture that shows clips frame by frame under their prompts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_MARGIN = 12
_GAP = 2
_PAPER = (255, 255, 255)
_INK = (30, 30, 30)


def _shown_frames(num_frames: int, max_frames: int) -> list[int]:
    """At most `max_frames` indices spread evenly from the first frame to the last."""
    count = min(num_frames, max_frames)
    return np.linspace(0, num_frames - 1, count).round().astype(int).tolist()


def _wrap(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.ImageFont, width: int) -> list[str]:
    """`text` in lines no wider than `width` px; a single longer word stays on a line of its own."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and draw.textlength(longer, font=font) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines or [""]


def contact_sheet(
    path: str | Path,
    clips: Sequence[np.ndarray],
    captions: Sequence[str],
    *,
    frame_height: int = 96,
    max_frames: int = 9,
) -> Path:
    """Draw clips as rows and their frames as columns, each row under its caption.

    Frames are enlarged by a whole factor, each pixel to a square, so that nothing is smoothed.

    Args:
        path: of the .png, replaced in one step; its folder is made.
        clips: uint8, (f h w 3) each; lengths and sizes may differ.
        captions: one per clip.
        frame_height: px that a frame is enlarged to, or just short of; larger frames stay as is.
        max_frames: columns at most; longer clips are thinned evenly.
    Returns:
        The path.
    Raises:
        ValueError: no clips, or not one caption per clip, or a clip of another shape.
    """
    if not clips or len(clips) != len(captions):
        raise ValueError(f"got {len(clips)} clips and {len(captions)} captions, expected as many")
    strips = [_strip(clip, frame_height, max_frames) for clip in clips]
    font = ImageFont.load_default(15)
    assert isinstance(font, (ImageFont.ImageFont, ImageFont.FreeTypeFont))
    width = max(400, *(strip.width for strip in strips))
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    texts = [_wrap(ruler, text, font, width) for text in captions]  # pyright: ignore[reportArgumentType]
    line_height = 20
    heights = [len(t) * line_height + s.height + _MARGIN for t, s in zip(texts, strips)]
    sheet = Image.new("RGB", (width + 2 * _MARGIN, sum(heights) + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN
    for lines, strip, height in zip(texts, strips, heights):
        for k, line in enumerate(lines):
            draw.text((_MARGIN, top + k * line_height), line, fill=_INK, font=font)
        sheet.paste(strip, (_MARGIN, top + len(lines) * line_height))
        top += height
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        sheet.save(temporary, format="PNG")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _strip(clip: np.ndarray, frame_height: int, max_frames: int) -> Image.Image:
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or len(clip) == 0:
        raise ValueError(f"got a clip of {clip.dtype} {clip.shape}, expected uint8 (f h w 3)")
    scale = max(1, frame_height // clip.shape[1])
    frames = clip[_shown_frames(len(clip), max_frames)].repeat(scale, 1).repeat(scale, 2)
    _, h, w, _ = frames.shape
    strip = Image.new("RGB", (len(frames) * (w + _GAP) - _GAP, h), _PAPER)
    for k, frame in enumerate(frames):
        strip.paste(Image.fromarray(frame), (k * (w + _GAP), 0))
    return strip
