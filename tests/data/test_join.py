"""Several manifests as one: every row, its files found from the new place."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.join import join_manifests
from data.manifest import read_manifest
from data.world_files import WorldSpec, write_world

SIZE = {"height": 16, "width": 16, "num_frames": 3, "fps": 8.0}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds")
    write_world(folder / "a", WorldSpec(3, 0, "train", 1, **SIZE), workers=1)
    spec = WorldSpec(4, 0, "train", None, scenario="subjects", **SIZE)
    write_world(folder / "b" / "c", spec, workers=1)
    return [folder / "a" / "manifest.jsonl", folder / "b" / "c" / "manifest.jsonl"]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_all_rows_and_their_files(worlds, tmp_path, suffix, monkeypatch):
    out = tmp_path / "far" / f"both.{suffix}"
    out.parent.mkdir()
    monkeypatch.chdir(tmp_path)  # relative to the manifest, not to where one stands
    names = [os.path.relpath(path) for path in worlds]
    counts = join_manifests(os.path.relpath(out), names)
    assert [count.rows for count in counts.values()] == [3, 4]
    both, parts = read_manifest(out), [read_manifest(path) for path in worlds]
    assert not both.bad
    every = [(manifest, row) for manifest in parts for row in manifest.rows]
    assert len(both.rows) == len(every)
    for row, (manifest, true) in zip(both.rows, every):
        assert os.path.samefile(both.locate(row), manifest.locate(true))
        assert not os.path.isabs(row.path)
        for one, other in zip(both.locate_references(row), manifest.locate_references(true)):
            assert os.path.samefile(one, other)
        assert len(row.references or ()) == len(true.references or ())
        assert row.captions == true.captions
        assert row.model_extra == true.model_extra
    assert both.num_references.tolist()[:3] == [0, 0, 0]
    assert both.num_references[3:].all()


def test_urls_and_absolute_paths_stay(tmp_path):
    rows = [{"path": path, "caption": "a"} for path in ("s3://b/a.mp4", "/data/a.mp4", "x/a.mp4")]
    one = tmp_path / "in" / "one.jsonl"
    one.parent.mkdir()
    one.write_text("".join(json.dumps(row) + "\n" for row in rows))
    join_manifests(tmp_path / "out.jsonl", [str(one)])
    found = [row.path for row in read_manifest(tmp_path / "out.jsonl").rows]
    assert found == ["s3://b/a.mp4", "/data/a.mp4", "in/x/a.mp4"]


def test_links_keep_their_names(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "00ff").write_bytes(b"x")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.png").symlink_to(tmp_path / "blobs" / "00ff")
    one = tmp_path / "in" / "one.jsonl"
    one.write_text(json.dumps({"path": "x.png", "caption": "a"}) + "\n")
    join_manifests(tmp_path / "out.jsonl", [str(one)])
    assert read_manifest(tmp_path / "out.jsonl").rows[0].path == "in/x.png"


def test_what_is_left_out_is_said(worlds, tmp_path):
    bad = tmp_path / "bad.jsonl"
    good = {"path": "a.mp4", "caption": "a"}
    lines = [good, {"path": "b.mp4"}, {**good, "keep": False}]
    bad.write_text("".join(json.dumps(row) + "\n" for row in lines))
    out = tmp_path / "out.jsonl"
    command = ["zoetrope", "data", "join", str(out), str(worlds[0]), str(bad)]
    executable = Path(sys.executable).with_name(command[0])
    done = subprocess.run([str(executable), *command[1:]], capture_output=True, text=True)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    assert f"1 rows of {bad}, 1 left out that cannot be used, 1 with keep: false" in text
    assert f"4 rows, {out}" in text
    assert "bad.jsonl:2 left out: no caption" in text


def test_mistakes(worlds, tmp_path):
    one = str(worlds[0])
    for out, names, error, message in (
        (tmp_path / "o.jsonl", [one, one], ValueError, "is given twice"),
        (worlds[0], [one], ValueError, "would be overwritten"),
        (tmp_path / "o.txt", [one], ValueError, "expected one of"),
        (worlds[1], [one], ValueError, "is there already; give another name first, or --overwrite"),
        (tmp_path / "no" / "o.jsonl", [one], FileNotFoundError, "no such folder"),
        (tmp_path / "o.jsonl", [str(tmp_path / "x.jsonl")], FileNotFoundError, "x.jsonl"),
    ):
        with pytest.raises(error, match=message):
            join_manifests(out, names)
    assert not list(tmp_path.iterdir())
