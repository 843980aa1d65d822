"""How long a checkpoint keeps the training waiting: written at once, and by a thread.

A stack of square matrices is trained with AdamW and EMA: a checkpoint has 16 bytes per parameter.
Steps beside a write are compared with steps of the same run without one.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch import nn

from sample.processes import Ranks, pick_device
from train.checkpoint import TrainState
from train.checkpoint_writer import Checkpointer
from train.config import AdamWConfig, EMAConfig, TrainConfig
from train.ema import EMA
from train.optim import build_optimizer, step_optimizer
from train.recipe import TrainedGroup


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=int, default=32, help="of parameters")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=256, help="rows per step")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured, else /tmp")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = pick_device(options.device)
    depth = max(1, options.millions * 10**6 // options.width**2)
    layers = [nn.Linear(options.width, options.width, bias=False) for _ in range(depth)]
    network = nn.Sequential(*layers).to(device)
    groups = [TrainedGroup("", dict(network.named_parameters()))]
    config = TrainConfig(steps=1, batch_size=1, optimizer=AdamWConfig(lr=1e-4))
    optimizer = build_optimizer(groups, config.optimizer)
    ema = EMA(groups[0].parameters, EMAConfig())
    state = TrainState(network, groups[0].parameters, groups, optimizer, ema)
    inputs = torch.randn(options.batch, options.width, device=device)

    def step() -> float:
        begin = time.perf_counter()
        network(inputs).square().mean().backward()
        step_optimizer(optimizer, 1e-4, 0)
        optimizer.zero_grad()
        ema.update(0)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    for _ in range(3):
        step()
    size = 16 * depth * options.width**2 / 2**30
    print(f"{size:.2f} GB per checkpoint, {device}, {torch.get_num_threads()} threads")
    print(
        f"{'':<10}{'waits s':>10}{'writes s':>10}{'step s':>10}{'beside a write':>16}", flush=True
    )
    for name, wait in (("at once", True), ("thread", False)):
        waits, writes, alone, beside = [], [], [], []
        with (
            TemporaryDirectory(dir=options.folder) as folder,
            Checkpointer(Path(folder), config, Ranks(0, 1, device, None)) as checkpoints,
        ):
            for number in range(options.saves):
                alone += [step() for _ in range(3)]
                checkpoints.save(number, state, {}, wait=wait)
                waits.append(checkpoints.blocked_seconds)
                while checkpoints.writing:
                    beside.append(step())
                checkpoints.finish()
                writes.append(checkpoints.write_seconds)
        figures = [f"{median(values):.3f}" for values in (waits, writes, alone)]
        near = f"{median(beside):.3f}" if beside else ""
        print(f"{name:<10}{figures[0]:>10}{figures[1]:>10}{figures[2]:>10}{near:>16}", flush=True)


if __name__ == "__main__":
    main()
