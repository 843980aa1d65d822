"""What a VAE may be trained on: adversary, perceptual network, checkpointing, starting from a model."""

import json
import math
import shutil
from pathlib import Path

import pytest
import timm
import torch
import wandb
import yaml
from safetensors.torch import load_file, save_file

from data.video import to_float
from dit.diffusers_vae import published_vae
from dit.diffusers_vae_config import WanVAEConfig
from sample.model import Model, load_model, save_model
from sample.processes import Ranks
from train.config_file import ConfigError, load_config
from train.logs import read_log
from train.loop import train
from train.parallel import parallelize
from train.plan import plan
from train.setup import build_recipe, fresh_state, open_data

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def vgg(tmp_path):
    """Random weights of a small VGG, as timm saves them."""
    torch.manual_seed(0)
    path = tmp_path / "vgg11.safetensors"
    save_file(vgg_weights(), path)
    return path


def vgg_weights():
    return timm.create_model("vgg11", pretrained=False).features.state_dict(prefix="features.")


def recipe_of(room, folder, kind="gan", **changes):
    config = load_config(room.write(folder / "recipe", kind, **changes))
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    recipe = build_recipe(config, open_data(config), ranks)
    parallelize(recipe, ranks)
    return recipe, config


def some_batch(recipe, config, step=100):
    clips = recipe.dataset()
    return recipe.make_batch(clips.collate([clips[g] for g in range(4)]), step)


def gradients(recipe, batch):
    recipe.zero_grad()
    losses, values = recipe(batch)
    losses.sum().backward()
    found = {name: p.grad.clone() for name, p in recipe.named_parameters() if p.grad is not None}
    return losses.detach(), values, found


def randomise(recipe):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in recipe.vae.named_parameters():
            if "conv" in name:
                parameter.normal_(std=0.1)


def test_the_adversary_acts_on_the_vae_as_its_loss_does(room, tmp_path):
    """The gradient that reaches the VAE is that of the losses written down plainly."""
    changes = {"recipe": {"adversarial": {"adaptive": False, "weight": 0.3, "ramp_steps": 0}}}
    recipe, config = recipe_of(room, tmp_path, **changes)
    randomise(recipe)
    batch = some_batch(recipe, config)
    losses, values, got = gradients(recipe, batch)
    assert {"adversarial", "discriminator", "logit_real", "logit_fake"} <= values.keys()

    recipe.zero_grad()
    plain, _ = recipe({**batch, "step": torch.tensor(0)})  # before the adversary starts
    video = to_float(batch["video"])
    mean, log_variance = recipe.vae.moments(video)
    output = recipe.vae.decode_raw(mean + (0.5 * log_variance).exp() * batch["noise"])
    logits = recipe.adversarial.discriminator(output).flatten(1)
    total = plain + 0.3 * torch.nn.functional.softplus(-logits).mean(1)
    total.sum().backward()
    for name, parameter in recipe.vae.named_parameters():
        torch.testing.assert_close(got[f"vae.{name}"], parameter.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        losses, total.detach() + values["discriminator"], atol=1e-5, rtol=1e-5
    )


def test_checkpointing_activations_changes_nothing(room, tmp_path):
    kept, config = recipe_of(room, tmp_path)
    anew, _ = recipe_of(room, tmp_path, train={"activation_checkpointing": "block"})
    for recipe in (kept, anew):
        randomise(recipe)
    batch = some_batch(kept, config)
    (losses, _, before), (others, _, after) = (gradients(r, batch) for r in (kept, anew))
    assert torch.equal(losses, others)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    saved = []
    for recipe in (kept, anew):
        count = [0]

        def note(tensor, count=count):
            count[0] += tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            recipe(batch)
        saved.append(count[0])
    assert saved[1] < 0.7 * saved[0]


def test_checkpointing_in_a_run_of_compiled_blocks(room, tmp_path):
    """The two together, through the loop, for both recipes."""
    for kind in ("vae", "dit"):
        plain = room.train(tmp_path / f"{kind}-plain", kind, train={"steps": 3})
        options = {"steps": 3, "activation_checkpointing": "block", "compile": "auto"}
        other = room.train(tmp_path / f"{kind}-other", kind, train=options)
        one, two = (read_log(out / "log.jsonl")[-1]["loss"] for out in (plain, other))
        assert two == pytest.approx(one, abs=1e-5)


def test_only_the_vae_is_averaged_and_exported(room, tmp_path):
    recipe, config = recipe_of(room, tmp_path)
    state = fresh_state(recipe, config.train)
    assert all(name.startswith("vae.") for name in state.ema.weights)
    assert any(name.startswith("adversarial.") for name in state.trained)
    names = {name for group in recipe.groups() for name in group.parameters}
    assert names == set(recipe.trained())
    betas = {tuple(group["betas"]) for group in state.optimizer.param_groups}
    assert betas == {(0.5, 0.9), tuple(config.train.optimizer.betas)}
    out = room.train(tmp_path / "run", "gan")
    assert {path.name for path in (out / "model").iterdir()} == {"model.yaml", "vae.safetensors"}
    info = load_model(out / "model").info
    assert info.provenance["statistics_clips"] == 8
    row = read_log(out / "log.jsonl")[-1]
    assert {
        "grad_norm",
        "grad_norm_discriminator",
        "temporal",
        "r1",
        "adversarial_weight",
    } <= row.keys()


