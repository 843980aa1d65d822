"""`zoetrope eval`: a saved model, or a manifest of videos, to a table and a .json of figures.

Heavy modules are imported inside the command, so that `zoetrope --help` answers at once.
"""

from __future__ import annotations

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from data.manifest import Manifest
    from eval.world_suite import Progress, WorldSettings


class Suite(StrEnum):
    """What is measured."""

    world = "world"
    vae = "vae"


class Sampler(StrEnum):
    """The samplers of `dit.samplers`."""

    euler = "euler"
    heun = "heun"
    midpoint = "midpoint"
    dpmpp_2m = "dpmpp_2m"
    unipc = "unipc"
    ddim = "ddim"
    ancestral = "ancestral"


def evaluate(
    model: Annotated[
        Path, typer.Argument(help="A model folder, or a manifest of the world's clips.")
    ],
    suite: Annotated[
        Suite, typer.Option(help="world: prompts scored by a tracker; vae: PSNR and SSIM.")
    ] = Suite.world,
    num: Annotated[int, typer.Option(help="How many clips.")] = 200,
    level: Annotated[int, typer.Option(help="The world's level of difficulty, 1 to 4.")] = 1,
    split: Annotated[str, typer.Option(help="held-out, combinations or speeds.")] = "held-out",
    seed: Annotated[int, typer.Option(help="Of the scenes, prompts and samples.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Sampler steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale, 1 for none.")] = None,
    sampler: Annotated[Sampler | None, typer.Option(help="The objective's own by default.")] = None,
    batch_size: Annotated[int, typer.Option(help="Clips at a time.")] = 32,
    avoid: Annotated[
        Path | None, typer.Option(help="A manifest whose captions are not used as prompts.")
    ] = None,
    clips: Annotated[
        Path | None, typer.Option(help="With --suite vae: a manifest to take the clips from.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, ...; default: a GPU if any.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="A .json file.")] = None,
) -> None:
    """Score a model on scenes it has not seen, every figure with N and a 95% interval.

    The same words may describe a training clip; --avoid leaves out prompts that do."""
    from eval.tables import as_text, score_table
    from eval.world_suite import WorldSettings

    if output is not None:
        _check_writable(output)
    settings = WorldSettings(
        level=level,
        split=split,
        num=num,
        seed=seed,
        steps=steps,
        guidance=guidance,
        sampler=None if sampler is None else sampler.value,
        batch_size=batch_size,
    )
    if suite is Suite.vae:
        results = _vae_suite(model, settings, clips, device)
    else:
        if clips is not None:
            raise ValueError("--clips goes with --suite vae; the world suite renders its own")
        results = _world_suite(model, settings, avoid, device)
    results = {"model": str(model), **results}
    typer.echo(as_text(score_table(results)))
    if output is not None:
        write_json(output, results)
        typer.echo(f"written to {output}")


def _check_writable(output: Path) -> None:
    """Before the work, not after it."""
    if not output.name or output.is_dir():
        raise ValueError(f"-o {output}: is a folder; give the name of a .json file")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"{output.parent}: no such folder to write {output.name} to")
    if not os.access(output.parent, os.W_OK):
        raise ValueError(f"-o {output}: {output.parent} cannot be written to")


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Write results in one step."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _captions(manifest: Path | None) -> set[str]:
    if manifest is None:
        return set()
    return {text for row in _read(manifest).rows for text in row.captions}


def _read(path: Path) -> Manifest:
    """A manifest, its unusable rows named."""
    from data.manifest import read_manifest

    manifest = read_manifest(path)
    manifest.warn_of_bad_rows()
    return manifest


def _world_suite(
    model: Path, settings: WorldSettings, avoid: Path | None, device: str | None
) -> dict[str, Any]:
    from tqdm import tqdm

    from eval.world_suite import run_world_suite, score_manifest

    listed = model if model.is_file() else model / "manifest.jsonl"
    if listed.is_file() and not (model / "model.yaml").is_file():
        manifest = _read(listed)
        count = min(settings.num, len(manifest.rows))
        with tqdm(total=count, unit="clip") as bar:
            return score_manifest(manifest, num=count, progress=_shown_on(bar))

    from sample.pipeline import TextToVideo

    pipeline = TextToVideo.from_folder(model, device)
    with tqdm(total=3 * settings.num, unit="clip") as bar:
        run = run_world_suite(pipeline, settings, avoid=_captions(avoid), progress=_shown_on(bar))
    return run.results


def _shown_on(bar: Any) -> Progress:
    def advance(column: str, done: int) -> None:
        bar.set_description(column)
        bar.update(done)

    return advance


def _vae_suite(
    folder: Path, settings: WorldSettings, listed: Path | None, device: str | None
) -> dict[str, Any]:
    from tqdm import tqdm

    from eval.vae_suite import read_clips, run_vae_suite
    from eval.world_suite import eval_scenes, real_clips
    from sample.model import load_model
    from sample.pipeline import pick_device

    model = load_model(folder, pick_device(device))
    info = model.info
    size: dict[str, Any] = {
        "height": info.height,
        "width": info.width,
        "num_frames": info.num_frames,
    }
    if listed is None:
        clips = real_clips(eval_scenes(settings, fps=info.fps, **size)[0])
    else:
        clips = read_clips(_read(listed), num=settings.num, fps=info.fps, **size)
    with tqdm(total=len(clips), unit="clip") as bar:
        results = run_vae_suite(model, clips, batch_size=settings.batch_size, progress=bar.update)
    if listed is None:
        return {**results, "level": settings.level, "split": settings.split, "seed": settings.seed}
    return {**results, "clips_from": str(listed)}
