"""What there is to ingest: the media files of a folder, a bucket or a manifest, and what else lies
beside them."""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.images import IMAGE_SUFFIXES
from data.manifest_formats import read_records

_VIDEO_SUFFIXES = (
    ".3gp .asf .avi .divx .f4v .flv .gif .m2ts .m2v .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogm .ogv "
    ".rm .rmvb .ts .vob .webm .wmv .y4m"
)
VIDEO_SUFFIXES = tuple(_VIDEO_SUFFIXES.split())
SIDECAR_SUFFIXES = (".txt", ".json", ".srt")
MANIFEST_SUFFIXES = (".jsonl", ".csv", ".parquet")

_FIRST_RESULTS = "steps/probe.jsonl"  # of every ingest, in its OUT

Record = dict[str, Any]


@dataclass
class Source:
    """What was found.

    Attributes:
        files: a record per media file, or per row of a manifest: `path`, which opens it from
            anywhere; `version`, which changes when the file does; `sidecars`, as [path, version]
            each; of a manifest also `column`, its caption, `row`, its other columns, `start`, `end`
            and `crop`, and of a row with `keep: false` `unwanted`, the reasons.
        skipped: (path, why) of everything else, by which nothing is lost silently.
        is_manifest: `files` are rows of one.
    """

    files: list[Record] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    is_manifest: bool = False

    @property
    def size(self) -> str:
        """How many files there are, in words."""
        if not self.is_manifest:
            return f"{len(self.files)} files"
        num_files = len({record["path"] for record in self.files})
        return f"{len(self.files)} rows of {num_files} files"

    @property
    def skipped_kinds(self) -> Counter[str]:
        """How many files were skipped, by their endings; how many rows, by the reason."""
        if self.is_manifest:
            return Counter(reason.partition(":")[0] for _, reason in self.skipped)
        return Counter(_suffix(path) or "(none)" for path, _ in self.skipped)


def find_source(src: str, out: Path) -> Source:
    """Everything under `src`.

    Args:
        src: a folder, a media file, a .jsonl, .csv or .parquet manifest with a column `path`, or
            the URL of a manifest, or of a folder that fsspec can list.
        out: where the results go; it is left out when it lies inside `src`.
    Raises:
        FileNotFoundError: nothing is there.
        ValueError: there is nothing in it to ingest, or it holds the results of an ingest.
    """
    if "://" in src and src.lower().endswith(MANIFEST_SUFFIXES):
        from data.media import local_copy

        with local_copy(src) as path:
            source = _from_manifest(Path(path), src)
    elif "://" in src:
        source = _from_listing(_listed(src), str(src))
    elif os.path.isdir(src):
        if _has_results(src):
            raise ValueError(
                f"{src} holds the results of an ingest (steps/, thumbnails/); give the folder of the "
                "raw videos, or its manifest.jsonl"
            )
        source = _from_folder(os.path.abspath(src), out)
    elif not os.path.exists(src):
        raise FileNotFoundError(f"nothing at {src}: expected a folder, a media file or a manifest")
    elif src.lower().endswith(MANIFEST_SUFFIXES):
        source = _from_manifest(Path(src), src)
    else:
        source = _from_folder(os.path.dirname(os.path.abspath(src)), out, only=src)
    if not source.files:
        counts = ", ".join(f"{n} {kind}" for kind, n in source.skipped_kinds.most_common(8))
        found = f"skipped {len(source.skipped)}: {counts}" if source.skipped else "it is empty"
        raise ValueError(f"no video or image in {src}; {found}")
    return source


def _suffix(path: str) -> str:
    return os.path.splitext(path.split("?")[0] if "://" in path else path)[1].lower()


def _is_media(path: str) -> bool:
    return _suffix(path) in VIDEO_SUFFIXES + IMAGE_SUFFIXES


