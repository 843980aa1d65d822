"""What a clip looks like, in numbers: movement, sharpness, blackness, standstill, text and logos.

All are measured on windows of neighbouring frames spread over the clip, on pictures made small, so
that they mean the same for every size and cost little. Images have those that need no movement.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from data.text_share import text_mask

_FLOW_SIZE = 256  # pixels of the longer side, for flow and for comparing frames
_SHARP_SIZE = 512  # of the longer side, for sharpness
_TEXT_HEIGHT = 360  # for text and logos
# Its stubs do not know that no initial flow is needed.
_farneback: Any = cv2.calcOpticalFlowFarneback


def measure_frames(windows: np.ndarray, fps: float, spacing: float) -> dict[str, float]:
    """All measures of a video.

    Args:
        windows: uint8 RGB (n f h w 3), n windows of f neighbouring frames.
        fps: of the clip, frames per second.
        spacing: seconds between neighbouring frames of a window.
    Returns:
        motion, jerk, sharpness, black, frozen, text, logo, brightness, contrast; logo is left out
        where nothing moves.
    """
    values = measure_picture(windows[:, 0])
    values["text"] = text_share(windows)
    small = np.stack([[_grey(frame, _FLOW_SIZE) for frame in window] for window in windows])
    values |= _movement(small, spacing)
    values["frozen"] = frozen_share(small)
    logo = logo_share(windows)
    if logo is not None:
        values["logo"] = logo
    return {name: round_off(value) for name, value in values.items()}


def measure_picture(frames: np.ndarray) -> dict[str, float]:
    """The measures that need no movement: sharpness, black, text, brightness, contrast.

    Args:
        frames: uint8 RGB (f h w 3).
    """
    greys = [_grey(frame, _SHARP_SIZE, enlarge=True) for frame in frames]
    values = {
        "sharpness": float(np.median([sharpness(grey) for grey in greys])),
        "black": float(np.mean([_is_black(grey) for grey in greys])),
        "text": text_share(frames[None]),
        "brightness": float(np.mean([grey.mean() for grey in greys])) / 255,
        "contrast": float(np.mean([grey.std() for grey in greys])) / 255,
    }
    return {name: round_off(value) for name, value in values.items()}


def round_off(value: float) -> float:
    """Five significant digits and six places: what is beyond them is noise."""
    return round(float(f"{value:.5g}"), 6)


def _grey(frame: np.ndarray, size: int, enlarge: bool = False) -> np.ndarray:
    """Luma of a frame whose longer side is made `size`, uint8 (h w); smaller ones stay unless
    `enlarge`."""
    height, width = frame.shape[:2]
    scale = size / max(height, width)
    if scale > 1 and not enlarge:
        scale = 1.0
    new = (max(8, round(width * scale)), max(8, round(height * scale)))
    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    return cv2.resize(grey, new, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)


def sharpness(grey: np.ndarray) -> float:
    """Variance of the Laplacian (Pech-Pacheco et al. 2000, LAPV), in grey levels squared.

    Args:
        grey: uint8 (h w), the longer side 512 pixels, so that all clips are compared alike.
    """
    return float(cv2.Laplacian(grey, cv2.CV_32F).var())


def _is_black(grey: np.ndarray) -> bool:
    """At least 98 % of the pixels below a tenth of white: the limits of ffmpeg's blackdetect."""
    return bool((grey < 25.5).mean() >= 0.98)


def frozen_share(windows: np.ndarray) -> float:
    """Share of neighbouring frames that are the same: mean difference at most 0.001 of white, the
    limit of ffmpeg's freezedetect.

    Args:
        windows: uint8 grey (n f h w).
    """
    pictures = windows.astype(np.int16)
    differences = np.abs(np.diff(pictures, axis=1)).mean(axis=(2, 3))
    return float((differences <= 0.255).mean())


