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
        str, typer.Option(help="train, held-out, combinations (unseen pairs) or speeds.")
    ] = "train",
    level: Annotated[int, typer.Option(help="Difficulty, 1 to 4.")] = 1,
    size: Annotated[
        str, typer.Option(help="Frame size in pixels: one number, or HEIGHTxWIDTH.")
    ] = "32",
    frames: Annotated[int, typer.Option(help="Frames per clip.")] = 9,
    fps: Annotated[float, typer.Option(help="Frames per second.")] = 8.0,
    workers: Annotated[int | None, typer.Option(help="Processes; all cores by default.")] = None,
) -> None:
    """Render the procedural world: .mp4 clips and a manifest with captions and exact states."""
    from data.video import parse_size
    from data.world_files import WorldSpec, write_world

    height, width = parse_size(size)
    spec = WorldSpec(
        clips=clips,
        seed=seed,
        split=split,
        level=level,
        height=height,
        width=width,
        num_frames=frames,
        fps=fps,
    )
    manifest = write_world(out, spec, workers=workers)
    typer.echo(f"{clips} clips, {manifest}")


@app.command()
def check(
    manifest: Annotated[Path, typer.Argument(help="A .jsonl, .csv or .parquet manifest.")],
    frames: Annotated[int, typer.Option(help="Frames that each clip must have room for.")] = 1,
    fps: Annotated[float, typer.Option(help="Their rate, in frames per second.")] = 8.0,
    height: Annotated[int | None, typer.Option(help="Count the clips smaller than this.")] = None,
    width: Annotated[int | None, typer.Option(help="Count the clips smaller than this.")] = None,
    max_bad_share: Annotated[float, typer.Option(help="Share of rows that may be bad.")] = 0.0,
    workers: Annotated[int | None, typer.Option(help="Processes; all cores by default.")] = None,
) -> None:
    """Decode every clip: kept or dropped, with the reason; exit code 1 when too many are bad."""
    from data.check import Wanted, check_manifest

    wanted = Wanted(num_frames=frames, fps=fps, height=height, width=width)
    if not check_manifest(manifest, wanted, max_bad_share, workers):
        raise typer.Exit(1)
