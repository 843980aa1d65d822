"""Which clips show the same: perceptual hashes and embeddings, compared all with all in blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

NUM_HASHES = 4  # frames of a clip that are hashed
HASH_BITS = 64
_BLOCK = 512  # clips compared at once
_TILE = 8192  # with as many others: a matrix of 16 MB


def hash_times(start: float, end: float) -> np.ndarray:
    """Seconds of the frames to hash: at the same shares of the clip whatever its frame rate, so that
    re-timed copies agree; (4,)."""
    return start + (np.arange(NUM_HASHES) + 0.5) / NUM_HASHES * (end - start)


def perceptual_hashes(frames: np.ndarray) -> list[str]:
    """The pHash of each frame (Zauner 2010, by the ImageHash library), in 16 hex digits.

    Args:
        frames: uint8 RGB (f h w 3).
    Raises:
        ValueError: ImageHash is not installed.
    """
    try:
        import imagehash
    except ImportError as error:
        raise ValueError(
            "finding duplicates needs ImageHash: pip install 'zoetrope[ingest]'"
        ) from error
    return [str(imagehash.phash(Image.fromarray(frame))) for frame in frames]


@dataclass(frozen=True)
class Vectors:
    """What is compared, and when two are the same.

    Attributes:
        values: float32 (n d), rows of length 1; a row of zeros is like nothing.
        min_cosine: of two that are the same.
        kind: named in what is reported.
    """

    values: np.ndarray
    min_cosine: float
    kind: str


@dataclass(frozen=True)
class Match:
    """A clip is a duplicate of number `of`, at this cosine of this kind of vectors."""

    of: int
    cosine: float
    kind: str


def hash_vectors(hashes: Sequence[Sequence[str] | None], max_distance: float) -> Vectors:
    """Hashes as vectors of signs: the cosine of two is 1 - 2 * (share of bits that differ), exactly.

    Args:
        hashes: of each clip, `NUM_HASHES` of 16 hex digits; None for a clip like no other.
        max_distance: bits of 64 that may differ, the mean over the frames.
    """
    num_bits = NUM_HASHES * HASH_BITS
    values = np.zeros((len(hashes), num_bits), np.float32)
    known = [index for index, each in enumerate(hashes) if each]
    if known:
        raw = bytes.fromhex("".join("".join(hashes[index] or ()) for index in known))
        bits = np.unpackbits(np.frombuffer(raw, np.uint8).reshape(len(known), -1), axis=1)
        values[known] = (bits.astype(np.float32) * 2 - 1) / np.sqrt(num_bits)
    # num_bits is a power of 4, so the sums are exact up to here; a quarter of a bit is left over.
    bits_allowed = max_distance * NUM_HASHES + 0.25
    return Vectors(values, 1 - 2 * bits_allowed / num_bits, "hash")


def hash_distance(cosine: float) -> float:
    """Bits of 64 that differ, the mean over the frames, from the cosine of two hash vectors."""
    return (1 - cosine) / 2 * HASH_BITS


def find_duplicates(order: Sequence[int], criteria: Sequence[Vectors]) -> dict[int, Match]:
    """Which clips are left out because one that comes before them shows the same.

    The clips are gone through in `order`; one that is like a clip that was kept is left out, and
    named with the first such. So every clip left out is like the one it is said to be like, and not
    only like another in a chain. Each block of clips is compared with all that were kept by a
    matrix product: 100,000 clips by hashes take a minute or two on two cores.

    Args:
        order: clips to go through, the best first.
        criteria: by any of which two clips may be the same; rows are clips.
    Returns:
        Of each clip left out, the match.
    """
    sequence = np.asarray(order, np.int64)
    kept: list[int] = []
    matches: dict[int, Match] = {}
    for first in range(0, len(sequence), _BLOCK):
        block = sequence[first : first + _BLOCK]
        found = _against_kept(block, np.array(kept, np.int64), criteria)
        within = [each.values[block] @ each.values[block].T for each in criteria]
        here: list[int] = []  # places in the block of those that are kept
        for place, clip in enumerate(block.tolist()):
            match = found.get(place) or _first_match(within, criteria, place, here, block)
            if match is None:
                here.append(place)
            else:
                matches[clip] = match
        kept += block[here].tolist()
    return matches


def _against_kept(
    block: np.ndarray, kept: np.ndarray, criteria: Sequence[Vectors]
) -> dict[int, Match]:
    """By place in the block, the first of the kept clips that each is like."""
    found: dict[int, Match] = {}
    for first in range(0, len(kept), _TILE):
        others = kept[first : first + _TILE]
        for each in criteria:
            left = [place for place in range(len(block)) if place not in found]
            cosines = each.values[block[left]] @ each.values[others].T
            same = cosines >= each.min_cosine
            for row in np.flatnonzero(same.any(axis=1)).tolist():
                column = int(same[row].argmax())
                match = Match(int(others[column]), float(cosines[row, column]), each.kind)
                found[left[row]] = match
    return found


def _first_match(
    within: Sequence[np.ndarray],
    criteria: Sequence[Vectors],
    place: int,
    here: list[int],
    block: np.ndarray,
) -> Match | None:
    for cosines, each in zip(within, criteria):
        same = np.flatnonzero(cosines[place, here] >= each.min_cosine)
        if len(same):
            other = here[int(same[0])]
            return Match(int(block[other]), float(cosines[place, other]), each.kind)
    return None
