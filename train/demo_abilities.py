"""One example of each ability of the demo's model: what is given, the command, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data.randomness import numpy_generator
from data.video import write_video
from data.world import Scene, make_scene
from data.world_captions import caption
from data.world_render import render
from data.world_subjects import reference_scene
from sample.model import read_model_file

SEED = 3_000  # of the scenes that are given; those of training and of scores have others
_SIZE = {"height": 32, "width": 32, "fps": 8.0}


@dataclass(frozen=True)
class Example:
    """One call of `zoetrope sample`.

    Attributes:
        name: of the file that is made; its ending says whether it is a video.
        title: for people.
        flags: beside the prompt; files of the inputs' folder by name alone.
    """

    name: str
    title: str
    prompt: str
    flags: tuple[str, ...] = ()

    @property
    def inputs(self) -> tuple[str, ...]:
        """The files that are given."""
        return tuple(part for part in map(_file_in, self.flags) if part)


def _file_in(flag: str) -> str:
    """The file that a flag's value names, which for a keyframe has its time before it; else nothing."""
    name = flag.rpartition(":")[2]
    return name if name.endswith((".png", ".mp4")) else ""


def _scene(index: int, scenario: str = "shapes", frames: int = 9, split: str = "held-out") -> Scene:
    level = 1 if scenario == "shapes" else None
    return make_scene(
        level=level,
        seed=SEED,
        index=index,
        split=split,
        scenario=scenario,
        num_frames=frames,
        **_SIZE,  # type: ignore[arg-type]
    )


def _text(scene: Scene) -> str:
    return caption(scene, numpy_generator(SEED, "abilities", scene.index), complete=True)


def _other_colour(scene: Scene) -> str:
    """The caption that the scene would have if its object had another colour."""
    (item,) = scene.objects
    other = "yellow" if item.colour != "yellow" else "red"
    return _text(replace(scene, objects=(replace(item, colour=other),)))


def _pictures(scene: Scene) -> list[np.ndarray]:
    return [render(reference_scene(scene, number))[0] for number in range(len(scene.objects))]


def _subjects(count: int) -> Scene:
    """The first scene with so many subjects that training never shows."""
    scenes = (_scene(index, "subjects", split="identities") for index in range(100))
    return next(scene for scene in scenes if len(scene.objects) == count)


def _scenes(frames: int) -> dict[str, Scene]:
    """What is shown of the world, by name.

    Args:
        frames: of a clip of the model's.
    """
    names = ("moving", "other", "middle", "changed")
    shapes = {name: _scene(k, frames=frames) for k, name in enumerate(names)}
    return {
        **shapes,
        "bounces": _scene(0, "bounces", frames=21),
        "one": _subjects(1),
        "two": _subjects(2),
    }


def write_given(folder: Path, frames: int) -> None:
    """Writes the pictures and videos that the examples are given, into a folder that is made.

    Args:
        frames: of a clip of the model's.
    """
    from sample.options import write_png

    folder.mkdir(parents=True, exist_ok=True)
    scenes = _scenes(frames)
    clips = {name: render(scene) for name, scene in scenes.items()}
    one, two = _pictures(scenes["one"]), _pictures(scenes["two"])
    pictures = {
        "first.png": clips["moving"][0],
        "begin.png": clips["other"][0],
        "end.png": clips["other"][-1],
        "middle.png": clips["middle"][4],
        "subject.png": one[0],
        "subject-one.png": two[0],
        "subject-two.png": two[1],
    }
    mask = np.zeros_like(clips["changed"])
    mask[:, :, 16:] = 255
    videos = {
        "clip.mp4": clips["bounces"][:9],
        "later.mp4": clips["bounces"][12:],
        "changed.mp4": clips["changed"],
        "mask.mp4": mask,
    }
    for name, picture in pictures.items():
        write_png(folder / name, picture)
    for name, video in videos.items():
        write_video(folder / name, video, fps=8)


def examples(model: Path, minutes: float = 1.0) -> list[Example]:
    """One of each ability; those with references if a model folder was trained with so many.

    Args:
        minutes: of the longest.
    """
    info = read_model_file(model).info
    every = _every_example(info.num_frames, minutes)
    return [each for each in every if each.flags.count("--reference") <= info.references]


def _every_example(frames: int, minutes: float) -> list[Example]:
    scenes = _scenes(frames)
    moving, other, middle, changed, bounces, one, two = scenes.values()
    long_text = _text(bounces)
    edit = ("--edit", "changed.mp4", "--strength", "0.8")
    return [
        Example("animated.mp4", "A picture moves", _text(moving), ("--image", "first.png")),
        Example(
            "between.mp4",
            "From one picture to another",
            _text(other),
            ("--image", "begin.png", "--last", "end.png"),
        ),
        Example(
            "keyframe.mp4", "A picture at a time", _text(middle), ("--keyframe", "0.5:middle.png")
        ),
        Example(
            "extended.mp4",
            "A video goes on",
            long_text,
            ("--extend", "clip.mp4", "--seconds", "2"),
        ),
        Example(
            "before.mp4",
            "What was before it",
            long_text,
            ("--extend", "clip.mp4", "--backward"),
        ),
        Example(
            "connected.mp4",
            "From one video into another",
            long_text,
            ("--connect", "clip.mp4", "later.mp4"),
        ),
        Example("loop.mp4", "Round in a loop", long_text, ("--loop",)),
        Example("edited.mp4", "Another colour", _other_colour(changed), edit),
        Example(
            "masked.mp4",
            "Another colour, on the right alone",
            _other_colour(changed),
            (*edit, "--mask", "mask.mp4"),
        ),
        Example(
            "subject.mp4", "A subject from a picture", _text(one), ("--reference", "subject.png")
        ),
        Example(
            "subjects.mp4",
            "Two subjects",
            _text(two),
            ("--reference", "subject-one.png", "--reference", "subject-two.png"),
        ),
        Example("picture.png", "A single picture", _text(moving), ("--frames", "1")),
        Example(
            "minute.mp4",
            "A minute; the prompt changes half way",
            f"0s: {long_text} | {30 * minutes:g}s: {_other_colour(bounces)}",
            ("--minutes", f"{minutes:g}"),
        ),
    ]


def sample_examples(
    model: Path, folder: Path, run: Callable[..., None], minutes: float = 1.0
) -> None:
    """Makes every example that is not there yet, or older than the model.

    Args:
        model: a model folder.
        folder: for what is made; what is given is in its folder `given`.
        run: called with each command.
        minutes: of the longest.
    """
    write_given(folder / "given", read_model_file(model).info.num_frames)
    trained = (model / "model.yaml").stat().st_mtime
    for example in examples(model, minutes):
        target = folder / example.name
        if target.exists() and target.stat().st_mtime > trained:
            print(f"{target}: there already")
            continue
        flags = [_placed(flag, folder / "given") for flag in example.flags]
        run("zoetrope", "sample", str(model), example.prompt, *flags, "-o", str(target))


def _placed(flag: str, folder: Path) -> str:
    name = _file_in(flag)
    return flag.removesuffix(name) + str(folder / name) if name else flag


def pages(model: Path, folder: Path, minutes: float = 1.0) -> list[tuple[Path, str, str]]:
    """For a page: files, what stands under them, and a note; what is given before what came of it.

    Args:
        model, folder: as `sample_examples`.
    """
    found = []
    for example in examples(model, minutes):
        found += [(folder / "given" / name, name, "given") for name in example.inputs]
        text = f"{example.title}: {example.prompt}"
        found.append((folder / example.name, text, " ".join(example.flags)))
    return found
