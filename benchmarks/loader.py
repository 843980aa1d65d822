"""How quickly clips are decoded, by which decoder, and whether a training step waits for its data.

Decoders take turns on the same clips, every frame of them to RGB in one thread. The loader reads whole
clips at their own rate and size, so that it has the same frames to decode. From a latent cache, a
step that computes nothing but takes as long as one of configs/presets/1.3b.yaml asks for its batches.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch

from benchmarks.timing import median_ms
from data.dataset import ClipDataset, StepSampler
from data.loader import ClipLoader
from data.manifest import read_manifest, write_manifest
from data.video import VideoReader, probe, write_video
from train.cache_folder import CHECKSUMS, CacheFolder, checksum
from train.latents import LatentRequest

_BATCH, _PREFETCH = 4, 2


def plain_pyav(path: str) -> int:
    """What one would write without a library around it."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        return len([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])


def plain_decord(path: str) -> int:
    import decord

    reader = decord.VideoReader(path, num_threads=1)
    return len(reader.get_batch(range(len(reader))).asnumpy())


def ours(backend: str) -> Callable[[str], int]:
    def read(path: str) -> int:
        with VideoReader(path, backend) as reader:  # type: ignore[arg-type]
            return len(reader.read_at(reader.frame_times()))

    return read


def torchcodec() -> tuple[Callable[[str], int] | None, str]:
    """Its decoder, or why there is none."""
    try:
        from torchcodec.decoders import VideoDecoder  # type: ignore[import-not-found]
    except (ImportError, RuntimeError, OSError) as error:
        return None, str(error).strip().splitlines()[0]
    return lambda path: len(VideoDecoder(path, num_ffmpeg_threads=1)[:]), ""


def decoders(paths: list[str], repeats: int) -> float:
    """Prints frames per second of each decoder on each clip; returns the plain loop's over all."""
    kinds: dict[str, Callable[[str], int]] = {
        "PyAV, plain loop": plain_pyav,
        "ours, pyav": ours("pyav"),
        "decord": plain_decord,
        "ours, decord": ours("decord"),
    }
    codec, why = torchcodec()
    if codec is None:
        print(f"torchcodec: left out ({why})")
    else:
        kinds["torchcodec"] = codec
    print(f"{'frames per second':<34}" + "".join(f"{name:>18}" for name in kinds))
    counted, seconds = 0, 0.0
    for path in paths:
        usable, count = {}, 0
        for name, read in kinds.items():
            try:
                count = read(path)
                usable[name] = lambda read=read, path=path: read(path)
            except Exception:  # a decoder that cannot read this file
                continue
        ms = median_ms(usable, repeats, torch.device("cpu"))
        info = probe(path)
        about = f"{Path(path).name[:16]} {info.width}x{info.height} {info.codec}"
        cells = [f"{1000 * count / ms[name]:,.0f}" if name in ms else "-" for name in kinds]
        print(f"{about:<34}" + "".join(f"{cell:>18}" for cell in cells), flush=True)
        counted += count
        seconds += ms["PyAV, plain loop"] / 1000
    return counted / seconds


