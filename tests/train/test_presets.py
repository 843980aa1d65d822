"""The presets: parameters as their names claim, figures in their comments as computed."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from dit.discriminator import PatchDiscriminator
from dit.transformer import DiT, DiTConfig
from dit.vae import VideoVAE
from sample.wan_config import transformer_json
from train.config_file import load_config
from train.config_recipes import DiTRecipeConfig, VAERecipeConfig
from train.plan import plan

FOLDER = Path(__file__).parents[2] / "configs" / "presets"
WAN_TEXT = 4096  # width of Wan's text states
# name: parameters it claims, latent channels, pixels that are one latent, parameters of Wan's own
PRESETS = {
    "130m": (130e6, 16, (4, 8, 8), None),
    "1.3b": (1.3e9, 16, (4, 8, 8), 1_418_996_800),
    "5b": (5e9, 48, (4, 16, 16), 4_999_787_712),
    "14b": (14e9, 16, (4, 8, 8), 14_288_491_584),
}
# name: latent channels
VAES = {"vae-4x8x8": 16, "vae-4x16x16": 48, "vae-8x32x32": 128}


def preset(name):
    path = FOLDER / f"{name}.yaml"
    config = load_config(path)
    assert isinstance(config.recipe, DiTRecipeConfig)
    return config, config.recipe, path.read_text()


def count(network):
    return sum(p.numel() for p in network.parameters())


def on_meta(config: DiTConfig) -> DiT:
    with torch.device("meta"):
        return DiT(config)


def wans(config: DiTConfig) -> WanTransformer3DModel:
    with torch.device("meta"):
        return WanTransformer3DModel.from_config(transformer_json(config))


def test_every_preset_is_tested():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*PRESETS, *VAES}


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_what_the_name_claims(name):
    claimed, channels, _, of_wan = PRESETS[name]
    _, recipe, text = preset(name)
    parameters = count(on_meta(recipe.dit.resolve(channels, recipe.text.width)))
    # Wan's 1.3B has 1.42B, which its comment says; the others are within 3%.
    assert abs(parameters / claimed - 1) < (0.1 if name == "1.3b" else 0.03)
    assert f"{parameters:,} parameters" in text
    if of_wan is not None:
        config = recipe.dit.resolve(channels, WAN_TEXT)
        assert count(on_meta(config)) == count(wans(config)) == of_wan
        assert f"{of_wan:,} with Wan's own" in text


@pytest.mark.parametrize("name", PRESETS)
def test_clips_fit_and_figures_in_comments_are_right(name):
    _, channels, factors, _ = PRESETS[name]
    config, recipe, text = preset(name)
    clip, network = config.data, recipe.dit.resolve(channels, recipe.text.width)
    assert (clip.num_frames - 1) % factors[0] == 0
    frames = (clip.num_frames - 1) // factors[0] + 1
    tokens = frames
    for size, factor, patch in zip((clip.height, clip.width), factors[1:], network.patch_size[1:]):
        assert size % (factor * patch) == 0
        tokens *= size // (factor * patch)
    flops = network.num_flops(tokens, recipe.text.context_length)
    assert f"{tokens:,} tokens a clip" in text
    per_token = re.search(r"in all ([\d.]+) GFLOPs a token", text)
    assert per_token is not None
    assert abs(float(per_token[1]) / (flops / tokens / 1e9) - 1) < 0.01
    parts = [float(x) for x in re.findall(r"#   \S.* ([\d.]+)(?: GFLOPs)?\n", text)]
    assert len(parts) == 3
    assert abs(sum(parts) / float(per_token[1]) - 1) < 0.01
    per_clip = re.search(r"([\d.]+) TFLOPs a clip", text)
    assert per_clip is not None
    assert abs(float(per_clip[1]) / (3 * flops / 1e12) - 1) < 0.05


def test_the_smallest_one_passes_a_dry_run(room, tmp_path):
    """With this test's clips and VAE in place of what the preset asks for."""
    overrides = {
        "out": tmp_path / "run",
        "data.manifest": room.folder / "train" / "manifest.jsonl",
        "data.validation": room.folder / "held-out" / "manifest.jsonl",
        "data.num_frames": 5,
        "data.height": 16,
        "data.width": 16,
        "data.fps": 8,
        "recipe.vae": room.vae,
        "recipe.latent_cache": tmp_path / "latents",
        "recipe.text.checkpoint": "null",
        "recipe.text.trainable": "true",
        "recipe.text.num_layers": 1,
    }
    pairs = [f"{key}={value}" for key, value in overrides.items()]
    lines = plan(load_config(FOLDER / "130m.yaml", pairs)).splitlines()
    parameters = next(line for line in lines if line.startswith("dit parameters"))
    assert 120e6 < int(parameters.split()[2].replace(",", "")) < 135e6


@pytest.mark.parametrize("name", VAES)
def test_vaes_compress_as_their_names_say(name):
    path = FOLDER / f"{name}.yaml"
    config = load_config(path)
    assert isinstance(config.recipe, VAERecipeConfig)
    with torch.device("meta"):
        vae = VideoVAE(config.recipe.vae)
        discriminator = PatchDiscriminator(config.recipe.adversarial.discriminator)
    space = vae.spatial_factor
    assert name == f"vae-{vae.temporal_factor}x{space}x{space}"
    assert vae.latent_channels == VAES[name]
    text = path.read_text()
    assert f"{count(vae):,} parameters, and {count(discriminator):,} in the disc" in text
    for bucket in config.data.buckets:
        vae.latent_shape(bucket.num_frames, bucket.height, bucket.width)


@pytest.mark.parametrize("name", VAES)
def test_vaes_pass_a_dry_run(room, tmp_path, name):
    """With this test's clips, and without the perceptual network's weights."""
    overrides = {
        "out": tmp_path / "run",
        "data.manifest": room.folder / "train" / "manifest.jsonl",
        "data.validation": room.folder / "held-out" / "manifest.jsonl",
        "recipe.perceptual": "null",
        "data.buckets": "[{num_frames: 1, height: 64, width: 64}]",
    }
    pairs = [f"{key}={value}" for key, value in overrides.items()]
    text = plan(load_config(FOLDER / f"{name}.yaml", pairs))
    assert "vae encoder parameters" in text
    assert "FLOPs per step" in text
