"""The `world` command end to end: real files, resumption, the same bytes from any worker."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
from typer.testing import CliRunner

from data.cli import app
from data.video import parse_size
from data.world import Scene
from data.world_files import WorldSpec, write_world
from data.world_render import render


def command(out, *more):
    return CliRunner().invoke(app, ["world", str(out), *map(str, more)])


def spec(**change):
    defaults = {
        "clips": 4,
        "seed": 0,
        "split": "train",
        "level": 1,
        "height": 32,
        "width": 32,
        "num_frames": 9,
        "fps": 8.0,
    }
    return WorldSpec(**{**defaults, **change})


def read_rows(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_command_writes_clips_that_show_their_state(tmp_path):
    out = tmp_path / "world"
    arguments = ("--clips", 5, "--seed", 7, "--split", "held-out", "--level", 4, "--workers", 0)
    result = command(out, *arguments, "--size", "48x64", "--frames", 5, "--fps", 12)
    assert result.exit_code == 0, result.output
    assert str(out / "manifest.jsonl") in result.output.replace("\n", "")
    rows = read_rows(out)
    assert [row["index"] for row in rows] == list(range(5))
    for row in rows:
        assert (row["level"], row["split"], row["seed"]) == (4, "held-out", 7)
        assert (row["num_frames"], row["height"], row["width"], row["fps"]) == (5, 48, 64, 12.0)
        assert row["duration"] == pytest.approx(5 / 12)
        assert len(set(row["caption"])) == 3
        with av.open(str(out / row["path"])) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264"
            assert stream.average_rate == 12
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        expected = render(Scene.from_state(row["state"])).astype(float)
        assert np.shape(frames) == (5, 48, 64, 3)
        # Half-resolution chroma blurs the outlines, and nothing else may differ.
        error = np.abs(np.array(frames) - expected)
        assert error.mean() < 4
        assert np.median(error) <= 3


def test_the_files_do_not_depend_on_workers(tmp_path):
    write_world(tmp_path / "one", spec(clips=130), workers=0)
    write_world(tmp_path / "two", spec(clips=130), workers=2)
    one, two = (contents(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []


def test_a_clip_does_not_depend_on_how_many_there_are(tmp_path):
    write_world(tmp_path / "few", spec(clips=3), workers=0)
    write_world(tmp_path / "more", spec(clips=5), workers=0)
    few, more = contents(tmp_path / "few"), contents(tmp_path / "more")
    clips = [name for name in few if name.endswith(".mp4")]
    assert len(clips) == 3
    assert all(few[name] == more[name] for name in clips)
    assert read_rows(tmp_path / "few") == read_rows(tmp_path / "more")[:3]


def test_a_repeated_call_renders_only_what_is_missing(tmp_path):
    write_world(tmp_path, spec(), workers=0)
    before = contents(tmp_path)
    paths = sorted(tmp_path.rglob("*.mp4"))
    stamps = {path: path.stat().st_mtime_ns for path in paths}
    paths[2].unlink()
    (tmp_path / "manifest.jsonl").unlink()
    write_world(tmp_path, spec(), workers=0)
    assert contents(tmp_path) == before
    kept = [path for path in paths if path.stat().st_mtime_ns == stamps[path]]
    assert kept == [path for path in paths if path != paths[2]]


def test_a_finished_world_is_left_alone(tmp_path):
    manifest = write_world(tmp_path, spec(), workers=0)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert write_world(tmp_path, spec(), workers=2) == manifest
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == stamps


def test_other_arguments_are_refused_and_named(tmp_path):
    out = tmp_path / "world"
    assert command(out, "--clips", 2, "--workers", 0).exit_code == 0
    result = command(out, "--clips", 2, "--workers", 0, "--seed", 5, "--fps", 16)
    assert isinstance(result.exception, ValueError)
    assert "got fps=16.0, seed=5, it was made with fps=8.0, seed=0" in str(result.exception)
    assert "\n" not in str(result.exception)


def test_a_folder_with_other_things_is_not_written_into(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="holds no world; use an empty or a new folder"):
        write_world(tmp_path, spec(), workers=0)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_damaged_arguments_are_named(tmp_path):
    write_world(tmp_path, spec(), workers=0)
    (tmp_path / "world.json").write_text('{"clips": 4, "se')
    with pytest.raises(ValueError, match=r"world\.json is damaged"):
        write_world(tmp_path, spec(), workers=0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--clips", "0"), "clips=0 leaves nothing to render"),
        (("--size", "33"), "size=33x33 does not fit H.264's chroma planes; use 34x34"),
        (("--size", "tiny"), "--size tiny: expected pixels"),
        (("--size", "32x32x3"), "--size 32x32x3: expected pixels"),
        (("--split", "test"), "split=test is unknown"),
        (("--level", "0"), "level=0 is unknown"),
        (("--frames", "100"), "use at most"),
        (("--workers", "-1"), "workers=-1 is negative"),
    ],
)
def test_mistakes_are_one_clear_line_and_leave_nothing_behind(tmp_path, flags, message):
    result = command(tmp_path / "world", *flags)
    assert result.exit_code != 0
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not (tmp_path / "world").exists()


@pytest.mark.parametrize(("text", "size"), [("32", (32, 32)), ("48x64", (48, 64))])
def test_sizes_are_height_first(text, size):
    assert parse_size(text) == size


def test_rendering_needs_no_torch():
    code = "import sys, data.world_files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_ctrl_c_is_one_line_and_the_same_call_goes_on(tmp_path):
    # Workers get the signal too, as on a terminal, here while they are still starting.
    zoetrope = Path(sys.executable).with_name("zoetrope")
    command = [str(zoetrope), "data", "world", str(tmp_path / "w")]
    command += ["--clips", "600", "--seed", "1", "--workers", "2"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not (tmp_path / "w" / "world.json").exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, out + err
    assert "Traceback" not in err
    assert not (tmp_path / "w" / "manifest.jsonl").exists()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert len((tmp_path / "w" / "manifest.jsonl").read_text().splitlines()) == 600
