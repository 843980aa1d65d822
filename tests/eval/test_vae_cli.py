import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from data.manifest import write_manifest
from data.video import write_video
from data.world_files import WorldSpec, write_world
from eval.tables import score_table
from eval.vae_options import short_names
from sample.model import Model, save_model
from train.cli import main

SIZE = {"height": 32, "width": 32, "num_frames": 9, "fps": 8.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model, lossy_model, other_model):
    """Folders of three VAEs, a manifest of world clips and one of a few made ones."""
    root = tmp_path_factory.mktemp("vaes")
    vaes = {
        "exact": Model(tiny_model.vae, tiny_model.info),
        "lossy": lossy_model,
        "other": other_model,
    }
    for name, model in vaes.items():
        save_model(root / name / "model", model)
    write_world(root / "world", WorldSpec(6, 1, "train", level=1, **SIZE), workers=0)
    rng = np.random.default_rng(0)
    for k in range(4):
        still = np.repeat(rng.integers(0, 255, (1, 60, 72, 3), np.uint8), 25, axis=0)
        write_video(root / f"{k}.mp4", still, 25.0)
    (root / "bad.mp4").write_bytes(b"no video")
    rows = [{"path": f"{k}.mp4", "caption": "noise"} for k in (0, "bad", 1, 2, 3)]
    write_manifest(root / "noise.jsonl", rows)
    return root


@pytest.fixture(scope="module")
def lpips_files(tmp_path_factory):
    """A classifier and weights per channel of timm's smallest network."""
    root = tmp_path_factory.mktemp("lpips")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", pretrained=False).state_dict(), root / "net.pth")
    channels = (32, 32, 48, 192, 96)
    linear = {f"lin{k}.model.1.weight": torch.rand(1, c, 1, 1) for k, c in enumerate(channels)}
    torch.save(linear, root / "lin.pth")
    weights = ("--lpips-weights", root / "net.pth", "--lpips-linear", root / "lin.pth")
    return [*map(str, weights), "--lpips-backbone", "test_resnet"]


def run(capfd, *arguments):
    """Exit code, table and messages of the command as typed."""
    with pytest.raises(SystemExit) as end:
        main(["eval", *map(str, arguments), "--suite", "vae", "--device", "cpu"])
    out, err = capfd.readouterr()
    return end.value.code, out, err


def test_one_vae_on_the_world(place, tmp_path, capfd):
    output = tmp_path / "vae.json"
    code, out, err = run(capfd, place / "exact/model", "--num", 6, "-o", output)
    assert code == 0, err
    results = json.loads(output.read_text())
    assert results["scores"]["vae"]["psnr"]["num"] == 6
    assert results["scores"]["vae"]["psnr"]["value"] > 50
    assert (results["level"], results["split"], results["seed"]) == (1, "held-out", 0)
    assert list(results["vaes"].values()) == [str(place / "exact/model")]
    (size,) = results["sizes"]
    assert {name: size[name] for name in SIZE} == SIZE
    assert size["differences"] == {}
    rows = {line.split("  ")[0] for line in out.splitlines()}
    assert {"PSNR, dB", "SSIM", "temporal PSNR, dB", "PSNR, dB, still", "SSIM, fast"} <= rows
    assert "LPIPS left out: give --lpips-weights" in out
    assert "reconstruction FVD left out: give --fvd-extractor" in out
    for word in ("posterior's mean", "float32", "uint8", "averaged over clips", "bootstrap"):
        assert word in out
        assert word in " ".join(results["protocol"])
    groups = [scores["model"]["psnr"]["num"] for scores in size["motion"]["scores"].values()]
    assert groups == [2, 2, 2]
    assert "levels of 255" in out
    # A report shows it as it shows the other suites.
    shown = [row[0] for row in score_table(results).rows]
    assert shown == ["PSNR, dB", "SSIM", "temporal PSNR, dB"]


