"""Memory and time of a long video, made in windows, while it is made and while it is decoded.

Resident memory of the whole process every ten seconds of video (on a GPU: what tensors hold there at
most since the line before). It should not grow with the length.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.timing import resident
from data.video_write import write_chunks
from sample.pipeline import TextToVideo
from sample.roll import decoded, plan_windows, roll
from sample.schedule import Schedule

EVERY = 10.0  # seconds of video


def memory(device: torch.device) -> float:
    """MB in use now, or on a GPU the peak since the last call."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 1e6
    return resident("VmRSS") / 1e6


def teller(title: str, pipeline: TextToVideo, num_frames: int) -> Callable[[int], None]:
    """What prints a line whenever, of so many frames, another ten seconds are there."""
    print(title)
    begun, last = time.perf_counter(), 0
    every = EVERY * pipeline.info.fps

    def tell(frames: int) -> None:
        nonlocal last
        if frames // every > last // every or last < num_frames <= frames:
            seconds, spent = frames / pipeline.info.fps, time.perf_counter() - begun
            print(f"{seconds:>10.1f} s{memory(pipeline.device):>14.1f}{spent:>12.1f}", flush=True)
        last = frames

    return tell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("runs/demo/model"))
    parser.add_argument("--prompt", default="a red circle bouncing around on a gray background")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device")
    options = parser.parse_args()
    if not options.model.is_dir():
        print(f"{options.model}: no such model folder; `make demo` makes one. Nothing measured")
        return
    pipeline = TextToVideo.from_folder(options.model, options.device)
    fps, factor = pipeline.info.fps, pipeline.vae.temporal_factor
    num_frames = round(options.minutes * 60 * fps)
    try:
        plan = plan_windows(pipeline, num_frames)
    except ValueError as error:
        print(f"{options.model}: {error}. Nothing measured")
        return
    print(f"torch {torch.__version__}, {pipeline.device}, {torch.get_num_threads()} threads")
    print(
        f"{options.model}, {num_frames} frames, {plan.num_windows} windows, {options.steps} steps"
    )
    print(f"{'video':>12}{'memory, MB':>14}{'time, s':>12}")
    with tempfile.TemporaryDirectory() as name:
        folder, schedule = Path(name) / "windows", Schedule((0.0,), (options.prompt,))
        tell = teller("made", pipeline, num_frames)
        for window in roll(pipeline, schedule, plan, folder, steps=options.steps):
            tell(1 + (plan.begins(window) - 1) * factor)
        tell, written = teller("decoded and written", pipeline, num_frames), 0

        def counted() -> Iterator[np.ndarray]:
            nonlocal written
            for chunk in decoded(pipeline, plan, folder, num_frames):
                yield chunk
                written += len(chunk)
                tell(written)

        write_chunks(Path(name) / "video.mp4", counted(), fps)


if __name__ == "__main__":
    main()
