"""`zoetrope data` where it knows configs and models: latents, show, check of a run."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from data.manifest import write_manifest
from train.cli import main
from train.logs import read_log


def run(capsys, *arguments):
    """What a command says, and its exit code."""
    with pytest.raises(SystemExit) as stopped:
        main(["data", *map(str, arguments)])
    said = capsys.readouterr()
    return stopped.value.code or 0, said.out, said.err


def manifest_of(room):
    return room.folder / "train" / "manifest.jsonl"


def test_a_cache_made_by_the_command_serves_a_run(room, tmp_path, capsys):
    cache = tmp_path / "cache"
    code, said, _ = run(
        capsys, "latents", manifest_of(room), room.vae, cache, "--dtype", "float32", "--no-text"
    )
    assert (code, said) == (0, f"{cache}: latents of 12 clips in 1 shards\n")
    before = [path.stat().st_mtime_ns for path in sorted(cache.iterdir())]
    plain = room.train(tmp_path / "plain", "dit", data={"random_start": False})
    recipe = {"latent_cache": str(cache), "cache_dtype": "float32"}
    cached = room.train(tmp_path / "run", "dit", recipe=recipe, data={"random_start": False})
    assert [path.stat().st_mtime_ns for path in sorted(cache.iterdir())] == before
    plain, cached = ([r["loss"] for r in read_log(x / "log.jsonl")] for x in (plain, cached))
    assert cached == pytest.approx(plain, abs=1e-5)
    # The same command finds everything made, and another one that it is of something else.
    assert run(capsys, "latents", manifest_of(room), room.vae, cache, "--dtype", "float32")[0] == 0
    code, _, error = run(capsys, "latents", manifest_of(room), room.vae, cache)
    assert code == 2
    assert f"latent cache {cache} was made with another dtype: it has float32" in error


def test_a_config_says_how_clips_are_cut(room, tmp_path, capsys):
    native = {"native": {"num_frames": [1, 5], "multiple": 8}, "random_start": False}
    config = room.write(tmp_path / "run", "dit", data=native)
    arguments = (manifest_of(room), room.vae, tmp_path / "cache", "--config", config)
    code, said, _ = run(capsys, "latents", *arguments)
    assert code == 0
    assert "latents of 12 clips" in said
    fingerprint = json.loads((tmp_path / "cache" / "index.json").read_text())["fingerprint"]
    assert "native sizes" in fingerprint["transform"]
    room.train(
        tmp_path / "run", "dit", data=native, recipe={"latent_cache": str(tmp_path / "cache")}
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dtype", "int8"), "--dtype int8: expected float16 or float32"),
        (("data.fps=4",), "data.fps=4: overrides are of a --config; give that too"),
        (("--frames", "4"), "frames=4 does not fit the VAE"),
        (("--frames", "-1"), "num_frames: Input should be greater than 0, got -1"),
        (("--size", "15"), "height"),
        (("--frames", "97"), "12 of 12 rows are too short; add longer videos, or ask for fewer"),
    ],
)
def test_mistakes_with_latents_are_one_line(room, tmp_path, capsys, arguments, message):
    code, _, error = run(
        capsys, "latents", manifest_of(room), room.vae, tmp_path / "cache", *arguments
    )
    lines = [line for line in error.splitlines() if line.startswith("zoetrope: error")]
    assert code == 2
    assert len(lines) == 1
    assert message in lines[0]


def test_a_run_that_cuts_at_random_has_no_cache(room, tmp_path, capsys):
    config = room.write(tmp_path / "run", "dit")
    arguments = (manifest_of(room), room.vae, tmp_path / "cache", "--config", config)
    code, _, error = run(capsys, "latents", *arguments)
    assert code == 2
    assert "set data.random_start=false" in error


def pictures(page):
    text = page.read_text()
    found = re.findall(r"base64,([^\"]+)", text)
    return text, [Image.open(io.BytesIO(base64.b64decode(picture))) for picture in found]


def test_show_has_the_batches_of_a_run(room, tmp_path, capsys):
    config = room.write(tmp_path / "run", "dit", data={"num_frames": 1})
    page = tmp_path / "page.html"
    code, said, _ = run(capsys, "show", config, page, "--batches", "2", "--clips", "3")
    assert (code, said) == (0, f"6 clips of 2 steps, {page}\n")
    text, found = pictures(page)
    assert len(found) == 6
    assert {(getattr(picture, "n_frames", 1), picture.size) for picture in found} == {(1, (96, 96))}
    assert "3 of its 4 clips" in text
    assert "line" in text


def test_show_of_a_manifest_keeps_odd_captions_apart_from_markup(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in ("a b.png", "ü\n2.png"):
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)).save(tmp_path / name)
    rows = [
        {"path": "a b.png", "caption": "<script>alert(1)</script>\nline two"},
        {"path": "ü\n2.png", "caption": "& <b>"},
    ]
    write_manifest(tmp_path / "m.jsonl", rows)
    page = tmp_path / "page.html"
    options = ("--frames", "1", "--size", "20x30", "--batches", "1", "--clips", "2")
    code, _, _ = run(capsys, "show", tmp_path / "m.jsonl", page, *options)
    assert code == 0
    text, found = pictures(page)
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\nline two" in text
    assert {picture.size for picture in found} == {(150, 100)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("page.html", "--batches", "0"), "--batches 0 and --clips 8 must be at least 1"),
        (("page.txt",), "expected a file that ends in .html"),
        (("nowhere/page.html",), "nowhere"),
        (("page.html", "--frames", "0"), "must be positive"),
        (("page.html", "--fps", "0"), "must be positive"),
        (("page.html", "--size", "x"), "--size x: expected pixels"),
        (("page.html", "data.fps=3"), "overrides are of a config"),
    ],
)
def test_mistakes_with_show_are_one_line(room, tmp_path, capsys, arguments, message):
    code, _, error = run(capsys, "show", manifest_of(room), tmp_path / arguments[0], *arguments[1:])
    (line,) = [line for line in error.splitlines() if line.startswith("zoetrope: error")]
    assert code == 2
    assert message in line


def test_check_of_a_run_says_its_sizes_and_epochs(room, tmp_path, capsys):
    native = {"native": {"num_frames": [1, 5], "multiple": 8}}
    config = room.write(tmp_path / "run", "dit", data=native)
    code, said, _ = run(capsys, "check", config, "--workers", "1")
    assert code == 0
    assert "12 of 12 clips kept, 0 dropped" in said
    assert "bucket 5x16x16" in said
    assert "an epoch of 12 rows is 3.0 steps of 4.0 clips; train.steps=12 are 4.00 epochs" in said
    code, said, _ = run(capsys, "check", config, "recipe.text.context_length=5", "--workers", "1")
    assert "captions longer than the text encoder's 5 tokens: 12 of the kept ones" in said
    code, _, error = run(capsys, "check", config, "--frames", "5")
    assert code == 2
    assert "--frames: " in error
