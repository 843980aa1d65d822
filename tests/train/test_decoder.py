"""A VAE's decoder by itself: trained on alone, and given to a model of the same latents."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from data.video import to_float
from dit.diffusers_vae import published_vae
from dit.diffusers_vae_config import WanVAEConfig
from dit.vae import VideoVAE
from sample.model import Model, load_model, save_model
from sample.processes import Ranks
from train.config_file import load_config
from train.parallel import parallelize
from train.plan_recipe import recipe_on_meta
from train.setup import build_recipe, open_data

FROZEN = {"vae": None, "freeze_encoder": True}


def test_a_decoder_is_trained_on_alone(room, tmp_path):
    """Latents stay what they are, so that models of them go on; a resumed run ends as one without a
    break does."""
    changes = {
        "recipe": {**FROZEN, "init": str(room.vae)},
        "train": {"steps": 4, "checkpoint_interval": 2},
    }
    config = load_config(room.write(tmp_path / "recipe", "vae", **changes))
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    recipe = build_recipe(config, open_data(config), ranks)
    parallelize(recipe, ranks)
    clips = recipe.dataset()
    batch = recipe.make_batch(clips.collate([clips[g] for g in range(4)]), 0)
    assert {name.split(".")[1] for name in recipe.trained()} == {"decoder"}
    losses, _ = recipe(batch)
    losses.sum().backward()
    assert all(p.grad is None for p in recipe.vae.encoder.parameters())
    assert all(p.grad is not None for p in recipe.vae.decoder.parameters())
    out = room.train(tmp_path / "run", "vae", **changes)
    before, after = (load_model(folder).vae for folder in (room.vae, out / "model"))
    video = to_float(batch["video"])
    latents = before.encode(video)
    assert torch.equal(after.encode(video).mean, latents.mean)
    assert torch.equal(after.encode(video).std, latents.std)
    assert not torch.equal(after.decode(latents.mean), before.decode(latents.mean))
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    room.train(out, "vae", **changes)
    again = load_model(out / "model").vae.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in after.state_dict().items())


def test_a_model_is_trained_on_with_another_decoder(room, tmp_path):
    """As its latents stay what they are, so does what the DiT learns, to the bit."""
    own = room.train(tmp_path / "own", "dit", train={"steps": 2}) / "model"
    cache = {"latent_cache": str(tmp_path / "latents")}

    def vae(name, **recipe):
        changes = {"recipe": {"vae": None, "init": str(own), **recipe}, "train": {"steps": 2}}
        return room.train(tmp_path / name, "vae", **changes) / "model"

    def trained(name, decoder=None):
        # What the test's own config has for a DiT from nothing comes with init.
        recipe = {"init": str(own), **dict.fromkeys(("dit", "text", "objective")), **cache}
        recipe["vae"] = None if decoder is None else str(decoder)
        changes = {"recipe": recipe, "train": {"steps": 3}, "data": {"random_start": False}}
        return room.train(tmp_path / name, "dit", **changes)

    def weights(folder, name="dit"):
        return load_file(folder / f"{name}.safetensors")

    def same(a, b):
        assert a.keys() == b.keys()
        return all(torch.equal(value, b[name]) for name, value in a.items())

    decoder = vae("decoder", freeze_encoder=True)
    plain, other = trained("plain") / "model", trained("other", decoder) / "model"
    assert same(weights(other), weights(plain))
    assert not same(weights(other), weights(own))
    assert same(weights(other, "vae"), weights(decoder, "vae"))
    assert not same(weights(other, "vae"), weights(own, "vae"))
    assert load_model(other).info.provenance["vae"] == str(decoder)
    with pytest.raises(ValueError, match=r"recipe\.vae=\S+whole/model has other latents than the"):
        trained("other-latents", vae("whole"))
    sizes = {"base_dim": 4, "z_dim": 4, "dim_mult": (1, 1, 2, 2), "num_res_blocks": 1}
    statistics = {"latents_mean": (0.0,) * 4, "latents_std": (1.0,) * 4}
    wan = published_vae(WanVAEConfig(**sizes, **statistics))
    save_model(tmp_path / "wan", Model(wan, load_model(room.vae).info))
    with pytest.raises(ValueError, match=r"where both VAEs are our own only; leave it out"):
        trained("published", tmp_path / "wan")
    with pytest.raises(FileNotFoundError, match=r"not-yet: no such folder"):
        trained("later", tmp_path / "not-yet")
    counted, _ = recipe_on_meta(load_config(tmp_path / "later.yaml"))
    assert isinstance(counted.vae, VideoVAE)
