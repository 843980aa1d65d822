"""Bars around a picture: found by how it looks over many frames, given as the crop without them."""

from __future__ import annotations

import numpy as np

_MIN_BAR = 2  # pixels
_MIN_LEFT = 0.25  # share of a side that must remain, or it is no bar
# Of 255, what 99 % of the outermost line may differ from one colour by: noise of standard deviation
# 4 does by 10, a real surface by more.
_MAX_NOISE = 12
_STEP_SHARE = 0.25  # of the pixels along a bar's inner edge that must leave its colour somewhere


def find_letterbox(grey: np.ndarray) -> tuple[int, int, int, int] | None:
    """The picture inside black or single-coloured bars.

    A line of pixels belongs to a bar if it has the colour of the outermost line, to within the
    noise of that line, in every frame. What is just inside a bar must differ from it along a good
    part of its edge in some frame: a dark sky, whose brightness begins gradually, is no bar.

    Args:
        grey: uint8 (f h w), several frames spread over the clip.
    Returns:
        (x, y, width, height) in pixels, all even; None where there are no bars.
    """
    height, width = grey.shape[1:]
    top, bottom = _bar(grey), _bar(grey[:, ::-1])
    # Within the rows of the picture: in bars above and below, every column has their colour too.
    inner = grey[:, top : height - bottom]
    left, right = _bar(inner.swapaxes(1, 2)), _bar(inner.swapaxes(1, 2)[:, ::-1])
    if not top and not bottom and (left or right):  # and the other way round
        inner = grey[:, :, left : width - right]
        top, bottom = _bar(inner), _bar(inner[:, ::-1])
    x, y = left + left % 2, top + top % 2
    crop_width = (width - right - x) // 2 * 2
    crop_height = (height - bottom - y) // 2 * 2
    if max(top, bottom, left, right) < _MIN_BAR:
        return None
    if crop_width < _MIN_LEFT * width or crop_height < _MIN_LEFT * height:
        return None
    return x, y, crop_width, crop_height


def _bar(lines: np.ndarray) -> int:
    """How many of the first lines are a bar; lines: (f n m), n lines of m pixels."""
    num_lines = lines.shape[1]
    if num_lines < 4:
        return 0
    colour = np.median(lines[:, 0])
    noise = float(np.percentile(np.abs(lines[:, 0] - colour), 99))
    if noise > _MAX_NOISE:
        return 0
    allowed = max(4.0, 1.6 * noise)
    away = (lines > colour + allowed) | (lines < colour - allowed)
    shares = away.mean(axis=2)
    # 2 %: a few pixels of noise or of ringing from the picture; in one frame, less than subtitles.
    in_bar = (shares.mean(axis=0) < 0.02) & (shares.max(axis=0) < 0.08)
    count = num_lines if in_bar.all() else int(np.argmin(in_bar))
    if count < _MIN_BAR or count > (1 - _MIN_LEFT) * num_lines:
        return 0
    # Blocks of a codec smear the edge by a pixel or two: look a little further in as well.
    inside = np.abs(lines[:, count : count + 3].astype(np.float32) - colour) > 2 * allowed
    return count if inside.any(axis=(0, 1)).mean() >= _STEP_SHARE else 0
