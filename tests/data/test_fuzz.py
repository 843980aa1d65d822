"""Damaged media of every kind through reader, loader and ingest: no crash, no hang, all accounted for.

FUZZ_FILES=1000 for the long form (`make fuzz`).
"""

import importlib.util
import itertools
import json
import os
import struct
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.check import Piece, Verdict, Wanted, check_clip
from data.dataset import ClipDataset, StepSampler
from data.ingest import ingest
from data.ingest_config import load_ingest_config
from data.loader import ClipLoader
from data.manifest import read_manifest, write_manifest
from data.pool import Lost, run_tasks
from data.video import VideoReader, VideoReadError

_spec = importlib.util.spec_from_file_location("media", Path(__file__).with_name("conftest.py"))
_media = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_media)
# Of `originals`, in their order.
SUFFIXES = [".mp4"] * 3 + [".mkv", ".avi", ".mp4", ".webm", ".mpg"]
SUFFIXES += [".png", ".jpg", ".webp", ".tif", ".bmp"]
NUM_FILES = int(os.environ.get("FUZZ_FILES", "90"))


def originals(folder):
    """Small media of the kinds that people have."""
    frames = _media.counting_frames(12, 48, 64)
    folder.mkdir()
    fragmented = {"movflags": "frag_keyframe+empty_moov"}
    made = [
        _media.encode(folder / "a.mp4", frames),
        _media.encode(folder / "b.mp4", frames, container_options=fragmented),
        _media.turn(_media.encode(folder / "c.mp4", frames), (0, 1, -1, 0)),
        _media.encode(folder / "d.mkv", frames),
        _media.encode(folder / "e.avi", frames, codec="mpeg4"),
        _media.encode(folder / "f.mp4", frames, options={"x264-params": "keyint=3"}, fps=25),
        _media.encode(folder / "g.webm", frames, codec="libvpx-vp9"),
        _media.encode(folder / "h.mpg", frames, codec="mpeg2video", fps=25),
    ]
    for name in ("i.png", "j.jpg", "k.webp", "l.tif", "m.bmp"):
        Image.fromarray(frames[3]).save(folder / name)
        made.append(folder / name)
    return [(path.suffix, path.read_bytes()) for path in made]


