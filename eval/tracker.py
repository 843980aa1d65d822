"""Recovers the objects of a clip of the procedural world from its pixels, and from nothing else.

The background is the colour that most pixels have. What clearly differs from it is cut into
connected blobs, frame by frame; a blob's colour is that of its core, and its opacity per pixel is
how far the pixel has gone from the background's colour to the core's, which places its centroid to
a fraction of a pixel. Blobs are linked over frames into tracks, and a track gets a colour, a shape,
a size and a motion. Where no name of the world's vocabulary fits, or frames disagree, the answer is
None.

Textured things (`textured`) have no one colour: a pixel's opacity is measured against the colour of the
nearest pixel inside, and two that touch are parted by their outlines alone, as colours part one thing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from data.world import BACKGROUNDS, COLOURS, SIZES
from eval.motion import classify
from eval.shapes import fit_shape, size_name

# Distances in RGB, of 255 per channel. Objects and backgrounds of the world are at least 130 apart,
# so faint smudges are no objects. Further than _NAMED from every name, a colour has none.
_VISIBLE = 55.0
_NAMED = 80.0
# Shares of the smallest object's area: a blob below the first is a speck, and a blob that comes
# apart at a higher threshold is two objects only if the bright parts are above the second.
_MIN_AREA, _MIN_PART = 0.3, 0.6
# Of textured things: a blob of more than so many of the largest object's area may be two, if it comes
# apart when its outline moves in by one of these shares of the shorter side. Convex ones never do.
_TWO = 1.4
_ERODED = (0.03, 0.05, 0.07, 0.09)
# The share of frames that must agree on a colour, or show the object, before it is named.
_AGREE = 0.75


@dataclass(frozen=True, eq=False)
class Blob:
    """One object in one frame. centre: (2,) pixels, x then y. alpha: opacity per pixel, (h w)."""

    centre: np.ndarray
    area: float
    colour: np.ndarray
    alpha: np.ndarray


@dataclass(frozen=True, eq=False)
class Track:
    """One object over a clip; names are None where the pixels say nothing clear.

    radius: of the circle of equal area, pixels. position: (f, 2) pixels, x then y, and colours: (f, 3)
    RGB, 0 to 255; both NaN in frames where the object was not found.
    """

    colour: str | None
    shape: str | None
    size: str
    motion: str | None
    radius: float
    position: np.ndarray
    colours: np.ndarray

    @property
    def found(self) -> np.ndarray:
        """The frames that show the object, (f,) bool."""
        return np.isfinite(self.position[:, 0])

    @property
    def path(self) -> np.ndarray | None:
        """The centroid at every frame, (f, 2), gaps bridged straight; None if mostly not found.

        Gaps cost permanence; they need not cost motion as well.
        """
        at = np.flatnonzero(self.found)
        if len(at) < _AGREE * len(self.position):
            return None
        k = np.arange(len(self.position))
        return np.stack([np.interp(k, at, self.position[at, axis]) for axis in (0, 1)], axis=1)

    @property
    def largest_step(self) -> float:
        """The longest way between neighbouring frames that both show it, pixels; 0 for none."""
        steps = np.hypot(*np.diff(self.position, axis=0).T)
        return float(np.nanmax(steps, initial=0.0))


@dataclass(frozen=True, eq=False)
class Sighting:
    """What a clip shows. counts: objects in each frame. tracks: the most present first.

    backgrounds: (f, 3) RGB, 0 to 255.
    """

    background: str | None
    counts: tuple[int, ...]
    tracks: tuple[Track, ...]
    backgrounds: np.ndarray


def name_of(colour: np.ndarray, names: Mapping[str, tuple[int, int, int]]) -> str | None:
    """The name of the colour (3,) nearest to one, None where none is near."""
    distances = {n: float(np.linalg.norm(colour - np.asarray(c))) for n, c in names.items()}
    nearest = min(distances, key=distances.__getitem__)
    return nearest if distances[nearest] <= _NAMED else None


def _components(mask: np.ndarray) -> list[np.ndarray]:
    labels, num = cast(tuple[np.ndarray, int], ndimage.label(mask))
    return [labels == k for k in range(1, num + 1)]


def _distances(masks: list[np.ndarray]) -> np.ndarray:
    """How far every pixel is from each mask, (n h w) pixels."""
    return np.stack([np.asarray(ndimage.distance_transform_edt(~mask)) for mask in masks])


def _split(distance: np.ndarray, blob: np.ndarray, min_area: float) -> list[np.ndarray]:
    """A blob of two objects that nearly touch, cut where a higher threshold parts them."""
    for threshold in np.arange(_VISIBLE + 20, float(distance[blob].max()), 20):
        parts = [p for p in _components(blob & (distance > threshold)) if p.sum() >= min_area]
        if len(parts) > 1:
            nearest = _distances(parts).argmin(axis=0)
            return [blob & (nearest == k) for k in range(len(parts))]
    return [blob]


def _split_outline(blob: np.ndarray) -> list[np.ndarray]:
    """A blob of two textured things that nearly touch, cut where its outline has a waist."""
    side = min(blob.shape)
    if blob.sum() <= _TWO * math.pi * (max(SIZES.values()) * side) ** 2:
        return [blob]
    depth = np.asarray(ndimage.distance_transform_edt(blob))
    for eroded in _ERODED:
        parts = _components(blob & (depth > eroded * side))
        parts = [part for part in parts if part.sum() >= 0.1 * blob.sum()]
        if len(parts) > 1:
            nearest = _distances(parts).argmin(axis=0)
            return [blob & (nearest == k) for k in range(len(parts))]
    return [blob]


def find_blobs(
    frame: np.ndarray,
    background: np.ndarray,
    *,
    least_radius: float | None = None,
    textured: bool = False,
) -> list[Blob]:
    """The objects in one frame.

    Args:
        frame: (h w 3), 0 to 255.
        background: its colour, (3,).
        least_radius: of the smallest object (the circle of equal area), pixels; None: that of the
            world's small shapes.
        textured: things may be of several colours; a blob's is then their mean.
    """
    height = frame.shape[0]
    least = min(SIZES.values()) * height if least_radius is None else least_radius
    unit = math.pi * least**2
    offset = frame - background
    distance = np.linalg.norm(offset, axis=-1)
    masks: list[np.ndarray] = []
    for mask in _components(distance > _VISIBLE):
        if mask.sum() >= _MIN_AREA * unit:
            parts = _split_outline(mask) if textured else _split(distance, mask, _MIN_PART * unit)
            masks += parts
    if not masks:
        return []
    # Every pixel belongs to the nearest blob, within the reach of a blurred edge.
    reach = _distances(masks)
    owner = reach.argmin(axis=0)
    y, x = np.mgrid[0.5:height, 0.5 : frame.shape[1]]
    blobs = []
    for k, mask in enumerate(masks):
        if textured:
            colour, alpha = _textured_opacity(offset, mask)
            colour = colour + background
        else:
            depth = distance[mask]
            core = frame[mask][depth >= np.quantile(depth, 0.6)]
            colour = np.median(core, axis=0)
            axis = colour - background
            alpha = offset @ axis / float(axis @ axis)
        alpha = np.where((owner == k) & (reach[k] <= 2.0), alpha, 0.0)
        area = float(alpha.sum())
        if area >= _MIN_AREA * unit:
            centre = np.array([(alpha * x).sum(), (alpha * y).sum()]) / area
            blobs.append(Blob(centre, area, colour, alpha))
    return blobs


def _textured_opacity(offset: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean colour inside, (3,), and every pixel's opacity against the nearest pixel inside, (h w).

    Args:
        offset: colours less the background's, (h w 3).
        mask: the pixels of one thing, (h w) bool.
    """
    depth = np.asarray(ndimage.distance_transform_edt(np.pad(mask, 1)))[1:-1, 1:-1]
    # The pixels of an outline are mixed with what is behind it.
    core = mask & (depth >= min(2.0, float(depth.max())))
    nearest = ndimage.distance_transform_edt(~core, return_distances=False, return_indices=True)
    rows, columns = cast(np.ndarray, nearest)
    inside = offset[rows, columns]
    alpha = (offset * inside).sum(axis=-1) / (inside**2).sum(axis=-1)
    return offset[core].mean(axis=0), np.where(core, 1.0, alpha.clip(0.0, 1.0))


