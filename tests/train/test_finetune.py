"""Training that starts from a model: imported from Wan or our own, all of it or adapters."""

import importlib.util
import json
import resource
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from data.world_files import WorldSpec, write_world
from dit.objective import DDPM, FlowMatching
from dit.transformer import DiT, DiTConfig
from sample.lora import WEIGHTS
from sample.model import load_model, save_model
from sample.pipeline import TextToVideo
from sample.wan_import import import_wan
from train.checkpoint import list_checkpoints
from train.cli import main
from train.config_file import ConfigError, load_config
from train.logs import read_log
from train.loop import train
from train.plan import plan
from train.recipe_dit import share_below

_spec = importlib.util.spec_from_file_location(
    "tiny_wan_folders", Path(__file__).parents[1] / "parity" / "conftest.py"
)
_tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_tiny)
CONFIG = Path(__file__).parents[2] / "configs" / "finetune" / "wan-1.3b-lora.yaml"
LORA = {"rank": 2, "alpha": 4}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Clips of 32x32, which Wan's tiny VAEs take."""
    folder = tmp_path_factory.mktemp("clips")
    spec = WorldSpec(6, 1, "train", 1, height=32, width=32, num_frames=5, fps=8.0)
    write_world(folder, spec, workers=1)
    return folder


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """Imported model folders by kind."""
    made = {}

    def folder(kind):
        if kind not in made:
            root = tmp_path_factory.mktemp(kind)
            import_wan(_tiny.save_wan(root / "theirs", kind), root / "ours", _tiny.SIZE)
            made[kind] = root / "ours"
        return made[kind]

    return folder


@pytest.fixture
def start(room, clips, tmp_path):
    """Trains from a model for a few steps; returns the run's folder."""

    def run(model, name="run", recipe=(), steps=3, **settings):
        values = room.values(tmp_path / name, "dit", logging={"sample_interval": 3})
        size = {"height": 32, "width": 32, "manifest": str(clips / "manifest.jsonl")}
        values["data"].update(size, validation=None)
        values["train"].update(steps=steps, batch_size=2, **settings)
        values["recipe"] = {"kind": "dit", "init": str(model), **dict(recipe)}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        train(load_config(path))
        return tmp_path / name

    return run


@pytest.fixture
def own(room, tmp_path):
    """A model of ours, trained for two steps."""
    return room.train(tmp_path / "own", "dit", train={"steps": 2}) / "model"


def losses(out):
    return [row["loss"] for row in read_log(out / "log.jsonl")]


def weights(folder, name="dit"):
    return {k: v for p in folder.glob(f"{name}*.safetensors") for k, v in load_file(p).items()}


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(value, b[name]) for name, value in a.items())


def message(capsys, *arguments):
    """The one line that a command ends in."""
    capsys.readouterr()  # what diffusers says while it saves
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    errors = capsys.readouterr().err.splitlines()
    assert (stopped.value.code, len(errors)) == (2, 1), errors
    return errors[0]


@pytest.mark.parametrize("kind", ["t2v", "ti2v"])
def test_all_of_an_imported_model(start, wan, tmp_path, capsys, kind):
    out = start(wan(kind))
    assert torch.tensor(losses(out)).isfinite().all()
    before, after = load_model(wan(kind)), load_model(out / "model")
    changed = {
        n for n, v in after.dit.state_dict().items() if not v.equal(before.dit.state_dict()[n])
    }
    assert changed == set(before.dit.state_dict())
    for name in ("vae", "text"):
        assert same(after.parts()[name].state_dict(), before.parts()[name].state_dict())
    assert (after.objective, after.sampling) == (before.objective, before.sampling)
    assert after.info.image_to_video == (kind == "ti2v")
    assert list((out / "samples").rglob("*.mp4"))

    with pytest.raises(SystemExit) as stopped:
        main(["export", str(out / "model"), str(tmp_path / "theirs"), "--format", "diffusers"])
    assert stopped.value.code == 0, capsys.readouterr().err
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "theirs" / "transformer")
    generator = torch.Generator().manual_seed(0)
    channels = before.vae.latent_channels
    x_t = torch.randn(1, channels, 2, 4, 4, generator=generator)
    t, context = torch.tensor([0.6]), torch.randn(1, 5, 16, generator=generator)
    with torch.no_grad():
        expected = theirs(x_t, 1000 * t, context, return_dict=False)[0]
        got, old = after.dit(x_t, t, context), before.dit(x_t, t, context)
    scale = expected.abs().max()
    assert (expected - old).abs().max() > 1e-3 * scale
    torch.testing.assert_close(got, expected, atol=1e-5 * scale.item(), rtol=0)


