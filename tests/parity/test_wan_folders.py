"""diffusers' folders in and out: every tensor bit for bit, little memory, and damage named."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file

from dit.umt5 import UMT5Encoder
from sample.model import load_model, read_model_file, save_model
from sample.pipeline import TextToVideo
from sample.shards import save_part
from sample.wan_export import export_diffusers
from sample.wan_import import import_wan

PARTS = ("transformer", "transformer_2", "vae", "text_encoder")
SIZE = {"fps": 8, "num_frames": 5, "height": 32, "width": 32}


def tensors(folder):
    """All tensors of a network's folder by name, as stored."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def assert_same_tensors(folder, other):
    for part in PARTS:
        expected, got = tensors(folder / part), tensors(other / part)
        assert got.keys() == expected.keys()
        assert expected or part == "transformer_2"
        for name, value in expected.items():
            assert got[name].dtype == value.dtype
            assert torch.equal(got[name], value), name


def edit(path, **changes):
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, **changes}))


@pytest.mark.parametrize("kind", ["t2v", "ti2v", "a14b"])
def test_round_trip_is_bit_identical(wan_folders, tmp_path, kind):
    theirs, ours = wan_folders(kind)
    export_diffusers(ours, tmp_path / "back")
    assert_same_tensors(theirs, tmp_path / "back")
    assert (kind == "a14b") == bool(tensors(theirs / "transformer_2"))
    back = WanPipeline.from_pretrained(tmp_path / "back")
    first = WanPipeline.from_pretrained(theirs)
    assert dict(back.config)["boundary_ratio"] == dict(first.config)["boundary_ratio"]
    assert dict(back.config)["expand_timesteps"] == dict(first.config)["expand_timesteps"]
    settings = dict(height=32, width=32, num_frames=5, num_inference_steps=3, output_type="latent")
    side = 32 // back.vae_scale_factor_spatial
    noise = torch.randn(1, first.transformer.config.in_channels, 2, side, side)
    expected = first("a circle", latents=noise, **settings).frames
    assert expected.std() > 0.1
    assert torch.equal(back("a circle", latents=noise, **settings).frames, expected)


def test_the_scheduler_comes_back(wan_folders, tmp_path):
    for name in ("unipc", "euler"):
        theirs, ours = wan_folders("t2v", name)
        export_diffusers(ours, tmp_path / name)
        expected, got = (
            WanPipeline.from_pretrained(f, text_encoder=None, transformer=None, vae=None).scheduler
            for f in (theirs, tmp_path / name)
        )
        assert type(got) is type(expected)
        got.set_timesteps(11)
        expected.set_timesteps(11)
        assert torch.equal(got.sigmas, expected.sigmas)
        assert torch.equal(got.timesteps, expected.timesteps)


def test_half_precision_is_kept_and_sampled(wan_folders, tmp_path):
    theirs, _ = wan_folders("t2v")
    WanPipeline.from_pretrained(theirs).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    import_wan(tmp_path / "half", tmp_path / "ours", SIZE)
    export_diffusers(tmp_path / "ours", tmp_path / "back")
    assert_same_tensors(tmp_path / "half", tmp_path / "back")
    assert {v.dtype for v in tensors(tmp_path / "back" / "vae").values()} == {torch.bfloat16}
    model = load_model(tmp_path / "ours")
    assert {p.dtype for p in model.dit.parameters()} == {torch.bfloat16}
    half = TextToVideo.from_folder(tmp_path / "ours", "cpu")
    whole = TextToVideo.from_folder(tmp_path / "ours", "cpu", dtype=torch.float32)
    assert {p.dtype for p in whole.dit.parameters()} == {torch.float32}
    rough, fine = (p(["a circle"], steps=3, output="latents") for p in (half, whole))
    assert fine.std() > 0.3
    assert (rough - fine).abs().mean() < 0.1 * fine.abs().mean()


def test_the_token_embedding_under_any_of_its_names(wan_folders, tmp_path):
    theirs, ours = wan_folders("t2v")
    ids = torch.tensor([[5, 9, 1, 0, 0]])
    expected = load_model(ours).text(ids)[0]
    assert expected[0, :3].abs().max() > 0.1
    weights = load_file(theirs / "text_encoder" / "model.safetensors")
    assert "encoder.embed_tokens.weight" not in weights
    both = {**weights, "encoder.embed_tokens.weight": weights["shared.weight"].clone()}
    alone = {k: v for k, v in both.items() if k != "shared.weight"}
    for name, variant in (("both", both), ("alone", alone)):
        folder = tmp_path / name
        shutil.copytree(theirs, folder)
        save_file(variant, folder / "text_encoder" / "model.safetensors", {"format": "pt"})
        import_wan(folder, tmp_path / f"{name}-ours", SIZE)
        assert torch.equal(load_model(tmp_path / f"{name}-ours").text(ids)[0], expected)
        export_diffusers(tmp_path / f"{name}-ours", tmp_path / f"{name}-back")
        loaded = WanPipeline.from_pretrained(tmp_path / f"{name}-back", transformer=None, vae=None)
        assert torch.equal(loaded.text_encoder.shared.weight, weights["shared.weight"])
        assert torch.equal(
            loaded.text_encoder.encoder.embed_tokens.weight, weights["shared.weight"]
        )


