import json
import os
import shutil

import pytest
from PIL import Image
from typer.testing import CliRunner

from data.manifest import read_manifest, write_manifest
from data.video import write_video
from train.cli import app


@pytest.fixture
def folder(tmp_path, counting):
    for name, num_frames in (("good.mp4", 9), ("short.mp4", 3), ("cut.mp4", 9)):
        write_video(tmp_path / name, counting(num_frames, 32, 32), fps=8)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(cut.read_bytes()[:-300])
    (tmp_path / "empty.mp4").touch()
    return tmp_path


def check(folder, names, *options):
    path = folder / "m.jsonl"
    write_manifest(path, [{"path": name, "caption": "x"} for name in names])
    return CliRunner().invoke(app, ["data", "check", str(path), *options])


def test_all_kept(folder):
    result = check(folder, ["good.mp4", "good.mp4"], "--workers", "1")
    assert result.exit_code == 0
    assert "kept     line 1: good.mp4: 32x32, 9 frames at 8 fps, 1.125 s, h264" in result.stdout
    assert "2 of 2 clips kept, 0 dropped" in result.stdout


def test_references_are_looked_at(folder):
    Image.new("RGB", (8, 8)).save(folder / "x.png")
    (folder / "y.png").write_bytes(b"no picture")
    rows = [
        {"path": "good.mp4", "caption": "x", "references": [name]} for name in ("x.png", "y.png")
    ]
    write_manifest(folder / "m.jsonl", rows)
    command = ["data", "check", str(folder / "m.jsonl"), "--workers", "1"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    kept, dropped = result.stdout.splitlines()[:2]
    assert kept.startswith("kept     line 1")
    assert dropped.startswith("dropped  line 2: good.mp4: its reference ")
    assert "y.png: " in dropped
    CliRunner().invoke(app, [*command, "--write", str(folder / "kept.csv")])
    assert read_manifest(folder / "kept.csv").rows[0].references == ("x.png",)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_dropped_clips_are_named_with_their_reason(folder, workers):
    names = ["empty.mp4", "good.mp4", "short.mp4", "missing.mp4", "cut.mp4"]
    result = check(folder, names, "--frames", "9", "--fps", "8", "--workers", workers)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[0] == "dropped  line 1: empty.mp4: the file is empty"
    assert lines[1].startswith("kept     line 2: good.mp4:")
    assert lines[2].startswith("dropped  line 3: short.mp4: 9 frames at 8 fps need more than 1.000")
    assert lines[3] == "dropped  line 4: missing.mp4: no such file"
    assert lines[4].startswith("dropped  line 5: cut.mp4: cut off")
    assert lines[5] == "1 of 5 clips kept, 4 dropped"


def test_rows_that_are_bad_count_as_dropped(folder):
    path = folder / "m.jsonl"
    good = {"path": "good.mp4", "caption": "x"}
    path.write_text("\n".join([json.dumps(good), json.dumps({"path": "good.mp4"}), "nonsense"]))
    result = CliRunner().invoke(app, ["data", "check", str(path), "--workers", "1"])
    assert result.exit_code == 1
    assert "dropped  line 2: no caption" in result.stdout
    assert "dropped  line 3: not JSON" in result.stdout
    assert "1 of 3 clips kept, 2 dropped" in result.stdout


@pytest.mark.parametrize(("share", "code"), [("0.4", 1), ("0.5", 0), ("1", 0)])
def test_a_share_of_bad_clips_may_be_allowed(folder, share, code):
    names = ["good.mp4", "empty.mp4"]
    result = check(folder, names, "--max-bad-share", share, "--workers", "1")
    assert result.exit_code == code
    assert "1 of 2 clips kept, 1 dropped" in result.stdout


def test_small_clips_are_counted(folder):
    result = check(folder, ["good.mp4"], "--height", "64", "--width", "32", "--workers", "1")
    assert result.exit_code == 0
    assert "smaller than asked for, which training will enlarge: 1 of" in result.stdout
    assert "smaller" not in check(folder, ["good.mp4"], "--height", "32", "--workers", "1").stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--frames", "0"], "must be positive"),
        (["--fps", "-1"], "must be positive"),
        (["--height", "0"], "must be positive"),
        (["--workers", "0"], "workers=0"),
        (["--max-bad-share", "2"], "--max-bad-share 2.0 must be in"),
    ],
)
def test_senseless_options_are_refused(folder, options, message):
    result = check(folder, ["good.mp4"], *options)
    assert result.exit_code != 0
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)


def test_a_missing_manifest_is_refused(tmp_path):
    result = CliRunner().invoke(app, ["data", "check", str(tmp_path / "no.jsonl")])
    assert isinstance(result.exception, FileNotFoundError)


