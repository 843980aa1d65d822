"""Those of the `zoetrope data` commands that know configs and models: check, show, latents.

Heavy modules are imported inside the commands, so that `zoetrope --help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from data.check import TextLimit
    from train.config import RunConfig

Overrides = Annotated[list[str] | None, typer.Argument(help="Of a config: section.key=value.")]
Workers = Annotated[int | None, typer.Option(help="Processes; all cores by default.")]


def check(
    target: Annotated[str, typer.Argument(help="A manifest, its URL, or a run's .yaml.")],
    overrides: Overrides = None,
    frames: Annotated[int | None, typer.Option(help="That each clip must have room for.")] = None,
    fps: Annotated[float | None, typer.Option(help="Their rate; 8 by default.")] = None,
    height: Annotated[int | None, typer.Option(help="Count the clips smaller than this.")] = None,
    width: Annotated[int | None, typer.Option(help="Count the clips smaller than this.")] = None,
    max_bad_share: Annotated[float, typer.Option(help="Share of rows that may be bad.")] = 0.0,
    context_length: Annotated[
        int, typer.Option(help="Tokens of a caption that the text encoder (CLIP's) reads.")
    ] = 77,
    write: Annotated[
        Path | None, typer.Option(help="A manifest of the kept rows, with what was measured.")
    ] = None,
    file_seconds: Annotated[float, typer.Option(help="After which a file is given up.")] = 180.0,
    workers: Workers = None,
) -> None:
    """Decode every clip: kept or dropped, with the reason, and what may surprise.

    Of a run's config it also says in which sizes the run sees its clips, and how many steps see
    each of them once. Exit code 1 when too many clips are bad, or none is left.
    """
    from data.check import Wanted, check_manifest, check_writable, write_kept
    from data.manifest import read_manifest

    if not 0 <= max_bad_share <= 1:
        raise ValueError(f"--max-bad-share {max_bad_share} must be in [0, 1]")
    run = _config(
        target, overrides, {"frames": frames, "fps": fps, "height": height, "width": width}
    )
    if run is None:
        length, rate = 1 if frames is None else frames, 8.0 if fps is None else fps
        wanted = Wanted(length, rate, height, width)
        limit, manifest = _clip_limit(context_length), read_manifest(target)
    else:
        data = run.data
        shortest = min(size[0] for size in data.sizes)
        wanted = Wanted(shortest, data.fps, *(data.base_size[1:] if data.native is None else ()))
        limit, manifest = _limit_of(run, context_length), read_manifest(data.manifest)
    if write is not None:
        check_writable(manifest, write)
    found = check_manifest(
        manifest, wanted, workers=workers, file_seconds=file_seconds, say=typer.echo
    )
    for line in found.lines(limit):
        typer.echo(line)
    if run is not None and found.kept:
        for line in _sizes_of(run):
            typer.echo(line)
    if write is not None and found.kept:
        write_kept(found, write)
        typer.echo(f"{write}: {len(found.kept)} rows")
    if not found.kept or found.num_dropped > max_bad_share * found.num_rows:
        raise typer.Exit(1)


def show(
    target: Annotated[str, typer.Argument(help="A run's .yaml, or a manifest.")],
    out: Annotated[Path, typer.Argument(help="The page, an .html file.")],
    overrides: Overrides = None,
    batches: Annotated[int, typer.Option(help="How many steps to show.")] = 4,
    clips: Annotated[int, typer.Option(help="At most so many clips of a step.")] = 8,
    seed: Annotated[int, typer.Option(help="Which steps.")] = 0,
    frames: Annotated[int | None, typer.Option(help="Of a clip; of a manifest alone.")] = None,
    fps: Annotated[float | None, typer.Option(help="Of a clip; of a manifest alone.")] = None,
    size: Annotated[
        str | None, typer.Option(help="Pixels: one number or HEIGHTxWIDTH; of a manifest alone.")
    ] = None,
) -> None:
    """Write a page of random training batches as the model sees them: cropped, resized, captioned."""
    from train.show_batches import dataset_of_manifest, dataset_of_run, show_batches

    if batches < 1 or clips < 1:
        raise ValueError(f"--batches {batches} and --clips {clips} must be at least 1")
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{out}: expected a file that ends in .html")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent}: no such folder to write {out.name} to")
    run = _config(target, overrides, {"frames": frames, "fps": fps, "size": size})
    if run is None:
        length, rate = 17 if frames is None else frames, 8.0 if fps is None else fps
        dataset = dataset_of_manifest(target, length, rate, size or "256", clips)
        steps = 10_000
    else:
        dataset, steps = dataset_of_run(run), run.train.steps
    shown = show_batches(out, target, dataset, steps, batches, clips, seed)
    typer.echo(f"{shown} clips of {batches} steps, {out}")


def latents(
    manifest: Annotated[str, typer.Argument(help="A manifest, or its URL.")],
    model: Annotated[Path, typer.Argument(help="A model folder: its VAE and text encoder.")],
    out: Annotated[Path, typer.Argument(help="The cache's folder.")],
    overrides: Overrides = None,
    config: Annotated[
        Path | None, typer.Option(help="A run's .yaml, whose data section says how clips are cut.")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Of a clip; the model's by default.")] = None,
    fps: Annotated[float | None, typer.Option(help="Of a clip; the model's by default.")] = None,
    size: Annotated[
        str | None, typer.Option(help="Pixels: one number or HEIGHTxWIDTH; the model's by default.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of what is stored: float16 or float32.")] = "float16",
    text: Annotated[
        bool, typer.Option(help="The states of the captions too, if the text encoder is frozen.")
    ] = True,
    workers: Annotated[int, typer.Option(help="Processes that decode, per rank.")] = 0,
    retry: Annotated[
        bool, typer.Option("--retry", help="Try again what could not be read before.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Put all clips through a frozen VAE once, for runs with `recipe.latent_cache`.

    The same command goes on where it stopped; under torchrun the processes share the work. Clips are
    cut as a run's `data` section says, or at their start to the model's size.
    """
    from train.build_cache import build_cache, data_section
    from train.config_recipes import DiTRecipeConfig
    from train.stills import num_stills

    if dtype not in ("float16", "float32"):
        raise ValueError(f"--dtype {dtype}: expected float16 or float32")
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device {device}: expected auto, cpu or cuda")
    given = {"frames": frames, "fps": fps, "size": size}
    run = _config(str(config), overrides, given) if config is not None else None
    if run is None and overrides:
        raise ValueError(f"{overrides[0]}: overrides are of a --config; give that too")
    data = data_section(manifest, model, workers, given, None if run is None else run.data)
    recipe = None if run is None else run.recipe
    stills = num_stills(recipe.tasks) if isinstance(recipe, DiTRecipeConfig) else 0
    references = run is not None and run.gives_references
    said = build_cache(out, data, model, dtype, text, device, retry, stills, references)
    if said:
        typer.echo(said)


