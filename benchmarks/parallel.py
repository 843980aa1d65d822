"""What spreading a training step over processes costs, and what checkpoints and logging cost.

Every layout is a short real run under torchrun with the same global batch; a process has one thread, so
that two of them have twice as much to compute with where there are two cores. Medians of the steps
after the first third. Ratios within one run of this script count, not its seconds.

    python -m benchmarks.parallel [--steps 30] [--processes 1 2 4]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from data.world_files import WorldSpec, write_world

DIT = {"dim": 256, "num_blocks": 6, "num_heads": 4, "mlp_dim": 1024}
TEXT = {"context_length": 24, "width": 64, "num_layers": 1, "num_heads": 2, "trainable": True}
VAE = {"latent_channels": 16, "widths": [32, 64], "factors": [[2, 2], [2, 2]]}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "replicas (DDP)": (2, {}),
    "FSDP2": (2, {"parallel": {"shard": 2}}),
    "FSDP2, 2 micro-batches": (2, {"parallel": {"shard": 2}, "grad_accum": 2}),
    "context, ulysses": (2, {"parallel": {"context": 2}}),
    "context, gather": (2, {"parallel": {"context": 2, "context_method": "gather"}}),
    "one process, blocks anew": (1, {"activation_checkpointing": "block"}),
    "one process, selected anew": (1, {"activation_checkpointing": "selective"}),
    "replicas (DDP), 4": (4, {}),
    "HSDP 2x2": (4, {"parallel": {"shard": 2}}),
    "context 2 x FSDP2 2": (4, {"parallel": {"shard": 2, "context": 2}}),
}


# `python -m train CONFIG` that writes down how long it was busy with its log.
TIMED = """
import atexit, json, sys, time
from train import loop
from train.cli import main

spent = {"step": [], "row": []}

def timed(owner, name, key):
    method = getattr(owner, name)
    def wrapper(*arguments, **options):
        begin = time.perf_counter()
        try:
            return method(*arguments, **options)
        finally:
            spent[key].append(time.perf_counter() - begin)
    setattr(owner, name, wrapper)

timed(loop.Window, "add", "step")
for name in ("add", "begin", "end_with"):
    timed(loop.Meter, name, "step")
timed(loop.Meter, "take", "row")
for name in ("row", "say"):
    timed(loop.RunLog, name, "row")
atexit.register(lambda: open(sys.argv[2], "w").write(json.dumps(spent)))
main(["train", sys.argv[1]])
"""


def config(folder: Path, out: str, steps: int, recipe: dict[str, Any], **train: Any) -> Path:
    """A run's YAML file."""
    values = {
        "out": str(folder / out),
        "device": "auto",
        "data": {
            "manifest": str(folder / "world" / "manifest.jsonl"),
            "num_frames": 9,
            "height": 64,
            "width": 64,
            "fps": 8.0,
            "random_start": False,
        },
        "recipe": recipe,
        "train": {
            "steps": steps,
            "batch_size": 8,
            "dtype": "float32",
            "threads": 1,
            "optimizer": {"kind": "adamw", "lr": 1e-4},
            "checkpoint_interval": 10**6,
            **train,
        },
        "logging": {
            "interval": 1,
            "val_interval": 10**6,
            "num_val_clips": 1,
            "sample_interval": 10**6,
            "num_samples": 0,
            "wandb": "disabled",
            "peak_tflops": 1.0,
        },
    }
    path = folder / f"{out}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run(path: Path, processes: int, *program: str) -> list[dict[str, Any]]:
    """Trains, and gives the rows of log.jsonl."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*command, f"--nproc-per-node={processes}", *(program or ("-m", "train", str(path)))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{path}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    out = Path(yaml.safe_load(path.read_text())["out"])
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def seconds_per_step(rows: list[dict[str, Any]]) -> float:
    """The median, from the times at which steps were done."""
    times = [row["seconds"] for row in rows]
    steps = [after - before for before, after in zip(times, times[1:])]
    return statistics.median(steps[len(steps) // 3 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2, 4])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec = WorldSpec(64, 0, "train", 1, height=64, width=64, num_frames=9, fps=8.0)
        write_world(folder / "world", spec)
        vae = {"kind": "vae", "vae": VAE, "num_statistics_clips": 8}
        run(config(folder, "vae", 2, vae), 1)
        dit = {"kind": "dit", "vae": str(folder / "vae" / "model"), "dit": DIT, "text": TEXT}
        dit |= {"objective": {"kind": "flow"}, "latent_cache": str(folder / "latents")}

        print(f"{'':28}{'processes':>10}{'ms/step':>10}{'speed':>8}{'MFU of 1 TFLOP/s each':>24}")
        base = None
        for number, (label, (processes, train)) in enumerate(LAYOUTS.items()):
            if processes not in given.processes:
                continue
            rows = run(config(folder, f"layout-{number}", given.steps, dit, **train), processes)
            seconds = seconds_per_step(rows)
            base = base or seconds
            mfu = statistics.median(row["mfu"] for row in rows[len(rows) // 3 :])
            print(
                f"{label:28}{processes:>10}{1000 * seconds:>10.0f}{base / seconds:>8.2f}{mfu:>23.1%}",
                flush=True,
            )
        measure_checkpoints(folder, dit, given.steps)
        measure_logging(folder, dit, given.steps)


def measure_checkpoints(folder: Path, dit: dict[str, Any], steps: int) -> None:
    print("\ncheckpoints: seconds that one keeps the training waiting, and that it takes to write")
    for label, beside in (("beside training", True), ("while it waits", False)):
        often = {"checkpoint_interval": 5, "async_checkpoints": beside}
        rows = run(config(folder, f"checkpoint-{beside}", steps, dit, **often), 1)
        kept = [row for row in rows[:-1] if row.get("checkpoint_seconds")]
        waited = statistics.median(row["checkpoint_seconds"] for row in kept)
        wrote = statistics.median(row["checkpoint_write_seconds"] for row in kept)
        share = waited / (waited + 1000 * seconds_per_step(rows))
        print(f"{label:28}{waited:>10.4f}{wrote:>10.4f}   {share:.3%} of 1,000 steps")


def measure_logging(folder: Path, dit: dict[str, Any], steps: int) -> None:
    path, out = config(folder, "logging", steps, dit), folder / "spent.json"
    (folder / "timed.py").write_text(TIMED)
    rows = run(path, 1, str(folder / "timed.py"), str(path), str(out))
    spent = json.loads(out.read_text())
    each, row = sum(spent["step"]) / steps, sum(spent["row"]) / steps
    share = (each + row / 50) / seconds_per_step(rows)
    print(
        f"\nlogging: {1e6 * each:.0f} us a step and {1e3 * row:.2f} ms a row, {share:.3%} of the time "
        "with a row every 50 steps"
    )


if __name__ == "__main__":
    main()
