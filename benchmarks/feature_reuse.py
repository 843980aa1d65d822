"""What feature reuse saves and what it costs in likeness, against full sampling of the same noise.

The error is that of the final latents, as a share of their standard deviation; for scale, the first
row after full sampling has it for another seed, that is, for another video of the same text.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from sample.pipeline import TextToVideo

PROMPTS = [
    "a large red circle moving left on a blue background",
    "a small green square moving up on a black background",
    "a yellow triangle moving right on a gray background",
    "a blue circle and a red square",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("runs/demo/model"))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.2, 0.4])
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    parser.add_argument("--device")
    options = parser.parse_args()
    if not options.model.is_dir():
        print(f"{options.model}: no such model folder; `make demo` makes one. Nothing measured")
        return
    pipeline = TextToVideo.from_folder(options.model, options.device)

    def sample(reuse: float | None, first_seed: int = 0) -> tuple[Tensor, float]:
        begun = time.perf_counter()
        latents = pipeline(
            options.prompts,
            steps=options.steps,
            guidance=options.guidance,
            seeds=range(first_seed, first_seed + len(options.prompts)),
            reuse=reuse,
            output="latents",
        )
        return latents, time.perf_counter() - begun

    sample(None)  # warm-up
    full, full_seconds = sample(None)

    def report(name: str, latents: Tensor, seconds: float) -> None:
        error = (latents - full).square().mean().sqrt() / full.std()
        skipped = pipeline.work.num_skipped / pipeline.work.num_evaluations
        print(
            f"{name:<20}{skipped:>10.1%}{full_seconds / seconds:>10.2f}{error:>10.3f}", flush=True
        )

    print(f"torch {torch.__version__}, {pipeline.device}, {torch.get_num_threads()} threads")
    print(f"{options.model}, {len(options.prompts)} clips, {options.steps} steps")
    print(f"{'threshold':<20}{'skipped':>10}{'speed':>10}{'error':>10}")
    report("off", full, full_seconds)
    report("off, other seeds", *sample(None, first_seed=1000))
    for threshold in options.thresholds:
        report(f"{threshold:g}", *sample(threshold))


if __name__ == "__main__":
    main()
