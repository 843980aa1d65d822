"""What `zoetrope sample` is asked for, read and checked: prompts, files to write, settings."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit.guidance import GuidanceConfig
    from sample.model import ModelInfo
    from sample.pipeline import TextToVideo


_LONGEST = 220  # bytes of a file name, to which a few are added while it is written


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


def output_paths(
    output: Path | None, count: int, gif: bool = False, picture: bool = False
) -> list[Path]:
    """out.mp4 for one video; out-000.mp4, out-001.mp4, ... for several; .png for pictures.

    Raises:
        ValueError: the name does not end so, or what is to be written, a .gif beside each video
            too where asked for, stands there as a folder or cannot be.
    """
    suffix, what = (".png", "single frames") if picture else (".mp4", "videos")
    if output is None:
        output = Path("out").with_suffix(suffix)
    if not output.name:
        raise ValueError(f"-o: no file name given; expected a {suffix}, such as out{suffix}")
    if output.suffix != suffix:
        raise ValueError(
            f"-o {output}: {what} are written as {suffix}; use {output.with_suffix(suffix)}"
        )
    paths = [output]
    if count > 1:
        paths = [output.with_name(f"{output.stem}-{i:03d}{suffix}") for i in range(count)]
    check_files("-o", [output, *paths])
    if gif:
        check_files("--gif", [path.with_suffix(".gif") for path in paths])
    return paths


def check_not_given(paths: Sequence[Path], given: Sequence[Path]) -> None:
    """Refuses to write what is to be read."""
    for path in given:
        if any(each.exists() and path.exists() and each.samefile(path) for each in paths):
            raise ValueError(f"{path} is one of the files that are given; write to another one")


def check_files(flag: str, paths: Sequence[Path]) -> None:
    """Refuses files that are folders, and files of one folder that cannot be made or written to."""
    for path in paths:
        if path.is_dir():
            raise ValueError(f"{flag} {path}: is a folder; give a file name")
        if len(os.fsencode(path.name)) > _LONGEST:
            raise ValueError(f"{flag} {path}: the name has more than {_LONGEST} bytes")
    folder = paths[0].parent
    above = next(each for each in (folder, *folder.parents) if each.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        what = "is a folder that you may not write to" if above.is_dir() else "is not a folder"
        raise ValueError(f"{flag} {paths[0]}: {above} {what}; give another place")


def write_gif(path: Path, frames, fps: float) -> None:  # noqa: ANN001 (numpy, imported lazily)
    """frames uint8 (f h w 3) as an endless GIF, written aside and renamed."""
    from PIL import Image

    from data.files import replacing

    pictures = [Image.fromarray(frame) for frame in frames]
    options = {"append_images": pictures[1:], "duration": round(1000 / fps), "loop": 0}
    with replacing(path) as partial:
        pictures[0].save(partial, format="GIF", save_all=True, **options)


def write_png(path: Path, frame) -> None:  # noqa: ANN001 (numpy, imported lazily)
    """frame uint8 (h w 3), written aside and renamed."""
    from PIL import Image

    from data.files import replacing

    with replacing(path) as partial:
        Image.fromarray(frame).save(partial, format="PNG")


class OutsideTraining(UserWarning):
    """What is asked of a model is not what it was trained on."""


def outside_trained(
    info: ModelInfo,
    frames: int,
    height: int,
    width: int,
    *,
    pictures: Collection[int] = (),
    noise_level: float = 0.0,
) -> list[str]:
    """What to say of a size that the model was not trained on, and of what it is given; nothing of
    models that do not say what they were trained on.

    Args:
        pictures: the frames of which pictures are given; noise_level: of what a window is given.
    """
    said = _other_size(info, frames, height, width)
    beside = [frame for frame in pictures if frame > 0]
    ends = "ends" in info.tasks and beside == [frames - 1]
    if len(pictures) > 1 and beside and not ends and "keyframes" not in info.tasks:
        said.append(
            f"pictures of {len(pictures)} frames are given, and the model was not trained with several "
            "(recipe.tasks.keyframes)"
        )
    if info.given_noise is not None and noise_level > info.given_noise:
        said.append(
            f"a noise level of {noise_level:g}: given frames carried {info.given_noise:g} at most when "
            "this model was trained (recipe.tasks.noise)"
        )
    return said


def _other_size(info: ModelInfo, frames: int, height: int, width: int) -> list[str]:
    if not info.sizes:
        return []
    lengths, pixels, aspects = zip(*((f, h * w, w / h) for f, h, w in info.sizes))
    low, high = 1 if "image" in info.tasks else min(lengths), max(lengths)
    outside = []
    if not low <= frames <= high:
        outside.append(f"{frames} frames (trained on {low} to {high})")
    if not 0.9 * min(pixels) <= height * width <= 1.1 * max(pixels):
        span = f"{min(pixels)} to {max(pixels)}"
        outside.append(f"{height}x{width} = {height * width} pixels (trained on {span})")
    if not 0.9 * min(aspects) <= width / height <= 1.1 * max(aspects):
        span = f"{min(aspects):.2f} to {max(aspects):.2f}"
        outside.append(f"width / height = {width / height:.2f} (trained on {span})")
    return [f"outside what the model was trained on: {'; '.join(outside)}"] if outside else []


def grid_of(kind: str | None) -> Any:
    """The grid config of a name."""
    from typing import get_args

    from dit.grids import GridConfig

    if kind is None:
        return None
    grids = {grid.model_fields["kind"].default: grid for grid in get_args(get_args(GridConfig)[0])}
    if kind not in grids:
        raise ValueError(f"--grid {kind}: use {', '.join(grids)}")
    return grids[kind]()


def dtype_of(name: str) -> Any:
    import torch

    if name not in ("bfloat16", "float32"):
        raise ValueError(f"--dtype {name}: use bfloat16 or float32")
    return getattr(torch, name)


def guidance_of(
    pipeline: TextToVideo,
    scale: float | None,
    low: float | None,
    *,
    references: float | None,
    negative: str,
    steps: int | None,
    **options: Any,
) -> GuidanceConfig:
    """What the flags say; the scale as the model has it by default.

    Args:
        references: scale of reference pictures; None where none are given.
    Raises:
        ValueError: a value that cannot be used, flags that would do nothing, or no step that moves.
    """
    from dit.guidance import GuidanceConfig

    given = {k: value for k, value in options.items() if value is not None and value is not False}
    scale = pipeline.sampling.guidance if scale is None else scale
    config = GuidanceConfig.checked(scale=scale, references=references, **given)
    flags = ["--sequential" if name == "sequential" else f"--guidance-{name}" for name in given]
    flags += ["--negative"] if negative else []
    if flags and config.is_none and low in (None, 1):
        raise ValueError(f"guidance 1 is no guidance; leave out {flags[0]} or raise --guidance")
    steps = pipeline.sampling.steps if steps is None else steps
    if scale != 1 and config.zero_steps and steps <= config.zero_steps:
        raise ValueError(
            f"--steps {steps}: cfg_zero keeps the noise for the first {config.zero_steps}; use "
            f"{config.zero_steps + 1} or more, or another --guidance-kind"
        )
    return config


def check_prompts(
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
        check_files("--sheet", [sheet])
    texts = [prompt] if prompt is not None else read_prompts(prompts)  # type: ignore[arg-type]
    return [text for text in texts for _ in range(num)]
