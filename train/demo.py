"""`make demo`: from nothing to scored videos, as the commands a user would type themselves.

Every step can be interrupted: the same command finds what is done and goes on from there.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from train.demo_abilities import pages, sample_examples
from train.demo_sizes import SHORT, SIZES, Size

# What is given says how it goes on, so that there is little to guide or to draw; docs/given.md.
KNOWN = {"--guidance": 1, "--temperature": 0.7}
GOES_ON = ("extension", "physics")  # parts that are sampled so
PROMPT_SEED = 2_000  # of the scenes shown on the page; scores use eval's own seed


def run(*command: str) -> None:
    """One step's command, shown as it could be typed.

    Raises:
        SystemExit: it failed, with its exit code, or was interrupted; its own message stands above.
    """
    print(f"$ {shlex.join(command)}", flush=True)
    executable = Path(sys.executable).with_name(command[0])
    process = subprocess.Popen([str(executable), *command[1:]])
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the command got it too, and writes a checkpoint before it ends
        process.wait()
        raise SystemExit(130) from None
    if code != 0:
        raise SystemExit(code if code > 0 else 128 - code)


def run_here(*command: str) -> None:
    """A `zoetrope` command in this process, for many short ones: what they import takes seconds.

    Raises:
        SystemExit: as `run`.
    """
    from train.cli import main as zoetrope

    print(f"$ {shlex.join(command)}", flush=True)
    try:
        zoetrope(command[1:])
    except SystemExit as end:
        if end.code:
            raise


def render(size: Size) -> None:
    """Clips for VAE and texts, others of several scenarios for all tasks, and held-out ones."""
    _render(size, "train", "shapes", size.clips, "train", 1)
    mixed = [
        # With the seed above, so that these have no captions of plain shapes that those have not;
        # nor have the longer ones.
        _render(size, f"mixed/{scenario}", scenario, clips, "train", 1)
        for scenario, clips in size.mixed.items()
    ]
    joined = {"mixed": mixed}
    for frames in {SHORT, *(stage.frames for stage in size.longer)}:
        length = "" if frames == SHORT else f"-{frames}"
        joined[f"held-out-mixed{length}"] = [
            _render(size, f"held-out{length}", "shapes", size.held_out, "held-out", 2, frames),
            _render(
                *(size, f"held-out-subjects{length}", "subjects"),
                *(size.held_out // 2, "held-out", 2, frames),
            ),
        ]
    for stage in size.longer:
        if not (stage.clips or stage.others):
            continue
        new = [_render(size, *clips[:3], "train", clips[3], stage.frames) for clips in stage.clips]
        old = [size.out / "world" / folder / "manifest.jsonl" for folder in stage.others]
        joined[stage.config.stem] = new + old
    for name, manifests in joined.items():
        path = str(size.out / "world" / f"{name}.jsonl")
        run_here("zoetrope", "data", "join", path, *map(str, manifests), "--overwrite")


def _render(
    size: Size,
    folder: str,
    scenario: str,
    clips: int,
    split: str,
    seed: int,
    frames: int = SHORT,
) -> Path:
    """The manifest of so many clips, in a folder of the world's."""
    what = {"--clips": clips, "--seed": seed, "--split": split}
    options = {**what, "--scenario": scenario, "--frames": frames}
    flat = [str(x) for pair in options.items() for x in pair]
    run_here("zoetrope", "data", "world", str(size.out / "world" / folder), *flat)
    return size.out / "world" / folder / "manifest.jsonl"


def torchrun(config: Path) -> None:
    run("torchrun", "--standalone", "--nproc-per-node", "1", "-m", "train", str(config))


def train_vae(size: Size) -> None:
    """All of it, and then its decoder alone, in which minutes are best spent once latents are good."""
    torchrun(size.vae)
    torchrun(size.decoder)


def write_prompts(size: Size) -> Path:
    """Prompts that no training clip has: other wordings, and colour-shape pairs never seen."""
    from data.manifest import read_manifest
    from eval.world_suite import WorldSettings, eval_scenes

    manifest = read_manifest(size.out / "world" / "train" / "manifest.jsonl")
    trained = {text for row in manifest.rows for text in row.captions}
    prompts: list[str] = []
    for split, num in (("held-out", 12), ("combinations", 4)):
        settings = WorldSettings(num=num, seed=PROMPT_SEED, split=split)
        _, found = eval_scenes(settings, avoid=trained, height=32, width=32, num_frames=9, fps=8.0)
        prompts += found
    path = size.shown / "prompts.txt"
    path.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    return path


def sample(size: Size) -> None:
    """Videos from the prompts, as files and as one picture."""
    (size.shown / "samples").mkdir(parents=True, exist_ok=True)
    prompts = write_prompts(size)
    files = {
        "--prompts": prompts,
        "-o": size.shown / "samples" / "sample.mp4",
        "--sheet": size.shown / "contact-sheet.png",
    }
    flat = [str(x) for pair in files.items() for x in pair]
    run("zoetrope", "sample", str(size.shown / "model"), *flat)


def score(size: Size) -> None:
    """The table: held-out prompts and pairs never seen."""
    train = size.out / "world" / "train" / "manifest.jsonl"
    for split in ("held-out", "combinations"):
        _score(size, split, {"--split": split, "--num": size.prompts, "--avoid": train})


def score_parts(size: Size) -> None:
    """More tables: what the model makes of what it is given."""
    for part, num in size.parts.items():
        sampled = KNOWN if part in GOES_ON else {}
        _score(size, part, {"--part": part, "--num": num, **sampled})


