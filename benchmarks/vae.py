"""Our VAE against diffusers' AutoencoderKLWan: the same compression, channels and parameter count.

Frames per second of encoding and decoding, taking turns, for growing length and size; and peak memory,
each measured in a process of its own. diffusers works through a clip in chunks of 4 frames by itself;
ours takes the whole clip, or chunks with the same result. Then long clips, decoded chunk by chunk: up
to a minute, 480 frames at 64x64 and 1,440 at 256x256. With `--train MINUTES` both are trained on
the procedural world for the same time, with the same losses and data, and compared on held-out clips.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import median_ms, resident
from dit.vae import VAEConfig, VideoVAE
from dit.vae_parts import decode_in_parts, encode_in_parts

# 4x8x8 with 16 channels, as Wan 2.1's.
OURS = VAEConfig(latent_channels=16, widths=(76, 154), factors=((1, 4), (4, 2)), stem="haar")
WAN = {"base_dim": 16, "z_dim": 16}
CHUNK = 4  # latent frames
SIZES = [(5, 64), (17, 64), (49, 64), (17, 128), (49, 128), (17, 256)]  # frames, rows and columns
NAMES = ("ours", "ours in chunks", "theirs")


def build(name: str, device: torch.device) -> nn.Module:
    """A network of random weights, nothing of it at zero."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    net = AutoencoderKLWan(**WAN) if name == "theirs" else VideoVAE(OURS)
    for parameter in net.parameters():
        if parameter.eq(0).all():
            nn.init.normal_(parameter, std=0.02)
    return net.to(device).requires_grad_(False)


def encode(name: str, net: Any, video: Tensor) -> Tensor:
    if name == "theirs":
        return net.encode(video).latent_dist.mean
    return encode_in_parts(net, video, chunk=CHUNK if name == "ours in chunks" else None).mean


def decode(name: str, net: Any, latents: Tensor) -> Tensor:
    if name == "theirs":
        return net.decode(latents).sample
    return decode_in_parts(net, latents, chunk=CHUNK if name == "ours in chunks" else None)