def test_everything_at_once(place, tmp_path, capfd, caplog, lpips_files, extractor_file):
    output = tmp_path / "all.json"
    code, out, err = run(
        capfd,
        *(place / "exact/model", place / "noise.jsonl", "--num", 3, "--batch-size", 2),
        *("--against", place / "lossy/model", "--against", place / "other/model"),
        *("--sizes", "36,48x60", "--sizes", "36x36", "--frames", 5, "--fps", 6),
        *("--tile", 8, "--overlap", 2, "--fvd-extractor", extractor_file, *lpips_files),
        *("-o", output),
    )
    assert code == 0, err
    assert caplog.text.count("bad.mp4") == 1  # not once a size
    results = json.loads(output.read_text())
    names = ["exact/model", "lossy/model", "other/model"]
    assert list(results["vaes"]) == names
    assert results["clips_from"] == str(place / "noise.jsonl")
    assert [(s["height"], s["width"]) for s in results["sizes"]] == [(36, 36), (48, 60)]
    for size in results["sizes"]:
        assert (size["num"], size["num_frames"], size["fps"]) == (3, 5, 6.0)
        figures = {"psnr", "ssim", "lpips", "temporal_psnr", "fvd", "blend_psnr"}
        for name in names:
            assert set(size["scores"][name]) == figures
            assert all(e["num"] == 3 for e in size["scores"][name].values())
        gain = size["differences"]["lossy/model"]["psnr"]
        each = [clip["vaes"] for clip in size["clips"]]
        gains = [c["exact/model"]["psnr"] - c["lossy/model"]["psnr"] for c in each]
        assert gain["value"] == pytest.approx(np.mean(gains))
        assert 0 < gain["low"] <= gain["value"] <= gain["high"]
        assert size["scores"]["lossy/model"]["lpips"]["value"] > 0
    assert "vae suite, 48x60: 3 clips, 5 frames at 6 fps" in out
    assert "tiles with a blend of 2 latents against the whole, dB" in out
    assert "PSNR, dB: exact/model minus this" in out
    assert "LPIPS left out" not in out
    assert "FVD left out" not in out
    assert "FVD at 36x36: 3 clips, 1 in the smallest group by motion, for features of 3 dim" in out
    assert "in [0, 255]" in out


def test_clips_are_the_same_with_and_without_company(place, tmp_path, capfd):
    alone, pair = tmp_path / "alone.json", tmp_path / "pair.json"
    shared = (place / "lossy/model", place / "world/manifest.jsonl", "--num", 4)
    assert run(capfd, *shared, "-o", alone)[0] == 0
    against = ("--against", place / "exact/model", "--batch-size", 3)
    assert run(capfd, *shared, *against, "-o", pair)[0] == 0
    a, b = (json.loads(path.read_text())["scores"]["vae"] for path in (alone, pair))
    assert a == b


def test_images_are_clips_of_one_frame(place, tmp_path, capfd):
    output = tmp_path / "images.json"
    code, out, err = run(
        capfd, place / "exact/model", place / "noise.jsonl", "--frames", 1, "-o", output
    )
    assert code == 0, err
    assert "temporal PSNR, dB  n/a" in out
    assert "by motion" not in out
    results = json.loads(output.read_text())
    assert results["sizes"][0]["motion"] is None
    assert "noise.jsonl has 4 clips that can be read, fewer than --num 200" in out


def test_pixels_for_the_extractor_can_be_from_minus_one_to_one(
    place, tmp_path, capfd, extractor_file
):
    found = []
    for pixels in ("255", "unit"):
        output = tmp_path / f"{pixels}.json"
        options = ("--fvd-extractor", extractor_file, "--fvd-range", pixels, "-o", output)
        assert run(capfd, place / "lossy/model", "--num", 5, *options)[0] == 0
        found.append(json.loads(output.read_text())["scores"]["vae"]["fvd"]["value"])
    assert found[0] == pytest.approx(found[1] * 127.5**2, rel=1e-3)