def test_all_of_our_own(room, own, tmp_path):
    """Its text encoder trains on, as it did; the first step is taken from where it stood."""
    changes = {"vae": None, "dit": None, "text": None, "objective": None, "init": str(own)}
    out = room.train(tmp_path / "run", "dit", recipe=changes, train={"steps": 3})
    assert torch.tensor(losses(out)).isfinite().all()
    assert not same(weights(out / "model"), weights(own))
    assert not same(weights(out / "model", "text"), weights(own, "text"))
    assert same(weights(out / "model", "vae"), weights(own, "vae"))
    assert load_model(out / "model").info.provenance["init"] == str(own)
    for name, value in weights(own).items():  # three steps of at most 2e-3 each
        assert (weights(out / "model")[name] - value).abs().max() < 1e-2


def test_stored_in_half_precision(start, wan, tmp_path):
    """What is trained becomes float32; what is not keeps its type, but for the VAE."""
    model = load_model(wan("t2v"))
    for part in (model.dit, model.text):
        part.bfloat16()
    save_model(tmp_path / "half", model)
    full = load_model(start(tmp_path / "half", "full", dtype="bfloat16") / "model")
    assert {p.dtype for p in full.dit.parameters()} == {torch.float32}
    assert {p.dtype for p in full.text.parameters()} == {torch.bfloat16}
    for dtype in ("bfloat16", "float32"):
        out = start(tmp_path / "half", dtype, {"lora": LORA}, dtype=dtype)
        assert torch.tensor(losses(out)).isfinite().all()
        assert {v.dtype for v in load_file(out / "lora" / WEIGHTS).values()} == {torch.float32}


def checkpoint_tensors(out, folder):
    target = folder / f"{out.name}.pt"
    dcp_to_torch_save(list_checkpoints(out / "checkpoints")[-1][1], target)
    return torch.load(target, weights_only=False)


def test_adapters_alone(start, wan, tmp_path):
    before = weights(wan("t2v"))
    out = start(wan("t2v"), recipe={"lora": LORA}, ema={"decay": 0.0})
    assert torch.tensor(losses(out)).isfinite().all()
    assert same(weights(wan("t2v")), before)
    found = load_file(out / "lora" / WEIGHTS)
    assert len(found) == 2 * 2 * 2 * 4  # A and B, blocks, attentions, layers
    assert all(v.abs().max() > 0 for v in found.values())  # B began at zero
    about = yaml.safe_load((out / "lora" / "lora.yaml").read_text())
    assert about["base"] == str(wan("t2v"))
    assert about["provenance"]["step"] == 3
    assert not (out / "model").exists()
    assert list((out / "samples").rglob("*.mp4"))
    saved = checkpoint_tensors(out, tmp_path)
    assert len(saved["model"]) == len(saved["ema"]) == len(found)
    assert all(".lora_" in name for part in ("model", "ema") for name in saved[part])
    assert len(saved["optimizer"]["state"]) == len(found)


def test_the_frozen_base_stays(start, wan, tmp_path, monkeypatch):
    """Bit for bit, in memory, with weight decay on."""
    from train import loop

    recipes = []
    build = loop.build_recipe
    monkeypatch.setattr(loop, "build_recipe", lambda *a: recipes.append(build(*a)) or recipes[0])
    optimizer = {"kind": "adamw", "lr": 1e-2, "weight_decay": 0.1}
    start(wan("t2v"), recipe={"lora": {**LORA, "targets": ["q", "mlp"]}}, optimizer=optimizer)
    state = recipes[0].dit.state_dict()
    base = {n.replace(".base_layer", ""): v for n, v in state.items() if ".lora_" not in n}
    assert same(base, weights(wan("t2v")))
    assert any(".mlp.fc2.lora_B" in name and v.abs().max() > 0 for name, v in state.items())


def flat(value, prefix=""):
    if isinstance(value, dict):
        for key, nested in value.items():
            yield from flat(nested, f"{prefix}/{key}")
    else:
        yield prefix, value


def test_resume_of_adapters_is_bit_exact(start, wan, tmp_path, capsys):
    options = {"recipe": {"lora": LORA}, "steps": 8, "checkpoint_interval": 4}
    whole = start(wan("t2v"), "whole", **options)
    half = tmp_path / "half"
    shutil.copytree(whole, half)
    shutil.rmtree(half / "lora")
    shutil.rmtree(half / "checkpoints" / "step-00000008")
    start(wan("t2v"), "half", **options)
    assert "resumed, steps 4 to 8" in capsys.readouterr().out
    assert same(load_file(whole / "lora" / WEIGHTS), load_file(half / "lora" / WEIGHTS))
    a, b = (dict(flat(checkpoint_tensors(out, tmp_path))) for out in (whole, half))
    assert a.keys() == b.keys()
    assert any("exp_avg" in name for name in a)
    for name, value in a.items():
        assert torch.equal(value, b[name]) if torch.is_tensor(value) else value == b[name], name
    start(wan("t2v"), "half", **options)
    assert "done already" in capsys.readouterr().out