def test_a_model_saved_here_is_exported(wan_folders, tmp_path):
    """An imported model after training: saved as any model is, in several files and in one."""
    theirs, ours = wan_folders("a14b")
    model = load_model(ours)
    with torch.no_grad():
        model.dit.head.weight.add_(1)
    save_model(tmp_path / "trained", model)
    assert isinstance(load_model(tmp_path / "trained").text, UMT5Encoder)
    (tmp_path / "trained" / "dit.safetensors").unlink()
    save_part(model.dit, tmp_path / "trained", "dit", max_bytes=50_000)
    assert len(list((tmp_path / "trained").glob("dit-*.safetensors"))) > 3
    export_diffusers(tmp_path / "trained", tmp_path / "out")
    loaded, first = (WanPipeline.from_pretrained(f) for f in (tmp_path / "out", theirs))
    assert torch.equal(loaded.transformer.proj_out.weight, first.transformer.proj_out.weight + 1)
    for part in ("transformer_2", "vae", "text_encoder"):
        got = getattr(loaded, part).state_dict()
        for name, value in getattr(first, part).state_dict().items():
            assert torch.equal(got[name], value), name
    assert loaded.tokenizer("ab").input_ids == first.tokenizer("ab").input_ids


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_importing_takes_little_memory(wan_folders, tmp_path, monkeypatch):
    """Resident memory after every piece copied, of a folder with a shard of 82 MB."""
    big, vocab = tmp_path / "big", 1_280_000
    shutil.copytree(wan_folders("t2v")[0], big)
    edit(big / "text_encoder" / "config.json", vocab_size=vocab)
    weights = load_file(big / "text_encoder" / "model.safetensors")
    weights["shared.weight"] = torch.randn(vocab, 16)
    save_file(weights, big / "text_encoder" / "model.safetensors", {"format": "pt"})
    del weights
    resident, copied = [], []

    def measure(part, header, count):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident.append(pages * os.sysconf("SC_PAGE_SIZE"))
        copied.append(count)

    monkeypatch.setattr("sample.shards.CHUNK_BYTES", 2**20)
    import_wan(big, tmp_path / "ours", SIZE, measure)
    assert sum(copied) > 75 * 2**20
    assert max(copied) == 2**20
    assert max(resident) - resident[0] < 20 * 2**20
    assert load_model(tmp_path / "ours").text.config.vocab_size == vocab


def test_loading_initialises_nothing(wan_folders, monkeypatch):
    """Networks of an imported model stand on the meta device until their weights come."""
    _, ours = wan_folders("a14b")

    def refuse(tensor, *_, **__):
        assert tensor.is_meta
        return tensor

    for name in ("normal_", "uniform_", "xavier_uniform_", "kaiming_uniform_"):
        monkeypatch.setattr(f"torch.nn.init.{name}", refuse)
    model = load_model(ours)
    assert not any(p.is_meta for part in model.parts().values() for p in part.parameters())


def test_an_interrupt_leaves_nothing(wan_folders, tmp_path, zoetrope, monkeypatch):
    theirs, ours = wan_folders("t2v")
    parts = []

    def interrupt(self, part, header, count):
        parts.append(part)
        if part == "vae":
            raise KeyboardInterrupt

    monkeypatch.setattr("sample.wan_cli._Bars.__call__", interrupt)
    for command in (["import", theirs], ["export", ours, "--format", "diffusers"]):
        code, _, _ = zoetrope(command[0], command[1], tmp_path / "out", *command[2:])
        assert code == 130
        assert list(tmp_path.iterdir()) == []
    assert parts.count("vae") == 2
    assert "dit" in parts  # it had begun to write


def test_the_commands(wan_folders, tmp_path, zoetrope):
    theirs, _ = wan_folders("ti2v")
    code, out, err = zoetrope(
        "import", theirs, tmp_path / "m", "--frames", 9, "--size", "32x64", "--fps", 12
    )
    assert (code, out.strip()) == (0, str(tmp_path / "m"))
    shards = len(list((theirs / "transformer").glob("*.safetensors")))
    assert err.count("dit diffusion_pytorch_model-") >= shards  # a bar for each
    info = read_model_file(tmp_path / "m").info
    assert (info.num_frames, info.height, info.width, info.fps) == (9, 32, 64, 12)
    assert info.image_to_video
    code, out, _ = zoetrope("export", tmp_path / "m", tmp_path / "d", "--format", "diffusers")
    assert (code, out.strip()) == (0, str(tmp_path / "d"))
    assert_same_tensors(theirs, tmp_path / "d")
    whole = ["export", tmp_path / "m", tmp_path / "t", "--format", "diffusers"]
    code, _, _ = zoetrope(*whole, "--transformer-only")
    assert code == 0
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == ["scheduler", "transformer"]
    assert tensors(tmp_path / "t" / "transformer").keys() == tensors(theirs / "transformer").keys()


def test_usual_sizes(wan_folders, tmp_path):
    for kind, wanted in (("t2v", (16, 81, 480, 832)), ("ti2v", (24, 121, 704, 1280))):
        info = import_wan(wan_folders(kind)[0], tmp_path / kind).info
        assert (info.fps, info.num_frames, info.height, info.width) == wanted