def from_video(folder: Path, clips: int, workers: int, rounds: int) -> None:
    """The loader on clips made for it, taking turns with a plain loop over the same files."""
    rng = np.random.default_rng(0)
    num_frames, height, width = 33, 240, 416
    grid = np.linspace(0, 6, width)[None, :] + np.linspace(0, 4, height)[:, None]
    for k in range(clips):
        phase = rng.uniform(0, 6, 3)
        moving = [
            np.stack([np.sin(grid * (c + 1) + phase[c] + f / 5) for c in range(3)], -1)
            for f in range(num_frames)
        ]
        noise = rng.normal(0, 6, (num_frames, height, width, 1))
        video = np.clip(127 + 90 * np.array(moving) + noise, 0, 255).astype(np.uint8)
        write_video(folder / f"{k}.mp4", video, fps=16)
    rows = [{"path": f"{k}.mp4", "caption": "x"} for k in range(clips)]
    write_manifest(folder / "m.jsonl", rows)
    paths = [str(folder / f"{k}.mp4") for k in range(clips)]
    size = {"num_frames": num_frames, "height": height, "width": width, "fps": 16.0}
    manifest = read_manifest(folder / "m.jsonl")
    loaders = {}
    for backend in ("pyav", "auto"):
        dataset = ClipDataset(manifest, **size, seed=0, backend=backend)
        sampler = StepSampler(_BATCH, 1, 0, 1)
        loaders[backend] = iter(ClipLoader(dataset, sampler, workers=workers, prefetch=_PREFETCH))
    rates: dict[str, list[float]] = {"plain": [], **{backend: [] for backend in loaders}}
    for _ in range(rounds + 1):  # the first is for starting and warming up
        begin = time.perf_counter()
        for path in paths:
            plain_pyav(path)
        rates["plain"].append(clips * num_frames / (time.perf_counter() - begin))
        for backend, items in loaders.items():  # the others have read ahead, and rest
            for _ in islice(items, _PREFETCH + 1):  # what was read ahead
                pass
            begin = time.perf_counter()
            count = sum(len(batch["g"]) for batch in islice(items, 2 * clips * workers // _BATCH))
            rates[backend].append(count * num_frames / (time.perf_counter() - begin))
            time.sleep(_PREFETCH * _BATCH * num_frames / rates[backend][-1])  # until it rests
    for items in loaders.values():
        items.close()
    plain = rates["plain"][1:]
    print(
        f"\nfrom video, {num_frames} frames of {width}x{height}: plain PyAV loop "
        f"{statistics.median(plain):,.0f} frames/s; medians of {rounds} rounds"
    )
    for backend in loaders:
        rate = rates[backend][1:]
        share = statistics.median(r / p / workers for r, p in zip(rate, plain))
        print(
            f"  loader, backend {backend}, {workers} worker(s): {statistics.median(rate):,.0f} "
            f"frames/s, {share:.2f} of the plain loop per worker"
        )


class _Cached:
    """Posteriors of the size that configs/presets/1.3b.yaml has, from shards on the disk."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.cache, self.rows = CacheFolder(folder, "latent cache"), rows
        shape = (64, 16, 9, 30, 52)
        for index in range(rows // 64):
            mean, std = torch.randn(2, *shape).half().unbind(0)
            sums = torch.tensor([checksum(m, s) for m, s in zip(mean, std)])
            self.cache.write(index, {"mean": mean, "std": std, CHECKSUMS: sums}, {})

    def request(self, g: int, bad: object = ()) -> object:
        clip = {"size": (33, 240, 416), "fps": 16.0, "start": 0.0, "end": None, "crop": None}
        about = {"g": g, "row": g, "caption": "", "path": "", "position": 0.0, "backend": "auto"}
        shard = self.cache.shard(g // 64 % (self.rows // 64))
        return LatentRequest(**clip, **about, shard=shard, place=g % 64)  # type: ignore[arg-type]

    def sample(self, request: object, value: torch.Tensor, bad: object) -> torch.Tensor:
        return value

    def collate(self, samples: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"posterior": torch.stack(samples)}


def from_cache(folder: Path, step_seconds: float, micro_batch: int, steps: int) -> None:
    dataset = _Cached(folder, 256)
    for workers in (0, 1):
        sampler = StepSampler(micro_batch, 1, 0, 1)
        items = iter(ClipLoader(dataset, sampler, workers=workers))  # type: ignore[arg-type]
        next(items)
        waits = []
        for _ in range(steps):
            time.sleep(step_seconds)
            begin = time.perf_counter()
            next(items)
            waits.append(time.perf_counter() - begin)
        items.close()
        wait = statistics.mean(waits[steps // 3 :])
        print(
            f"from cache, {micro_batch} clips in {step_seconds:g} s, {workers} worker(s): waits "
            f"{1000 * wait:.2f} ms, {wait / (wait + step_seconds):.2%} of a step"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=Path, help="folder of videos for the decoders")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9, help="of plain loop and loader in turn")
    parser.add_argument("--step-seconds", type=float, default=0.1, help="of a step from cache")
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.clips is not None:
        paths = sorted(
            str(p) for p in options.clips.iterdir() if p.suffix in (".mp4", ".mkv", ".mov")
        )
        rate = decoders(paths, options.repeats)
        print(f"plain PyAV loop over all: {rate:,.0f} frames/s")
    with tempfile.TemporaryDirectory() as folder:
        from_video(Path(folder), 8, options.workers, options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        from_cache(Path(folder), options.step_seconds, options.micro_batch, options.steps)


if __name__ == "__main__":
    main()
