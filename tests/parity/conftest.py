"""Tiny folders of every kind of Wan, saved by diffusers and transformers themselves."""

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


@pytest.fixture
def zoetrope(capsys):
    """Runs a command through the real entry point; gives its status, output and errors."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        return stopped.value.code, *capsys.readouterr()

    return run