VAE = "{root}/exact/model"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{root}/gone", "no such folder"),
        (VAE + " {root}/gone.jsonl", "no manifest at"),
        (VAE + " {root}/empty.jsonl", "none of its 0 rows can be used"),
        (VAE + " {root}/wrong.jsonl", "line 1: not JSON"),
        (VAE + " {root}/unreadable.jsonl", "no clip to measure can be read"),
        (VAE + " {root}/0.mp4", "expected one of .jsonl"),
        (VAE + " {root}/noise.jsonl --frames 25", "no clip to measure can be read; "),
        (VAE + " --sizes 32 64x48", "several sizes are given as --sizes 32,64x48"),
        (VAE + " --against {root}/lossy/model {root}/other/model", "needs its own --against"),
        (VAE + " --against {root}/exact/model", "given twice"),
        (VAE + " --against {root}/gone", "no such folder"),
        (VAE + " --sizes 33", "height=33 does not fit model; use 34 or 32 (--sizes)"),
        (VAE + " --sizes 32x1", "width=1 does not fit model; use 2 (--sizes)"),
        (VAE + " --sizes 8", "8x8 is smaller than SSIM's window; use at least 11x11"),
        (VAE + " --sizes big", "--sizes big: expected pixels"),
        (VAE + " --sizes ,", "--sizes is empty"),
        (VAE + " --frames 8", "frames=8 does not fit model; use 9 or 5 (--frames)"),
        (VAE + " --frames 0", "frames=0; use at least 1"),
        (VAE + " --fps 0", "fps=0.0; use frames per second above 0"),
        (VAE + " --fps nan", "fps=nan; use frames per second above 0"),
        (VAE + " --num 0", "num=0; use at least 1"),
        (VAE + " --batch-size 0", "batch_size=0; use at least 1"),
        (VAE + " --tile 0", "tile=0; use at least 1"),
        (VAE + " --overlap 2", "--overlap 2 is of tiles; give --tile too"),
        (VAE + " --tile 8 --overlap 5", "--overlap 5 of tiles of 8; use 0 to 4"),
        (VAE + " --tile 8 --overlap=-1", "--overlap -1 of tiles of 8; use 0 to 4"),
        (VAE + " --tile 100", "--tile 100: clips of 32x32 have at most 16 latents a side"),
        (VAE + " --against {root}/exact/../exact/model", "given twice"),
        (VAE + " --lpips-backbone vgg11", "--lpips-backbone is of LPIPS; give --lpips-weights"),
        (VAE + " --fvd-range unit", "--fvd-range is of FVD's extractor; give --fvd-extractor"),
        (VAE + " {root}/noise.jsonl --level 2", "--level is of the world's clips"),
        (VAE + " --lpips-weights x", "--lpips-weights is given without --lpips-linear"),
        (VAE + " --lpips-linear x", "--lpips-linear is given without --lpips-weights"),
        (VAE + " --lpips-weights {root}/gone --lpips-linear {root}/gone", "gone: no such file"),
        (VAE + " --fvd-extractor {root}/gone", "--fvd-extractor {root}/gone: no such file"),
        (VAE + " --fvd-extractor {root}/noise.jsonl", "not a TorchScript module"),
        (VAE + " --steps 3", "--steps goes with --suite world"),
        (VAE + " --avoid x", "--avoid goes with --suite world"),
        (VAE + " -o {root}/gone/x.json", "no such folder to write x.json to"),
        (VAE + " -o {root}", "is a folder"),
        (
            VAE + " --against {root}/other/model",
            "height=32 does not fit other/model; use 36 or 30, which fit all 2 VAEs (--sizes)",
        ),
        (
            "{root}/other/model --against {root}/exact/model --sizes 36 --frames 7",
            "frames=7 does not fit exact/model; use 9 or 5, which fit all 2 VAEs (--frames)",
        ),
    ],
)
def test_mistakes_are_one_line(place, capfd, arguments, message):
    (place / "empty.jsonl").touch()
    (place / "wrong.jsonl").write_text("{\n")
    (place / "unreadable.jsonl").write_text('{"path": "bad.mp4", "caption": "x"}\n')
    given = arguments.format(root=place).split()
    code, out, err = run(capfd, *given)
    assert code == 2
    assert out == ""
    errors = [line for line in err.splitlines() if line.startswith("zoetrope: error: ")]
    assert len(errors) == 1, err
    assert message.format(root=place) in errors[0]
    assert "Traceback" not in err


def test_a_vae_that_gives_nan_is_one_line(place, tmp_path, capfd, tiny_model):
    vae = copy.deepcopy(tiny_model.vae)
    with torch.no_grad():
        vae.decoder.stem.weight[0] = math.nan
    save_model(tmp_path / "diverged", Model(vae, tiny_model.info))
    code, _, err = run(capfd, place / "exact/model", "--num", 2, "--against", tmp_path / "diverged")
    assert code == 2
    assert "zoetrope: error: diverged gives NaN or infinite pixels for clip 1;" in err


def test_frames_too_small_for_lpips_are_refused_before_the_work(place, capfd, lpips_files):
    code, out, err = run(capfd, place / "exact/model", "--sizes", 24, *lpips_files)
    assert (code, out) == (2, "")
    assert "24x24 is too small for LPIPS with test_resnet; use at least 32x32 (--sizes)" in err


def test_names_are_as_short_as_they_can_be():
    paths = [Path("runs/a/model"), Path("runs/b/model")]
    assert short_names(paths) == ["a/model", "b/model"]
    assert short_names([Path("runs/a"), Path("runs/b/model")]) == ["a", "model"]
    assert short_names([Path("model")]) == ["model"]
