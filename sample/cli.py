"""`zoetrope sample MODEL "prompt"`: a model folder and prompts to video files."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor
    from tqdm import tqdm

    from dit.guidance import GuidanceConfig
    from sample.pipeline import TextToVideo
    from sample.processes import Ranks


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


def output_paths(output: Path, count: int, gif: bool = False) -> list[Path]:
    """out.mp4 for one video; out-000.mp4, out-001.mp4, ... for several.

    Raises:
        ValueError: the name does not end in .mp4, or what is to be written, a .gif beside each video
            too where asked for, stands there as a folder or cannot be.
    """
    if not output.name:
        raise ValueError("-o: no file name given; expected a .mp4, such as out.mp4")
    if output.suffix != ".mp4":
        raise ValueError(
            f"-o {output}: videos are written as .mp4; use {output.with_suffix('.mp4')}"
        )
    paths = [output]
    if count > 1:
        paths = [output.with_name(f"{output.stem}-{i:03d}.mp4") for i in range(count)]
    _check_files("-o", [output, *paths])
    if gif:
        _check_files("--gif", [path.with_suffix(".gif") for path in paths])
    return paths


def _check_files(flag: str, paths: Sequence[Path]) -> None:
    """Refuses files that are folders, and files of one folder that cannot be made or written to."""
    for path in paths:
        if path.is_dir():
            raise ValueError(f"{flag} {path}: is a folder; give a file name")
    folder = paths[0].parent
    above = next(each for each in (folder, *folder.parents) if each.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        what = "is a folder that you may not write to" if above.is_dir() else "is not a folder"
        raise ValueError(f"{flag} {paths[0]}: {above} {what}; give another place")


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


def read_image(path: Path, height: int, width: int) -> "Tensor":
    """A picture as a first frame (3 h w) in [-1, 1]: scaled to cover the size, cut at the middle.

    Of 8 or 16 bits a value; what is transparent shows white paper behind it.

    Raises:
        FileNotFoundError, ValueError: no such file, or not a picture, or one of more bits.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    from data.images import eight_bits
    from data.video import to_float

    if not path.is_file():
        raise FileNotFoundError(f"--image {path}: no such file")
    try:
        with Image.open(path) as opened:
            ImageOps.exif_transpose(opened, in_place=True)
            picture = eight_bits(opened)
    except Image.DecompressionBombError as error:
        raise ValueError(f"--image {path}: too large; make it smaller ({error})") from error
    except (OSError, ValueError, SyntaxError, RuntimeError) as error:  # PIL's, by format
        raise ValueError(f"--image {path}: not a picture that can be read ({error})") from error
    picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    return to_float(torch.from_numpy(np.array(picture)).permute(2, 0, 1))


def _grid(kind: str | None) -> Any:
    """The grid config of a name."""
    from typing import get_args

    from dit.grids import GridConfig

    if kind is None:
        return None
    grids = {grid.model_fields["kind"].default: grid for grid in get_args(get_args(GridConfig)[0])}
    if kind not in grids:
        raise ValueError(f"--grid {kind}: use {', '.join(grids)}")
    return grids[kind]()


def _dtype(name: str) -> Any:
    import torch

    if name not in ("bfloat16", "float32"):
        raise ValueError(f"--dtype {name}: use bfloat16 or float32")
    return getattr(torch, name)


def _guidance(
    pipeline: "TextToVideo",
    scale: float | None,
    low: float | None,
    *,
    negative: str,
    steps: int | None,
    **options: Any,
) -> "GuidanceConfig":
    """What the flags say; the scale as the model has it by default.

    Raises:
        ValueError: a value that cannot be used, flags that would do nothing, or no step that moves.
    """
    from dit.guidance import GuidanceConfig

    given = {name: value for name, value in options.items() if value not in (None, False)}
    scale = pipeline.sampling.guidance if scale is None else scale
    config = GuidanceConfig.checked(scale=scale, **given)
    flags = ["--sequential" if name == "sequential" else f"--guidance-{name}" for name in given]
    flags += ["--negative"] if negative else []
    if flags and scale == 1 and low in (None, 1):
        raise ValueError(f"guidance 1 is no guidance; leave out {flags[0]} or raise --guidance")
    steps = pipeline.sampling.steps if steps is None else steps
    if scale != 1 and config.zero_steps and steps <= config.zero_steps:
        raise ValueError(
            f"--steps {steps}: cfg_zero keeps the noise for the first {config.zero_steps}; use "
            f"{config.zero_steps + 1} or more, or another --guidance-kind"
        )
    return config