def test_resume_refuses_another_base(start, wan, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(wan("t2v"), base)
    out = start(base, recipe={"lora": LORA})
    shutil.rmtree(out / "lora")
    model = load_model(base)
    model.dit.head.weight.data.mul_(1.01)
    save_model(base, model)
    with pytest.raises(ValueError, match="was made with another DiT"):
        start(base, recipe={"lora": LORA})
    with pytest.raises(ValueError, match=r"was made with another recipe\.lora\.rank"):
        start(base, recipe={"lora": {**LORA, "rank": 3}})


def test_another_fps_is_said(start, wan, caplog):
    values = {"lora": LORA}
    model = wan("t2v")
    start(model, recipe=values)
    assert "data.fps" not in caplog.text
    contents = yaml.safe_load((model / "model.yaml").read_text())
    try:
        changed = {**contents, "info": {**contents["info"], "fps": 24}}
        (model / "model.yaml").write_text(yaml.safe_dump(changed))
        start(model, name="other", recipe=values)
        assert "is sampled at 24; its motion will change speed" in caplog.text
    finally:
        (model / "model.yaml").write_text(yaml.safe_dump(contents))


def test_resume_refuses_a_base_with_other_settings(start, wan, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(wan("t2v"), base)
    out = start(base, recipe={"lora": LORA})
    shutil.rmtree(out / "lora")
    contents = yaml.safe_load((base / "model.yaml").read_text())
    contents["objective"]["shift"] = 1.5
    (base / "model.yaml").write_text(yaml.safe_dump(contents))
    with pytest.raises(ValueError, match=r"was made with another model\.yaml: its contents"):
        start(base, recipe={"lora": LORA})


def test_another_objective(start, wan, tmp_path):
    """Refused for a LoRA, which is sampled as its base; else the model says how it is sampled now."""
    ddpm = {"objective": {"kind": "ddpm", "prediction": "v"}}
    with pytest.raises(ValueError, match=r"recipe.objective is DDPM with prediction v; a LoRA is"):
        start(wan("t2v"), recipe={"lora": LORA, **ddpm})
    out = start(wan("t2v"), recipe=ddpm)
    model = load_model(out / "model")
    assert isinstance(model.objective, DDPM)
    assert torch.isfinite(TextToVideo(model, "cpu")(["a"], steps=2)).all()


@pytest.mark.parametrize("expert", ["high", "low"])
def test_one_expert_on_its_noise_levels(start, wan, monkeypatch, expert):
    seen = []
    draw = FlowMatching.sample_t
    monkeypatch.setattr(
        FlowMatching, "sample_t", lambda self, *a: seen.append(draw(self, *a)) or seen[-1]
    )
    monkeypatch.setattr("train.recipe_dit.share_below", unseen(seen, share_below))
    out = start(wan("a14b"), recipe={"expert": expert}, steps=12)
    t = torch.cat(seen)
    assert len(t) == 24
    assert ((t >= 0.875) if expert == "high" else (t < 0.875)).all()
    assert t.max() - t.min() > (0.05 if expert == "high" else 0.4)
    trained, other = ("dit", "dit_low_noise")[:: 1 if expert == "high" else -1]
    model, before = load_model(out / "model"), load_model(wan("a14b"))
    assert not same(model.parts()[trained].state_dict(), before.parts()[trained].state_dict())
    assert same(model.parts()[other].state_dict(), before.parts()[other].state_dict())
    assert model.expert_boundary == 0.875


def unseen(seen, function):
    """`function`, whose own calls are not kept in `seen`."""

    def call(*arguments):
        count = len(seen)
        result = function(*arguments)
        del seen[count:]
        return result

    return call


@pytest.mark.parametrize(
    "objective",
    [FlowMatching(shift=5.0), FlowMatching(t_distribution="mode"), DDPM()],
    ids=["shifted", "mode", "ddpm"],
)
@pytest.mark.parametrize("t", [0.3, 0.875])
def test_share_of_noise_levels(objective, t):
    """Against counting; within 1e-3, the distance between DDPM's noise levels."""
    drawn = objective.sample_t(torch.linspace(0, 1, 20_001, dtype=torch.float64), 8)
    assert share_below(objective, t, 8) == pytest.approx(
        (drawn < t).double().mean().item(), abs=1e-3
    )
    assert (share_below(objective, 0.0, 8), share_below(objective, 1.0, 8)) == (0, 1)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"init": None}, "recipe.dit: missing; it has no default"),
        ({"init": "m", "dit": {"dim": 24}}, "recipe.dit"),
        ({"init": "m", "vae": "v", "lora": {"rank": 2}}, "recipe.vae: adapters are saved without"),
        ({"init": "m", "expert": "hi"}, "recipe.expert: got 'hi', expected 'high' or 'low'"),
        ({"init": "m", "lora": {"rank": 0}}, "recipe.lora.rank: got 0, expected greater than 0"),
        ({"init": "m", "lora": {"rank": 2, "targets": []}}, "recipe.lora.targets"),
        ({"init": "m", "lora": {"ranks": 2}}, "recipe.lora.ranks: unknown key; did you mean rank?"),
        ({"lora": {"rank": 2}}, "recipe.lora: this is for a run that starts from a trained model"),
        ({"expert": "low"}, "recipe.expert: this is for a run that starts from a trained model"),
    ],
)
def test_mistakes_in_the_config(room, tmp_path, changes, expected):
    values = room.values(tmp_path / "run", "dit")
    values["recipe"] = {"kind": "dit", **changes}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert any(f"{path}: {expected}" in line for line in str(caught.value).splitlines())


