"""What zoetrope data ingest takes as its source and as its OUT, and what it leaves alone."""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from data.cli import app
from data.embeddings import _tower
from data.ingest import ingest
from data.ingest_config import load_ingest_config
from data.ingest_select import mark_duplicates, settle_captions
from data.ingest_source import find_source
from data.ingest_steps import Step
from data.video_write import write_video

MILD = ["filters.min_sharpness=null", "filters.min_width=48", "filters.min_height=48"]


def config(*overrides):
    return load_ingest_config(None, [*MILD, *overrides])


def run(src, out, *overrides):
    return ingest(os.fspath(src), out, config(*overrides), workers=0)


def rows_of(result):
    return [json.loads(line) for line in result.manifest.read_text().splitlines()]


def listed(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_an_out_that_would_lose_something_is_refused(tmp_path, pan):
    src = tmp_path / "src"
    src.mkdir()
    write_video(src / "a.mp4", pan(1, 30), fps=20)
    manifest = listed(src / "manifest.jsonl", [{"path": "a.mp4", "caption": "x"}])
    before = manifest.read_bytes()
    os.symlink(src, tmp_path / "link")
    for given, out, message in [
        (manifest, src, "is the source and would be overwritten; choose another OUT"),
        (manifest, tmp_path / "link", "is the source and would be overwritten"),
        (f"file://{manifest}", src, "is the source and would be overwritten"),
        (src / "a.mp4", src, "no ingest made it"),
        (src, src, "is the source itself; choose another OUT"),
        (src, "", "OUT is empty"),
        (src, src / "a.mp4", "is a file"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            run(given, out)
        assert "\n" not in str(error.value)
        assert str(out) in str(error.value)
    with pytest.raises(OSError, match=r"a\.mp4/deep cannot be made: Not a directory"):
        run(src, src / "a.mp4" / "deep")
    assert manifest.read_bytes() == before
    assert sorted(os.listdir(src)) == ["a.mp4", "manifest.jsonl"]
    result = CliRunner().invoke(app, ["ingest", str(src), ""])
    assert "OUT is empty" in str(result.exception)


def test_what_a_source_manifest_drops_stays_dropped(tmp_path, pan):
    write_video(tmp_path / "a.mp4", pan(1, 30), fps=20)
    rows = [
        {"path": "a.mp4", "caption": "x", "keep": True, "drop_reasons": []},
        {"path": "a.mp4", "caption": "y", "keep": False, "drop_reasons": ["too odd: 3"], "end": 1},
        {"path": "gone.mp4", "caption": "z", "keep": False, "by": "me"},
        {"path": "a.mp4", "keep": "no"},
    ]
    result = run(listed(tmp_path / "list.jsonl", rows), tmp_path / "out")
    kept, odd, gone = rows_of(result)
    assert (kept["keep"], kept["drop_reasons"]) == (True, [])
    assert (odd["keep"], odd["drop_reasons"]) == (False, ["in the source manifest: too odd: 3"])
    assert (odd["caption"], odd["end"], "motion" in odd) == ("y", 1, False)
    assert gone["drop_reasons"] == ["in the source manifest: no reason given"]
    assert gone["by"] == "me"
    assert str(result).startswith("3 rows of 2 files, 3 clips, 1 kept\n")
    assert "     2  in the source manifest\n" in str(result)
    assert "other rows: 1 keep\n" in str(result)
    assert "Dropped: in the source manifest (2)" in result.report.read_text()
    (tmp_path / "again").mkdir()
    again = run(result.manifest, tmp_path / "again")
    assert [row["drop_reasons"] for row in rows_of(again)] == [
        row["drop_reasons"] for row in rows_of(result)
    ]


def test_the_crop_of_a_source_row_is_what_is_measured(tmp_path, pan):
    video = pan(1, 30)  # 96 x 160
    video[:, :, 80:] = 0
    write_video(tmp_path / "a.mp4", video, fps=20)
    crops = [
        None,
        [80, 0, 80, 96],
        [0, 8, 61.0, 64],
        [0, 0, 40, 96],
        [100, 0, 61, 96],
        [0, -1, 4, 4],
    ]
    rows = [{"path": "a.mp4", "caption": "x", "crop": crop} for crop in [*crops, "0,0,8,8"]]
    result = run(
        listed(tmp_path / "list.jsonl", rows), tmp_path / "out", "duplicates.max_distance=null"
    )
    whole, black, part, narrow, outside, negative = rows_of(result)
    assert whole["crop"][2] < 100  # what letterbox detection makes of it
    assert (black["crop"], black["black"], black["bars"]) == ([80, 0, 80, 96], 1.0, 0.5)
    assert (part["crop"], part["black"], part["keep"]) == ([0, 8, 61, 64], 0.0, True)
    assert narrow["drop_reasons"] == [
        "too narrow: 40, at least 48 is asked for (filters.min_width)"
    ]
    for row in (outside, negative):
        (reason,) = row["drop_reasons"]
        assert "is not inside the picture of 160x96" in reason
    assert [why for _, why in result.source.skipped] == [
        "crop: expected [x, y, width, height] in pixels, got '0,0,8,8'"
    ]


@pytest.mark.parametrize("data", [b"", b"no checkpoint", b"\x80\x02."])
def test_weights_that_are_no_checkpoint_are_named(tmp_path, data):
    pytest.importorskip("open_clip")
    weights = tmp_path / "weights.pt"
    weights.write_bytes(data)
    with pytest.raises(ValueError, match=r"duplicates\.clip\.weights=.* is no checkpoint") as error:
        _tower("ViT-S-32", str(weights))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("finished", [True, False])
def test_results_of_another_ingest_are_no_source(tmp_path, pan, finished):
    src = tmp_path / "src"
    src.mkdir()
    write_video(src / "a.mp4", pan(1, 30), fps=20)
    first = run(src, src / "deep" / "first", "captions.default=x")
    if not finished:
        first.manifest.unlink()
    source = find_source(str(src), tmp_path / "second")
    assert [os.path.basename(record["path"]) for record in source.files] == ["a.mp4"]
    assert source.skipped == [(str(src / "deep" / "first"), "the results of an ingest")]
    with pytest.raises(ValueError, match="holds the results of an ingest"):
        run(first.manifest.parent, tmp_path / "second")


def test_results_in_a_bucket_are_no_source():
    import fsspec

    files = fsspec.filesystem("memory")
    for name in ("a.mp4", "set/steps/probe.jsonl", "set/thumbnails/00/x.jpg", "settled/b.mp4"):
        files.pipe_file(f"/results/{name}", b"x")
    source = find_source("memory://results", Path("out"))
    names = [record["path"].partition("results/")[2] for record in source.files]
    assert names == ["a.mp4", "settled/b.mp4"]
    assert {why for _, why in source.skipped} == {"the results of an ingest"}


@pytest.mark.parametrize("name", ["notes.txt", "notes.json", "notes.srt", "notes"])
def test_a_single_file_is_one(tmp_path, name):
    (tmp_path / name).write_text("words")
    source = find_source(str(tmp_path / name), tmp_path / "out")
    assert [record["path"] for record in source.files] == [str(tmp_path / name)]
    assert source.size == "1 files"
    assert source.files[0]["sidecars"] == source.skipped == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["filters.min_motion=3"], "filters: min_motion=3 is more than max_motion=2"),
        (["filters.min_fps=9", "filters.max_fps=8"], "filters: min_fps=9 is more than max_fps=8"),
        (["filters.max_text=-0.1"], "filters: max_text=-0.1 is negative"),
        (["filters.min_width=-1"], "filters: min_width=-1 is negative"),
        (["scenes.max_seconds=0.5"], "filters.min_seconds=1 is more than scenes.max_seconds=0.5"),
    ],
)
def test_thresholds_that_no_clip_can_meet_are_refused(overrides, message):
    with pytest.raises(ValueError, match="ingest config: ") as error:
        load_ingest_config(None, overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_captioned_copy_is_not_lost_to_one_without_a_caption(tmp_path, pan):
    src = tmp_path / "src"
    src.mkdir()
    video = pan(1, 40)
    write_video(src / "original.mp4", video, fps=20)
    small = np.stack([cv2.resize(f, (120, 72), interpolation=cv2.INTER_AREA) for f in video])
    write_video(src / "copy.mp4", small, fps=20)
    (src / "copy.txt").write_text("of the copy")
    copy, original = rows_of(run(src, tmp_path / "out"))
    assert (copy["keep"], copy["caption"]) == (True, "of the copy")
    assert original["drop_reasons"][0].startswith("no caption: ")
    # With a default no clip is without a caption; the better copy is kept, with the better words.
    copy, original = rows_of(run(src, tmp_path / "out", "captions.default=any"))
    assert copy["drop_reasons"][0].startswith("duplicate of ")
    assert (original["keep"], original["caption"]) == (True, "of the copy")
    assert original["caption_from"] == "files of a duplicate"


def test_a_caption_of_its_own_is_not_replaced_by_that_of_a_duplicate():
    settings = config()
    common = {"drop_reasons": [], "is_image": True, "hashes": ["0" * 16] * 4, "shown_height": 9}
    records = [
        common | {"shown": f"{k}", "shown_width": 9 - k, "drop_reasons": [], "written": written}
        for k, written in enumerate([["own"], ["other"], []])
    ]
    mark_duplicates(records, settings.duplicates)
    settle_captions(records[0], settings.captions)
    assert [len(record["drop_reasons"]) for record in records] == [0, 1, 1]
    assert (records[0]["caption"], records[0]["caption_from"]) == ("own", "files")


def test_no_captioner_is_asked_where_a_duplicate_has_a_caption(tmp_path, pan, monkeypatch):
    src = tmp_path / "src"
    src.mkdir()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_video(src / f"{name}.mp4", pan(seed, 30), fps=20)
    (src / "b.txt").write_text("of b")
    asked = []

    def answer(tasks, _):
        asked.extend(os.path.basename(task["path"]) for task in tasks)
        return [[{"generated": ["made up"]}] for _ in tasks]

    step = Step("captioner", answer, ("path", "version"), None)
    monkeypatch.setattr("data.ingest.model_steps", lambda config: (None, step))
    a, b, c = rows_of(run(src, tmp_path / "out"))
    assert asked == ["c.mp4"]
    assert (a["caption"], a["caption_from"]) == ("of b", "files of a duplicate")
    assert (b["keep"], c["caption"], c["caption_from"]) == (False, "made up", "captioner")
