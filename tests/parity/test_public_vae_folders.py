"""Folders of published VAEs: imported, opened as they are, and refused where they are damaged."""

import json
import shutil
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dit.vae import VAEConfig, VideoVAE
from sample.model import Model, ModelInfo, load_model, read_model_file, save_model
from sample.vae_import import import_vae, open_vae

SIZE = {"fps": 8, "num_frames": 25, "height": 64, "width": 32}  # fits all of them
FAMILIES = {
    "wan": (16, 81, 480, 832),
    "wan-2.2": (24, 121, 704, 1280),
    "hunyuan_video": (24, 129, 720, 1280),
    "cogvideox-1.5": (8, 49, 480, 720),
    "ltx_video-0.9.1": (25, 161, 512, 704),
    "mochi": (30, 19, 480, 848),
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def edit(path, **changes):
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, **changes}))


def outputs(vae):
    """Of a clip and of latents that are the same at every call."""
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(1, 3, 25, 32, 32, generator=generator) * 2 - 1
    posterior = vae.encode(video)
    latents = torch.randn(posterior.mean.shape, generator=generator)
    return posterior.mean, posterior.std, vae.decode(latents)


def assert_same(vae, other):
    """All but for rounding, which depends on where in memory the weights lie."""
    for a, b in zip(outputs(vae), outputs(other)):
        assert a.std() > 1e-3
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def imported(vae_folder, tmp_path_factory):
    made = {}

    def folder(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("imported") / family
            import_vae(vae_folder(family), made[family], SIZE)
        return made[family]

    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_imported_and_opened(vae_folder, imported, family):
    theirs, ours = vae_folder(family), imported(family)
    model = load_model(ours)
    assert model.dit is None
    assert model.info.provenance == {"imported_from": family}
    got, opened = load_file(ours / "vae.safetensors"), open_vae(theirs)
    expected = load_file(theirs / WEIGHTS)
    assert got.keys() == {f"model.{name}" for name in expected}
    assert all(torch.equal(got[f"model.{name}"], value) for name, value in expected.items())
    assert not opened.vae.training
    assert not any(p.requires_grad for p in opened.vae.parameters())
    for other in (opened.vae, open_vae(str(ours)).vae):
        assert_same(model.vae, other)
    info = opened.info
    assert (info.fps, info.num_frames, info.height, info.width) == FAMILIES[family]
    assert not info.image_to_video


def test_saved_as_any_model(imported, tmp_path):
    model = load_model(imported("ltx_video-0.9.1"))
    save_model(tmp_path / "m", model)
    again = load_model(tmp_path / "m", vae_only=True).vae
    assert again.config == model.vae.config
    assert_same(model.vae, again)


def test_half_precision(vae_folder, tmp_path):
    """Kept by the import; opened in float32."""
    folder = tmp_path / "half"
    shutil.copytree(vae_folder("ltx_video"), folder)
    weights = {k: v.bfloat16() for k, v in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS)
    import_vae(folder, tmp_path / "m", SIZE)
    kept, opened = load_model(tmp_path / "m").vae, open_vae(folder).vae
    assert {v.dtype for v in kept.state_dict().values()} == {torch.bfloat16}
    assert {v.dtype for v in opened.state_dict().values()} == {torch.float32}
    whole = load_model(tmp_path / "m", dtype=torch.float32).vae
    assert_same(opened, whole)
    for rough, fine in zip(outputs(kept), outputs(opened)):
        assert (rough.float() - fine).abs().mean() < 0.1 * fine.abs().mean()


def test_a_vae_of_ours_is_opened(tmp_path):
    vae = VideoVAE(VAEConfig(latent_channels=4, widths=(8,), factors=((4, 8),)))
    info = ModelInfo(fps=8, num_frames=9, height=16, width=16)
    save_model(tmp_path / "m", Model(vae, info))
    assert isinstance(open_vae(tmp_path / "m").vae, VideoVAE)


def test_the_vae_of_a_pipeline(wan_folders, vae_folder, tmp_path, zoetrope):
    theirs, ours = wan_folders("t2v")
    code, out, _ = zoetrope("import", theirs, tmp_path / "m", "--vae-only", "--size", "32x64")
    assert (code, out.strip()) == (0, str(tmp_path / "m"))
    file = read_model_file(tmp_path / "m")
    assert (file.vae.kind, file.dit, file.info.height, file.info.width) == ("wan", None, 32, 64)
    for vae in (load_model(tmp_path / "m").vae, open_vae(theirs).vae):
        assert_same(load_model(ours, vae_only=True).vae, vae)
    pipeline = tmp_path / "pipeline"
    shutil.copytree(vae_folder("mochi"), pipeline / "vae")
    (pipeline / "model_index.json").write_text('{"_class_name": "MochiPipeline"}')
    code, _, err = zoetrope("import", pipeline, tmp_path / "mochi")
    assert code == 2
    assert "_class_name is MochiPipeline; expected WanPipeline or" in err.splitlines()[-1]
    assert err.splitlines()[-1].endswith("--vae-only imports its VAE alone")
    code, _, err = zoetrope("import", pipeline, tmp_path / "mochi", "--vae-only")
    assert code == 0
    assert "vae diffusion_pytorch_model" in err  # a bar
    assert load_model(tmp_path / "mochi").vae.temporal_factor == 6
    code, _, err = zoetrope("export", tmp_path / "mochi", tmp_path / "d", "--format", "diffusers")
    assert code == 2
    assert "holds a VAE alone" in err.splitlines()[-1]


def test_unknown_settings_are_left_aside(vae_folder, tmp_path, caplog):
    shutil.copytree(vae_folder("ltx_video"), tmp_path / "copy")
    edit(tmp_path / "copy" / "config.json", flavour="lemon")
    open_vae(tmp_path / "copy")
    assert "flavour=lemon is no setting known here; left aside" in caplog.text


def drop_tensor(f):
    weights = load_file(f / WEIGHTS)
    del weights["encoder.conv_in.conv.weight"]
    save_file(weights, f / WEIGHTS)


def reshape_tensor(f):
    weights = load_file(f / WEIGHTS)
    weights["latents_std"] = torch.ones(7)
    save_file(weights, f / WEIGHTS)


def cut(f):
    (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100])


