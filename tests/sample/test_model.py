"""Model folders: everything comes back, and what is damaged is named."""

import shutil

import pytest
import torch

from sample.model import Model, load_model, save_model


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
            lambda f: edit(f, "num_blocks: 1", "num_blocks: 2"),
            ValueError,
            "does not fit model.yaml",
        ),
        (lambda f: edit(f, "mlp_dim: 48", "mlp_dim: 40"), ValueError, "does not fit model.yaml"),
        (lambda f: edit(f, "kind: flow", "kind: flaw"), ValueError, "objective"),
        (lambda f: edit(f, "fps: 8.0", "fps: -1"), ValueError, r"info\.fps"),
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