def test_accumulation_changes_nothing(room, tmp_path):
    optimizer = {"kind": "adamw", "lr": 2e-3, "eps": 1e-3}
    losses = []
    for pieces in (1, 2):
        changes = {"train": {"grad_accum": pieces, "optimizer": optimizer}}
        out = room.train(tmp_path / f"run-{pieces}", "gan", **changes)
        losses.append([row["loss"] for row in read_log(out / "log.jsonl")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5, abs=1e-5)


def test_perceptual_network(room, tmp_path, vgg, capsys):
    changes = {"perceptual": {"backbone": "vgg11", "weights": str(vgg), "num_frames": 2}}
    recipe, config = recipe_of(room, tmp_path, "vae", recipe=changes)
    randomise(recipe)
    assert not any(name.startswith("perceptual") for name in recipe.trained())
    batch = some_batch(recipe, config)
    losses, values, found = gradients(recipe, batch)
    assert (values["perceptual"] > 0).all()
    plain, _ = recipe_of(room, tmp_path, "vae")
    randomise(plain)
    without, _, _ = gradients(plain, batch)
    torch.testing.assert_close(losses, without + values["perceptual"], atol=1e-5, rtol=1e-4)
    assert found["vae.decoder.stem.weight"].abs().max() > 0

    out = room.train(tmp_path / "run", "vae", recipe=changes)
    assert "perceptual" in read_log(out / "log.jsonl")[-1]
    assert not list((out / "model").glob("perceptual*"))
    shutil.rmtree(out / "model")
    save_file(vgg_weights(), vgg)
    with pytest.raises(ValueError, match=r"was made with another perceptual network"):
        room.train(out, "vae", recipe=changes)

    capsys.readouterr()
    out = room.train(tmp_path / "without", "vae", recipe={"perceptual": {"backbone": "vgg11"}})
    assert "without the perceptual loss: recipe.perceptual.weights" in capsys.readouterr().out
    assert "perceptual" not in read_log(out / "log.jsonl")[-1]


def test_starting_from_a_model(room, tmp_path):
    """The first step sees what the model makes; statistics are measured anew."""
    changes = {"recipe": {"vae": None, "init": str(room.vae)}}
    recipe, config = recipe_of(room, tmp_path, "vae", **changes)
    source = load_model(room.vae).vae
    video = to_float(some_batch(recipe, config)["video"])
    expected = source.decode(source.encode(video).mean)
    torch.testing.assert_close(recipe.reconstruct(video), expected, atol=1e-5, rtol=1e-5)
    out = room.train(tmp_path / "run", "vae", **changes)
    assert recipe.trained()
    tuned = load_model(out / "model").vae
    assert not torch.equal(tuned.decoder.stem.weight, source.decoder.stem.weight)
    assert not torch.equal(tuned.latent_std, source.latent_std)


def test_a_published_vae_is_fine_tuned_and_keeps_its_statistics(room, tmp_path):
    config = WanVAEConfig(
        base_dim=4,
        z_dim=4,
        dim_mult=(1, 1, 2, 2),
        num_res_blocks=1,
        latents_mean=(0.1, 0.2, 0.3, 0.4),
        latents_std=(1.0, 1.1, 1.2, 1.3),
    )
    source = tmp_path / "wan"
    save_model(source, Model(published_vae(config), load_model(room.vae).info))
    changes = {"recipe": {"vae": None, "init": str(source)}, "train": {"steps": 3}}
    out = room.train(tmp_path / "run", "vae", **changes)
    before, after = (load_model(folder).vae for folder in (source, out / "model"))
    assert after.config == before.config
    assert torch.equal(after.latent_std, before.latent_std)
    # A single frame passes some of its layers by; the run can be resumed all the same.
    images = {"num_frames": 1}
    steps = {"steps": 3, "checkpoint_interval": 2}
    out_2 = room.train(tmp_path / "images", "vae", data=images, **{**changes, "train": steps})
    shutil.rmtree(out_2 / "model")
    shutil.rmtree(out_2 / "checkpoints" / "step-00000003")
    room.train(out_2, "vae", data=images, **{**changes, "train": steps})
    assert load_model(out_2 / "model").info.num_frames == 1
    weight = "decoder.conv_in.weight"
    assert not torch.equal(*(vae.model.get_parameter(weight) for vae in (before, after)))
    changes["train"] = {"steps": 3, "activation_checkpointing": "block"}
    with pytest.raises(ValueError, match=r"know our own VAE only"):
        room.train(tmp_path / "other", "vae", **changes)
    changes["recipe"]["freeze_encoder"], changes["train"] = True, {"steps": 3}
    with pytest.raises(ValueError, match=r"recipe\.freeze_encoder knows our own VAE only"):
        room.train(tmp_path / "other", "vae", **changes)


def test_a_model_that_is_not_finite_is_no_start(room, tmp_path):
    shutil.copytree(room.vae, tmp_path / "vae")
    path = tmp_path / "vae" / "vae.safetensors"
    weights = load_file(path)
    weights["decoder.stem.weight"][0] = math.nan
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"has weights that are NaN or infinite"):
        room.train(tmp_path / "run", "vae", recipe={"vae": None, "init": str(tmp_path / "vae")})


