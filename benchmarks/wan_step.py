"""Our training and sampling steps against diffusers' WanTransformer3DModel, in one run.

Same sizes, precision and inputs (bfloat16 is autocast for both), and the same share of the machine:
the two take turns. Both are also compared with what one large matrix product reaches.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from benchmarks.timing import matmul_rate, median_ms
from dit.transformer import DiT, DiTConfig
from sample.wan_config import transformer_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Size:
    """A network and a batch for it."""

    config: DiTConfig
    latents: tuple[int, int, int, int]  # clips, frames, height, width
    num_context: int

    def num_tokens(self) -> int:
        """Of one clip."""
        _, f, h, w = self.latents
        return f * h * w // 4

    def num_flops(self) -> int:
        """Of a forward pass of the batch."""
        return self.latents[0] * self.config.num_flops(self.num_tokens(), self.num_context)


def size(dim: int, num_blocks: int, num_heads: int, mlp_dim: int, context_dim: int) -> DiTConfig:
    return DiTConfig(
        in_channels=16,
        context_dim=context_dim,
        dim=dim,
        num_blocks=num_blocks,
        num_heads=num_heads,
        mlp_dim=mlp_dim,
    )


SIZES = {
    "the demo's DiT": Size(size(192, 6, 6, 768, 64), (64, 3, 8, 8), 24),
    "the 130M preset's blocks, images": Size(size(768, 3, 12, 3584, 512), (4, 1, 32, 32), 77),
    "the 130M preset's blocks, clips": Size(size(768, 3, 12, 3584, 512), (1, 5, 32, 32), 77),
    "Wan 1.3B's blocks": Size(size(1536, 2, 12, 8960, 4096), (1, 3, 30, 52), 512),
}


def both_networks(config: DiTConfig, device: torch.device) -> tuple[DiT, WanTransformer3DModel]:
    """Ours and theirs, with nothing at zero; not with the same numbers, which cost nothing."""
    theirs = WanTransformer3DModel.from_config(transformer_json(config))
    assert isinstance(theirs, WanTransformer3DModel)
    ours = DiT(config)
    for parameter in (*ours.parameters(), *theirs.parameters()):
        if parameter.eq(0).all():
            nn.init.normal_(parameter, std=0.02)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    return ours.to(device), theirs.to(device)


def steps(
    networks: tuple[nn.Module, nn.Module], size: Size, device: torch.device, dtype: torch.dtype
) -> dict[str, dict[str, Callable[[], object]]]:
    """The calls to time: ours and theirs, training and sampling."""
    ours, theirs = networks
    b, f, h, w = size.latents
    x = torch.randn(b, size.config.in_channels, f, h, w, device=device)
    t = torch.rand(b, device=device)
    context = torch.randn(b, size.num_context, size.config.context_dim, device=device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16)

    def theirs_forward() -> Tensor:
        return theirs(x, 1000 * t, context, return_dict=False)[0]

    def training(network: nn.Module, forward: Callable[[], Tensor]) -> None:
        network.zero_grad()
        with autocast:
            prediction = forward()
        prediction.float().square().mean().backward()

    def sampling(forward: Callable[[], Tensor]) -> None:
        with torch.no_grad(), autocast:
            forward()

    with torch.no_grad(), autocast:
        prepared: Any = ours.prepare_context(context)  # type: ignore[operator]
    return {
        "training": {
            "ours": lambda: training(ours, lambda: ours(x, t, context)),
            "theirs": lambda: training(theirs, theirs_forward),
        },
        "sampling": {
            "ours": lambda: sampling(lambda: ours(x, t, prepared)),
            "theirs": lambda: sampling(theirs_forward),
        },
    }


def compare(
    name: str, dtype: str, compiled: bool, options: argparse.Namespace, rate: float
) -> None:
    """Prints a line for training and one for sampling."""
    size, device = SIZES[name], torch.device(options.device)
    networks = both_networks(size.config, device)
    if compiled:
        for network in networks:
            for block in network.blocks:
                block.compile(dynamic=False)
    for kind, runs in steps(networks, size, device, DTYPES[dtype]).items():
        ms = median_ms(runs, options.repeats, device)
        flops = size.num_flops() * (3 if kind == "training" else 1)
        # Sampling computes the text's keys and values once; theirs does at every step.
        share = {who: flops / (each / 1000) / rate for who, each in ms.items()}
        how = "compiled" if compiled else "eager"
        print(
            f"{name:<34}{kind:<10}{dtype:<10}{how:<10}{ms['ours']:>9.1f}{ms['theirs']:>9.1f}"
            f"{ms['theirs'] / ms['ours']:>8.2f}{share['ours']:>8.0%}{share['theirs']:>8.0%}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    rates = {name: matmul_rate(DTYPES[name], device) for name in options.dtypes}
    for name, rate in rates.items():
        print(f"one large {name} matrix product: {rate / 1e9:.0f} GFLOP/s")
    print(
        f"\n{'':<34}{'':<10}{'':<10}{'':<10}{'ours ms':>9}{'theirs':>9}{'ratio':>8}"
        f"{'ours':>8}{'theirs':>8} of the matmul rate"
    )
    for name in options.sizes:
        for dtype in options.dtypes:
            for compiled in (False, True) if options.compiled else (False,):
                compare(name, dtype, compiled, options, rates[dtype])


if __name__ == "__main__":
    main()
