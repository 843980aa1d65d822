"""`make demo DEMO=tiny`: every step of the demo, for real, and its second run."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from train import demo as demo_module
from train import gallery
from train.config_file import load_config
from train.demo_abilities import examples

ROOT = Path(__file__).parents[2]


def demo(cwd):
    command = [sys.executable, "-m", "train.demo", "tiny"]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900)


def test_tiny_demo(nursery, tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    done = demo(tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    out = tmp_path / "runs" / "demo-tiny"
    assert "[10/10]" in done.stdout
    assert str(out / "report.html") in done.stdout
    every = examples(out / "model")
    assert any("--reference" in example.flags for example in every)
    made = [out / "abilities" / example.name for example in every]
    assert all(path.stat().st_size for path in made)
    given = [name for example in every for name in example.inputs]
    videos = sum(name.endswith(".mp4") for name in [*given, *(path.name for path in made)])
    page = (out / "report.html").read_text()
    assert page.count("<video") == 16 + videos
    assert page.count('<img class="still"') == len(given) + len(made) - videos
    assert "all four together" in page
    assert (out / "contact-sheet.png").read_bytes()[:4] == b"\x89PNG"
    for split in ("held-out", "combinations"):
        scores = json.loads((out / f"scores-{split}.json").read_text())["scores"]
        assert scores["generated"]["joint"]["num"] == 8
        assert scores["real"]["joint"]["value"] == 1
    scores = json.loads((out / "scores-identity.json").read_text())["scores"]
    assert scores["real"]["one subject: identity"]["value"] == 1
    assert "the right one of 100" in page
    sampling = json.loads((out / "scores-physics.json").read_text())["sampling"]
    assert (sampling["guidance"], sampling["temperature"]) == (1, 0.7)
    assert (out / "model").resolve() == out / "tiny-long" / "model"
    manifests = [
        out / "world" / name for name in ("train/manifest.jsonl", "mixed.jsonl", "tiny-long.jsonl")
    ]
    trained = "".join(path.read_text() for path in manifests)
    for prompt in (out / "prompts.txt").read_text().splitlines():
        assert f'"{prompt}"' not in trained

    weights = (out / "model" / "dit.safetensors").read_bytes()

    def run(*command):
        """As the demo's, but for the time that imports take."""
        is_torchrun = command[0] == "torchrun"
        program = Path(sys.executable).with_name(command[0])
        start = command[command.index("-m") :] if is_torchrun else (program, *command[1:])
        code, output = nursery.run(*start, processes=int(is_torchrun), cwd=tmp_path)
        assert code == 0, output
        print(output)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_module, "run", run)
    demo_module.main("tiny")
    again = capsys.readouterr().out
    assert again.count("steps are done already") == 6
    assert again.count("there already") == len(made)
    assert again.count("this model is scored already") == 2 + len(demo_module.SIZES["tiny"].parts)
    assert (out / "model" / "dit.safetensors").read_bytes() == weights

    gallery.main("tiny", str(tmp_path / "page" / "gallery.md"))
    page = (tmp_path / "page" / "gallery.md").read_text()
    assert page.count("\n|") == len(made) + 2
    shown = re.findall(r"\]\((gallery/[^)]+)\)", page)
    assert len(shown) == len(made) + len(given)
    for name in shown:
        assert Image.open(tmp_path / "page" / name).size == (128, 128)


@pytest.mark.parametrize("name", demo_module.SIZES)
def test_each_training_goes_on_from_the_one_before(name):
    size = demo_module.SIZES[name]
    paths = [size.vae, size.decoder, size.dit, size.tasks, *(each.config for each in size.longer)]
    configs = [load_config(ROOT / path) for path in paths]
    assert configs[0].recipe.init is None
    for path, before, config in zip(paths[1:], configs, configs[1:]):
        source = config.recipe.vae if path == size.dit else config.recipe.init
        assert source == before.out / "model", path
        assert str(path) in (ROOT / path).read_text() or name == "tiny", path
    lengths = [config.data.num_frames for config in configs[4:]]
    assert lengths == [stage.frames for stage in size.longer]
    if size.long_decoder is not None:
        decoder = load_config(ROOT / size.long_decoder)
        assert decoder.recipe.init == configs[1].out / "model"
        assert decoder.data.num_frames == max(lengths)
        assert configs[-1].recipe.vae == decoder.out / "model"
        assert decoder.out.name == size.long_decoder.stem
        configs.append(decoder)
    assert all(config.out.parent == size.out for config in configs)
    rendered = {
        f"{stage.config.stem}.jsonl" for stage in size.longer if stage.clips or stage.others
    }
    assert {config.data.manifest.name for config in configs[4:]} <= rendered


def test_an_unknown_demo_is_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "train.demo", "huge"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "DEMO=huge is unknown; use world, long, tiny" in done.stderr


def test_the_gallery_comes_after_the_demo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="model is not there; run make demo DEMO=tiny first"):
        gallery.main("tiny", str(tmp_path / "gallery.md"))
