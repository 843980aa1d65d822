"""The `world` command end to end: real files, resumption, the same bytes from any worker."""

import hashlib
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
from PIL import Image
from typer.testing import CliRunner

from data.cli import app
from data.video import parse_size
from data.world import SPLITS, Scene
from data.world_files import WorldSpec, write_world
from data.world_render import render
from data.world_subjects import reference_scene


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


# Of manifest, arguments, frames and names, before there were scenarios: what is trained on, and what
# lies in folders made earlier, stays what it was.
LEVEL_HASHES = {
    1: ("de98bfb257dcb157", "3fa04a44f32ba375", "5cdac488b566bd30", "d91995a74f2b849b"),
    2: ("bedbf47bd12ff36f", "0dd97e69bf2cbc72", "ed59fb657c15cdc6", "da83bbad0b9f7548"),
    3: ("218e96b460f7f5f4", "dbfd9e004df54005", "5744d75be67414aa", "8ac61f7cdd42dd4d"),
    4: ("509b87decc405b64", "dd4f897931a79d4e", "4e38fdd355437d09", "83440ca33c723ee0"),
}


@pytest.mark.parametrize("level", LEVEL_HASHES)
def test_levels_are_what_they_always_were(tmp_path, level):
    for split, expected in zip(SPLITS, LEVEL_HASHES[level]):
        arguments = spec(clips=6, seed=5, split=split, level=level, width=32 + 16 * (level % 2))
        out = tmp_path / split
        write_world(out, arguments, workers=0)
        digest = hashlib.blake2b(digest_size=8)
        for name in ("world.json", "manifest.jsonl"):
            digest.update((out / name).read_bytes())
        for index in range(6):
            digest.update(render(arguments.scene(index)).tobytes())
        digest.update(json.dumps(sorted(str(p.relative_to(out)) for p in out.rglob("*"))).encode())
        assert digest.hexdigest() == expected, split


def subjects(**change):
    return spec(**{"level": None, "scenario": "subjects", "clips": 12, **change})


def test_subjects_come_with_a_picture_of_each(tmp_path):
    out = tmp_path / "world"
    arguments = ("--scenario", "subjects", "--split", "identities", "--clips", 12)
    result = command(out, *arguments, "--size", "32x48", "--workers", 0)
    assert result.exit_code == 0, result.output
    assert json.loads((out / "world.json").read_text())["scenario"] == "subjects"
    rows = read_rows(out)
    assert {len(row["references"]) for row in rows} == {1, 2}
    for row in rows:
        assert (row["scenario"], "level" in row) == ("subjects", False)
        scene = Scene.from_state(row["state"])
        assert len(row["references"]) == len(scene.objects)
        for number, path in enumerate(row["references"]):
            assert path == f"references/000/{row['index']:06d}-{number + 1}.png"
            with Image.open(out / path) as picture:
                found = np.array(picture)
            assert found.shape == (32, 48, 3)
            expected = render(reference_scene(scene, number))[0]
            np.testing.assert_array_equal(found, expected)
    listed = {out / path for row in rows for path in (row["path"], *row["references"])}
    assert {path for path in out.rglob("*") if path.suffix in (".png", ".mp4")} == listed


def test_an_interrupted_call_also_brings_back_lost_pictures(tmp_path):
    write_world(tmp_path, subjects(), workers=0)
    before = contents(tmp_path)
    rows = read_rows(tmp_path)
    two = next(row for row in rows if len(row["references"]) == 2)
    (tmp_path / two["references"][1]).unlink()
    (tmp_path / rows[0]["path"]).unlink()
    write_world(tmp_path, subjects(), workers=0)
    assert contents(tmp_path) == before


def test_files_of_a_scenario_do_not_depend_on_workers(tmp_path):
    write_world(tmp_path / "one", subjects(clips=70), workers=0)
    write_world(tmp_path / "two", subjects(clips=70), workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_another_scenario_in_the_same_folder_is_refused(tmp_path):
    out = tmp_path / "world"
    assert command(out, "--clips", 2, "--workers", 0).exit_code == 0
    result = command(out, "--clips", 2, "--workers", 0, "--scenario", "pan")
    assert isinstance(result.exception, ValueError)
    assert "got level=None, scenario=pan, it was made with level=1, scenario=None" in str(
        result.exception
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--clips", "0"), "clips=0 leaves nothing to render"),
        (("--size", "33"), "size=33x33 does not fit H.264's chroma planes; use 34x34"),
        (("--size", "tiny"), "--size tiny: expected pixels"),
        (("--size", "32x32x3"), "--size 32x32x3: expected pixels"),
        (("--split", "test"), "split=test is unknown"),
        (("--level", "0"), "level=0 is unknown"),
        (("--scenario", "pan", "--level", "1"), "level=1 says nothing about scenario=pan"),
        (("--scenario", "rain"), "scenario=rain is unknown; use one of shapes, subjects"),
        (("--scenario", "subjects", "--split", "speeds"), "use one of train, held-out, identities"),
        (("--scenario", "pan", "--frames", "100"), "use at most 20 frames"),
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