def test_images_are_kept_as_single_frames_alone(folder):
    Image.new("RGBA", (40, 30)).save(folder / "a.png")
    Image.new("RGB", (40, 30)).save(folder / "b.jpg")
    cut = folder / "b.jpg"
    cut.write_bytes(cut.read_bytes()[:-100])
    names = ["a.png", "b.jpg", "good.mp4"]
    lines = check(folder, names, "--frames", "1", "--workers", "1").stdout.splitlines()
    assert lines[0] == "kept     line 1: a.png: 40x30, an image, png"
    assert lines[1].startswith("dropped  line 2: b.jpg: ")
    assert lines[3] == "2 of 3 clips kept, 1 dropped"
    lines = check(folder, names, "--frames", "5", "--workers", "1").stdout.splitlines()
    assert lines[0] == "dropped  line 1: a.png: an image, but 5 frames are wanted"
    assert lines[3] == "1 of 3 clips kept, 2 dropped"


def rows_of(folder, rows, *options):
    path = folder / "m.jsonl"
    write_manifest(path, rows)
    return CliRunner().invoke(app, ["data", "check", str(path), "--workers", "1", *options])


def test_reasons_are_counted_with_those_of_the_manifest_itself(folder):
    good = {"path": "good.mp4", "caption": "x"}
    dropped = {"keep": False, "drop_reasons": ["blur 3.1 is under 10"]}
    rows = [good, good | dropped, good | dropped | {"drop_reasons": ["blur 4.2 is under 10"]}]
    result = rows_of(folder, [*rows, good | {"path": "gone.mp4"}, good | {"path": "lost.mp4"}])
    assert result.exit_code == 1
    assert "dropped  line 2: good.mp4: blur 3.1 is under 10" in result.stdout
    assert "1 of 3 clips kept, 2 dropped" in result.stdout
    assert "beside them, left out by the manifest itself: 2 rows" in result.stdout
    assert "  2 dropped, such as: blur 3.1 is under 10" in result.stdout
    assert "  2 dropped, such as: no such file" in result.stdout
    result = rows_of(folder, rows)
    assert (result.exit_code, result.stdout.splitlines()[3]) == (0, "1 of 1 clips kept, 0 dropped")


def test_what_may_surprise_is_said(folder):
    shutil.copy(folder / "good.mp4", folder / "copy.mp4")
    rows = [
        {"path": "good.mp4", "caption": "a " * 100, "fps": 25, "duration": 9, "num_frames": 9},
        {"path": "copy.mp4", "caption": ["short", "b " * 80], "width": 32, "height": 31},
        {"path": "good.mp4", "caption": "x", "start": 0.5},
    ]
    result = rows_of(folder, rows, "--frames", "2", "--fps", "16")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[4:] == [
        "fewer frames per second than the 16 asked for, so that training sees frames twice: 3 of the "
        "kept ones (lines 1, 2, 3)",
        "fps in the manifest is not that of the file: 1 of the kept ones (line 1)",
        "duration in the manifest is not that of the file: 1 of the kept ones (line 1)",
        "height in the manifest is not that of the file: 1 of the kept ones (line 2)",
        "the same piece of the same file, or of a copy of it, as a row before: 1 of the kept ones "
        "(line 2)",
        "captions longer than the text encoder's 77 tokens: 2 of the kept ones (lines 1, 2); 30 of all "
        "190 tokens are lost",
    ]


def test_the_kept_rows_can_be_written_with_what_was_measured(folder):
    rows = [
        {"path": "good.mp4", "caption": "x", "start": 0.5, "tag": "mine"},
        {"path": "cut.mp4", "caption": "x"},
    ]
    target = folder / "kept.jsonl"
    result = rows_of(folder, rows, "--write", str(target))
    assert result.exit_code == 1
    (row,) = read_manifest(target).rows
    found = {"height": 32, "width": 32, "fps": 8.0, "duration": 1.125, "pixel_aspect": 1.0}
    assert row.model_extra == found | {"tag": "mine"}
    assert (
        "kept     line 1: good.mp4 [0.5, end]: 32x32, 5 frames at 8 fps, 0.625 s" in result.stdout
    )
    assert row.start == 0.5
    for name in ("no/x.jsonl", "x.txt", "m.jsonl"):  # before anything is read
        result = rows_of(folder, rows[:1], "--write", str(folder / name))
        assert isinstance(result.exception, ValueError)
        assert "kept" not in result.stdout


def test_a_file_that_hangs_is_given_up(folder):
    os.mkfifo(folder / "pipe.mp4")  # whoever opens it waits for ever
    rows = [{"path": "pipe.mp4", "caption": "x"}, {"path": "good.mp4", "caption": "x"}]
    result = rows_of(folder, rows, "--file-seconds", "2")
    lines = result.stdout.splitlines()
    assert lines[0] == "dropped  line 1: pipe.mp4: it took longer than 2 s"
    assert lines[1].startswith("kept     line 2: good.mp4")


def test_nothing_usable_ends_with_1(folder):
    result = rows_of(folder, [{"path": "cut.mp4", "caption": "x"}], "--max-bad-share", "1")
    assert (result.exit_code, result.stdout.splitlines()[1]) == (1, "0 of 1 clips kept, 1 dropped")


def test_crops_must_lie_inside_the_picture(folder):
    row = {"path": "good.mp4", "caption": "x"}
    result = rows_of(folder, [row | {"crop": [0, 0, 32, 32]}, row | {"crop": [4, 0, 32, 16]}])
    assert "dropped  line 2: good.mp4: crop 4,0 32x16 lies outside its 32x32" in result.stdout
