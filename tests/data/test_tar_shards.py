import io
import itertools
import json
import os
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from data import tar_shards
from data.cli import app
from data.dataset import ClipDataset
from data.manifest import read_manifest, write_manifest
from data.media import Piece
from data.tar_index import index_shards
from data.tar_shards import parse_bytes, write_shards
from data.video import read_clip, write_video

wds = pytest.importorskip("webdataset")


@pytest.fixture
def source(tmp_path):
    """Nine clips and an image; of clip 1 two pieces, which are not neighbours in the manifest."""
    folder = tmp_path / "source"
    folder.mkdir()
    rows = []
    for k in range(9):
        video = np.random.default_rng(k).integers(0, 256, (4, 16, 16, 3), np.uint8)
        write_video(folder / f"{k} ü\n.mp4", video, fps=8)
        rows.append({"path": f"{k} ü\n.mp4", "caption": f"clip {k}", "score": k / 8})
    Image.new("RGB", (16, 16), (9 * 20, 0, 9)).save(folder / "still.PNG")
    rows[0]["text"] = 0.25  # a share, and no caption
    rows[1] |= {"start": 0.125, "end": 0.5, "crop": [0, 0, 8, 8], "tags": ["a", "<b>"]}
    rows.insert(4, {"path": "still.PNG", "caption": ["a picture", "ein Bild\nü"]})
    rows.insert(7, {"path": rows[1]["path"], "caption": ["again", "and again"]})
    write_manifest(folder / "m.jsonl", rows)
    return folder


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def members(shard):
    with tarfile.open(shard) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}


def test_shards_give_the_same_samples(source, tmp_path):
    done = write_shards(source / "m.jsonl", str(tmp_path / "out"), 14_000)
    assert (done.num_rows, done.num_files, done.bad, done.num_bad_rows) == (11, 10, [], 0)
    assert done.num_shards > 2
    before, after = read_manifest(source / "m.jsonl"), read_manifest(done.manifest)
    assert len(after.rows) == 11
    for old, new in zip(before.rows, after.rows):
        assert (old.caption, old.start, old.end, old.crop) == (
            *(new.caption, new.start, new.end, new.crop),
        )
        assert new.model_extra == {**(old.model_extra or {}), "source": old.path}
        piece = Piece.parse(after.locate(new))
        with open(piece.file, "rb") as file:
            file.seek(piece.offset)
            assert file.read(piece.length) == (source / old.path).read_bytes()
    how = {"num_frames": 1, "height": 16, "width": 16, "fps": 8, "seed": 0}
    for g in range(11):
        a, b = ClipDataset(before, **how)[g], ClipDataset(after, **how)[g]
        assert torch.equal(a["video"], b["video"])
        assert (a["caption"], a["row"], b["bad"]) == (b["caption"], b["row"], [])


def test_shards_are_the_same_every_time_and_of_bounded_size(source, tmp_path):
    for out in ("a", "b"):
        write_shards(source / "m.jsonl", str(tmp_path / out), 14_000)
    os.utime(source / "0 ü\n.mp4", (1, 1))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    for name, data in files(tmp_path / "a").items():
        if name.endswith(".tar"):
            with tarfile.open(tmp_path / "a" / name) as tar:
                for member in tar:
                    assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
                assert tar.offset <= 14_000
            assert len(data) % tarfile.RECORDSIZE == 0
    # One file is more than that: a shard each.
    done = write_shards(source / "m.jsonl", str(tmp_path / "c"), 100)
    assert (done.num_shards, done.num_over) == (10, 10)
    assert write_shards(source / "m.jsonl", str(tmp_path / "c"), 100).num_over == 10
    assert write_shards(source / "m.jsonl", str(tmp_path / "a"), 14_000).num_over == 0


def test_webdataset_reads_ours(source, tmp_path):
    done = write_shards(source / "m.jsonl", str(tmp_path / "out"), 14_000)
    shards = [str(tmp_path / "out" / f"{k:05d}.tar") for k in range(done.num_shards)]
    found = list(wds.WebDataset(shards, shardshuffle=False, empty_check=False))
    assert len({sample["__key__"] for sample in found}) == len(found) == 10
    rows = read_manifest(source / "m.jsonl").rows
    paths = list(dict.fromkeys(row.path for row in rows))
    for sample, path in zip(found, paths, strict=True):
        media = sample["png" if path.endswith("PNG") else "mp4"]
        assert media == (source / path).read_bytes()
        own = [row for row in rows if row.path == path]
        assert sample["txt"].decode() == own[0].captions[0]
        record = json.loads(sample["json"])
        of_rows = record["rows"] if len(own) > 1 else [record]
        assert [row["caption"] for row in of_rows] == [row.caption for row in own]


