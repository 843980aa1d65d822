"""What a training step of the demo's DiT costs, piece by piece.

Medians of repeated runs after warm-up. On a GPU the same script gives its figures.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.timing import matmul_rate, median_ms
from dit.text import TextEncoder
from dit.transformer import DiT
from train.config import AdamWConfig, MuonConfig
from train.config_file import load_config
from train.config_recipes import DiTRecipeConfig
from train.optim import build_optimizer
from train.recipe import TrainedGroup

LATENTS = 32, 3, 8, 8  # of the demo's clips


def parts(config_path: Path, device: torch.device) -> tuple[DiT, TextEncoder, int]:
    """The networks of a DiT config, for latents like the demo's, and its batch size."""
    config = load_config(config_path, [])
    assert isinstance(config.recipe, DiTRecipeConfig)
    text = TextEncoder(config.recipe.text.resolve())
    dit = DiT(config.recipe.dit.resolve(LATENTS[0], text.width))
    for parameter in dit.parameters():
        if parameter.eq(0).all():
            nn.init.normal_(parameter, std=0.02)
    return dit.to(device), text.to(device), config.train.batch_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/world/dit.yaml"))
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    dit, text, batch_size = parts(options.config, device)
    x = torch.randn(batch_size, *LATENTS, device=device)
    t = torch.rand(batch_size, device=device)
    ids = text.tokenize(["a large red circle moving left on a blue background"] * batch_size).to(
        device
    )
    named = dict(nn.ModuleDict({"dit": dit, "text": text}).named_parameters())
    tokens = LATENTS[1] * LATENTS[2] * LATENTS[3] // 4

    def step(dtype: torch.dtype) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
            prediction = dit(x, t, *text(ids))
        prediction.float().square().mean().backward()

    def measure(name: str, run: Callable[[], object]) -> float:
        ms = median_ms({name: run}, options.repeats, device)[name]
        print(f"{name:<44}{ms:9.1f} ms", flush=True)
        return ms

    print(
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {options.config}"
    )
    print(
        f"batch {batch_size}, {batch_size * tokens} tokens, "
        f"{sum(p.numel() for p in named.values()):,} parameters"
    )
    measure("forward + backward, float32, eager", lambda: step(torch.float32))
    dit.use_attention("sdpa")
    measure("forward + backward, bfloat16, fused attention", lambda: step(torch.bfloat16))
    dit.use_attention("auto")
    eager = measure("forward + backward, bfloat16, eager", lambda: step(torch.bfloat16))
    begun = time.perf_counter()
    for block in dit.blocks:
        block.compile(dynamic=False)
    step(torch.bfloat16)
    print(f"{'(compiling the blocks)':<44}{time.perf_counter() - begun:9.1f} s")
    compiled = measure("forward + backward, bfloat16, compiled", lambda: step(torch.bfloat16))
    adamw = build_optimizer([TrainedGroup("", named)], AdamWConfig(lr=1e-9))
    measure("AdamW step", adamw.step)
    muon_config = MuonConfig(lr=1e-9, muon_lr=1e-9)
    muon = build_optimizer([TrainedGroup("", named)], muon_config, list(dit.blocks))
    measure("Muon + AdamW step", muon.step)
    flops = 3 * batch_size * dit.config.num_flops(tokens, ids.shape[1])
    reached, best = flops / compiled * 1000, matmul_rate(torch.bfloat16, device)
    print(
        f"the DiT's matrix products, compiled: {reached / 1e9:.0f} GFLOP/s, {reached / best:.0%} of "
        f"what one large product reaches"
    )
    print(f"compiled / eager: {compiled / eager:.2f}")
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
