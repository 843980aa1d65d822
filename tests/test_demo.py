"""`make demo DEMO=tiny`: every step of the demo, for real, and its second run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def demo(cwd):
    command = [sys.executable, "-m", "train.demo", "tiny"]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900)


def test_tiny_demo(tmp_path):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    done = demo(tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    out = tmp_path / "runs" / "demo-tiny"
    assert "[6/6]" in done.stdout
    assert str(out / "report.html") in done.stdout
    page = (out / "report.html").read_text()
    assert page.count("<video") == 16
    assert "all four together" in page
    assert (out / "contact-sheet.png").read_bytes()[:4] == b"\x89PNG"
    for split in ("held-out", "combinations"):
        scores = json.loads((out / f"scores-{split}.json").read_text())["scores"]
        assert scores["generated"]["joint"]["num"] == 8
        assert scores["real"]["joint"]["value"] == 1
    trained = (out / "world" / "train" / "manifest.jsonl").read_text()
    for prompt in (out / "prompts.txt").read_text().splitlines():
        assert f'"{prompt}"' not in trained

    weights = (out / "model" / "dit.safetensors").read_bytes()
    again = demo(tmp_path)
    assert again.returncode == 0
    assert again.stdout.count("steps are done already") == 2
    assert again.stdout.count("this model is scored already") == 2
    assert (out / "model" / "dit.safetensors").read_bytes() == weights


def test_an_unknown_demo_is_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "train.demo", "huge"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "DEMO=huge is unknown; use world or tiny" in done.stderr
