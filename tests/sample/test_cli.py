"""`zoetrope sample` through its real entry point."""

import subprocess
import sys
from pathlib import Path

import av
import pytest
from PIL import Image

ZOETROPE = str(Path(sys.executable).with_name("zoetrope"))


def zoetrope(*arguments, cwd):
    command = [ZOETROPE, "sample", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def frames_of(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_one_prompt(folder, tmp_path):
    done = zoetrope(
        folder, "a red circle moving left", "-o", "new/out.mp4", "--steps", 2, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    frames = frames_of(tmp_path / "new" / "out.mp4")
    assert len(frames) == 5
    assert frames[0].shape == (16, 16, 3)
    assert "new/out.mp4" in done.stdout
    assert "sampling" in done.stderr  # the progress bar


def test_a_file_of_prompts_with_every_option(folder, tmp_path):
    (tmp_path / "prompts.txt").write_text(
        "# a comment\na red circle\n\na blue square\n", encoding="utf-8-sig"
    )
    options = (
        "--prompts prompts.txt -o out.mp4 --num 2 --frames 9 --size 16x24 --steps 2 --guidance 3 "
        "--sampler heun --shift 1 --seed 4 --negative blurry --batch-size 3 --gif --sheet sheet.png "
        "--device cpu"
    )
    done = zoetrope(folder, *options.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for i in range(4):
        frames = frames_of(tmp_path / f"out-{i:03d}.mp4")
        assert len(frames) == 9
        assert frames[0].shape == (16, 24, 3)
        assert Image.open(tmp_path / f"out-{i:03d}.gif").n_frames > 1
    assert Image.open(tmp_path / "sheet.png").width > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--frames", "16"], "frames=16 does not fit the VAE: it needs 4*k+1; use 17 or 13"),
        (["x", "--size", "big"], "--size big: expected pixels"),
        (["x", "--sampler", "ddim"], "use euler or heun"),
        (["x", "--frames", "0"], "frames=0 does not fit the VAE"),
        (["x", "--shift", "0"], "shift=0.0; use a number above 0"),
        (["x", "--device", "gpu"], "device=gpu cannot be used"),
        (["x", "--num", "0"], "--num 0: use 1 or more"),
        (["x", "--batch-size", "0"], "--batch-size 0: use 1 or more"),
        (["x", "-o", "out.avi"], "videos are written as .mp4"),
        (["x", "--sheet", "a.jpg"], "expected a .png"),
        (["x", "--prompts", "p.txt"], "one of the two"),
        ([], "one of the two"),
        (["--prompts", "none.txt"], "none.txt: no such file"),
        (["--prompts", "empty.txt"], "no prompt in it"),
    ],
)
def test_mistakes_are_one_line(folder, tmp_path, arguments, message):
    (tmp_path / "empty.txt").write_text("\n# nothing\n")
    done = zoetrope(folder, *arguments, "--steps", 1, cwd=tmp_path)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("zoetrope: error:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["empty.txt"]


def test_no_model_folder(tmp_path):
    done = zoetrope("nowhere", "x", cwd=tmp_path)
    assert done.returncode == 2
    assert "nowhere: no such folder; expected a model folder" in done.stderr
