import json
from dataclasses import replace

import pytest
import typer
from typer.testing import CliRunner

from data.world_files import WorldSpec, write_world
from eval.cli import Part, evaluate
from eval.world_parts import PARTS
from sample.model import save_model

app = typer.Typer()
app.command()(evaluate)


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model):
    path = tmp_path_factory.mktemp("eval") / "model"
    save_model(path, tiny_model)
    return path


@pytest.fixture(scope="module")
def able(tmp_path_factory, tiny_model):
    """A model that says it was trained to be given frames in every way."""
    tasks = ("text", "random", "sides", "window")
    path = tmp_path_factory.mktemp("eval") / "able"
    save_model(path, replace(tiny_model, info=tiny_model.info.model_copy(update={"tasks": tasks})))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    path = tmp_path_factory.mktemp("eval") / "world"
    spec = WorldSpec(5, 1, "train", level=1, height=32, width=32, num_frames=9, fps=8.0)
    return write_world(path, spec, workers=0)


def test_the_world_suite_prints_a_table_and_writes_json(folder, world, tmp_path):
    output = tmp_path / "results.json"
    result = run(
        *(folder, "--suite", "world", "--num", 4, "--steps", 2, "--batch-size", 2),
        *("--guidance", 1, "--sampler", "heun", "--avoid", world, "-o", output),
    )
    assert result.exit_code == 0, result.output
    assert "all four together" in result.stdout
    results = json.loads(output.read_text())
    assert results["sampling"] == {"steps": 2, "guidance": 1.0, "sampler": "heun"}
    assert results["scores"]["real"]["joint"]["num"] == 4
    assert results["avoided_captions"] == len(
        {c for line in world.read_text().splitlines() for c in json.loads(line)["caption"]}
    )
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_folder_of_videos_is_scored_without_a_model(world, as_folder):
    result = run(world.parent if as_folder else world, "--num", 5)
    assert result.exit_code == 0, result.output
    row = next(line for line in result.stdout.splitlines() if line.startswith("all four together"))
    assert "1.000" in row
    assert "N=5" in row


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--num", 0], ValueError, "at least 1"),
        (["--batch-size", -1], ValueError, "at least 1"),
        (["--level", 7], ValueError, "level=7"),
        (["--split", "test"], ValueError, "split=test"),
        (["--sampler", "ddim"], ValueError, "does not suit"),
        (["x.jsonl"], ValueError, "--suite vae"),
        (["--against", "x"], ValueError, "--against goes with --suite vae"),
        (["--sizes", "32"], ValueError, "--sizes goes with --suite vae"),
        (["--tile", 4], ValueError, "--tile goes with --suite vae"),
        (["--lpips-weights", "x"], ValueError, "--lpips-weights goes with --suite vae"),
        (["-o", "no/such/folder/x.json"], FileNotFoundError, "no such folder"),
        (["-o", "/"], ValueError, "is a folder"),
        (["--device", "meta"], ValueError, "device=meta cannot be used"),
        (["--guidance", "nan"], ValueError, "expected a finite number"),
        (["--temperature", 2], ValueError, "temperature=2; use a number above 0, up to 1"),
        (["--suite", "vae", "--temperature", 1], ValueError, "goes with --suite world"),
        (["--part", "edit", "--temperature", 1], ValueError, "does not go with edits"),
    ],
)
def test_mistakes_are_one_line(folder, options, error, message):
    result = run(folder, "--steps", 1, *options)
    assert isinstance(result.exception, error)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)


def test_every_part_can_be_asked_for():
    assert {part.value for part in Part} == {"text", *PARTS}


def test_a_part_prints_a_table_and_notes_and_writes_json(able, tmp_path):
    output = tmp_path / "physics.json"
    options = ("--num", 1, "--steps", 1, "--seed", 3, "--temperature", 0.5, "-o", output)
    result = run(able, "--part", "physics", *options)
    assert result.exit_code == 0, result.output
    assert "parabola, out of distribution: velocity error, units/s" in result.stdout
    assert "5 of 9 frames are given" in result.stdout
    results = json.loads(output.read_text())
    assert (results["part"], results["num"], results["seed"]) == ("physics", 1, 3)
    assert results["sampling"]["temperature"] == 0.5
    assert (
        results["published"]["models"]["uniform, out of distribution"]["DiT-B, 3M videos"] == 0.358
    )


@pytest.mark.parametrize(
    ("part", "row"),
    [
        ("extension", "connection: distance from where it should be, px"),
        ("minute", "50 to 60 s: drift of the colour, of 441"),
    ],
)
def test_parts_of_longer_videos(able, part, row):
    result = run(able, "--part", part, "--num", 1, "--steps", 1, "--guidance", 1)
    assert result.exit_code == 0, result.output
    assert row in result.stdout
    assert f"world suite, {part}: 1 " in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--level", 2], "--level goes with --part text"),
        (["--split", "speeds"], "--split goes with --part text"),
        (["--avoid", "x.jsonl"], "--avoid goes with --part text"),
        (["--suite", "vae"], "--part goes with --suite world"),
        (["--num", 0], "at least 1"),
        ([], "needs a model that was trained for it"),
    ],
)
def test_mistakes_with_a_part_are_one_line(folder, options, message):
    result = run(folder, "--part", "physics", *options)
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)


def test_parts_need_a_model_and_one_process(folder, world, monkeypatch):
    result = run(world, "--part", "physics")
    assert "--part physics needs a model folder" in str(result.exception)
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run(folder, "--part", "physics")
    assert "--part physics runs in one process, not 2" in str(result.exception)


def test_rows_that_cannot_be_scored_are_named(world, caplog):
    manifest = world.with_name("partly.jsonl")
    manifest.write_text(world.read_text() + '{"path": "x.mp4"}\n')
    result = run(manifest, "--num", 6)
    manifest.unlink()
    assert result.exit_code == 0
    assert "partly.jsonl:6 left out" in caplog.text


def test_a_state_of_something_else_is_named(world):
    manifest = world.with_name("other.jsonl")
    row = json.loads(world.read_text().splitlines()[0])
    row["state"]["height"] = "a"
    manifest.write_text(json.dumps(row) + "\n")
    result = run(manifest)
    manifest.unlink()
    assert isinstance(result.exception, ValueError)
    assert "other.jsonl, line 1: its `state` is not one" in str(result.exception)


def test_a_missing_model_is_named(tmp_path):
    result = run(tmp_path / "gone")
    assert isinstance(result.exception, FileNotFoundError)
    assert "gone" in str(result.exception)