def _score(size: Size, name: str, options: dict[str, object]) -> None:
    """scores-NAME.json, unless this model has been scored."""
    model, scores = size.shown / "model", size.shown / f"scores-{name}.json"
    if scores.is_file() and scores.stat().st_mtime > (model / "model.yaml").stat().st_mtime:
        print(f"{scores}: this model is scored already")
        return
    flat = [str(x) for pair in options.items() for x in pair]
    run("zoetrope", "eval", str(model), "--suite", "world", *flat, "-o", str(scores))


def abilities(size: Size) -> None:
    """One example of each thing that can be given beside a text."""
    model, folder = size.shown / "model", size.shown / "abilities"
    sample_examples(model, folder, run_here, size.long_minutes)


def report(size: Size) -> None:
    """The page that shows all of it."""
    from eval.report import ReportVideo, write_report
    from eval.tables import score_table

    out = size.shown
    prompts = (out / "prompts.txt").read_text(encoding="utf-8").splitlines()
    videos = [
        ReportVideo(out / "samples" / f"sample-{i:03d}.mp4", prompt)
        for i, prompt in enumerate(prompts)
    ]
    scored = ("held-out", "combinations", *size.parts)
    results = [json.loads((out / f"scores-{name}.json").read_text()) for name in scored]
    logs = {
        "VAE": "vae",
        "VAE, its decoder": "decoder",
        "DiT, text to video": "dit",
        "DiT, all tasks": "tasks",
    }
    if size.long_decoder is not None:
        logs["VAE, its decoder on longer clips"] = size.long_decoder.stem
    for stage in size.longer:
        logs[f"DiT, all tasks, {stage.config.stem}"] = stage.config.stem
    write_report(
        out / "report.html",
        title="Zoetrope: videos that this machine learned to make from text",
        intro="A video VAE and a diffusion transformer, trained from nothing on the procedural "
        "world: one object, straight motions in four directions, 32x32 pixels; after that on objects "
        "that bounce, collide and fall, and on subjects that are known from pictures.",
        videos={
            "Prompts never used in training": videos[:12],
            "Pairs never seen": videos[12:],
            "Given more than a text: pictures and videos, and what was made of them": [
                ReportVideo(*each)
                for each in pages(out / "model", out / "abilities", size.long_minutes)
            ],
        },
        tables=[score_table(result) for result in results],
        logs={title: size.out / run / "log.jsonl" for title, run in logs.items()},
        picture=out / "contact-sheet.png",
    )


def link_model(size: Size, run: str) -> None:
    """runs/demo/model is the last run's export, under the name that the README uses."""
    size.shown.mkdir(parents=True, exist_ok=True)
    link, target = size.shown / "model", size.out / run / "model"
    target = Path(os.path.relpath(target, size.shown))
    if link.is_symlink() or not link.exists():
        link.unlink(missing_ok=True)
        link.symlink_to(target)


def train_tasks(size: Size) -> None:
    torchrun(size.tasks)
    if not size.longer:
        link_model(size, "tasks")


def train_longer(size: Size) -> None:
    if size.long_decoder is not None:
        torchrun(size.long_decoder)
    for stage in size.longer:
        torchrun(stage.config)
    link_model(size, size.longer[-1].config.stem)


STEPS: tuple[tuple[str, Callable[[Size], None]], ...] = (
    ("render the world", render),
    ("train the video VAE", train_vae),
    ("train the diffusion transformer: text to video", lambda size: torchrun(size.dit)),
    ("train it on, to be given pictures and videos too", train_tasks),
    ("train it on for longer, above all on subjects and seams", train_longer),
    ("sample prompts never used in training", sample),
    ("animate, extend, connect, loop, edit, go on for a minute", abilities),
    ("score the texts", score),
    ("score what it makes of pictures and videos", score_parts),
    ("write the report", report),
)


def command(name: str) -> str:
    """What a user types for the demo of that size."""
    return "make demo" + ("" if name == "world" else f" DEMO={name}")


def main(name: str = "world") -> None:
    """Runs every step of the demo of that size, saying how far along it is.

    Raises:
        SystemExit: no such size, or a step failed.
    """
    if name not in SIZES:
        raise SystemExit(f"demo: DEMO={name} is unknown; use {', '.join(SIZES)}")
    size = SIZES[name]
    begun = time.monotonic()
    steps = [(*each, minutes) for each, minutes in zip(STEPS, size.minutes, strict=True) if minutes]
    for i, (title, step, _) in enumerate(steps):
        left = sum(minutes for *_, minutes in steps[i:])
        to_go = f"about {left:.0f} min to go" if left >= 1 else "less than a minute to go"
        print(f"\n[{i + 1}/{len(steps)}] {title} ({to_go})", flush=True)
        try:
            step(size)
        except SystemExit as end:
            what = "interrupted" if end.code == 130 else f"that failed with exit code {end.code}"
            print(f"\ndemo: {what}; {command(name)} goes on from here")
            raise
    print(f"\nDone in {(time.monotonic() - begun) / 60:.1f} min.")
    _say_what_is_there(name, size)


def _say_what_is_there(name: str, size: Size) -> None:
    out = size.shown.resolve()
    print(f"  videos, curves, scores: {out / 'report.html'}")
    print(f"  one picture:            {out / 'contact-sheet.png'}")
    prompt = '"a red circle moving left on a blue background"'
    model, video = size.shown / "model", size.shown / "mine.mp4"
    print(f"  your own prompt:        .venv/bin/zoetrope sample {model} {prompt} -o {video}")
    if name == "tiny":
        print(
            "So short a training gives noise and scores near zero; plain make demo trains in earnest."
        )


if __name__ == "__main__":
    main(*sys.argv[1:2])
