"""`make gallery`: docs/gallery.md, one example of each ability of the demo's model.

Run after `make demo`; examples that are missing are made.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from data.files import replacing
from data.video import VideoReader
from sample.options import write_gif, write_png
from train.demo import SIZES, abilities, command
from train.demo_abilities import Example, examples

# Of the world's small pictures; half of it for more frames than LONG, or files grow large.
SCALE = 4
LONG = 100
_HEAD = """# Gallery

One example of each ability of the demo's model, which two CPU cores trained from nothing
([README](../README.md)). `{demo}` makes them; `{gallery}` made this page of what is in `{out}`.
Nothing is picked out: each is the first that was made. What each ability is: [given.md](given.md); how
well the model does it: [demo-recipe.md](demo-recipe.md).

| given | prompt and flags | made |
|---|---|---|
"""


def read_frames(path: Path) -> tuple[np.ndarray, float]:
    """All frames of a video, or the one of a picture, uint8 (f h w 3), and their rate."""
    with VideoReader(path, "pyav") as reader:
        info = reader.info
        if info.is_image:
            return reader.read_at([0.0]), 1.0
        count = round(info.duration * info.fps)
        return reader.read_at((np.arange(count) + 0.5) / info.fps), info.fps


def write_shown(source: Path, folder: Path) -> Path:
    """A file as browsers show it in a page of text: enlarged, a .gif or a .png."""
    frames, fps = read_frames(source)
    scale = SCALE if len(frames) <= LONG else SCALE // 2
    frames = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    if len(frames) == 1:
        target = folder / source.name
        write_png(target, frames[0])
    else:
        target = folder / f"{source.stem}.gif"
        write_gif(target, frames, fps)
    return target


def line(example: Example, folder: Path, page: Path) -> str:
    """A row of the page's table; what it shows is written beside the page.

    Args:
        folder: of what was made, with what was given in its folder `given`.
    """

    def shown(path: Path) -> str:
        place = write_shown(path, page.with_suffix("")).relative_to(page.parent).as_posix()
        return f"![{path.stem}]({place})"

    given = " ".join(shown(folder / "given" / name) for name in example.inputs)
    flags = f"<br>`{' '.join(example.flags)}`" if example.flags else ""
    prompt = example.prompt.replace("|", "\\|")
    return f"| {given} | **{example.title}**<br>{prompt}{flags} | {shown(folder / example.name)} |"


def main(name: str = "world", page: str | None = None) -> None:
    """Writes the page of a demo of that size.

    Args:
        page: where; by default docs/gallery.md, or for the tiny demo a file in its own folder.
    Raises:
        SystemExit: that demo has not been made.
    """
    size = SIZES[name]
    target = Path(page or (size.shown / "gallery.md" if name == "tiny" else "docs/gallery.md"))
    model, folder = size.shown / "model", size.shown / "abilities"
    if not (model / "model.yaml").is_file():
        raise SystemExit(f"gallery: {model} is not there; run {command(name)} first")
    abilities(size)
    target.with_suffix("").mkdir(parents=True, exist_ok=True)
    rows = [line(example, folder, target) for example in examples(model, size.long_minutes)]
    text = (
        _HEAD.format(
            out=size.shown, demo=command(name), gallery=command(name).replace("demo", "gallery", 1)
        )
        + "\n".join(rows)
        + "\n"
    )
    with replacing(target) as partial:
        partial.write_text(text, encoding="utf-8")
    print(f"{target}: {len(rows)} examples")


if __name__ == "__main__":
    main(*sys.argv[1:3])
