"""`zoetrope sample MODEL "prompt"`: a model folder and prompts to video files."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sample.abilities import FromVideos, Rolling
from sample.media import read_image, read_keyframes
from sample.options import (
    check_not_given,
    check_prompts,
    dtype_of,
    grid_of,
    guidance_of,
    output_paths,
    outside_trained,
    write_gif,
)

if TYPE_CHECKING:
    from tqdm import tqdm

    from sample.pipeline import TextToVideo
    from sample.processes import Ranks


_GIVEN: dict[str, Any] = {"rich_help_panel": "What is given beside the prompt"}


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
    make: Callable[[str, int, dict[str, Any]], Any] | None = None,
) -> list[Any]:
    """Samples batch by batch and writes each video; gives the clips, uint8 (f h w 3), to keep.

    Batches are dealt out to the processes; of those that share one, the first decodes and writes.

    Args:
        make: in place of the pipeline; makes one video (3 f h w) from a prompt, a seed and options.
    """
    from tqdm import tqdm

    from data.video import to_uint8, write_video
    from sample.options import write_png

    clips: dict[int, Any] = {}
    steps, fps = options["steps"] or pipeline.sampling.steps, pipeline.info.fps
    writes = ranks.rank % ranks.context == 0
    batch = min(batch, -(-len(texts) // ranks.num_data_ranks))
    starts = range(0, len(texts), batch)[ranks.data_rank :: ranks.num_data_ranks]
    total = sum(len(texts[start : start + batch]) for start in starts) * steps if not make else None
    with tqdm(total=total, desc="sampling", unit="step", disable=not ranks.is_main) as bar:
        for start in starts:
            chunk = texts[start : start + batch]
            asked = {**options, "progress": partial(_advance, bar, len(chunk))}
            if make is not None:
                videos = make(chunk[0], seed + start, asked)[None]
            else:
                seeds = range(seed + start, seed + start + len(chunk))
                output = "video" if writes else "latents"
                videos = pipeline(chunk, seeds=seeds, output=output, **asked)
            for index, video in enumerate(videos if writes else (), start):
                clip = to_uint8(video).permute(1, 2, 3, 0).numpy()
                if paths[index].suffix == ".png":
                    write_png(paths[index], clip[0])
                else:
                    write_video(paths[index], clip, fps=fps)
                if gif:
                    write_gif(paths[index].with_suffix(".gif"), clip, fps)
                if keep:
                    clips[index] = clip
    every = {index: clip for part in ranks.gather(clips) for index, clip in part.items()}
    return [every[index] for index in sorted(every)]


def sample(
    model: Annotated[Path, typer.Argument(help="A model folder, such as runs/demo/model.")],
    prompt: Annotated[str | None, typer.Argument(help="What the video shows.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file, a prompt a line.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write: out.mp4, or out.png.")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Length; as trained by default.")] = None,
    size: Annotated[str | None, typer.Option(help="Pixels: 32 or HEIGHTxWIDTH.")] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to begin with.", **_GIVEN)] = None,
    last: Annotated[Path | None, typer.Option(help="A picture to end with.", **_GIVEN)] = None,
    keyframe: Annotated[
        list[str] | None,
        typer.Option(help="A picture at a time, as SECONDS:PATH; may be repeated.", **_GIVEN),
    ] = None,
    reference: Annotated[
        list[Path] | None,
        typer.Option(
            help="A picture of a subject; repeated, in the order in which the prompt names them.",
            **_GIVEN,
        ),
    ] = None,
    extend: Annotated[
        Path | None, typer.Option(help="A video that goes on, for --seconds more.", **_GIVEN)
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="To extend by; 1.", **_GIVEN)] = None,
    backward: Annotated[
        bool, typer.Option("--backward", help="Extend in front of the video.", **_GIVEN)
    ] = False,
    both: Annotated[
        bool, typer.Option("--both", help="Extend on either side of it.", **_GIVEN)
    ] = False,
    connect: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Two videos, from one of which to lead into the other.", **_GIVEN),
    ] = None,
    loop: Annotated[
        bool, typer.Option("--loop", help="Lead back to the beginning.", **_GIVEN)
    ] = False,
    edit: Annotated[
        Path | None, typer.Option(help="A video to change by the prompt.", **_GIVEN)
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="Of the change, 0 to 1; 0.6.", **_GIVEN)
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="Video or picture, white where to change.", **_GIVEN)
    ] = None,
    given: Annotated[
        int | None,
        typer.Option(help="Latent frames of what is given; see docs/given.md.", **_GIVEN),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="Length, in windows; the prompt may be a schedule.", **_GIVEN),
    ] = None,
    noise_level: Annotated[
        float | None, typer.Option(help="Of what a window is given, 0 to 1; 0.", **_GIVEN)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Sampler steps; the model's own, or 20.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Scale of the text, 1 is none; the model's own, or 2.")
    ] = None,
    guidance_low: Annotated[
        float | None, typer.Option(help="Scale for the low-noise expert of a model with two.")
    ] = None,
    guidance_references: Annotated[
        float | None, typer.Option(help="Scale of --reference; 1 is none, 2 by default.")
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
    temperature: Annotated[
        float | None, typer.Option(help="Of the noise to start from, 0 to 1; less varies less.")
    ] = None,
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
    """Sample videos from text, pictures and videos; under torchrun its processes share them out."""
    texts = check_prompts(prompt, prompts, num, batch_size, sheet)
    if context != 1 and reuse is not None:
        raise ValueError(f"--reuse works on whole clips, and --context {context} splits them")
    videos = FromVideos(
        *(extend, connect, loop, edit, seconds, backward, both, strength, mask, given)
    )
    if guidance_references is not None and not reference:
        raise ValueError("--guidance-references goes with --reference, which is not there")
    pictures = [flag for flag, value in (("--image", image), ("--last", last)) if value]
    pictures += ["--keyframe"] if keyframe else []
    videos.check(pictures, frames, batch_size, context)
    rolling = Rolling(minutes, noise_level, given)
    others = {
        "--frames": frames is not None,
        "--sheet": sheet is not None,
        "--gif": gif,
        "--batch-size": batch_size is not None,
        f"--context {context}": context > 1,  # whose processes share one clip
    }
    rolling.check(texts, videos, pictures, others)
    paths = output_paths(output, len(texts), gif, picture=frames == 1 and minutes is None)
    read = [*videos.paths, *(reference or ()), prompts, mask, image, last]
    read += [Path(each.partition(":")[2]) for each in keyframe or ()]
    written = [*paths, *([sheet] if sheet else []), *([p.with_suffix(".gif") for p in paths] * gif)]
    if sheet is not None and sheet.absolute() in [path.absolute() for path in paths]:
        raise ValueError(f"--sheet {sheet}: is what -o writes too; use another name")
    check_not_given(written, [path for path in read if path is not None])

    from data.video import parse_size
    from dit.samplers import check_temperature
    from sample import processes
    from sample.lora import parse_lora
    from sample.pipeline import MAX_BATCH_CELLS, TextToVideo

    if temperature is not None:
        check_temperature(temperature)
        if edit is not None:
            raise ValueError("--temperature does not go with --edit, which starts from its video")
    height, width = (None, None) if size is None else parse_size(size)
    loras, loras_low = ([parse_lora(text) for text in named or ()] for named in (lora, lora_low))
    ranks = processes.start(device or "auto", None, context=context)
    pipeline = TextToVideo.from_folder(
        model,
        device if ranks.mesh is None else ranks.device,
        dtype=dtype_of(dtype),
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
    if reference and guidance_references is None:
        guidance_references = pipeline.sampling.guidance_references
    options: dict[str, Any] = {
        "frames": frames,
        "height": height,
        "width": width,
        "steps": steps,
        "guidance": guidance_of(
            pipeline,
            guidance,
            guidance_low,
            references=guidance_references,
            negative=negative,
            steps=steps,
            kind=guidance_kind,
            rescale=guidance_rescale,
            interval=guidance_interval,
            sequential=sequential,
        ),
        "guidance_low": guidance_low,
        "sampler": sampler,
        "grid": grid_of(grid),
        "shift": shift,
        "negative": negative,
        "image": None if image is None else read_image(image, height, width),
        "keyframes": read_keyframes(last, keyframe or (), frames, height, width, info.fps),
        "references": [read_image(path, height, width, "--reference") for path in reference or ()],
        "reuse": reuse,
    }
    if temperature is not None:
        options["temperature"] = temperature  # not None: what is half done has no such option
    pipeline.latent_shape(frames, height, width)  # refuse what does not fit before making folders
    # An edited video has a length of its own, which is looked at when it is read.
    shown = [*options["keyframes"], *([0] if image is not None else [])]
    level = noise_level or 0.0
    unlike = outside_trained(info, frames, height, width, pictures=shown, noise_level=level)
    for text in unlike if edit is None and ranks.is_main else ():
        typer.echo(f"warning: {text}", err=True)
    make = videos.maker(pipeline, height, width, options)
    for path in (paths[0], sheet or paths[0]):
        path.parent.mkdir(parents=True, exist_ok=True)
    batch = batch_size or max(1, MAX_BATCH_CELLS // (frames * height * width))
    if rolling.minutes is not None:
        rolling.write(paths, pipeline, texts, seed, options, ranks)
        clips = []
    else:
        clips = _generate(
            pipeline,
            texts,
            paths,
            ranks,
            batch=1 if make else batch,
            seed=seed,
            gif=gif,
            keep=sheet is not None,
            options=options,
            make=make,
        )
    processes.stop()
    if not ranks.is_main:
        return
    if reuse is not None:
        work = pipeline.all_work
        shares = f"{work.num_skipped} of {work.num_evaluations} evaluations"
        typer.echo(f"reuse: {shares} skipped all blocks but one", err=True)
    if sheet is not None:
        from sample.sheet import contact_sheet

        contact_sheet(sheet, clips, texts)
        typer.echo(sheet)
    for path in paths:
        typer.echo(path)
