import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from data.cli import app
from data.manifest import write_manifest
from data.video import write_video


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
    return CliRunner().invoke(app, ["check", str(path), *options])


def test_all_kept(folder):
    result = check(folder, ["good.mp4", "good.mp4"], "--workers", "1")
    assert result.exit_code == 0
    assert "kept     line 1: good.mp4: 32x32, 9 frames at 8 fps, 1.125 s, h264" in result.stdout
    assert "2 of 2 clips kept, 0 dropped" in result.stdout


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
    result = CliRunner().invoke(app, ["check", str(path), "--workers", "1"])
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
        (["--max-bad-share", "2"], "max_bad_share=2"),
    ],
)
def test_senseless_options_are_refused(folder, options, message):
    result = check(folder, ["good.mp4"], *options)
    assert result.exit_code != 0
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)


def test_a_missing_manifest_is_refused(tmp_path):
    result = CliRunner().invoke(app, ["check", str(tmp_path / "no.jsonl")])
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
