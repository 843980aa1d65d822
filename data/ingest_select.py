"""Which clips are kept, and why not the others: from what was measured alone, without any media."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.duplicates import Vectors, find_duplicates, hash_distance, hash_vectors
from data.embeddings import decode_embedding
from data.ingest_config import BOUNDS, Captions, Duplicates, Filters

Record = dict[str, Any]

# Columns of a manifest row, in order, as far as a record has them; then those of the source row.
_COLUMNS = (
    "start end crop width height pixel_aspect num_frames fps duration seconds codec rotation has_audio "
    "is_image bars motion jerk sharpness black frozen text logo brightness contrast hashes "
    "duplicate_of caption_from caption_problems error failed"
)
COLUMNS = _COLUMNS.split()


def name_of(record: Record) -> str:
    """A clip in words: its file, and which piece of it."""
    name = record["shown"]
    if "start" in record and "end" in record and not record.get("is_image"):
        name += f" [{record['start']:.3f}-{record['end']:.3f} s]"
    return name


def derive(records: Sequence[Record], out: Path) -> None:
    """Adds to each record what follows from its columns: `shown` (its path as the manifest has it),
    `seconds`, `shown_width` and `shown_height`; images lose what only videos have."""
    for record in records:
        path = record["path"]
        record["shown"] = path if "://" in path else os.path.relpath(path, out)
        if "width" in record:
            _, _, width, height = record.get("crop") or (0, 0, record["width"], record["height"])
            record["shown_width"], record["shown_height"] = width, height
        if record.get("is_image"):
            for column in ("start", "end", "fps", "duration"):
                record.pop(column, None)
        elif "end" in record and "motion" in record:
            record["seconds"] = round(record["end"] - record["start"], 6)


def filter_reasons(record: Record, filters: Filters) -> list[str]:
    """Why a clip is dropped: what was measured, and what is asked for; empty for one that stays."""
    if "unwanted" in record:
        return list(record["unwanted"])
    if "error" in record:
        return [f"not readable: {record['error']}"]
    reasons = []
    for bound in BOUNDS:
        limit, value = getattr(filters, bound.key), record.get(bound.column)
        if limit is None or value is None or (bound.videos and record["is_image"]):
            continue
        if value < limit if bound.low else value > limit:
            least = "least" if bound.low else "most"
            reasons.append(
                f"{bound.words}: {value:.4g}, at {least} {limit:g} is asked for "
                f"(filters.{bound.key})"
            )
    return reasons


def kind_of(reason: str) -> str:
    """The group that a reason for dropping belongs to: its first words."""
    kind = reason.partition(":")[0]
    return "duplicate" if kind.startswith("duplicate of") else kind


def count_kinds(records: Sequence[Record]) -> Counter[str]:
    """Dropped clips by the kinds of their reasons; one with several is counted under each."""
    return Counter(
        kind
        for record in records
        for kind in {kind_of(why): None for why in record["drop_reasons"]}
    )


def mark_duplicates(records: Sequence[Record], settings: Duplicates) -> None:
    """Adds `duplicate_of` and a reason to each clip that shows the same as a better one, which takes
    over its captions if it has none.

    Of clips that show the same, the longest is kept, of these the largest, of these the first.
    Clips that are dropped already take no part; images are compared with images alone.

    Args:
        records: all clips.
        settings: what counts as the same.
    """
    for images in (False, True):
        members = sorted(
            (r for r in records if not r["drop_reasons"] and r["is_image"] == images), key=_quality
        )
        criteria = _criteria(members, settings)
        for place, match in find_duplicates(range(len(members)), criteria).items():
            record, other = members[place], members[match.of]
            if match.kind == "hash":
                measured = (
                    f"hashes differ in {hash_distance(match.cosine):g} of 64 bits, "
                    f"{settings.max_distance:g} are allowed (duplicates.max_distance)"
                )
            else:
                assert settings.clip is not None
                measured = (
                    f"embeddings have a cosine of {match.cosine:.3f}, less than "
                    f"{settings.clip.min_cosine:g} is asked for (duplicates.clip.min_cosine)"
                )
            record["duplicate_of"] = name_of(other)
            record["duplicate"] = other
            if record.get("written") and not other.get("written"):
                other["written"] = record["written"]
                other["written_by"] = "files of a duplicate"
            record["drop_reasons"].append(f"duplicate of {name_of(other)}: {measured}")


def _quality(record: Record) -> tuple[float, int]:
    """Sorts the best first; sorting keeps the order of equals."""
    return -record.get("seconds", 0.0), -record["shown_width"] * record["shown_height"]


def _criteria(members: Sequence[Record], settings: Duplicates) -> list[Vectors]:
    criteria = []
    if settings.max_distance is not None:
        hashes = [member.get("hashes") for member in members]
        criteria.append(hash_vectors(hashes, settings.max_distance))
    if settings.clip is not None and members:
        values = np.stack([decode_embedding(member["embedding"]) for member in members])
        criteria.append(Vectors(values, settings.clip.min_cosine - 1e-6, "embedding"))
    return criteria


def lacks_caption(record: Record, settings: Captions) -> bool:
    """Whether a clip has no caption and no default either."""
    return settings.default is None and not (record.get("written") or record.get("generated"))


def settle_captions(record: Record, settings: Captions) -> None:
    """Gives a clip its `caption`, and says in `caption_from` where it is from; without any it is
    dropped."""
    if "unwanted" in record:
        return
    written, generated = record.get("written", []), record.get("generated", [])
    captions = list(dict.fromkeys([*written, *generated]))
    files = record.get("written_by", "files")
    sources = [name for name, some in ((files, written), ("captioner", generated)) if some]
    if not captions and settings.default is not None:
        captions, sources = [settings.default], ["default"]
    if captions:
        record["caption"] = captions[0] if len(captions) == 1 else captions
        record["caption_from"] = " and ".join(sources)
    elif not record["drop_reasons"]:
        record["drop_reasons"].append(
            "no caption: no sidecar file, no column and no captioner gave one "
            "(captions.default would)"
        )


def manifest_row(record: Record) -> Record:
    """A record as a row of the manifest: every measured value, kept or not."""
    row: Record = {"path": record["shown"]}
    if "unwanted" in record and "column" in record:  # the row stays what it was
        row["caption"] = record["column"]
    elif "caption" in record:
        row["caption"] = record["caption"]
    row["keep"] = not record["drop_reasons"]
    row["drop_reasons"] = record["drop_reasons"]
    row |= {name: record[name] for name in COLUMNS if record.get(name) is not None}
    others = {name: v for name, v in record.get("row", {}).items() if name not in row}
    text = json.dumps(row | others, ensure_ascii=False)
    # Half of a surrogate pair, which JSON can hold and UTF-8 cannot, becomes a question mark.
    return json.loads(text.encode("utf-8", "replace"))
