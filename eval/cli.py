"""`zoetrope eval`: a saved model, or a manifest of videos, to a table and a .json of figures.

Heavy modules are imported inside the command, so that `zoetrope --help` answers at once.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data.files import replacing

if TYPE_CHECKING:
    from data.manifest import Manifest
    from eval.world_suite import Progress, WorldSettings


class Suite(StrEnum):
    """What is measured."""

    world = "world"
    vae = "vae"


class Part(StrEnum):
    """The abilities that the world suite measures; those but `text` are in `eval.world_parts`."""

    text = "text"
    physics = "physics"
    extension = "extension"
    minute = "minute"
    identity = "identity"
    edit = "edit"


class PixelRange(StrEnum):
    """What a video network takes as pixels."""

    levels = "255"
    unit = "unit"


class Sampler(StrEnum):
    """The samplers of `dit.samplers`."""

    euler = "euler"
    heun = "heun"
    midpoint = "midpoint"
    dpmpp_2m = "dpmpp_2m"
    unipc = "unipc"
    ddim = "ddim"
    ancestral = "ancestral"


# The options, apart from the function that takes them, which would be pages long.
ModelPath = Annotated[
    Path,
    typer.Argument(metavar="MODEL", help="A model folder, or a manifest of the world's clips."),
]
ManifestPath = Annotated[
    Path | None,
    typer.Argument(
        metavar="MANIFEST", help="With --suite vae: where clips are from; default the world."
    ),
]
Wanted = Annotated[
    Suite, typer.Option(help="world: prompts scored by a tracker; vae: what a VAE loses.")
]
Num = Annotated[
    int | None, typer.Option(help="How many clips; default 200 (extension 50, minute 8).")
]
Level = Annotated[
    int | None, typer.Option(help="The world's level of difficulty, 1 to 4; default 1.")
]
Split = Annotated[str | None, typer.Option(help="held-out, the default, combinations or speeds.")]
Seed = Annotated[int | None, typer.Option(help="Of the scenes, prompts and samples; default 0.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: a GPU if any.")]
BatchSize = Annotated[
    int | None, typer.Option(help="Clips at a time; default 32, fewer VAE clips if large.")
]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="A .json file.")]

_WORLD: dict[str, Any] = {"rich_help_panel": "With --suite world"}
WantedPart = Annotated[
    Part | None,
    typer.Option(help="What the model is given and asked for; default text.", **_WORLD),
]
Steps = Annotated[int | None, typer.Option(help="Sampler steps.", **_WORLD)]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale, 1 for none.", **_WORLD)]
GuidanceReferences = Annotated[
    float | None, typer.Option(help="With --part identity: scale of the pictures.", **_WORLD)
]
Temperature = Annotated[float | None, typer.Option(help="Of noise to start from; 1.", **_WORLD)]
WantedSampler = Annotated[
    Sampler | None, typer.Option(help="The objective's own by default.", **_WORLD)
]
Avoid = Annotated[
    Path | None, typer.Option(help="A manifest whose captions are not used as prompts.", **_WORLD)
]

_VAE: dict[str, Any] = {"rich_help_panel": "With --suite vae"}
Against = Annotated[
    list[Path] | None, typer.Option(help="Another VAE on the same clips; repeatable.", **_VAE)
]
Sizes = Annotated[
    list[str] | None,
    typer.Option(help="Sizes of clips, as 32,64x48 (HEIGHTxWIDTH); default the model's.", **_VAE),
]
Frames = Annotated[int | None, typer.Option(help="Per clip; default the model's.", **_VAE)]
Fps = Annotated[float | None, typer.Option(help="Of the clips; default the model's.", **_VAE)]
LpipsWeights = Annotated[
    Path | None, typer.Option(help="The classifier's weights, as torchvision's vgg16.", **_VAE)
]
LpipsLinear = Annotated[
    Path | None, typer.Option(help="LPIPS's own weights, as its vgg.pth.", **_VAE)
]
LpipsBackbone = Annotated[
    str | None, typer.Option(help="timm's name of the classifier; default vgg16.", **_VAE)
]
FvdExtractor = Annotated[
    Path | None,
    typer.Option(help="TorchScript: float32 video (b 3 f h w) to features (b d).", **_VAE),
]
FvdRange = Annotated[
    PixelRange | None,
    typer.Option(help="Pixels it takes: 255 for [0, 255], unit for [-1, 1].", **_VAE),
]
Tile = Annotated[
    int | None,
    typer.Option(help="Latents: also decode in blended tiles, and compare with the whole.", **_VAE),
]
Overlap = Annotated[
    int | None, typer.Option(help="Latents that tiles share; default a quarter of one.", **_VAE)
]


def evaluate(
    model: ModelPath,
    manifest: ManifestPath = None,
    suite: Wanted = Suite.world,
    part: WantedPart = None,
    num: Num = None,
    level: Level = None,
    split: Split = None,
    seed: Seed = None,
    batch_size: BatchSize = None,
    device: Device = None,
    output: Output = None,
    steps: Steps = None,
    guidance: Guidance = None,
    guidance_references: GuidanceReferences = None,
    sampler: WantedSampler = None,
    temperature: Temperature = None,
    avoid: Avoid = None,
    against: Against = None,
    sizes: Sizes = None,
    frames: Frames = None,
    fps: Fps = None,
    lpips_weights: LpipsWeights = None,
    lpips_linear: LpipsLinear = None,
    lpips_backbone: LpipsBackbone = None,
    fvd_extractor: FvdExtractor = None,
    fvd_range: FvdRange = None,
    tile: Tile = None,
    overlap: Overlap = None,
) -> None:
    """Score a model on unseen scenes, or VAEs on clips, every figure with N and a 95% interval.

    The same words may describe a training clip; --avoid leaves out prompts that do."""
    if output is not None:
        _check_writable(output)
    scenes: dict[str, Any] = {"level": level, "split": split, "seed": seed}
    scenes = {name: value for name, value in scenes.items() if value is not None}
    settings = _settings(part, num, batch_size, steps, guidance, sampler, scenes)
    settings = replace(settings, guidance_references=guidance_references, temperature=temperature)
    of_the_world = {
        "part": part,
        "steps": steps,
        "guidance": guidance,
        "guidance_references": guidance_references,
        "sampler": sampler,
        "temperature": temperature,
        "avoid": avoid,
    }
    of_vaes: dict[str, Any] = {
        "manifest": manifest,
        "against": against,
        "sizes": sizes,
        "frames": frames,
        "fps": fps,
        "lpips_weights": lpips_weights,
        "lpips_linear": lpips_linear,
        "lpips_backbone": lpips_backbone,
        "fvd_extractor": fvd_extractor,
        "fvd_range": None if fvd_range is None else fvd_range.value,
        "tile": tile,
        "overlap": overlap,
    }
    if suite is Suite.vae:
        _refuse(of_the_world, Suite.world)
        given = {name: value for name, value in of_vaes.items() if value is not None}
        if manifest is not None and scenes:
            raise ValueError(
                f"--{next(iter(scenes))} is of the world's clips, and these come from {manifest}; "
                "leave one of the two out"
            )
        results, text = _vae_suite(model, settings, {**given, "batch_size": batch_size}, device)
    else:
        _refuse(of_vaes, Suite.vae)
        if part not in (None, Part.text):
            _refuse_of_text({"level": level, "split": split, "avoid": avoid})
        if guidance_references is not None and part is not Part.identity:
            raise ValueError("--guidance-references goes with --part identity")
        if temperature is not None and part is Part.edit:
            raise ValueError("--temperature does not go with edits, which start from their videos")
        results, text = _world_suite(model, part or Part.text, settings, avoid, device)
    if int(os.environ.get("RANK", 0)):  # under torchrun one process speaks for all
        return
    typer.echo(text)
    if output is not None:
        write_json(output, {"model": str(model), **results})
        typer.echo(f"written to {output}")


def _settings(
    part: Part | None,
    num: int | None,
    batch_size: int | None,
    steps: int | None,
    guidance: float | None,
    sampler: Sampler | None,
    scenes: dict[str, Any],
) -> WorldSettings:
    """Options as settings; where nothing is said, a part's own number of clips."""
    from eval.world_suite import WorldSettings

    if num is None and part not in (None, Part.text):
        from eval.world_parts import DEFAULT_NUM

        num = DEFAULT_NUM.get(part.value)
    if num is not None:
        scenes = {**scenes, "num": num}
    return WorldSettings(
        **scenes,
        steps=steps,
        guidance=guidance,
        sampler=None if sampler is None else sampler.value,
        batch_size=32 if batch_size is None else batch_size,
    )