def test_the_config_that_overfits_one_clip(room, tmp_path):
    manifest = tmp_path / "one-clip.jsonl"
    row = json.loads((room.folder / "train" / "manifest.jsonl").read_text().splitlines()[0])
    clip = (room.folder / "train" / row["path"]).resolve()
    manifest.write_text(json.dumps({"path": str(clip), "caption": "any text"}) + "\n")
    overrides = [f"out={tmp_path / 'run'}", f"data.manifest={manifest}", "data.num_frames=5"]
    overrides += ["data.height=16", "data.width=16", "train.steps=2", "logging.wandb=disabled"]
    train(load_config(CONFIGS / "overfit-vae.yaml", overrides))
    model = load_model(tmp_path / "run" / "model")
    assert (model.vae.temporal_factor, model.vae.spatial_factor) == (4, 8)


def test_latents_are_shown_as_histograms(room, tmp_path, monkeypatch):
    shown = {}
    monkeypatch.setattr(wandb, "Histogram", lambda values: ("histogram", values.shape))
    log = wandb.sdk.wandb_run.Run.log

    def note(self, values, **options):
        shown.update(values)
        plain = {k: v for k, v in values.items() if not isinstance(v, tuple)}
        return log(self, plain, **options)

    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log", note)
    room.train(tmp_path / "run", "gan", logging={"wandb": "offline"})
    assert shown["val/latents/std_of_channels"] == ("histogram", (4,))
    assert shown["val/latents/mean"] == (
        "histogram",
        (4 * 4 * 2 * 4 * 4,),
    )  # clips, channels, frames, ...
    assert math.isfinite(shown["train/grad_norm_discriminator"])


def test_dry_run_counts_the_adversary(room, tmp_path):
    text = plan(load_config(room.write(tmp_path / "run", "gan")))
    assert "discriminator parameters" in text
    plain = plan(load_config(room.write(tmp_path / "plain", "vae")))

    def flops(text):
        return float(
            next(x for x in text.splitlines() if x.startswith("FLOPs per step")).split()[3]
        )

    assert flops(text) > flops(plain)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"adversarial": {"discriminator": {"num_layers": 5}}}, r"needs 32x32; use fewer"),
        ({"perceptual": {"weights": "nowhere"}}, r"nowhere: no such file"),
        (
            {"perceptual": {"backbone": "vgg99", "weights": "x"}},
            r"backbone=vgg99: timm has no such",
        ),
        ({"vae": None}, r"recipe\.vae: missing"),
        ({"init": "some/model"}, r"recipe\.vae: comes with recipe\.init=some/model; leave it out"),
        ({"vae": None, "init": "nowhere"}, r"nowhere: no such folder"),
        ({"freeze_encoder": True}, r"freeze_encoder=true is for a VAE that has been trained"),
        (
            {"adversarial": {"start": 4}},
            r"recipe\.adversarial\.start: unknown key; did you mean start",
        ),
        ({"adversarial": {"r1_weight": -1}}, r"recipe\.adversarial\.r1_weight: got -1"),
        (
            {"adversarial": {"start_step": 12}},
            r"start_step=12 is after the last of train\.steps=12",
        ),
        ({"l1_weight": 0}, r"nothing asks for reconstructions"),
        ({"charbonnier_epsilon": -1}, r"recipe\.charbonnier_epsilon: got -1"),
    ],
)
def test_mistakes(room, tmp_path, recipe, message):
    with pytest.raises((ConfigError, ValueError, FileNotFoundError), match=message):
        room.train(tmp_path / "run", "gan", recipe=recipe)
    assert not (tmp_path / "run").exists()


def test_settings_in_the_run_folder_read_back(room, tmp_path):
    out = room.train(tmp_path / "run", "gan", train={"steps": 6})
    values = yaml.safe_load((out / "config.yaml").read_text())
    assert values["recipe"]["adversarial"]["start_step"] == 5
    assert load_config(out / "config.yaml").recipe.adversarial.discriminator.width == 4


def test_everything_trains_in_bfloat16(room, tmp_path):
    out = room.train(tmp_path / "run", "gan", train={"dtype": "bfloat16", "steps": 9})
    row = read_log(out / "log.jsonl")[-1]
    assert math.isfinite(row["discriminator"])
    vae = load_model(out / "model").vae
    assert {p.dtype for p in vae.parameters()} == {torch.float32}