def _from_folder(root: str, out: Path, only: str | None = None) -> Source:
    """All of a folder; with `only`, that file of it and its sidecars, whatever its suffix."""
    source = Source()
    wanted = None
    if only is None:
        found = list(_walk(root, str(out.resolve()), source.skipped))
    else:
        wanted = os.path.abspath(only)
        stem = os.path.splitext(wanted)[0]
        names = (base + suffix for base in (stem, wanted) for suffix in SIDECAR_SUFFIXES)
        beside = dict.fromkeys(name for name in names if os.path.isfile(name) and name != wanted)
        found = [(path, _version(path)) for path in (wanted, *beside)]
    media = [(p, v) for p, v in found if p == wanted or _is_media(p)]
    _pair(source, media, dict(found))
    return source


def _walk(root: str, out: str, skipped: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """(path, version) of each file, folders and files by name; links are followed once."""
    status = os.stat(root)
    seen = {(status.st_dev, status.st_ino): root}
    stack = [root]
    while stack:
        folder = stack.pop()
        try:
            names = sorted(os.listdir(folder))
        except OSError as error:
            skipped.append((folder, f"a folder that cannot be listed: {error.strerror}"))
            continue
        folders = []
        for name in names:
            path = os.path.join(folder, name)
            reason, is_folder = _look_at(path, name, out, seen)
            if reason:
                skipped.append((_printable(path), reason))
            elif is_folder:
                folders.append(path)
            else:
                yield path, _version(path)
        stack += reversed(folders)


def _look_at(path: str, name: str, out: str, seen: dict[tuple[int, int], str]) -> tuple[str, bool]:
    """(why it is skipped or "", whether it is a folder)."""
    if name.startswith("."):
        return "hidden", False
    if _printable(path) != path:
        return "its name is not valid UTF-8: rename it", False
    try:
        status = os.stat(path)
    except OSError as error:
        broken = os.path.islink(path)
        return "a broken link" if broken else f"not readable: {error.strerror}", False
    is_folder = stat.S_ISDIR(status.st_mode)
    if not is_folder and not stat.S_ISREG(status.st_mode):
        return "not a regular file", False
    if is_folder and os.path.realpath(path) == out:
        return "the folder of the results", False
    if is_folder and _has_results(path):
        return "the results of an ingest", False
    here = (status.st_dev, status.st_ino)
    if here in seen:  # a symbolic or hard link, or a loop of them
        return f"the same as {seen[here]}, by a link", False
    seen[here] = path
    return "", is_folder


def _has_results(folder: str) -> bool:
    """Is it the OUT of an ingest, finished or not? Its thumbnails are nobody's source."""
    return os.path.isfile(os.path.join(folder, _FIRST_RESULTS))


def _printable(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "replace")


def _version(path: str) -> str:
    try:
        # A piece of a tar shard is of the same version as the shard.
        status = os.stat(path if os.path.exists(path) else path.rpartition("#")[0])
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return ""
    return f"{status.st_size}-{status.st_mtime_ns}"


def _listed(url: str) -> Iterator[tuple[str, str]]:
    """(URL, version) of everything under a URL."""
    from data.media_store import list_media

    for path, size in list_media(url):
        yield path, str(size)


def _from_listing(found: Iterable[tuple[str, str]], root: str) -> Source:
    source = Source()
    visible = {}
    everything = list(found)
    results = tuple(
        path.removesuffix(_FIRST_RESULTS) for path, _ in everything if path.endswith(_FIRST_RESULTS)
    )
    for path, version in everything:
        inside = path[len(root) :] if path.startswith(root) else path
        if path.startswith(results):
            source.skipped.append((path, "the results of an ingest"))
        elif any(part.startswith(".") for part in inside.split("/")):
            source.skipped.append((path, "hidden"))
        else:
            visible[path] = version
    _pair(source, [(path, v) for path, v in visible.items() if _is_media(path)], visible)
    return source


def _pair(source: Source, media: list[tuple[str, str]], found: dict[str, str]) -> None:
    """Gives each media file its sidecars; what is left over is skipped."""
    used = {path for path, _ in media}
    for path, version in media:
        sidecars = []
        for suffix in SIDECAR_SUFFIXES:
            for name in (os.path.splitext(path)[0] + suffix, path + suffix):
                if name in found and name not in used | {s for s, _ in sidecars}:
                    sidecars.append([name, found[name]])
        source.files.append({"path": path, "version": version, "sidecars": sidecars})
    used |= {name for record in source.files for name, _ in record["sidecars"]}
    for path in found:
        if path not in used:
            lonely = _suffix(path) in SIDECAR_SUFFIXES
            reason = "a sidecar without its media file" if lonely else "neither video nor image"
            source.skipped.append((path, reason))


def _from_manifest(path: Path, name: str) -> Source:
    """A record per row; a row that cannot be used is skipped, and named by its line.

    Args:
        path: a local file with what the manifest says.
        name: the manifest's own path or URL, from where its paths start.
    """
    source = Source(is_manifest=True)
    folder = name.rpartition("/")[0] if "://" in name else os.path.dirname(name)
    for line, found in read_records(path, name):
        where = f"{name}, line {line}"
        row = _as_row(found)
        if isinstance(row, str):
            source.skipped.append((where, row))
            continue
        place = _placed(row.pop("path"), folder)
        if isinstance(row.get("references"), list):  # the new manifest is elsewhere
            row["references"] = [_placed(str(path), folder) for path in row["references"]]
        record: Record = {"path": place, "version": _version(place), "sidecars": []}
        for key in ("start", "end"):
            if row.get(key) is not None:
                record[key] = float(row.pop(key))
        if row.get("crop") is not None:
            record["crop"] = [int(value) for value in row.pop("crop")]
        if not row.pop("keep", True):
            record["unwanted"] = _reasons(row.pop("drop_reasons", None))
        if "://" not in place:
            record["sidecars"] = _beside(place)
        if "caption" in row:
            record["column"] = row.pop("caption")
        source.files.append(record | {"row": row})
    return source


def _placed(path: str, folder: str) -> str:
    """Where a path of a manifest in a folder leads: absolute, or a URL."""
    if "://" in path:
        return path
    if "://" in folder:
        return f"{folder}/{path}"
    return os.path.abspath(os.path.join(folder, path))


def _reasons(found: Any) -> list[str]:
    """Why a source manifest drops a row, in its own words."""
    reasons = found if isinstance(found, list) else [found]
    words = [str(reason) for reason in reasons if reason] or ["no reason given"]
    prefix = "in the source manifest: "
    return [prefix + reason.removeprefix(prefix) for reason in words]


def _beside(place: str) -> list[list[str]]:
    stem = os.path.splitext(place)[0]
    names = (base + suffix for suffix in SIDECAR_SUFFIXES for base in (stem, place))
    return [[name, _version(name)] for name in names if os.path.isfile(name) and name != place]


def _as_row(found: Any) -> Record | str:
    """A manifest's row without its missing values, or what is wrong with it."""
    if isinstance(found, bytes):
        try:
            found = json.loads(found.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            return "not JSON"
    if isinstance(found, str):
        return found
    if not isinstance(found, dict):
        return f"expected a JSON object, got {type(found).__name__}"
    row = {
        key: value
        for key, value in found.items()
        if value is not None and not (isinstance(value, float) and math.isnan(value))
    }
    row = json.loads(json.dumps(row, default=str))  # Parquet has dates and bytes
    if not isinstance(row.get("path"), str) or not row["path"]:
        return "no path"
    for key in ("start", "end"):
        value = row.get(key, 0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e9:
            return f"{key}: expected seconds, got {value!r}"
    if "end" in row and row["end"] <= row.get("start", 0.0):
        return f"end={row['end']} is not after start={row.get('start', 0.0)}"
    if not isinstance(row.get("keep", True), bool):
        return f"keep: expected true or false, got {row['keep']!r:.80}"
    crop = row.get("crop")
    if crop is not None and not (
        isinstance(crop, list)
        and len(crop) == 4
        and all(
            type(value) is int or (type(value) is float and value.is_integer()) for value in crop
        )
    ):
        return f"crop: expected [x, y, width, height] in pixels, got {crop!r:.80}"
    return row
