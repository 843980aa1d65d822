"""What cannot be imported or exported is named in one line, with exit status 2."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from dit.flow import FlowMatching
from sample.model import load_model, save_model


def edit(path, **changes):
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, **changes}))


def drop_shard(f):
    (f / "transformer" / "diffusion_pytorch_model-00002-of-00007.safetensors").unlink()


def truncate_shard(f):
    path = f / "transformer" / "diffusion_pytorch_model-00002-of-00007.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop_tensor(f):
    path = f / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    del weights["encoder.final_layer_norm.weight"]
    save_file(weights, path)


def quantise(f):
    path = f / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    weights["encoder.final_layer_norm.weight"] = torch.ones(16, dtype=torch.int8)
    save_file(weights, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "no such folder; expected a downloaded one"),
        (lambda f: (f / "model_index.json").unlink(), "no model_index.json in it"),
        (lambda f: (f / "model_index.json").write_text("{"), "model_index.json: not JSON"),
        (
            lambda f: edit(f / "model_index.json", _class_name="FluxPipeline"),
            "_class_name is FluxPipeline; expected WanPipeline",
        ),
        (
            lambda f: edit(f / "model_index.json", image_encoder=["transformers", "CLIP"]),
            "image-to-video models that see a picture through CLIP are not supported",
        ),
        (
            lambda f: edit(f / "model_index.json", boundary_ratio=0.9),
            "needs transformer_2 and boundary_ratio together",
        ),
        (
            lambda f: edit(f / "model_index.json", transformer_2=["a", "b"], boundary_ratio="low"),
            "transformer_2/config.json: no such file",
        ),
        (
            lambda f: edit(f / "transformer/config.json", _class_name="WanVACETransformer3DModel"),
            "_class_name is WanVACETransformer3DModel; expected WanTransformer3DModel",
        ),
        (
            lambda f: edit(f / "transformer/config.json", image_dim=1280),
            "takes a picture through CLIP or extra channels (image_dim=1280",
        ),
        (
            lambda f: edit(f / "transformer/config.json", in_channels=36),
            "(image_dim=None, in_channels=36, out_channels=4), which is not supported",
        ),
        (
            lambda f: edit(f / "transformer/config.json", qk_norm=None),
            "qk_norm is None; only rms_norm_across_heads is supported",
        ),
        (
            lambda f: edit(f / "transformer/config.json", num_layers=3),
            "does not fit its config.json: lacks blocks.2.",
        ),
        (
            lambda f: edit(f / "transformer/config.json", ffn_dim=80),
            "is (96,), expected (80,)",
        ),
        (
            lambda f: edit(f / "transformer/config.json", attention_head_dim="many"),
            "transformer/config.json",
        ),
        (drop_shard, "00002-of-00007.safetensors: no such file"),
        (truncate_shard, "00002-of-00007.safetensors: not a whole safetensors file"),
        (lambda f: shutil.rmtree(f / "vae"), "vae/config.json: no such file"),
        (lambda f: edit(f / "vae/config.json", z_dim=5), "latents_mean has 4 numbers, z_dim=5"),
        (lambda f: shutil.rmtree(f / "text_encoder"), "text_encoder/config.json: no such file"),
        (
            lambda f: (f / "text_encoder/model.safetensors").unlink(),
            "text_encoder/model.safetensors: no such file",
        ),
        (lambda f: edit(f / "text_encoder/config.json", model_type="t5"), "model_type is t5"),
        (drop_tensor, "lacks encoder.final_layer_norm.weight (1 in all)"),
        (quantise, "is I8; quantised weights are not supported"),
        (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer: no tokenizer in it"),
        (lambda f: (f / "tokenizer/tokenizer.json").write_text("{"), "tokenizer: not a tokenizer"),
        (
            lambda f: edit(f / "scheduler/scheduler_config.json", _class_name="DDIMScheduler"),
            "_class_name is DDIMScheduler; expected UniPCMultistepScheduler or FlowMatchEuler",
        ),
        (
            lambda f: edit(f / "scheduler/scheduler_config.json", solver_order=3),
            "solver_order is 3; only 2 is supported",
        ),
        (
            lambda f: edit(f / "scheduler/scheduler_config.json", use_flow_sigmas=False),
            "use_flow_sigmas is False; only True is supported",
        ),
    ],
)
def test_what_cannot_be_imported_is_named(wan_folders, tmp_path, zoetrope, damage, message):
    copy = tmp_path / "copy"
    shutil.copytree(wan_folders("t2v")[0], copy)
    damage(copy)
    code, out, err = zoetrope("import", copy, tmp_path / "out")
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if line.startswith("zoetrope: error:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert str(copy) in lines[0]
    assert not (tmp_path / "out").exists()


def test_settings_that_nobody_knows_are_named(wan_folders, tmp_path, zoetrope, caplog):
    copy = tmp_path / "copy"
    shutil.copytree(wan_folders("t2v")[0], copy)
    assert zoetrope("import", copy, tmp_path / "plain")[0] == 0
    assert not caplog.messages
    edit(copy / "transformer/config.json", window=7)
    edit(copy / "vae/config.json", clip_output=False)
    assert zoetrope("import", copy, tmp_path / "out")[0] == 0
    named = [message.removeprefix(f"{copy}/") for message in caplog.messages]
    assert named == [
        "transformer/config.json: window=7 is no setting known here; left aside",
        "vae/config.json: clip_output=False is no setting known here; left aside",
    ]


def test_a_boundary_that_is_none(wan_folders, tmp_path, zoetrope):
    copy = tmp_path / "copy"
    shutil.copytree(wan_folders("a14b")[0], copy)
    for boundary in ("low", 1.5):
        edit(copy / "model_index.json", boundary_ratio=boundary)
        code, _, err = zoetrope("import", copy, tmp_path / "out")
        assert code == 2
        assert "model_index.json: expert_boundary: Input should be" in err.splitlines()[-1]


def test_out_exists_and_no_extra(wan_folders, tmp_path, zoetrope, monkeypatch):
    theirs, ours = wan_folders("t2v")
    (tmp_path / "out").mkdir()
    for command in (["import", theirs], ["export", ours, "--format", "diffusers"]):
        code, _, err = zoetrope(command[0], command[1], tmp_path / "out", *command[2:])
        assert code == 2
        assert f"{tmp_path / 'out'} exists; give a name that does not" in err
    for library in ("diffusers", "transformers"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, library, None)
            for command in (
                ["import", theirs, tmp_path / "new"],
                ["sample", ours, "x", "-o", tmp_path / "x.mp4"],
            ):
                code, _, err = zoetrope(*command)
                assert code == 2
                assert f"needs {library}: pip install 'zoetrope[wan]'" in err.splitlines()[-1]


def test_what_cannot_be_exported_is_named(wan_folders, tmp_path, zoetrope):
    model = load_model(wan_folders("t2v")[1])
    model.objective = FlowMatching(prediction="x_0")
    save_model(tmp_path / "m", model)
    code, _, err = zoetrope("export", tmp_path / "m", tmp_path / "out", "--format", "diffusers")
    assert code == 2
    assert "cannot be exported to diffusers: its network predicts x_0" in err
    model.objective, model.dit.config = (
        FlowMatching(),
        model.dit.config.model_copy(update={"rope_theta": 500.0}),
    )
    save_model(tmp_path / "m", model)
    code, _, err = zoetrope("export", tmp_path / "m", tmp_path / "out", "--format", "diffusers")
    assert code == 2
    assert "rope_theta=500: Wan's transformer has 10000" in err
    assert not (tmp_path / "out").exists()