def settings(**changes):
    return lambda f: edit(f / "config.json", **changes)


DAMAGE = {
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "no such file; the folder is incomplete"),
    "cut short": (cut, "not a whole safetensors file"),
    "no tensor": (drop_tensor, "lacks encoder.conv_in.conv.weight (1 in all)"),
    "wrong shape": (reshape_tensor, "latents_std is (7,), expected (6,)"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
    "no object": (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object"),
    "class": (
        settings(_class_name="AutoencoderKL"),
        "_class_name is AutoencoderKL; expected AutoencoderKLWan or AutoencoderKLHunyuanVideo or",
    ),
    "large": (settings(latent_channels=10**12), "latent_channels: Input should be less than"),
    "deep": (settings(layers_per_block=[10**6] * 5), "layers_per_block.0: Input should be less"),
    "long": (settings(block_out_channels=[8] * 10**5), "block_out_channels: Tuple should have at"),
    "huge": (
        settings(patch_size=2**24, decoder_block_out_channels=[2**24] * 4),
        "no VAE can have these sizes (",
    ),
    "other sizes": (settings(latent_channels=2**24), "does not fit its config.json: "),
    "short": (settings(spatio_temporal_scaling=[]), "no VAE can have these sizes (list index"),
    "words": (settings(patch_size="four"), "patch_size: Input should be a valid integer"),
    "negative": (settings(scaling_factor=-1), "scaling_factor: Input should be greater than 0"),
    "infinite": (settings(scaling_factor=float("inf")), "scaling_factor: Input should be a finite"),
    "other factor": (settings(temporal_compression_ratio=4), "settings contradict each other"),
    "other patches": (
        settings(patch_size=2),
        "decoder.conv_out.conv.bias is (48,), expected (12,)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders(vae_folder, tmp_path, zoetrope, damage):
    change, message = DAMAGE[damage]
    copy = tmp_path / "copy"
    shutil.copytree(vae_folder("ltx_video"), copy)
    change(copy)
    code, out, err = zoetrope("import", copy, tmp_path / "out")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert message in err
    assert str(copy) in err
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        open_vae(copy)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mochi", {"latents_std": [1.0] * 3}, "latents_std has 3 numbers, latent_channels=4"),
        ("mochi", {"latents_std": [0.0] * 4}, "latents_std.0: Input should be greater than 0"),
        ("mochi", {"latents_mean": None}, "latents_mean: Field required"),
        (
            "mochi",
            {"temporal_expansions": [2, 2, 3]},
            "decoder.up_blocks.2.proj.bias is (256,), expected (512,)",
        ),
        ("cogvideox", {"use_quant_conv": True}, "use_quant_conv: Input should be False"),
        (
            "cogvideox",
            {"temporal_compression_ratio": 8},
            "temporal_compression_ratio: Input should",
        ),
        ("cogvideox", {"norm_num_groups": 3}, "no VAE can have these sizes (num_channels"),
        ("hunyuan_video", {"act_fn": "odd"}, "act_fn: Input should be 'silu'"),
        ("hunyuan_video", {"spatial_compression_ratio": 6}, "settings contradict each other"),
    ],
)
def test_settings_that_no_such_vae_has(vae_folder, tmp_path, family, changes, message):
    copy = tmp_path / "copy"
    shutil.copytree(vae_folder(family), copy)
    edit(copy / "config.json", **changes)
    with pytest.raises(ValueError) as raised:  # noqa: PT011 the messages have signs of patterns
        open_vae(copy)
    assert str(raised.value).startswith(str(copy))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--frames", "12"], "frames=12 does not fit the VAE: it needs 8*k+1; use 17 or 9"),
        (["--size", "40x32"], "height=40 does not fit the VAE: it needs a multiple of 32"),
        (["--fps", "0"], "--fps 0: use a number from 0.01 to 1000"),
    ],
)
def test_sizes_that_do_not_fit(vae_folder, tmp_path, zoetrope, flags, message):
    code, _, err = zoetrope("import", vae_folder("ltx_video"), tmp_path / "out", *flags)
    assert code == 2
    assert message in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_folders_of_something_else(vae_folder, tmp_path, zoetrope):
    for flags in ([], ["--vae-only"]):
        code, _, err = zoetrope("import", tmp_path / "none", tmp_path / "out", *flags)
        assert code == 2
        assert "no such folder; expected a downloaded one in diffusers' format" in err
    (tmp_path / "empty").mkdir()
    code, _, err = zoetrope("import", tmp_path / "empty", tmp_path / "out", "--vae-only")
    assert code == 2
    assert "neither config.json nor vae/config.json in it" in err
    with pytest.raises(FileNotFoundError, match="neither config"):
        open_vae(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_vae(tmp_path / "none")
    (tmp_path / "out").mkdir()
    code, _, err = zoetrope("import", vae_folder("mochi"), tmp_path / "out")
    assert code == 2
    assert "exists; give a name that does not" in err


def test_a_damaged_model_file(imported, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(imported("mochi"), copy)
    contents = yaml.safe_load((copy / "model.yaml").read_text())
    contents["vae"]["spatial_expansions"] = []
    (copy / "model.yaml").write_text(yaml.safe_dump(contents))
    with pytest.raises(ValueError, match=r"model\.yaml: vae\.mochi\.spatial_expansions: Tuple"):
        load_model(copy)
    contents["vae"]["spatial_expansions"] = [2]
    (copy / "model.yaml").write_text(yaml.safe_dump(contents))
    with pytest.raises(ValueError, match=r"model\.yaml: vae: no VAE can have these sizes"):
        load_model(copy)


def test_diffusers_is_named_where_it_lacks(imported, vae_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for what in (vae_folder("mochi"), imported("mochi")):
        with pytest.raises(ValueError, match=r"AutoencoderKLMochi needs diffusers: pip install"):
            open_vae(what)
