"""Model folders: everything comes back, and what is damaged is named."""

import os
import shutil

import pytest
import torch
import yaml

from sample.model import Model, SamplingDefaults, load_model, save_model
from sample.shards import save_part


def test_round_trip(tmp_path, model):
    model.vae.latent_mean.normal_()
    save_model(tmp_path / "m", model)
    loaded = load_model(tmp_path / "m")
    assert loaded.info == model.info
    assert loaded.objective == model.objective
    for name, part in model.parts().items():
        other = loaded.parts()[name]
        assert other.config == part.config
        assert not other.training
        assert not any(p.requires_grad for p in other.parameters())
        for key, value in part.state_dict().items():
            assert torch.equal(other.state_dict()[key], value), key


def test_a_vae_alone_is_a_model_folder(tmp_path, model):
    save_model(tmp_path / "vae", Model(model.vae, model.info))
    loaded = load_model(tmp_path / "vae")
    assert loaded.dit is None
    assert loaded.objective is None
    assert sorted(p.name for p in (tmp_path / "vae").iterdir()) == ["model.yaml", "vae.safetensors"]


def test_saving_again_replaces_the_whole_folder(tmp_path, model):
    save_model(tmp_path / "m", model)
    save_model(tmp_path / "m", Model(model.vae, model.info))
    assert not (tmp_path / "m" / "dit.safetensors").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_kill_between_the_renames_loses_nothing(tmp_path, model):
    save_model(tmp_path / "m", model)
    (tmp_path / "m").rename(tmp_path / ".m.old")
    assert load_model(tmp_path / "m").info == model.info
    save_model(tmp_path / "m", model)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_two_experts_and_a_way_of_sampling_come_back(tmp_path, experts_folder):
    model = load_model(experts_folder)
    model.sampling = SamplingDefaults(sampler="heun", steps=7, guidance=3.5)
    save_model(tmp_path / "m", model)
    loaded = load_model(tmp_path / "m")
    assert loaded.file() == model.file()
    assert loaded.expert_boundary == 0.7
    assert torch.equal(loaded.dit_low_noise.head.weight, -loaded.dit.head.weight)
    assert loaded.dit.head.weight.abs().max() > 0


def test_weights_in_several_files(tmp_path, folder, model):
    copy = tmp_path / "m"
    shutil.copytree(folder, copy)
    (copy / "dit.safetensors").unlink()
    save_part(model.dit, copy, "dit", max_bytes=20_000)
    files = sorted(p.name for p in copy.glob("dit*"))
    assert len(files) > 3
    assert files[0] == f"dit-00001-of-{len(files) - 1:05d}.safetensors"
    assert all(p.stat().st_size < 25_000 for p in copy.glob("dit-*"))
    for name, value in load_model(copy).dit.state_dict().items():
        assert torch.equal(value, model.dit.state_dict()[name]), name
    (copy / files[1]).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{files[1]}: no such file; dit.*lists"):
        load_model(copy)


def test_the_vae_alone_of_a_whole_folder(folder):
    model = load_model(folder, vae_only=True)
    assert model.dit is None
    assert model.text is None
    assert model.vae.decode(torch.zeros(1, 4, 2, 4, 4)).shape == (1, 3, 5, 16, 16)


def test_a_folder_of_an_earlier_version(folder, tmp_path):
    """Fields that came later are not in it, and mean what was so before."""
    copy = tmp_path / "m"
    shutil.copytree(folder, copy)
    path = copy / "model.yaml"
    contents = yaml.safe_load(path.read_text())
    del contents["info"]["image_to_video"]
    contents["objective"] = {"kind": "flow", "prediction": "velocity", "shift": 3.0}
    path.write_text(yaml.safe_dump(contents))
    model = load_model(copy)
    assert not model.info.image_to_video
    assert model.sampling == SamplingDefaults(sampler=None, steps=20, guidance=2.0)
    assert model.objective.shift == 3.0


def test_no_pickle(folder):
    assert {p.suffix for p in folder.iterdir()} == {".yaml", ".safetensors"}


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: shutil.rmtree(f), FileNotFoundError, "no such folder"),
        (lambda f: (f / "model.yaml").unlink(), FileNotFoundError, r"no model\.yaml in it"),
        (lambda f: (f / "dit.safetensors").unlink(), FileNotFoundError, r"dit\.safetensors"),
        (lambda f: (f / "vae.safetensors").write_bytes(b"x" * 40), ValueError, "whole safetensors"),
        (lambda f: (f / "model.yaml").write_text("a: ["), ValueError, "not YAML"),
        (lambda f: (f / "model.yaml").write_bytes(b"\xff\xfe\xff"), ValueError, "not "),
        (lambda f: (f / "model.yaml").write_text("hello"), ValueError, "format_version is None"),
        (lambda f: edit(f, "format_version: 1", "format_version: 9"), ValueError, "is 9"),
        (
            lambda f: edit(f, "num_blocks: 2", "num_blocks: 3"),
            ValueError,
            "does not fit model.yaml",
        ),
        (lambda f: edit(f, "mlp_dim: 48", "mlp_dim: 40"), ValueError, "does not fit model.yaml"),
        (lambda f: edit(f, "kind: flow", "kind: flaw"), ValueError, "objective"),
        (lambda f: edit(f, "fps: 8.0", "fps: -1"), ValueError, r"info\.fps"),
        (
            lambda f: edit(f, "objective:", "expert_boundary: 0.5\nobjective:"),
            ValueError,
            r"model\.yaml: needs dit_low_noise and expert_boundary together",
        ),
        (
            lambda f: cut_objective(f),
            ValueError,
            r"model\.yaml: needs dit, text and objective together",
        ),
    ],
)
def test_damage_is_named(folder, tmp_path, damage, error, message):
    copy = tmp_path / "m"
    shutil.copytree(folder, copy)
    damage(copy)
    with pytest.raises(error, match=message) as raised:
        load_model(copy)
    assert str(copy) in str(raised.value)
    assert "\n" not in str(raised.value)


def edit(folder, before, after):
    path = folder / "model.yaml"
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after, 1))


def cut_objective(folder):
    path = folder / "model.yaml"
    contents = yaml.safe_load(path.read_text())
    del contents["objective"]
    path.write_text(yaml.safe_dump(contents))


def test_others_may_read_what_new_files_let_them(folder, tmp_path):
    before = os.umask(0o022)
    try:
        save_model(tmp_path / "m", load_model(folder))
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "m").glob("*.*")}
    assert set(modes.values()) == {0o644}
