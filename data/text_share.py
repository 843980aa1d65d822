"""Where burnt-in text is, without a trained detector: rows of dense, strong, upright strokes.

Letters are strokes of nearly one colour on another, a few pixels wide, side by side along a line.
The morphological gradient finds strokes, a closing along the line joins them (the classic scheme of
Wu et al. 1997 and Wolf and Jolion 2002), and each blob is then asked whether it looks like a line
of letters: low and long, well filled, two-coloured, with many changes from dark to light.
"""

from __future__ import annotations

import cv2
import numpy as np

_MIN_STEP = 48  # grey levels between a letter and what is around it
_MIN_HEIGHT, _MAX_HEIGHT = 7, 80  # of a line, in pixels of a picture 360 high
_MIN_ASPECT = 2.0


def text_mask(grey: np.ndarray) -> np.ndarray:
    """Boxes around lines of text.

    Args:
        grey: uint8 (h w), about 360 pixels high.
    Returns:
        bool (h w).
    """
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3))
    gradient = cv2.morphologyEx(grey, cv2.MORPH_GRADIENT, kernel)
    strokes = (gradient > _MIN_STEP).astype(np.uint8)
    mask = np.zeros(grey.shape, bool)
    # Small and large letters have other gaps between them.
    for gap in (7, 17):
        joined = cv2.morphologyEx(strokes, cv2.MORPH_CLOSE, np.ones((1, gap), np.uint8))
        joined = cv2.morphologyEx(joined, cv2.MORPH_OPEN, np.ones((3, gap), np.uint8))
        _, _, boxes, _ = cv2.connectedComponentsWithStats(joined, connectivity=4)
        for x, y, width, height, area in boxes[1:]:
            low_and_long = _MIN_HEIGHT <= height <= _MAX_HEIGHT and width >= _MIN_ASPECT * height
            if low_and_long and area >= 0.5 * width * height:
                box = (slice(y, y + height), slice(x, x + width))
                if _is_lettering(grey[box], strokes[box]):
                    mask[box] = True
    return mask


def _is_lettering(grey: np.ndarray, strokes: np.ndarray) -> bool:
    """Whether a box has two colours, sharp edges all along it, and as many strokes as letters."""
    _, light = cv2.threshold(grey, 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    light = light.astype(bool)
    share = light.mean()
    if not 0.1 <= share <= 0.9:
        return False
    # Two colours: within each half the grey levels lie close together, for the step between them.
    step = float(grey[light].mean()) - float(grey[~light].mean())
    spread = min(float(grey[light].std()), float(grey[~light].std()))
    if step < _MIN_STEP or spread > 0.3 * step:
        return False
    # A letter of a line of height h is about h / 2 wide, with two to four changes across it.
    height, width = grey.shape
    changes = np.abs(np.diff(light.astype(np.int8), axis=1)).sum(axis=1)
    per_height = float(np.percentile(changes, 75)) / (width / height)
    covered = strokes.any(axis=0).mean()
    return 2.2 <= per_height <= 14 and covered >= 0.75