def test_ours_are_indexed_to_the_same_manifest(source, tmp_path):
    out = tmp_path / "out"
    write_shards(source / "m.jsonl", str(out), 14_000)
    found = index_shards([str(out / "*.tar")], out / "index.jsonl")
    assert (found.num_samples, found.bad, found.num_silent) == (10, [], 0)
    own = sorted((out / "manifest.jsonl").read_text().splitlines())
    assert sorted((out / "index.jsonl").read_text().splitlines()) == own


@pytest.fixture
def theirs(source, tmp_path):
    """Two shards that the webdataset library wrote; the media that an index should find."""
    (tmp_path / "theirs").mkdir()
    clips = [(source / f"{k} ü\n.mp4").read_bytes() for k in range(6)]
    still = (source / "still.PNG").read_bytes()
    samples = [
        {"__key__": "a.x/b c", "mp4": clips[0], "txt": "plain text\n"},
        {
            "__key__": "1",
            "MP4": clips[1],
            "json": {"caption": "from json", "width": 7, "text": 0.5},
            "txt": "no",
        },
        {"__key__": "2", "video.mp4": clips[2], "cap": b"a cap"},
        {"__key__": "3", "json": {"text": ["one", "two"], "path": "theirs"}, "mp4": clips[3]},
        {"__key__": "4", "jpg": still, "mp4": clips[4], "txt": ""},
        {"__key__": "5", "png": still, "json": b"{broken", "txt": "a still"},
        {"__key__": "6", "txt": "nothing to see", "npy": np.zeros(3)},
        {"__key__": "f" * 150, "mp4": clips[5], "txt": "a long name"},
    ]
    pattern = f"{tmp_path}/theirs/%03d.tar"
    with wds.ShardWriter(pattern, maxcount=4, verbose=0, encoder=encoded) as writer:
        for sample in samples[:-1]:
            writer.write(sample)
    # Only tarfile itself writes names of more than 100 characters.
    with tarfile.open(tmp_path / "theirs" / "001.tar", "a", format=tarfile.PAX_FORMAT) as tar:
        for ending in ("mp4", "txt"):
            data = samples[-1][ending]
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(f"{samples[-1]['__key__']}.{ending}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return [*clips[:5], still, clips[5]]


def encoded(sample):
    def encode(key, value):
        if isinstance(value, bytes) or key.startswith("__"):
            return value
        return value.encode() if isinstance(value, str) else json.dumps(value, default=str).encode()

    return {key: encode(key, value) for key, value in sample.items()}


def test_shards_of_others_are_indexed_and_read(theirs, tmp_path):
    out = tmp_path / "made" / "index.jsonl"
    out.parent.mkdir()
    found = index_shards([f"{tmp_path}/theirs/*.tar"], out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row.get("caption") for row in rows] == [
        *("plain text", "from json", "a cap", ["one", "two"], None, "a still", "a long name"),
    ]
    assert (rows[1]["width"], rows[1]["text"]) == (7, 0.5)
    assert "text" not in rows[3], "that was the caption"
    assert (found.num_shards, found.num_samples, found.num_rows) == (2, 7, 7)
    assert (found.num_silent, found.num_without_media) == (1, 1)
    assert len(found.bad) == 1
    assert "5.json is not JSON" in found.bad[0][1]
    manifest = read_manifest(out)
    assert [reason for _, reason in manifest.bad] == ["no caption"]
    for row, expected in zip(rows, theirs, strict=True):
        piece = Piece.parse(str(out.parent / row["path"]))
        with open(piece.file, "rb") as file:
            file.seek(piece.offset)
            assert file.read(piece.length) == expected
        clip = read_clip(str(piece), num_frames=1, fps=8, height=16, width=16)
        assert clip.shape == (3, 1, 16, 16)


def test_damaged_shards_are_named(source, tmp_path):
    out = tmp_path / "out"
    write_shards(source / "m.jsonl", str(out), 10**6)
    whole = (out / "00000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    at = whole.index(b"000000005.mp4")
    (tmp_path / "hurt.tar").write_bytes(whole[:at] + bytes([0xAA]) * 600 + whole[at + 600 :])
    (tmp_path / "no.tar").write_bytes(b"no tar file at all" * 100)
    (tmp_path / "zip.tar").write_bytes(b"\x1f\x8b" + whole)
    names = ["cut.tar", "hurt.tar", "no.tar", "zip.tar", "none.tar"]
    found = index_shards([str(tmp_path / name) for name in names], tmp_path / "i.jsonl")
    reasons = {os.path.basename(shard): reason for shard, reason in found.bad}
    assert "cut off in" in reasons["cut.tar"]
    assert "damaged at byte" in reasons["hurt.tar"]
    assert "header" in reasons["no.tar"]
    assert "unpack it" in reasons["zip.tar"]
    assert "no such file" in reasons["none.tar"]
    assert found.num_shards == 0
    assert found.num_samples >= 5 + 3, "those before the damage"
    for row in read_manifest(tmp_path / "i.jsonl").rows:
        read_clip(tmp_path / row.path, num_frames=1, fps=8, height=16, width=16)
    with pytest.raises(ValueError, match=r"no video or image in any of the 1 shards; .*unpack it"):
        index_shards([str(tmp_path / "zip.tar")], tmp_path / "j.jsonl")
    with pytest.raises(FileNotFoundError, match="no such file"):
        index_shards([str(tmp_path / "x*.tar")], tmp_path / "j.jsonl")


# Interruptions and mistakes


def test_an_interrupted_call_continues(source, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    write_shards(source / "m.jsonl", str(whole), 14_000)
    opened = []

    def counted(path, stop_after=None):
        opened.append(path)
        if stop_after is not None and len(opened) > stop_after:
            raise KeyboardInterrupt
        return open_bytes(path)

    open_bytes = tar_shards.open_bytes
    out = tmp_path / "out"
    monkeypatch.setattr(tar_shards, "open_bytes", lambda path: counted(path, 7))
    with pytest.raises(KeyboardInterrupt):
        write_shards(source / "m.jsonl", str(out), 14_000)
    assert "manifest.jsonl" not in files(out)
    kept = sum(name.endswith(".json") for name in files(out))
    assert kept >= 1
    assert not [name for name in files(out) if name.endswith("partial")]
    monkeypatch.setattr(tar_shards, "open_bytes", counted)
    opened.clear()
    write_shards(source / "m.jsonl", str(out), 14_000)
    assert files(out) == files(whole)
    first = json.loads((out / f"{kept - 1:05d}.json").read_text())["next"]
    assert len(set(opened)) == 10 - first, "what is there is not read again"
    opened.clear()
    (out / "00001.tar").write_bytes(b"cut off")
    write_shards(source / "m.jsonl", str(out), 14_000)
    assert files(out) == files(whole)


def test_other_shards_in_the_folder_are_not_mixed_in(source, tmp_path):
    write_shards(source / "m.jsonl", str(tmp_path / "out"), 14_000)
    with pytest.raises(ValueError, match="out holds the shards of another manifest or shard size"):
        write_shards(source / "m.jsonl", str(tmp_path / "out"), 15_000)


def test_no_other_manifest_is_replaced(source, tmp_path, monkeypatch):
    (source / "m.jsonl").rename(source / "manifest.jsonl")
    before = files(source)
    monkeypatch.chdir(source)
    (tmp_path / "link").symlink_to(source)
    for path in ("manifest.jsonl", str(source / "manifest.jsonl"), f"file://{tmp_path}/link"):
        path = path if path.endswith("jsonl") else f"{path}/manifest.jsonl"
        with pytest.raises(ValueError, match="would take its place; use another folder"):
            write_shards(path, "../link", 14_000)
    assert files(source) == before

    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.jsonl").write_text("mine")
    with pytest.raises(ValueError, match=r"out/manifest.jsonl is there already"):
        write_shards("manifest.jsonl", str(out), 14_000)
    assert files(out) == {"manifest.jsonl": b"mine"}, "and nothing was done for nothing"
    (out / "manifest.jsonl").unlink()
    write_shards("manifest.jsonl", str(out), 14_000)
    (out / "manifest.jsonl").write_text("mine, made since")
    with pytest.raises(ValueError, match=r"out/manifest.jsonl is there already"):
        write_shards("manifest.jsonl", str(out), 14_000)
    assert (out / "manifest.jsonl").read_text() == "mine, made since"


def test_an_index_replaces_nothing_and_has_each_shard_once(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    write_shards(source / "m.jsonl", str(out), 14_000)
    before = files(out)
    with pytest.raises(FileExistsError, match="is there already: choose another name"):
        index_shards([str(out / "*.tar")], out / "manifest.jsonl")
    assert files(out) == before
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/none: no such folder"):
        index_shards([str(out / "*.tar")], tmp_path / "none" / "i.jsonl")
    monkeypatch.chdir(out)
    twice = ["00000.tar", str(out / "*.tar"), f"file://{out}/00001.tar"]
    found = index_shards(twice, out / "index.jsonl")
    assert (found.num_samples, found.num_rows) == (10, 11)
    assert len((out / "index.jsonl").read_text().splitlines()) == 11


def test_an_unknown_protocol_is_named(tmp_path):
    for url in ("foo://x/*.tar", "foo::memory://x/a.tar"):
        with pytest.raises(ValueError, match="foo:// is not known to fsspec; expected s3://"):
            index_shards([url], tmp_path / "i.jsonl")


def test_unreadable_files_are_reported_and_counted(source, tmp_path):
    (source / "1 ü\n.mp4").unlink()
    (source / "3 ü\n.mp4").write_bytes(b"")
    done = CliRunner().invoke(app, ["shards", str(source / "m.jsonl"), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "no such file" in done.output
    assert "the file is empty" in done.output
    assert "2 files cannot be read, of 3 rows" in done.output
    assert "8 rows of 8 files in 1 shards" in done.output
    assert "left out," not in done.output
    assert "over 1GB" not in done.output
    again = CliRunner().invoke(app, ["shards", str(source / "m.jsonl"), str(tmp_path / "out")])
    assert again.output == done.output
    for path in source.glob("*.mp4"):
        path.unlink()
    (source / "still.PNG").unlink()
    none = CliRunner().invoke(app, ["shards", str(source / "m.jsonl"), str(tmp_path / "none")])
    assert none.exit_code == 1
    assert not (tmp_path / "none" / "manifest.jsonl").exists()


def test_the_summary_says_what_is_left_out_and_too_large(source, tmp_path):
    with (source / "m.jsonl").open("a") as file:
        for row in ({"path": "x.mp4", "caption": "x", "keep": False}, {"path": "y.mp4"}):
            file.write(f"{json.dumps(row)}\n" * (2 if "keep" in row else 1))
    command = ["shards", str(source / "m.jsonl"), str(tmp_path / "out"), "--shard-size", "100B"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "keep: false in the manifest: 2 rows" in done.output
    assert "since they cannot be used: 1 rows" in done.output
    assert "over 100B, for one file that needs more: 10 shards" in done.output


def test_the_index_command(source, tmp_path):
    write_shards(source / "m.jsonl", str(tmp_path / "out"), 14_000)
    shards = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    done = CliRunner().invoke(app, ["index", *shards, "--out", str(tmp_path / "i.csv")])
    assert done.exit_code == 0, done.output
    assert f"11 rows of 10 samples in {len(shards)} shards" in done.output
    assert len(read_manifest(tmp_path / "i.csv").rows) == 11


@pytest.mark.parametrize(
    ("text", "size"),
    [("1GB", 10**9), ("500 mb", 5 * 10**8), ("1GiB", 2**30), ("4096", 4096), ("1.5kB", 1500)],
)
def test_sizes_are_understood(text, size):
    assert parse_bytes(text) == size


@given(st.sampled_from(["", "GB", "0", "-1GB", "1 XB", "0.1", "1e9", "nan"]))
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match="expected a size"):
        parse_bytes(text)


def test_http_is_not_written_to(source):
    with pytest.raises(ValueError, match="HTTP is for reading"):
        write_shards(source / "m.jsonl", "http://127.0.0.1:1/x", 10**6)


def test_shards_are_sharded_again(source, tmp_path):
    """A member of a shard is a source like any other."""
    first = write_shards(source / "m.jsonl", str(tmp_path / "a"), 14_000)
    second = write_shards(first.manifest, str(tmp_path / "b"), 10**6)
    assert second.num_shards == 1
    a = list(itertools.chain(*(members(p).items() for p in sorted((tmp_path / "a").glob("*.tar")))))
    b = list(members(tmp_path / "b" / "00000.tar").items())
    assert [x for x in a if not x[0].endswith("json")] == [
        x for x in b if not x[0].endswith("json")
    ]
    assert read_manifest(second.manifest).rows[0].model_extra["source"] == "0 ü\n.mp4"


def test_references_are_found_from_the_shards(source, tmp_path):
    rows = [
        {"path": "0 ü\n.mp4", "caption": "a", "references": ["still.PNG", "s3://b/x.png"]},
        {"path": "1 ü\n.mp4", "caption": "b"},
    ]
    write_manifest(source / "m.jsonl", rows)
    done = write_shards(source / "m.jsonl", str(tmp_path / "out"), 10**6)
    found = read_manifest(done.manifest)
    places = found.locate_references(found.rows[0])
    assert places == (str(source / "still.PNG"), "s3://b/x.png")
    assert found.rows[1].references is None
