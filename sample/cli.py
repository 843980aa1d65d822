"""`zoetrope sample MODEL "prompt"`: a model folder and prompts to video files."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tqdm import tqdm

MAX_BATCH_CELLS = 64 * 9 * 32 * 32  # pixels sampled at once on a CPU before a batch is split


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; blank lines and lines that start with # are left out.

    Raises:
        FileNotFoundError, ValueError: no such file, not text, or no prompt in it.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; --prompts takes a text file, a prompt a line"
        )
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text; expected a prompt a line") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"{path}: no prompt in it; expected a prompt a line")
    return prompts


def output_paths(output: Path, count: int) -> list[Path]:
    """out.mp4 for one video; out-000.mp4, out-001.mp4, ... for several.

    Raises:
        ValueError: the name does not end in .mp4.
    """
    if output.suffix != ".mp4":
        raise ValueError(
            f"-o {output}: videos are written as .mp4; use {output.with_suffix('.mp4')}"
        )
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{i:03d}.mp4") for i in range(count)]


def write_gif(path: Path, frames, fps: float) -> None:  # noqa: ANN001 (numpy, imported lazily)
    """frames uint8 (f h w 3) as an endless GIF, written aside and renamed."""
    from PIL import Image

    pictures = [Image.fromarray(frame) for frame in frames]
    aside = path.with_name(f".{path.name}.partial")
    options = {"append_images": pictures[1:], "duration": round(1000 / fps), "loop": 0}
    try:
        pictures[0].save(aside, format="GIF", save_all=True, **options)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _advance(bar: "tqdm[Any]", count: int, step: int) -> None:
    bar.update(count)


def sample(
    model: Annotated[Path, typer.Argument(help="A model folder, such as runs/demo/model.")],
    prompt: Annotated[str | None, typer.Argument(help="What the video shows.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file, a prompt a line.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help=".mp4 to write.")] = Path(
        "out.mp4"
    ),
    frames: Annotated[int | None, typer.Option(help="Length; as trained by default.")] = None,
    size: Annotated[str | None, typer.Option(help="Pixels: 32 or HEIGHTxWIDTH.")] = None,
    steps: Annotated[int, typer.Option(help="Sampler steps.")] = 20,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 turns it off.")] = 2.0,
    sampler: Annotated[
        str | None, typer.Option(help="euler or heun (flow), ddim or ancestral (DDPM).")
    ] = None,
    shift: Annotated[float | None, typer.Option(help="Shift of t; as trained by default.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first video; the next has seed + 1.")] = 0,
    num: Annotated[int, typer.Option(help="Videos per prompt.")] = 1,
    negative: Annotated[str, typer.Option(help="What guidance moves away from.")] = "",
    batch_size: Annotated[int | None, typer.Option(help="Videos sampled at once.")] = None,
    gif: Annotated[bool, typer.Option("--gif", help="Also write a .gif beside each .mp4.")] = False,
    sheet: Annotated[
        Path | None, typer.Option(help="Also write a .png contact sheet of all videos.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU if there is one.")] = None,
) -> None:
    """Sample videos from text."""
    if (prompt is None) == (prompts is None):
        raise ValueError(
            "give a prompt in quotes, or a file of them with --prompts (one of the two)"
        )
    if num < 1:
        raise ValueError(f"--num {num}: use 1 or more")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"--batch-size {batch_size}: use 1 or more")
    if sheet is not None and sheet.suffix != ".png":
        raise ValueError(f"--sheet {sheet}: expected a .png")
    if output.is_dir() or (sheet is not None and sheet.is_dir()):
        raise ValueError(f"{output if output.is_dir() else sheet}: is a folder; give a file name")
    texts = [prompt] if prompt is not None else read_prompts(prompts)  # type: ignore[arg-type]
    texts = [text for text in texts for _ in range(num)]
    paths = output_paths(output, len(texts))

    from tqdm import tqdm

    from data.video import parse_size, to_uint8, write_video
    from sample.pipeline import TextToVideo

    height, width = (None, None) if size is None else parse_size(size)
    pipeline = TextToVideo.from_folder(model, device)
    info = pipeline.info
    cells = (frames or info.num_frames) * (height or info.height) * (width or info.width)
    batch = batch_size or max(1, MAX_BATCH_CELLS // cells)
    output.parent.mkdir(parents=True, exist_ok=True)
    clips = []
    with tqdm(total=len(texts) * steps, desc="sampling", unit="step") as bar:
        for start in range(0, len(texts), batch):
            chunk = texts[start : start + batch]
            videos = pipeline(
                chunk,
                frames=frames,
                height=height,
                width=width,
                steps=steps,
                guidance=guidance,
                sampler=sampler,  # type: ignore[arg-type]
                shift=shift,
                seeds=range(seed + start, seed + start + len(chunk)),
                negative=negative,
                progress=partial(_advance, bar, len(chunk)),
            )
            for path, video in zip(paths[start:], videos):
                clip = to_uint8(video).permute(1, 2, 3, 0).numpy()
                write_video(path, clip, fps=info.fps)
                if gif:
                    write_gif(path.with_suffix(".gif"), clip, info.fps)
                if sheet is not None:
                    clips.append(clip)
    if sheet is not None:
        from sample.sheet import contact_sheet

        contact_sheet(sheet, clips, texts)
        typer.echo(sheet)
    for path in paths:
        typer.echo(path)
