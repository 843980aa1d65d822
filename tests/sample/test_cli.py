"""`zoetrope sample` and `zoetrope export` through their real entry point."""

import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from sample.media import read_image
from train.cli import main


@pytest.fixture
def zoetrope(tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder; gives its status, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        return stopped.value.code, *capsys.readouterr()

    return run


def frames_of(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_one_prompt_in_a_process_of_its_own(folder, tmp_path):
    command = [str(Path(sys.executable).with_name("zoetrope")), "sample", str(folder)]
    done = subprocess.run(
        [*command, "a red circle moving left", "-o", "new/out.mp4", "--steps", "2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    frames = frames_of(tmp_path / "new" / "out.mp4")
    assert len(frames) == 5
    assert frames[0].shape == (16, 16, 3)
    assert done.stdout == "new/out.mp4\n"
    assert "sampling" in done.stderr  # the progress bar


def test_a_file_of_prompts_with_every_option(zoetrope, folder, tmp_path):
    (tmp_path / "prompts.txt").write_text(
        "# a comment\na red circle\n\na blue square\n", encoding="utf-8-sig"
    )
    options = (
        "--prompts prompts.txt -o out.mp4 --num 2 --frames 9 --size 16x24 --steps 2 --guidance 3 "
        "--sampler heun --shift 1 --seed 4 --negative blurry --batch-size 3 --gif --sheet sheet.png "
        "--device cpu --guidance-kind apg --guidance-rescale 0.5 --guidance-interval 0.1 0.9 "
        "--sequential --grid shifted --reuse 0"
    )
    code, _, errors = zoetrope("sample", folder, *options.split())
    assert code == 0, errors
    for i in range(4):
        frames = frames_of(tmp_path / f"out-{i:03d}.mp4")
        assert len(frames) == 9
        assert frames[0].shape == (16, 24, 3)
        assert Image.open(tmp_path / f"out-{i:03d}.gif").n_frames > 1
    assert Image.open(tmp_path / "sheet.png").width > 100


@pytest.fixture
def latents(monkeypatch):
    """What the VAE was given, call by call: what flags change, before 8 bits and a codec hide it."""
    from dit.vae import VideoVAE

    seen, decode = [], VideoVAE.decode
    monkeypatch.setattr(
        VideoVAE, "decode", lambda self, x, *more: (seen.append(x), decode(self, x, *more))[1]
    )
    return seen


@pytest.mark.parametrize(
    "flags",
    [
        "--guidance-kind apg",
        "--guidance-kind cfg_zero",
        "--guidance-rescale 0.7",
        "--guidance-interval 0.7 1",
        "--guidance 4",
        "--sampler unipc",
        "--sampler dpmpp_2m",
        "--sampler midpoint",
        "--grid uniform",
        "--grid karras",
        "--grid wan --shift 5",
        "--shift 1",
        "--reuse 0.9",
        "--steps 5",
    ],
)
def test_every_flag_changes_the_sample(zoetrope, latents, folder, flags):
    for extra in ([], flags.split()):
        code, _, errors = zoetrope("sample", folder, "a circle", "--steps", 4, *extra)
        assert code == 0, errors
    assert (latents[0] - latents[1]).abs().max() > 1e-2


def test_float32_is_another_precision(zoetrope, latents, folder):
    for extra in ([], ["--dtype", "float32"]):
        assert zoetrope("sample", folder, "a circle", "--steps", 3, *extra)[0] == 0
    difference = (latents[0] - latents[1]).abs().max()
    assert 1e-5 < difference < 0.1


def test_sequential_guidance_is_the_same_sample(zoetrope, latents, folder):
    for extra in ([], ["--sequential"]):
        assert zoetrope("sample", folder, "a circle", "--steps", 3, *extra)[0] == 0
    torch.testing.assert_close(latents[0], latents[1], atol=3e-2, rtol=0)  # bfloat16 sums differ


def test_reuse_reports_what_it_saved(zoetrope, folder):
    code, _, errors = zoetrope("sample", folder, "x", "--steps", 4, "--reuse", 5)
    assert code == 0
    # 4 steps of 2 texts; the first step of each has nothing to reuse.
    assert "reuse: 6 of 8 evaluations skipped" in errors


def test_a_first_frame(zoetrope, latents, image_folder, tmp_path):
    picture = np.zeros((40, 80, 3), np.uint8)
    picture[:, 10:70, 0] = 255  # red in the middle, which is what stays of it
    Image.fromarray(picture).save(tmp_path / "first.png")
    arguments = ["sample", image_folder, "a circle", "--steps", 3]
    code, _, errors = zoetrope(*arguments, "--image", "first.png")
    assert code == 0, errors
    assert zoetrope(*arguments)[0] == 0
    assert (latents[0] - latents[1])[:, :, 1:].abs().max() > 1e-2
    from sample.model import load_model

    red = torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1, 1).expand(1, 3, 1, 16, 16)
    with torch.no_grad():
        expected = load_model(image_folder).vae.encode(red).mean
    torch.testing.assert_close(latents[0][:, :, :1], expected, atol=1e-5, rtol=0)


def test_a_scale_for_the_low_noise_expert(zoetrope, latents, experts_folder):
    for scale in (2, 4):
        code, _, errors = zoetrope(
            "sample", experts_folder, "x", "--steps", 3, "--guidance-low", scale
        )
        assert code == 0, errors
    assert (latents[0] - latents[1]).abs().max() > 1e-2


def test_compiled_blocks_give_the_same_sample(zoetrope, latents, folder, monkeypatch):
    compiled, compile_module = [], torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: (compiled.append(self), compile_module(self))[1]
    )
    for extra in ([], ["--compile"]):
        code, _, errors = zoetrope("sample", folder, "x", "--steps", 2, *extra)
        assert code == 0, errors
    assert len(compiled) == 2  # blocks
    assert latents[0].abs().max() > 3
    torch.testing.assert_close(latents[0], latents[1], atol=0.15, rtol=0)  # bfloat16 sums differ


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--frames", "16"], "frames=16 does not fit the VAE: it needs 4*k+1; use 17 or 13"),
        (["x", "--size", "big"], "--size big: expected pixels"),
        (["x", "--sampler", "ddim"], "does not suit this model's objective; use euler, heun"),
        (["x", "--sampler", "best"], "unknown sampler best; use euler"),
        (["x", "--frames", "0"], "frames=0 does not fit the VAE"),
        (["x", "--shift", "0"], "shift=0.0; use a number above 0"),
        (["x", "--shift", "1e-300"], "shift=1e-300; use 0.001 to 1000, 1 for none"),
        (
            ["x", "--grid", "fine"],
            "--grid fine: use uniform, shifted, karras, wan, flow_match_euler",
        ),
        (["x", "--dtype", "int8"], "--dtype int8: use bfloat16 or float32"),
        (["x", "--grid", "uniform", "--shift", "2"], "the uniform grid has no shift"),
        (["x", "--guidance", "-1"], "guidance: scale=-1.0; expected greater than or equal to 0"),
        (
            ["x", "--guidance-kind", "odd"],
            "guidance: kind=odd; expected 'cfg', 'cfg_zero' or 'apg'",
        ),
        (["x", "--guidance-rescale", "2"], "guidance: rescale=2.0; expected"),
        (["x", "--guidance-interval", "1", "0"], "guidance: interval=1 to 0"),
        (["x", "--guidance-low", "2"], "guidance_low=2: this model has no low-noise expert"),
        (["x", "--reuse", "-1"], "reuse threshold=-1.0; use a finite number, 0 or more"),
        (
            ["x", "--guidance-kind", "cfg_zero"],
            "--steps 1: cfg_zero keeps the noise for the first 1; use 2 or more, or another",
        ),
        *(
            (
                ["x", "--guidance", "1", *flags],
                f"guidance 1 is no guidance; leave out {flags[0]} or raise --guidance",
            )
            for flags in (
                ["--negative", "blurry"],
                ["--guidance-kind", "apg"],
                ["--guidance-rescale", "0.5"],
                ["--guidance-interval", "0", "0.5"],
                ["--sequential"],
            )
        ),
        (["x", "--image", "none.png"], "--image none.png: no such file"),
        (["x", "--image", "empty.txt"], "--image empty.txt: not a picture that can be read"),
        (
            ["x", "--image", "grey.png"],
            "a given first frame needs a model that was trained for it (recipe.tasks: one of first, ",
        ),
        (["x", "--device", "gpu"], "device=gpu cannot be used"),
        (["x", "--num", "0"], "--num 0: use 1 or more"),
        (["x", "--batch-size", "0"], "--batch-size 0: use 1 or more"),
        (["x", "-o", "out.avi"], "videos are written as .mp4"),
        (["x", "-o", ""], "-o: no file name given; expected a .mp4, such as out.mp4"),
        (["x", "-o", "grey.png/out.mp4"], "-o grey.png/out.mp4: grey.png is not a folder"),
        (
            ["x", "--sheet", "grey.png/new/s.png"],
            "--sheet grey.png/new/s.png: grey.png is not a fo",
        ),
        (["x", "--sheet", "a.jpg"], "expected a .png"),
        (["x", "--prompts", "p.txt"], "one of the two"),
        ([], "one of the two"),
        (["--prompts", "none.txt"], "none.txt: no such file"),
        (["--prompts", "empty.txt"], "no prompt in it"),
    ],
)
def test_mistakes_are_one_line(zoetrope, folder, tmp_path, arguments, message):
    (tmp_path / "empty.txt").write_text("\n# nothing\n")
    Image.new("L", (16, 16)).save(tmp_path / "grey.png")
    code, _, errors = zoetrope("sample", folder, *arguments, "--steps", 1)
    assert code == 2
    lines = [line for line in errors.splitlines() if line.startswith("zoetrope: error:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in errors
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.txt", "grey.png"]


@pytest.mark.parametrize(
    ("taken", "flags", "message"),
    [
        ("out.mp4", [], "-o out.mp4: is a folder; give a file name"),
        ("out-001.mp4", ["--num", "2"], "-o out-001.mp4: is a folder"),
        ("out.gif", ["--gif"], "--gif out.gif: is a folder"),
        ("out-001.gif", ["--gif", "--num", "2"], "--gif out-001.gif: is a folder"),
        ("s.png", ["--sheet", "s.png"], "--sheet s.png: is a folder"),
    ],
)
def test_files_that_are_folders(zoetrope, tmp_path, taken, flags, message):
    """Before the model, which does not even exist, is read."""
    (tmp_path / taken).mkdir()
    code, _, errors = zoetrope("sample", "nowhere", "x", *flags)
    assert code == 2
    assert f"zoetrope: error: {message}" in errors


@pytest.mark.parametrize("flag", ["-o new/x.mp4", "--sheet new/x.png"])
def test_a_folder_that_may_not_be_written_to(zoetrope, monkeypatch, flag):
    monkeypatch.setattr("os.access", lambda *_: False)
    code, _, errors = zoetrope("sample", "nowhere", "x", *flag.split())
    assert code == 2
    assert ". is a folder that you may not write to; give another place" in errors


def test_folders_are_made(zoetrope, folder, tmp_path):
    flags = ["-o", "a/b/x.mp4", "--sheet", "c/d/s.png", "--guidance", "1", "--steps", "1"]
    assert zoetrope("sample", folder, "x", *flags)[0] == 0
    assert (tmp_path / "a/b/x.mp4").is_file()
    assert (tmp_path / "c/d/s.png").is_file()


def test_guidance_of_one_expert_alone(zoetrope, experts_folder):
    """What guidance flags say holds for the other one."""
    flags = ["--guidance", "1", "--negative", "blurry", "--steps", "1"]
    assert zoetrope("sample", experts_folder, "x", *flags, "--guidance-low", "2")[0] == 0
    code, _, errors = zoetrope("sample", experts_folder, "x", *flags, "--guidance-low", "1")
    assert code == 2
    assert "guidance 1 is no guidance" in errors


GREY = np.arange(256).reshape(16, 16)
ROTATED = Image.Exif()
ROTATED[0x112] = 6  # orientation: to be turned by 90 degrees


@pytest.mark.parametrize(
    ("name", "values", "expected", "options"),
    [
        ("a.png", GREY.astype(np.uint8), GREY, {}),
        ("a.png", (GREY * 257).astype(np.uint16), GREY, {}),
        ("a.tif", (GREY * 257).astype(np.uint16), GREY, {}),
        ("a.tif", (GREY * 257).astype(">u2"), GREY, {}),
        ("a.pgm", (GREY * 257).astype(np.uint16), GREY, {}),
        ("a.png", (GREY * 257).astype(np.uint16), np.rot90(GREY, -1), {"exif": ROTATED}),
        ("a.png", GREY.astype(np.uint8), np.where(GREY == 9, 255, GREY), {"transparency": 9}),
        ("a.png", np.full((16, 16, 4), [60, 60, 60, 0], np.uint8), 255 + 0 * GREY, {}),
        ("a.png", np.full((16, 16, 4), [60, 60, 60, 51], np.uint8), 216 + 0 * GREY, {}),
    ],
)
def test_pictures_of_every_kind(tmp_path, name, values, expected, options):
    Image.fromarray(values).save(tmp_path / name, **options)
    picture = (read_image(tmp_path / name, 16, 16) + 1) * 127.5
    for channel in picture:
        np.testing.assert_allclose(channel.numpy(), expected, atol=1e-3)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pictures_of_32_bits_are_refused(tmp_path, dtype):
    Image.fromarray(GREY.astype(dtype)).save(tmp_path / "a.tif")
    with pytest.raises(
        ValueError, match=r"a\.tif: not a picture .* 32 bits a value; expected 8 or 16"
    ):
        read_image(tmp_path / "a.tif", 16, 16)


def test_a_picture_that_is_too_large(tmp_path, monkeypatch):
    Image.new("L", (16, 16)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"--image .*a\.png: too large; make it smaller"):
        read_image(tmp_path / "a.png", 16, 16)


def test_no_model_folder(zoetrope):
    code, _, errors = zoetrope("sample", "nowhere", "x")
    assert code == 2
    assert "nowhere: no such folder; expected a model folder" in errors


def test_exporting_a_model_of_our_own(zoetrope, folder, tmp_path):
    """Its DiT is a Wan transformer; its VAE and text encoder are nothing that diffusers has."""
    arguments = ["export", folder, "out", "--format", "diffusers"]
    code, _, errors = zoetrope(*arguments)
    assert code == 2
    assert (
        f"{folder}: its VAE is zoetrope's own and its text encoder is open_clip's, which WanPipeline "
        "cannot hold; --transformer-only exports"
    ) in errors
    assert not (tmp_path / "out").exists()
    assert zoetrope(*arguments, "--transformer-only")[0] == 0

    from diffusers import UniPCMultistepScheduler, WanTransformer3DModel

    from sample.model import load_model

    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "out", subfolder="transformer")
    ours = load_model(folder).dit
    x, t, text = torch.randn(1, 4, 2, 4, 4), torch.tensor([0.3]), torch.randn(1, 5, 16)
    with torch.no_grad():
        expected = theirs(x, 1000 * t, text, return_dict=False)[0]
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(ours(x, t, text), expected, atol=1e-5, rtol=0)
    scheduler = UniPCMultistepScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
    assert scheduler.config.flow_shift == 3.0
    assert scheduler.config.use_flow_sigmas


def test_what_cannot_be_exported(zoetrope, ddpm_folder, tmp_path):
    arguments = ["out", "--format", "diffusers", "--transformer-only"]
    code, _, errors = zoetrope("export", ddpm_folder, *arguments)
    assert code == 2
    assert "cannot be exported to diffusers: its network predicts v (objective ddpm)" in errors
    assert "'onnx' is not" in zoetrope("export", ddpm_folder, "out", "--format", "onnx")[2]
    assert list(tmp_path.iterdir()) == []