def _movement(windows: np.ndarray, spacing: float) -> dict[str, float]:
    """Motion and jerk from dense optical flow (Farneback 2003).

    motion is the mean length of the flow; jerk the mean change of the camera's velocity from one
    frame to the next, the camera's being the median flow of the picture, per axis. Both in frame
    diagonals, per second and per second and frame.

    Args:
        windows: uint8 grey (n f h w).
        spacing: seconds between frames.
    """
    diagonal = float(np.hypot(*windows.shape[2:]))
    lengths, jerks = [], []
    for window in windows:
        camera = []
        for before, after in zip(window, window[1:]):
            flow = _farneback(
                before, after, None, 0.5, 4, 21, 3, 7, 1.5, cv2.OPTFLOW_FARNEBACK_GAUSSIAN
            )
            lengths.append(float(np.hypot(flow[..., 0], flow[..., 1]).mean()))
            camera.append(np.median(flow, axis=(0, 1)))
        jerks += [float(np.hypot(*change)) for change in np.diff(np.array(camera), axis=0)]
    scale = 1 / (diagonal * spacing)
    return {
        "motion": float(np.mean(lengths)) * scale if lengths else 0.0,
        "jerk": float(np.mean(jerks)) * scale if jerks else 0.0,
    }


def text_share(windows: np.ndarray) -> float:
    """Share of the picture that lines of text cover, the mean over windows (data/text_share.py).

    What is text in the first frame of a window must be so in the last: burnt-in text stays long
    enough to be read, what merely looks like letters comes and goes.

    Args:
        windows: uint8 RGB (n f h w 3).
    """
    first = np.stack([text_mask(_at_height(window[0])) for window in windows])
    last = np.stack([text_mask(_at_height(window[-1])) for window in windows])
    return float((first & last).mean())


def _at_height(frame: np.ndarray) -> np.ndarray:
    """Luma at most 360 pixels high, uint8 (h w)."""
    height, width = frame.shape[:2]
    scale = min(1.0, _TEXT_HEIGHT / min(height, width))
    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    new = (max(8, round(width * scale)), max(8, round(height * scale)))
    return cv2.resize(grey, new, interpolation=cv2.INTER_AREA) if scale < 1 else grey


def logo_share(windows: np.ndarray) -> float | None:
    """Share of the picture covered by edges that stay put while it moves underneath.

    The gradient of a watermark is the median, over frames, of the pictures' gradients (Dekel et
    al. 2017, "On the effectiveness of visible watermarks", eq. 2). Of its strong edges those count
    that are there in most frames as they are in the median, and around which the picture changes:
    where nothing moves, every edge stays put. So a logo over an empty sky is not seen.

    Args:
        windows: uint8 RGB (n f h w 3).
    Returns:
        In [0, 1]; None where too little changes to tell.
    """
    frames = windows.reshape(-1, *windows.shape[2:])
    frames = frames[:: max(1, len(frames) // 16)]
    if len(frames) < 3:
        return None
    greys = np.stack([_at_height(frame) for frame in frames]).astype(np.float32)
    dx = np.stack([cv2.Sobel(grey, cv2.CV_32F, 1, 0, scale=0.25) for grey in greys])
    dy = np.stack([cv2.Sobel(grey, cv2.CV_32F, 0, 1, scale=0.25) for grey in greys])
    usual_x, usual_y = np.median(dx, axis=0), np.median(dy, axis=0)
    strength = np.hypot(usual_x, usual_y)
    strays = np.median(np.hypot(dx - usual_x, dy - usual_y), axis=0)
    staying = (strength > 12) & (strays < 0.5 * strength)
    # How much the picture changes around an edge, from the pixels that are not part of one.
    changes = np.median(np.abs(greys - np.median(greys, axis=0)), axis=0)
    edges = (strength > 12).astype(np.uint8)
    beside = 1 - cv2.dilate(edges, np.ones((5, 5), np.uint8)).astype(np.float32)
    total, count = (cv2.boxFilter(part, -1, (31, 31)) for part in (changes * beside, beside))
    moving = total > 10 * np.maximum(count, 1e-3)
    if moving.mean() < 0.1:
        return None
    # Strokes into areas: closed over a gap of 9 pixels, then what is thinner than 3 goes.
    area = (staying & moving).astype(np.uint8)
    area = cv2.morphologyEx(area, cv2.MORPH_CLOSE, np.ones((9, 9), np.uint8))
    area = cv2.morphologyEx(area, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    return float(area.mean())