def _refuse_of_text(options: dict[str, Any]) -> None:
    """Options that other parts, which choose their own scenes, would ignore."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(
                f"--{name} goes with --part text; the other parts have their own scenes"
            )


def _refuse(options: dict[str, Any], suite: Suite) -> None:
    """Options of the other suite, which would do nothing."""
    for name, value in options.items():
        if value is None:
            continue
        if name == "manifest":
            raise ValueError(
                f"{value}: a manifest beside the model goes with --suite vae; the world suite renders "
                "its own clips"
            )
        raise ValueError(f"--{name.replace('_', '-')} goes with --suite {suite.value}")


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
    with replacing(path) as partial:
        partial.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")


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
    model: Path, part: Part, settings: WorldSettings, avoid: Path | None, device: str | None
) -> tuple[dict[str, Any], str]:
    from eval.tables import as_text, score_table

    if part is Part.text:
        results = _world_results(model, settings, avoid, device)
    else:
        results = _part_results(model, part, settings, device)
    text = as_text(score_table(results))
    return results, "\n\n".join(
        [text, *(["\n".join(results["notes"])] if "notes" in results else [])]
    )


def _is_manifest(model: Path) -> Path | None:
    """The manifest that a path is of, None for a model folder."""
    listed = model if model.is_file() else model / "manifest.jsonl"
    return listed if listed.is_file() and not (model / "model.yaml").is_file() else None


def _part_results(
    model: Path, part: Part, settings: WorldSettings, device: str | None
) -> dict[str, Any]:
    from tqdm import tqdm

    from eval.world_parts import PARTS
    from sample.pipeline import TextToVideo

    if _is_manifest(model) is not None:
        raise ValueError(
            f"{model}: --part {part.value} needs a model folder, not a manifest of clips"
        )
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        raise ValueError(
            f"--part {part.value} runs in one process, not {processes}; leave torchrun out"
        )
    pipeline = TextToVideo.from_folder(model, device)
    with tqdm(unit="clip") as bar:
        return PARTS[part.value](pipeline, settings, _shown_on(bar))


def _world_results(
    model: Path, settings: WorldSettings, avoid: Path | None, device: str | None
) -> dict[str, Any]:
    from tqdm import tqdm

    from eval.world_suite import run_world_suite, score_manifest
    from sample import processes

    listed = _is_manifest(model)
    if listed is not None:
        manifest = _read(listed)
        count = min(settings.num, len(manifest.rows))
        with tqdm(total=count, unit="clip") as bar:
            return score_manifest(manifest, num=count, progress=_shown_on(bar))

    from sample.pipeline import TextToVideo

    ranks = processes.start(device or "auto", None)
    pipeline = TextToVideo.from_folder(model, device if ranks.mesh is None else ranks.device)
    done = _captions(avoid)
    with tqdm(total=3 * settings.num, unit="clip", disable=not ranks.is_main) as bar:
        run = run_world_suite(pipeline, settings, avoid=done, progress=_shown_on(bar), ranks=ranks)
    processes.stop()
    return run.results


def _shown_on(bar: Any) -> Progress:
    def advance(column: str, done: int) -> None:
        bar.set_description(column)
        bar.update(done)

    return advance


def _vae_suite(
    folder: Path, settings: WorldSettings, given: dict[str, Any], device: str | None
) -> tuple[dict[str, Any], str]:
    from eval.tables import as_text
    from eval.vae_cli import compare
    from eval.vae_options import VAEOptions
    from eval.vae_tables import comparison_tables
    from sample.pipeline import pick_device

    results = compare(folder, VAEOptions(**given), settings, pick_device(device))
    paragraphs = [as_text(table) for table in comparison_tables(results)]
    paragraphs.append("\n".join([*results["notes"], *results["protocol"]]))
    return results, "\n\n".join(paragraphs)