def inputs(frames: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    video = torch.rand(1, 3, frames, size, size, device=device) * 2 - 1
    return video, torch.randn(1, 16, 1 + (frames - 1) // 4, size // 8, size // 8, device=device)


def peak_mb(name: str, direction: str, frames: int, size: int, device: str) -> float:
    """Memory above that of the weights and the input, in MB; run in a fresh process."""
    place = torch.device(device)
    net = build(name, place)
    video, latents = inputs(frames, size, place)
    small_video, small_latents = inputs(5, 32, place)  # warm up: thread pools, kernels
    encode(name, net, small_video)
    decode(name, net, small_latents)
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forgets the peak so far
        before = resident("VmRSS")
    encode(name, net, video) if direction == "encode" else decode(name, net, latents)
    if place.type == "cuda":
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    return (resident("VmHWM") - before) / 1e6


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def compare_speed(options: argparse.Namespace, device: torch.device) -> None:
    nets = {name: build(name, device) for name in NAMES}
    counts = [sum(p.numel() for p in nets[name].parameters()) for name in ("ours", "theirs")]
    print(f"parameters: ours {counts[0]:,}, theirs {counts[1]:,}")
    head = "".join(f"{name:>16}" for name in NAMES)
    print(f"{'':<26}{'frames per second':<48}{'peak memory, MB':<48}\n{'':<26}{head}{head}")
    for direction, run in (("encode", encode), ("decode", decode)):
        for frames, size in SIZES[: options.sizes]:
            given = inputs(frames, size, device)[direction == "decode"]
            with torch.no_grad():
                runs = {name: partial(run, name, nets[name], given) for name in NAMES}
                ms = median_ms(runs, options.repeats, device)
            speeds = "".join(f"{1000 * frames / ms[name]:>16.1f}" for name in NAMES)
            arguments = direction, frames, size, str(device)
            peaks = [in_fresh_process(peak_mb, name, *arguments) for name in NAMES]
            memory = "".join(f"{peak:>16.0f}" for peak in peaks)
            ratio = ms["theirs"] / ms["ours"]
            label = f"{direction} {frames} x {size} x {size}"
            print(f"{label:<26}{speeds}{memory}   ours / theirs {ratio:.2f}", flush=True)


def streamed(frames: int, size: int, device: str) -> tuple[float, float]:
    """Decodes a long clip chunk by chunk, handing on every chunk as a writer to a file would: peak
    memory in MB as for `peak_mb`, and frames per second."""
    place = torch.device(device)
    net: Any = build("ours", place)
    latents = inputs(frames, size, place)[1]
    decode("ours", net, inputs(5, 32, place)[1])
    Path("/proc/self/clear_refs").write_text("5")
    before, begun, shown = resident("VmRSS"), time.perf_counter(), 0
    stream = net.new_stream()
    for part in latents.split(CHUNK, dim=2):
        video = net.decode(part, stream)
        assert video.isfinite().all()
        shown += video.shape[2]
    assert shown == frames
    return (resident("VmHWM") - before) / 1e6, frames / (time.perf_counter() - begun)


def compare_lengths(device: torch.device) -> None:
    print(f"\ndecoding in chunks of {CHUNK} latent frames, each given away at once")
    for size, lengths in ((64, (49, 121, 481)), (256, (49, 361, 1441))):
        for frames in lengths:
            peak, speed = in_fresh_process(streamed, frames, size, str(device))
            label = f"{frames} x {size} x {size}"
            print(f"{label:<26}{speed:>12.1f} frames/s{peak:>12.0f} MB", flush=True)


def world_clips(split: str, num: int, seed: int, size: int, frames: int) -> Tensor:
    """Clips of the procedural world, uint8 (n 3 f h w)."""
    from data.world import make_scene
    from data.world_render import render

    shape: dict[str, Any] = {"height": size, "width": size, "num_frames": frames, "fps": 8}
    scenes = [make_scene(level=2, split=split, seed=seed, index=i, **shape) for i in range(num)]
    clips = torch.stack([torch.from_numpy(render(scene)) for scene in scenes])
    return clips.permute(0, 4, 1, 2, 3).contiguous()


def moments(net: Any, video: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(net, VideoVAE):
        return net.moments(video)
    posterior = net.encode(video).latent_dist
    return posterior.mean, posterior.logvar


def raw_decode(net: Any, latents: Tensor) -> Tensor:
    return net.decode_raw(latents) if isinstance(net, VideoVAE) else net._decode(latents).sample


def train_for(net: nn.Module, clips: Tensor, seconds: float, lr: float, batch: int) -> int:
    """The demo's losses for a stretch of time, with the demo's schedule over it; steps taken."""
    from data.video import to_float
    from train.vae_losses import kl_divergence

    net.requires_grad_(True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=1e-4)
    order = torch.Generator().manual_seed(0)
    begun, step = time.perf_counter(), 0
    while (spent := (time.perf_counter() - begun) / seconds) < 1:
        chosen = torch.randint(len(clips), (batch,), generator=order)
        video = to_float(clips[chosen])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mean, log_variance = (x.float() for x in moments(net, video))
            noise = torch.randn(mean.shape, generator=order)
            output = raw_decode(net, mean + (0.5 * log_variance).exp() * noise).float()
        error = output - video
        kl = kl_divergence(mean, log_variance).sum() / video.numel()
        loss = 0.2 * error.abs().mean() + error.square().mean() + 1e-5 * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20, (1 - spent) / 0.4)
        optimizer.step()
        step += 1
    net.requires_grad_(False)
    return step


def held_out_psnr(net: nn.Module, clips: Tensor) -> Tensor:
    """dB per clip, float32, of the posterior mean, rounded to uint8."""
    from data.video import to_float, to_uint8

    found = []
    with torch.no_grad():
        for part in clips.split(8):
            output = to_uint8(raw_decode(net, moments(net, to_float(part))[0]))
            error = (output.float() - part.float()).square().flatten(1).mean(1)
            found.append(10 * torch.log10(255**2 / error.clamp(min=1e-6)))
    return torch.cat(found)


def compare_training(options: argparse.Namespace, device: torch.device) -> None:
    size, frames = 64, 17
    train = world_clips("train", 512, 1, size, frames)
    held_out = world_clips("held-out", 64, 2, size, frames)
    print(f"\ntraining for {options.train:g} minutes each, {size}x{size}, {frames} frames, batch 4")
    given = dict(pair.split("=", 1) for pair in options.ours)
    ours = VAEConfig.model_validate({**OURS.model_dump(), **given})
    print(f"ours: {ours.model_dump(exclude={'kind'})}")
    for lr in options.lr:
        for name in options.names:
            torch.manual_seed(0)
            from diffusers import AutoencoderKLWan

            net = AutoencoderKLWan(**WAN) if name == "theirs" else VideoVAE(ours)
            steps = train_for(net.to(device), train, 60 * options.train, lr, batch=4)
            psnr = held_out_psnr(net.eval(), held_out)
            error = 1.96 * psnr.std().item() / math.sqrt(len(psnr))
            print(
                f"{name:<8} lr {lr:g}  {steps:>6} steps  held-out PSNR {psnr.mean():.2f} "
                f"+- {error:.2f} dB (N={len(psnr)})",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="how many of the sizes")
    parser.add_argument("--train", type=float, default=0.0, help="minutes for each network")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--names", nargs="+", default=["theirs", "ours"], help="what to train")
    parser.add_argument("--ours", nargs="+", default=[], help="KEY=VALUE of ours that is trained")
    parser.add_argument("--lengths", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, float32")
    if options.sizes:
        compare_speed(options, device)
    if options.lengths:
        compare_lengths(device)
    if options.train:
        compare_training(options, device)


if __name__ == "__main__":
    main()