def absurd(data, rng):
    """Metadata that nobody means: sizes, clocks and lengths of 0, of all ones, or random."""
    data = bytearray(data)
    value = [b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", rng.bytes(4)][rng.integers(4)]
    names = [
        n for n in (b"tkhd", b"mvhd", b"mdhd", b"stsz", b"stts", b"avc1", b"stsd") if n in data
    ]
    if b"IHDR" in data:
        at = data.index(b"IHDR") + 4 + 4 * int(rng.integers(2))
        data[at : at + 4] = value
        start = data.index(b"IHDR")
        data[start + 17 : start + 21] = struct.pack(">I", zlib.crc32(data[start : start + 17]))
    elif names:
        at = data.index(names[rng.integers(len(names))]) + 4 + 4 * int(rng.integers(22))
        data[at : at + 4] = value
    else:
        at = int(rng.integers(min(200, len(data) - 4)))
        data[at : at + 4] = value
    return bytes(data)


def mutate(data, rng):
    kind = rng.integers(8)
    if kind == 0:
        return data[: int(rng.integers(len(data)))]
    if kind in (1, 2):  # a few bits, or many
        data = bytearray(data)
        for at in rng.integers(len(data), size=(3, 200)[kind - 1]):
            data[at] ^= 1 << int(rng.integers(8))
        return bytes(data)
    if kind == 3:  # another beginning
        length = int(rng.integers(4, 64))
        return rng.bytes(length) + data[length:]
    if kind == 4:
        return b""
    if kind == 5:  # a hole
        at, length = int(rng.integers(len(data))), int(rng.integers(1, 400))
        return data[:at] + b"\0" * length + data[at + length :]
    if kind == 6:  # twice, or with another's bytes inside
        at = int(rng.integers(len(data)))
        return data[:at] + data + data[at:]
    return absurd(data, rng)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A folder with mutated files, every tenth as it was; and their names."""
    folder = tmp_path_factory.mktemp("zoo")
    whole = originals(folder / "whole")
    rng = np.random.default_rng(0)
    names = []
    (folder / "media").mkdir()
    for number, (suffix, data) in zip(range(NUM_FILES), itertools.cycle(whole)):
        other = whole[rng.integers(len(whole))][0]
        name = f"{number:04d}{other if rng.random() < 0.1 else suffix}"
        damaged = data if number % 10 == 0 else mutate(data, rng)
        (folder / "media" / name).write_bytes(damaged)
        names.append(name)
    return folder / "media", names


def read(path):
    """Everything that a reader does; a reason, or nothing."""
    try:
        with VideoReader(path) as reader:
            last = max(0.0, reader.info.duration - 1e-3)
            times = [0.0, min(0.3, last), min(last, 2.0)]
            frames = reader.read_at(times)
            assert frames.shape == (3, reader.info.height, reader.info.width, 3)
    except VideoReadError as error:
        return error.reason
    return None


def test_the_reader_reads_or_says_why(zoo):
    folder, names = zoo
    paths = [str(folder / name) for name in names]
    found = dict(run_tasks(read, paths, workers=2, time_limit=30.0))
    assert sorted(found) == list(range(len(names)))
    assert not [(names[k], v) for k, v in found.items() if isinstance(v, Lost)]
    assert not [reason for reason in found.values() if reason is not None and "\n" in reason]
    good = {k for k, reason in found.items() if reason is None}
    # What was not touched is read, but for files whose ending is another kind's.
    renamed = {
        k for k, name in enumerate(names) if Path(name).suffix != SUFFIXES[k % len(SUFFIXES)]
    }
    assert set(range(0, len(names), 10)) - renamed <= good
    assert len(good) < len(names)


def test_check_has_a_verdict_for_each(zoo):
    folder, names = zoo
    pieces = [Piece(str(folder / name), 0.0, None, None) for name in names]
    wanted = partial(check_clip, wanted=Wanted(1, 8.0))
    found = dict(run_tasks(wanted, pieces, workers=2, time_limit=30.0))
    assert sorted(found) == list(range(len(names)))
    assert all(isinstance(verdict, Verdict) for verdict in found.values())


def test_the_loader_replaces_and_names_each(zoo):
    folder, names = zoo
    path = folder.parent / "m.jsonl"
    write_manifest(path, [{"path": f"media/{name}", "caption": name} for name in names])
    clip = {"num_frames": 1, "height": 16, "width": 16, "fps": 8.0}
    dataset = ClipDataset(read_manifest(path), **clip, seed=0, random_start=False)
    sampler = StepSampler(10, 1, 0, 1)
    loader = ClipLoader(dataset, sampler, workers=2, file_seconds=30.0)
    items = iter(loader)
    steps = -(-len(names) // 10)
    rows, bad = [], {}
    for step in range(steps):
        batch = next(items)
        assert batch["g"] == list(range(10 * step, 10 * step + 10))
        assert batch["video"].shape == (10, 3, 1, 16, 16)
        rows += batch["rows"]
        bad.update(batch["bad"])
    items.close()
    assert not [reason for reason in bad.values() if reason.startswith("quarantined")]
    # An epoch asks for every row: each was read, or is named.
    named = {int(Path(path).stem) for path in bad}
    assert named | set(rows) == set(range(len(names)))
    assert not named & set(rows)


def test_ingest_accounts_for_each(zoo):
    folder, names = zoo
    out = folder.parent / "ingested"
    ingest(str(folder), out, load_ingest_config(None, ["captions.default=x"]), workers=2)
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert {Path(row["path"]).name for row in rows} == set(names)
    for row in rows:
        assert row["keep"] or row["drop_reasons"]
    assert (out / "report.html").is_file()
