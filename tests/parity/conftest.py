"""Tiny folders of every kind of Wan and of other video VAEs, saved by diffusers and transformers
themselves."""

from pathlib import Path
from typing import Literal

import pytest
import torch

from sample.wan_import import import_wan
from train.cli import main

Kind = Literal["t2v", "ti2v", "a14b"]
SIZE = {"fps": 8, "num_frames": 5, "height": 32, "width": 32}


def make_tokenizer():
    """One token a letter, `</s>` at the end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "▁abcdefghijklmnopqrstuvwxyzé&"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -1.0) for c in letters)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_transformer(channels: int, seed: int):
    """No layer of it at zero, where two different networks would agree."""
    from diffusers import WanTransformer3DModel

    transformer = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=channels,
        out_channels=channels,
        text_dim=16,
        freq_dim=32,
        ffn_dim=96,
        num_layers=2,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            value = 0.2 * torch.randn(parameter.shape, generator=generator)
            # With gains near 1 attention is not uniform, and the gradients of q and k are not tiny.
            parameter.copy_(value + ("norm" in name and name.endswith("weight")))
    return transformer.eval()


def make_vae(kind: Kind):
    from diffusers import AutoencoderKLWan

    channels = 6 if kind == "ti2v" else 4
    options = {}
    if kind == "ti2v":  # the residual VAE of Wan 2.2, 16x in space
        options = dict(is_residual=True, patch_size=2, in_channels=12, out_channels=12)
        options.update(scale_factor_spatial=16, decoder_base_dim=8)
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=channels,
        dim_mult=[1, 1, 2, 2],
        num_res_blocks=1,
        latents_mean=[0.1 * c for c in range(channels)],
        latents_std=[1.0 + 0.1 * c for c in range(channels)],
        **options,
    ).eval()


def make_scheduler(name: str):
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=3.0)
    return UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0
    )


def save_wan(path: Path, kind: Kind, scheduler: str = "unipc", shard: str = "10GB") -> Path:
    """A pipeline of random weights, saved by diffusers."""
    from diffusers import WanPipeline
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    vae = make_vae(kind)
    text = UMT5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0
    )
    pipeline = WanPipeline(
        tokenizer=make_tokenizer(),
        text_encoder=UMT5EncoderModel(text).eval(),
        vae=vae,
        scheduler=make_scheduler(scheduler),
        transformer=make_transformer(vae.config.z_dim, 1),
        transformer_2=make_transformer(vae.config.z_dim, 2) if kind == "a14b" else None,
        boundary_ratio=0.875 if kind == "a14b" else None,
        expand_timesteps=kind == "ti2v",
    )
    pipeline.save_pretrained(path, max_shard_size=shard)
    return path


@pytest.fixture(scope="session")
def wan_folders(tmp_path_factory):
    """diffusers' folder and the model folder imported from it, by kind and scheduler."""
    made: dict[tuple[Kind, str], tuple[Path, Path]] = {}

    def folders(kind: Kind, scheduler: str = "unipc") -> tuple[Path, Path]:
        if (kind, scheduler) not in made:
            root = tmp_path_factory.mktemp(f"{kind}-{scheduler}")
            theirs = save_wan(root / "theirs", kind, scheduler, shard="60KB")
            import_wan(theirs, root / "ours", SIZE)
            made[kind, scheduler] = theirs, root / "ours"
        return made[kind, scheduler]

    return folders


# A family of video VAEs: diffusers' class, and settings for a tiny one.
VAES = {
    "hunyuan_video": (
        "AutoencoderKLHunyuanVideo",
        dict(
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
        ),
    ),
    "cogvideox": (
        "AutoencoderKLCogVideoX",
        dict(
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            scaling_factor=0.7,
        ),
    ),
    "ltx_video": (
        "AutoencoderKLLTXVideo",
        dict(
            latent_channels=6,
            block_out_channels=(8, 8, 16, 16),
            decoder_block_out_channels=(8, 8, 16, 16),
            layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 5,
            scaling_factor=0.8,
        ),
    ),
    "mochi": (
        "AutoencoderKLMochi",
        dict(
            latent_channels=4,
            encoder_block_out_channels=(64,) * 4,
            decoder_block_out_channels=(64,) * 4,
            layers_per_block=(1,) * 5,
            latents_mean=(-0.5, 0.0, 0.3, 1.0),
            latents_std=(0.5, 1.0, 1.5, 2.0),
            scaling_factor=0.9,
        ),
    ),
}
VAES["cogvideox-1.5"] = (
    VAES["cogvideox"][0],
    {**VAES["cogvideox"][1], "invert_scale_latents": True},
)
LTX_LATER = {
    **VAES["ltx_video"][1],
    "decoder_block_out_channels": (8, 16, 32),
    "decoder_layers_per_block": (1,) * 4,
    "decoder_spatio_temporal_scaling": (True,) * 3,
    "decoder_inject_noise": (False,) * 4,
    "upsample_residual": (True,) * 3,
    "upsample_factor": (2,) * 3,
    "timestep_conditioning": True,
}
VAES["ltx_video-0.9.1"] = (
    "AutoencoderKLLTXVideo",
    {**LTX_LATER, "decoder_inject_noise": (True, True, True, False)},
)
VAES["ltx_video-0.9.5"] = (
    "AutoencoderKLLTXVideo",
    {
        **LTX_LATER,
        "block_out_channels": (8, 8, 16, 32, 32),
        "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
        "spatio_temporal_scaling": (True,) * 4,
        "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
        "spatial_compression_ratio": 32,
        "temporal_compression_ratio": 8,
    },
)


def make_public_vae(family: str):
    """No parameter of it at zero, or all at one."""
    import diffusers

    if family.startswith("wan"):
        vae = make_vae("ti2v" if family == "wan-2.2" else "t2v")
    else:
        name, settings = VAES[family]
        vae = getattr(diffusers, name)(**settings)
    with torch.no_grad():
        for parameter in vae.parameters():
            if parameter.ndim and parameter.min() == parameter.max():
                parameter.add_(0.2 * torch.randn(parameter.shape))
        if family.startswith("ltx"):
            vae.latents_mean.normal_()
            vae.latents_std.uniform_(0.5, 2)
    return vae.eval()


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory):
    """A family's folder, saved by diffusers."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            torch.manual_seed(0)
            made[family] = tmp_path_factory.mktemp("vaes") / family
            make_public_vae(family).save_pretrained(made[family])
        return made[family]

    return folder


@pytest.fixture
def zoetrope(capsys):
    """Runs a command through the real entry point; gives its status, output and errors."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        return stopped.value.code, *capsys.readouterr()

    return run