def test_muon_is_not_for_adapters(start, wan):
    with pytest.raises(ConfigError, match=r"recipe\.lora trains products of two thin ones"):
        start(wan("t2v"), recipe={"lora": LORA}, optimizer={"kind": "muon", "lr": 1e-3})


def test_models_that_do_not_fit(room, wan, own, tmp_path, capsys):
    def run(model, **recipe):
        values = room.values(tmp_path / "run", "dit")
        values["recipe"] = {"kind": "dit", "init": str(model), **recipe}
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(values))
        return message(capsys, "train", path)

    assert f"recipe.init={room.vae} holds a VAE alone" in run(room.vae)
    assert "no such folder; expected a model folder" in run(tmp_path / "none")
    assert f"recipe.expert=low, but {own} has one DiT; leave it out" in run(own, expert="low")
    assert "has two experts; set recipe.expert=high (t from 1 to 0.875)" in run(wan("a14b"))
    assert "do not divide into patches of 1x2x2; change data.*" in run(wan("ti2v"))


def test_without_peft(room, own, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    values = room.values(tmp_path / "run", "dit")
    values["recipe"] = {"kind": "dit", "init": str(own), "lora": LORA}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    assert "recipe.lora needs peft: pip install 'zoetrope[lora]'" in message(capsys, "train", path)


def test_dry_run_of_the_config_for_wan(wan, clips, tmp_path, capsys):
    overrides = {
        "out": tmp_path / "run",
        "data.manifest": clips / "manifest.jsonl",
        "data.num_frames": 5,
        "data.height": 32,
        "data.width": 32,
        "recipe.init": wan("t2v"),
    }
    capsys.readouterr()
    pairs = [f"{key}={value}" for key, value in overrides.items()]
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(CONFIG), *pairs, "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert stopped.value.code == 0
    trained = 2 * 8 * 2 * 48 * 32  # blocks, layers of each, A and B, width, rank
    assert f"({trained:,} trained)" in next(x for x in lines if x.startswith("dit parameters"))
    flops = next(line for line in lines if line.startswith("FLOPs per step"))
    assert float(flops.split()[3]) > 1e8


def test_a_dry_run_reads_no_weights(wan, clips, tmp_path):
    """Of a DiT of 2.9 GB, whose file here has nothing but holes."""
    folder = tmp_path / "large"
    shutil.copytree(wan("t2v"), folder)
    contents = yaml.safe_load((folder / "model.yaml").read_text())
    contents["dit"].update(dim=5120, num_heads=40, mlp_dim=13824, num_blocks=2)
    (folder / "model.yaml").write_text(yaml.safe_dump(contents))
    with torch.device("meta"):
        weights = DiT(DiTConfig(**contents["dit"])).state_dict()
    header, end = {}, 0
    for name, value in weights.items():
        begin, end = end, end + 4 * value.numel()
        shape = list(value.shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "dit.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    config = load_config(
        CONFIG,
        [
            f"data.manifest={clips / 'manifest.jsonl'}",
            f"recipe.init={folder}",
            *("data.num_frames=5", "data.height=32", "data.width=32"),
        ],
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = plan(config).splitlines()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * (1 if sys.platform == "darwin" else 1024) < 200e6
    dit = next(line for line in lines if line.startswith("dit parameters"))
    assert int(dit.split()[2].replace(",", "")) > 0.7e9