def _config(target: str, overrides: list[str] | None, given: dict[str, Any]) -> RunConfig | None:
    """The run's config that a command was given; None where it was a manifest.

    Raises:
        ValueError: it was given what a config says itself, or overrides without a config.
    """
    if not target.lower().endswith((".yaml", ".yml")):
        if overrides:
            raise ValueError(f"{overrides[0]}: overrides are of a config, and {target} is none")
        return None
    from train.config_file import load_config

    for name, value in given.items():
        if value is not None:
            raise ValueError(f"--{name}: {target} says that itself; override its data section")
    return load_config(target, overrides or [])


def _clip_limit(length: int) -> TextLimit:
    """Of CLIP's tokenizer, which counts a start and an end."""
    from open_clip.tokenizer import SimpleTokenizer

    from data.check import TextLimit

    if length < 3:
        raise ValueError(f"--context-length {length}: expected at least 3")
    tokenizer = SimpleTokenizer()
    return TextLimit(lambda text: len(tokenizer.encode(text)) + 2, length)


def _limit_of(run: RunConfig, length: int) -> TextLimit | None:
    """Of the text encoder that a run has; None where it has none."""
    from train.config_recipes import VAERecipeConfig

    recipe = run.recipe
    if isinstance(recipe, VAERecipeConfig):
        return None
    if recipe.text is not None:
        return _clip_limit(recipe.text.context_length)
    from data.check import TextLimit
    from dit.umt5 import UMT5Config, clean_prompt
    from sample.model import load_tokenizer, read_model_file

    assert recipe.init is not None
    config = read_model_file(recipe.init).text
    if not isinstance(config, UMT5Config):
        return _clip_limit(length if config is None else config.context_length)
    tokenizer = load_tokenizer(recipe.init / "tokenizer")
    return TextLimit(
        lambda text: len(tokenizer(clean_prompt(text)).input_ids), config.context_length
    )


def _sizes_of(run: RunConfig) -> list[str]:
    """In which sizes a run sees its rows, and how long an epoch is."""
    from train.show_batches import recipe_of
    from train.sizes import describe_sizes

    recipe = recipe_of(run)
    manifest, order = recipe.data.train, recipe.order
    lines = describe_sizes(manifest, run, order, recipe.num_tokens)
    a_step = sum(order.mean_counts().values())
    rows = sum(len(rows) for rows in order.rows.values())
    steps = rows / a_step
    return [
        *lines,
        f"an epoch of {rows:,} rows is {steps:,.1f} steps of {a_step:,.1f} clips; "
        f"train.steps={run.train.steps:,} are {run.train.steps / steps:,.2f} epochs",
    ]
