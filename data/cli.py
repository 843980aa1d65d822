"""The `zoetrope data` commands: render the procedural world, check a manifest.

Heavy modules are imported inside the commands, so that `zoetrope --help` answers at once.
"""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(name="data", help="Make and check datasets.", no_args_is_help=True)


@app.callback()
def data() -> None:
    """Make and check datasets."""


@app.command()
def world(
    out: Annotated[Path, typer.Argument(help="Folder for the clips and manifest.jsonl.")],
    clips: Annotated[int, typer.Option(help="How many clips to render.")] = 1000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same clips.")] = 0,
    split: Annotated[
        str,
        typer.Option(help="train, held-out, combinations (unseen pairs), speeds or identities."),
    ] = "train",
    scenario: Annotated[
        str, typer.Option(help="What is shown; see docs/world.md. Only shapes has levels.")
    ] = "shapes",
    level: Annotated[
        int | None, typer.Option(help="Difficulty of shapes, 1 to 4; 1 by default.")
    ] = None,
    size: Annotated[
        str, typer.Option(help="Frame size in pixels: one number, or HEIGHTxWIDTH.")
    ] = "32",
    frames: Annotated[int, typer.Option(help="Frames per clip.")] = 9,
    fps: Annotated[float, typer.Option(help="Frames per second.")] = 8.0,
    workers: Annotated[int | None, typer.Option(help="Processes; all cores by default.")] = None,
) -> None:
    """Render the procedural world: .mp4 clips and a manifest with captions and exact states."""
    from data.video import parse_size
    from data.world import SHAPES_SCENARIO
    from data.world_files import WorldSpec, write_world

    height, width = parse_size(size)
    if level is None and scenario == SHAPES_SCENARIO:
        level = 1
    spec = WorldSpec(
        clips=clips,
        seed=seed,
        split=split,
        level=level,
        height=height,
        width=width,
        num_frames=frames,
        fps=fps,
        scenario=scenario,
    )
    manifest = write_world(out, spec, workers=workers)
    typer.echo(f"{clips} clips, {manifest}")


@app.command()
def ingest(
    src: Annotated[
        str, typer.Argument(help="A folder, a file, a manifest with `path`, or a folder's URL.")
    ],
    out: Annotated[str, typer.Argument(help="Folder for manifest.jsonl and report.html.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, values in YAML.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML; see configs/ingest.yaml.")] = None,
    engine: Annotated[str, typer.Option(help="local, or ray.")] = "local",
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster; else a local Ray.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; all cores by default.")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Try again what failed before.")] = False,
) -> None:
    """Make a dataset of raw video: split, crop, measure, filter, deduplicate, caption.

    The same command again goes on where it stopped; other thresholds re-select without reading.
    Exit code 1 when no clip is kept.
    """
    from data.ingest import ingest as run_ingest
    from data.ingest_config import load_ingest_config

    settings = load_ingest_config(config, overrides or [])
    result = run_ingest(
        src,
        out,
        settings,
        engine=engine,
        address=address,
        workers=workers,
        retry=retry,
    )
    typer.echo(result)
    if not result.num_kept:
        raise typer.Exit(1)


@app.command()
def shards(
    manifest: Annotated[str, typer.Argument(help="A manifest, or its URL.")],
    out: Annotated[str, typer.Argument(help="Folder for the shards and manifest.jsonl, or URL.")],
    shard_size: Annotated[
        str, typer.Option(help="At most this much in a shard, such as 1GB.")
    ] = "1GB",
) -> None:
    """Write a dataset as WebDataset tar shards; exit code 1 when no file can be read."""
    from data.tar_shards import parse_bytes, write_shards

    done = write_shards(manifest, out, parse_bytes(shard_size))
    for path, reason in done.bad:
        typer.echo(f"left out  {path}: {reason}")
    if done.bad:
        typer.echo(f"{len(done.bad)} files cannot be read, of {done.num_bad_rows} rows")
    if done.num_dropped:
        typer.echo(f"left out, with keep: false in the manifest: {done.num_dropped} rows")
    if done.num_unusable:
        typer.echo(f"left out, since they cannot be used: {done.num_unusable} rows")
    if not done.num_rows:
        typer.echo("nothing is left: no manifest is written")
        raise typer.Exit(1)
    if done.num_over:
        typer.echo(f"over {shard_size}, for one file that needs more: {done.num_over} shards")
    typer.echo(
        f"{done.num_rows} rows of {done.num_files} files in {done.num_shards} shards, {done.manifest}"
    )


@app.command()
def join(
    out: Annotated[Path, typer.Argument(help="The manifest to write: .jsonl, .csv or .parquet.")],
    manifests: Annotated[list[str], typer.Argument(help="Manifests, or their URLs.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the manifest if it is there.")
    ] = False,
) -> None:
    """Make one manifest of several, whose files stay where they are."""
    from data.join import join_manifests

    done = join_manifests(out, manifests, overwrite)
    for manifest, counts in done.items():
        left_out = f", {counts.left_out} left out that cannot be used" if counts.left_out else ""
        left_out += f", {counts.dropped} with keep: false" if counts.dropped else ""
        typer.echo(f"{counts.rows} rows of {manifest}{left_out}")
    typer.echo(f"{sum(counts.rows for counts in done.values())} rows, {out}")


@app.command()
def references(
    manifest: Annotated[str, typer.Argument(help="A manifest, or its URL.")],
    out: Annotated[Path, typer.Argument(help="Folder for the pictures and manifest.jsonl.")],
    keep: Annotated[float, typer.Option(help="Seconds to leave of a piece, at least.")] = 1.0,
    apart: Annotated[float, typer.Option(help="Seconds between those and the picture.")] = 0.5,
    workers: Annotated[int | None, typer.Option(help="Processes; all cores by default.")] = None,
) -> None:
    """Put each clip's last frame aside as a reference picture, for recipe.tasks.references."""
    from data.manifest import read_manifest
    from data.references import add_references

    rows = read_manifest(manifest)
    rows.warn_of_bad_rows()
    done = add_references(rows, out, keep=keep, apart=apart, workers=workers)
    typer.echo(f"{done.made} rows got a picture, {done.had} had some")
    for reason, count in sorted(done.without.items(), key=lambda found: -found[1]):
        typer.echo(f"{count} rows without: {reason}")
    typer.echo(out / "manifest.jsonl")
    if not done.made + done.had:
        raise typer.Exit(1)


@app.command()
def index(
    shards: Annotated[list[str], typer.Argument(help="Tar shards: paths, URLs, with wildcards.")],
    out: Annotated[Path, typer.Option(help="The manifest: .jsonl, .csv or .parquet.")],
) -> None:
    """Make a manifest of existing WebDataset tar shards; exit code 1 when one is damaged."""
    from data.tar_index import index_shards

    done = index_shards(shards, out)
    for shard, reason in done.bad:
        typer.echo(f"damaged  {shard}: {reason}")
    typer.echo(
        f"{done.num_rows} rows of {done.num_samples} samples in {done.num_shards} shards, {out}"
    )
    if done.num_without_media:
        typer.echo(f"left out, with no video or image in them: {done.num_without_media} samples")
    if done.num_silent:
        typer.echo(
            f"without a caption: {done.num_silent} rows, which training leaves out; `zoetrope data "
            "ingest` on the manifest gives them one"
        )
    if done.bad:
        raise typer.Exit(1)