def _link(frames: list[list[Blob]]) -> list[list[Blob | None]]:
    """Blobs into tracks, one entry per frame: each goes to the track last seen nearest to it."""
    tracks: list[list[Blob | None]] = []
    last: list[Blob] = []
    for k, blobs in enumerate(frames):
        rest = set(range(len(blobs)))
        if last and blobs:
            cost = np.array(
                [
                    [
                        np.linalg.norm(a.centre - b.centre)
                        # A change of colour is as unlikely as a leap through the frame.
                        + 0.25 * np.linalg.norm(a.colour - b.colour)
                        for b in blobs
                    ]
                    for a in last
                ]
            )
            for i, j in zip(*linear_sum_assignment(cost)):
                tracks[i].append(blobs[j])
                last[i] = blobs[j]
                rest.discard(int(j))
        tracks += [[None] * k + [blobs[j]] for j in sorted(rest)]
        last += [blobs[j] for j in sorted(rest)]
        for t in tracks:
            if len(t) == k:
                t.append(None)
    return tracks


def _describe(
    seen: list[Blob | None], height: int, width: int, fps: float, textured: bool
) -> Track:
    blobs = [b for b in seen if b is not None]
    fit = fit_shape(np.stack([b.alpha for b in blobs]), np.stack([b.centre for b in blobs]))
    position = np.stack([np.full(2, np.nan) if b is None else b.centre for b in seen])
    colours = np.stack([np.full(3, np.nan) if b is None else b.colour for b in seen])
    colour, votes = Counter(name_of(b.colour, COLOURS) for b in blobs).most_common(1)[0]
    track = Track(
        colour=colour if votes >= _AGREE * len(blobs) and not textured else None,
        shape=fit.shape,
        size=size_name(fit.radius, height),
        motion=None,
        radius=fit.radius,
        position=position,
        colours=colours,
    )
    path = track.path
    if path is None:
        # What flashes up in a few frames is not an object that has a colour and a shape.
        return replace(track, colour=None, shape=None)
    motion = classify(path, shape=fit.shape, radius=fit.radius, height=height, width=width, fps=fps)
    return replace(track, motion=motion)


def track(video: np.ndarray, fps: float, *, textured: bool = False) -> Sighting:
    """Find the background and all objects of a clip.

    Args:
        video: uint8, (f h w 3).
        fps: frames per second; motions under gravity are told apart by it.
        textured: things may be of several colours; tracks then have none.
    Raises:
        ValueError: not a uint8 clip.
    """
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or len(video) == 0:
        raise ValueError(f"got a clip of {video.dtype} {video.shape}, expected uint8 (f h w 3)")
    _, height, width, _ = video.shape
    clip = video.astype(np.float64)
    backgrounds = np.median(clip, axis=(1, 2))
    names = {name_of(b, BACKGROUNDS) for b in backgrounds}
    frames = [find_blobs(frame, b, textured=textured) for frame, b in zip(clip, backgrounds)]
    tracks = [_describe(seen, height, width, fps, textured) for seen in _link(frames)]
    # Most present, then largest, first.
    tracks.sort(key=lambda t: (-int(t.found.sum()), -t.radius))
    return Sighting(
        background=names.pop() if len(names) == 1 else None,
        counts=tuple(len(blobs) for blobs in frames),
        tracks=tuple(tracks),
        backgrounds=backgrounds,
    )