def _check(
    prompt: str | None, prompts: Path | None, num: int, batch_size: int | None, sheet: Path | None
) -> list[str]:
    """The prompts, as many times as asked; refuses flags that do not fit each other."""
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
    if sheet is not None:
        _check_files("--sheet", [sheet])
    texts = [prompt] if prompt is not None else read_prompts(prompts)  # type: ignore[arg-type]
    return [text for text in texts for _ in range(num)]


def _advance(bar: "tqdm[Any]", count: int, step: int) -> None:
    bar.update(count)


def _generate(
    pipeline: "TextToVideo",
    texts: Sequence[str],
    paths: Sequence[Path],
    ranks: "Ranks",
    *,
    batch: int,
    seed: int,
    gif: bool,
    keep: bool,
    options: dict[str, Any],
) -> list[Any]:
    """Samples batch by batch and writes each video; gives the clips, uint8 (f h w 3), to keep.

    Batches are dealt out to the processes; of those that share one, the first decodes and writes.
    """
    from tqdm import tqdm

    from data.video import to_uint8, write_video

    clips: dict[int, Any] = {}
    evaluated = skipped = 0
    steps, fps = options["steps"] or pipeline.sampling.steps, pipeline.info.fps
    writes = ranks.rank % ranks.context == 0
    batch = min(batch, -(-len(texts) // ranks.num_data_ranks))
    starts = range(0, len(texts), batch)[ranks.data_rank :: ranks.num_data_ranks]
    total = sum(len(texts[start : start + batch]) for start in starts) * steps
    with tqdm(total=total, desc="sampling", unit="step", disable=not ranks.is_main) as bar:
        for start in starts:
            chunk = texts[start : start + batch]
            videos = pipeline(
                chunk,
                seeds=range(seed + start, seed + start + len(chunk)),
                progress=partial(_advance, bar, len(chunk)),
                output="video" if writes else "latents",
                **options,
            )
            evaluated += pipeline.work.num_evaluations
            skipped += pipeline.work.num_skipped
            for index, video in enumerate(videos if writes else (), start):
                clip = to_uint8(video).permute(1, 2, 3, 0).numpy()
                write_video(paths[index], clip, fps=fps)
                if gif:
                    write_gif(paths[index].with_suffix(".gif"), clip, fps)
                if keep:
                    clips[index] = clip
    if options["reuse"] is not None and ranks.is_main:
        typer.echo(
            f"reuse: {skipped} of {evaluated} evaluations skipped all blocks but one", err=True
        )
    every = {index: clip for part in ranks.gather(clips) for index, clip in part.items()}
    return [every[index] for index in sorted(every)]


def sample(
    model: Annotated[Path, typer.Argument(help="A model folder, such as runs/demo/model.")],
    prompt: Annotated[str | None, typer.Argument(help="What the video shows.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file, a prompt a line.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help=".mp4 to write.")] = Path(
        "out.mp4"
    ),
    frames: Annotated[int | None, typer.Option(help="Length; as trained by default.")] = None,
    size: Annotated[str | None, typer.Option(help="Pixels: 32 or HEIGHTxWIDTH.")] = None,
    image: Annotated[
        Path | None, typer.Option(help="A picture to begin with, for models that can.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Sampler steps; the model's own, or 20.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Scale, 1 turns it off; the model's own, or 2.")
    ] = None,
    guidance_low: Annotated[
        float | None, typer.Option(help="Scale for the low-noise expert of a model with two.")
    ] = None,
    guidance_kind: Annotated[str | None, typer.Option(help="cfg, cfg_zero or apg.")] = None,
    guidance_rescale: Annotated[
        float | None, typer.Option(help="0 to 1: hold back contrast that guidance adds.")
    ] = None,
    guidance_interval: Annotated[
        tuple[float, float] | None, typer.Option(help="LOW HIGH: noise levels with guidance.")
    ] = None,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Half the memory for guidance; the same result.")
    ] = False,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="euler, heun, midpoint, dpmpp_2m or unipc (flow); ddim, ancestral or dpmpp_2m (DDPM)."
        ),
    ] = None,
    grid: Annotated[
        str | None, typer.Option(help="uniform, shifted, karras, wan or flow_match_euler.")
    ] = None,
    shift: Annotated[float | None, typer.Option(help="Shift of t; as trained by default.")] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="A LoRA in diffusers' format, PATH or PATH:SCALE; may be repeated."),
    ] = None,
    lora_low: Annotated[
        list[str] | None, typer.Option(help="One for the low-noise expert of a model with two.")
    ] = None,
    reuse: Annotated[
        float | None, typer.Option(help="Skip blocks that change less than this; try 0.1.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first video; the next has seed + 1.")] = 0,
    num: Annotated[int, typer.Option(help="Videos per prompt.")] = 1,
    negative: Annotated[str, typer.Option(help="What guidance moves away from.")] = "",
    batch_size: Annotated[int | None, typer.Option(help="Videos sampled at once.")] = None,
    gif: Annotated[bool, typer.Option("--gif", help="Also write a .gif beside each .mp4.")] = False,
    sheet: Annotated[
        Path | None, typer.Option(help="Also write a .png contact sheet of all videos.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU if there is one.")] = None,
    dtype: Annotated[
        str, typer.Option(help="bfloat16 or float32: what text encoder and DiT multiply in.")
    ] = "bfloat16",
    compile_blocks: Annotated[
        bool, typer.Option("--compile", help="Compile the DiT; pays for long or many videos.")
    ] = False,
    context: Annotated[
        int, typer.Option(min=1, help="Under torchrun: processes that share a video's tokens.")
    ] = 1,
) -> None:
    """Sample videos from text; under torchrun its processes share them out."""
    texts = _check(prompt, prompts, num, batch_size, sheet)
    if context != 1 and reuse is not None:
        raise ValueError(f"--reuse works on whole clips, and --context {context} splits them")
    paths = output_paths(output, len(texts), gif)

    from data.video import parse_size
    from sample import processes
    from sample.lora import parse_lora
    from sample.pipeline import MAX_BATCH_CELLS, TextToVideo

    height, width = (None, None) if size is None else parse_size(size)
    loras, loras_low = ([parse_lora(text) for text in given or ()] for given in (lora, lora_low))
    ranks = processes.start(device or "auto", None, context=context)
    pipeline = TextToVideo.from_folder(
        model,
        device if ranks.mesh is None else ranks.device,
        dtype=_dtype(dtype),
        compile_blocks=compile_blocks,
        lora=loras,
        lora_low=loras_low,
    )
    if context > 1:
        from sample.context import share

        share(pipeline.experts, ranks)
    info = pipeline.info
    frames = info.num_frames if frames is None else frames
    height, width = height or info.height, width or info.width
    options: dict[str, Any] = {
        "frames": frames,
        "height": height,
        "width": width,
        "steps": steps,
        "guidance": _guidance(
            pipeline,
            guidance,
            guidance_low,
            negative=negative,
            steps=steps,
            kind=guidance_kind,
            rescale=guidance_rescale,
            interval=guidance_interval,
            sequential=sequential,
        ),
        "guidance_low": guidance_low,
        "sampler": sampler,
        "grid": _grid(grid),
        "shift": shift,
        "negative": negative,
        "image": None if image is None else read_image(image, height, width),
        "reuse": reuse,
    }
    pipeline.latent_shape(frames, height, width)  # refuse what does not fit before making folders
    for path in (output, sheet or output):
        path.parent.mkdir(parents=True, exist_ok=True)
    batch = batch_size or max(1, MAX_BATCH_CELLS // (frames * height * width))
    clips = _generate(
        pipeline,
        texts,
        paths,
        ranks,
        batch=batch,
        seed=seed,
        gif=gif,
        keep=sheet is not None,
        options=options,
    )
    processes.stop()
    if not ranks.is_main:
        return
    if sheet is not None:
        from sample.sheet import contact_sheet

        contact_sheet(sheet, clips, texts)
        typer.echo(sheet)
    for path in paths:
        typer.echo(path)
