"""`zoetrope import` and `zoetrope export`: models and VAEs from and to diffusers' folders."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tqdm import tqdm

    from sample.shards import Header


class ExportFormat(StrEnum):
    """What `zoetrope export` can write."""

    DIFFUSERS = "diffusers"


class _Bars:
    """A progress bar for each file that is copied."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._path: Path | None = None

    def __call__(self, part: str, header: "Header", count: int) -> None:
        if header.path != self._path:
            from tqdm import tqdm

            self.close()
            name = f"{part} {header.path.name}"
            self._bar = tqdm(total=header.data_bytes, desc=name, unit="B", unit_scale=True)
            self._path = header.path
        assert self._bar is not None
        self._bar.update(count)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def import_model(
    path: Annotated[
        Path, typer.Argument(help="A folder of Wan or of a video VAE, from diffusers.")
    ],
    out: Annotated[Path, typer.Argument(help="The model folder to write; must not exist.")],
    frames: Annotated[int | None, typer.Option(help="Usual length of a sample.")] = None,
    size: Annotated[str | None, typer.Option(help="Usual size: 480 or HEIGHTxWIDTH.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second of the samples.")] = None,
    vae_only: Annotated[
        bool, typer.Option("--vae-only", help="Take a pipeline's VAE alone.")
    ] = False,
) -> None:
    """Make a model folder of a Wan model, or of a video VAE alone, in diffusers' format."""
    from data.video import parse_size
    from sample.vae_import import import_vae, is_vae_folder
    from sample.wan_import import import_wan

    values: dict[str, Any] = {"num_frames": frames, "fps": fps}
    if frames is not None and frames < 1:
        raise ValueError(f"--frames {frames}: use 1 or more")
    if fps is not None and not 0.01 <= fps <= 1000:
        raise ValueError(f"--fps {fps:g}: use a number from 0.01 to 1000")
    if size is not None:
        values["height"], values["width"] = parse_size(size)
    bars = _Bars()
    try:
        given = {name: value for name, value in values.items() if value is not None}
        run = import_vae if vae_only or is_vae_folder(path) else import_wan
        run(path, out, given, bars)
    finally:
        bars.close()
    typer.echo(out)


def export_model(
    model: Annotated[Path, typer.Argument(help="A model folder, such as runs/demo/model.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; must not exist.")],
    to: Annotated[ExportFormat, typer.Option("--format", help="What to write.")],
    transformer_only: Annotated[
        bool, typer.Option("--transformer-only", help="Leave out VAE, text encoder and tokenizer.")
    ] = False,
) -> None:
    """Write a model folder in another format."""
    from sample.wan_export import export_diffusers

    assert to is ExportFormat.DIFFUSERS
    bars = _Bars()
    try:
        export_diffusers(model, out, transformer_only=transformer_only, progress=bars)
    finally:
        bars.close()
    typer.echo(out)
