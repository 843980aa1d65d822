"""`make demo`: from nothing to scored videos, as the commands a user would type themselves; and `make
abilities`, which trains the demo's model on to be given pictures and videos.

Every step can be interrupted: the same command finds what is done and goes on from there.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from train.demo_abilities import pages, sample_examples

LAWS = ("uniform", "collision", "parabola")
PROMPT_SEED = 2_000  # of the scenes shown on the page; scores use eval's own seed


@dataclass(frozen=True)
class Size:
    """How large a demo is; minutes are measured on two CPU cores."""

    out: Path
    vae: Path
    dit: Path
    tasks: Path
    clips: int
    held_out: int
    more: dict[str, int]  # clips of other scenarios, for the abilities
    prompts: int
    minutes: tuple[float, ...]  # per step of the demo, and of the abilities
    more_minutes: tuple[float, ...]
    long_minutes: float = 1.0  # of the longest video


SIZES = {
    "world": Size(
        out=Path("runs/demo"),
        vae=Path("configs/world/vae.yaml"),
        dit=Path("configs/world/dit.yaml"),
        tasks=Path("configs/world/tasks.yaml"),
        clips=20_000,
        held_out=512,
        more={"bounces": 4_000, **dict.fromkeys(LAWS, 400)},
        prompts=300,
        minutes=(1, 2, 16, 0.3, 1.5, 0.1),
        more_minutes=(0.3, 7, 2, 0.1),
    ),
    "tiny": Size(
        out=Path("runs/demo-tiny"),
        vae=Path("configs/world/tiny-vae.yaml"),
        dit=Path("configs/world/tiny-dit.yaml"),
        tasks=Path("configs/world/tiny-tasks.yaml"),
        clips=128,
        held_out=16,
        more={"subjects": 32, **dict.fromkeys(LAWS, 16)},
        prompts=8,
        minutes=(0.1, 0.3, 0.4, 0.2, 0.2, 0.1),
        more_minutes=(0.1, 0.3, 0.3, 0.1),
        long_minutes=0.05,
    ),
}


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
    """The training clips, and held-out ones for validation."""
    for split, clips, seed in (("train", size.clips, 1), ("held-out", size.held_out, 2)):
        _render(size, split, "shapes", clips, split, seed)


def render_more(size: Size) -> None:
    """Clips of other scenarios, and a manifest of them and the training clips."""
    world = size.out / "world"
    for scenario, clips in size.more.items():
        _render(size, scenario, scenario, clips, "train", 1)
    joined = [str(world / name / "manifest.jsonl") for name in ("train", *size.more)]
    run_here("zoetrope", "data", "join", str(world / "all.jsonl"), *joined, "--overwrite")


def _render(size: Size, folder: str, scenario: str, clips: int, split: str, seed: int) -> None:
    options = {"--clips": clips, "--seed": seed, "--split": split, "--scenario": scenario}
    flat = [str(x) for pair in options.items() for x in pair]
    run_here("zoetrope", "data", "world", str(size.out / "world" / folder), *flat)


def torchrun(config: Path) -> None:
    run("torchrun", "--standalone", "--nproc-per-node", "1", "-m", "train", str(config))


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
    path = size.out / "prompts.txt"
    path.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    return path


def sample(size: Size) -> None:
    """Videos from the prompts, as files and as one picture."""
    (size.out / "samples").mkdir(parents=True, exist_ok=True)
    prompts = write_prompts(size)
    files = {
        "--prompts": prompts,
        "-o": size.out / "samples" / "sample.mp4",
        "--sheet": size.out / "contact-sheet.png",
    }
    flat = [str(x) for pair in files.items() for x in pair]
    run("zoetrope", "sample", str(size.out / "model"), *flat)


def score(size: Size) -> None:
    """The table: held-out prompts and pairs never seen, unless this model has been scored."""
    model, train = size.out / "model", size.out / "world" / "train" / "manifest.jsonl"
    for split in ("held-out", "combinations"):
        scores = size.out / f"scores-{split}.json"
        if scores.is_file() and scores.stat().st_mtime > (model / "model.yaml").stat().st_mtime:
            print(f"{scores}: this model is scored already")
            continue
        options = {"--suite": "world", "--split": split, "--num": size.prompts, "--avoid": train}
        flat = [str(x) for pair in options.items() for x in pair]
        run("zoetrope", "eval", str(model), *flat, "-o", str(scores))


def abilities(size: Size) -> None:
    """One example of each."""
    model, folder = size.out / "tasks" / "model", size.out / "abilities"
    sample_examples(model, folder, run_here, size.long_minutes)


def report_abilities(size: Size) -> None:
    """The page that shows them, with what was given."""
    from eval.report import ReportVideo, write_report

    shown = pages(size.out / "tasks" / "model", size.out / "abilities")
    write_report(
        size.out / "abilities.html",
        title="Zoetrope: given more than a text",
        intro="The demo's model, trained on for a few minutes to be given pictures and videos. What is "
        "given stands before what was made of it.",
        videos={"One example of each": [ReportVideo(*each) for each in shown]},
        logs={"DiT": size.out / "tasks" / "log.jsonl"},
    )


def report(size: Size) -> None:
    """The page that shows all of it."""
    from eval.report import ReportVideo, write_report
    from eval.tables import score_table

    out = size.out
    prompts = (out / "prompts.txt").read_text(encoding="utf-8").splitlines()
    videos = [
        ReportVideo(out / "samples" / f"sample-{i:03d}.mp4", prompt)
        for i, prompt in enumerate(prompts)
    ]
    splits = ("held-out", "combinations")
    results = [json.loads((out / f"scores-{split}.json").read_text()) for split in splits]
    write_report(
        out / "report.html",
        title="Zoetrope: videos that this machine learned to make from text",
        intro="A video VAE and a diffusion transformer, trained from nothing on the procedural "
        "world (level 1: one object, straight motions in four directions, 32x32 pixels).",
        videos={"Prompts never used in training": videos[:12], "Pairs never seen": videos[12:]},
        tables=[score_table(result) for result in results],
        logs={"VAE": out / "vae" / "log.jsonl", "DiT": out / "dit" / "log.jsonl"},
        picture=out / "contact-sheet.png",
    )


def link_model(size: Size) -> None:
    """runs/demo/model is the DiT run's export, under the name that the README uses."""
    link, target = size.out / "model", Path("dit") / "model"
    if link.is_symlink() or not link.exists():
        link.unlink(missing_ok=True)
        link.symlink_to(target)


def train_dit(size: Size) -> None:
    torchrun(size.dit)
    link_model(size)


def main(name: str = "world", what: str = "demo") -> None:
    """Runs every step of the demo of that size, or of its abilities, saying how far along it is.

    Args:
        what: "demo" or "abilities".
    Raises:
        SystemExit: no such size, no model to give abilities to, or a step failed.
    """
    if name not in SIZES:
        raise SystemExit(f"demo: DEMO={name} is unknown; use {' or '.join(SIZES)}")
    size = SIZES[name]
    command = f"make {what}" + ("" if name == "world" else f" DEMO={name}")
    if what == "demo":
        steps = (
            ("render the world", render),
            ("train the video VAE", lambda size: torchrun(size.vae)),
            ("train the diffusion transformer", train_dit),
            ("sample prompts never used in training", sample),
            ("score them", score),
            ("write the report", report),
        )
        _go(size, steps, size.minutes, command)
        _say_what_is_there(name, size)
        return
    if not (size.out / "model" / "model.yaml").is_file():
        first = command.replace("abilities", "demo")
        raise SystemExit(f"demo: {size.out / 'model'} is not there; run {first} first")
    steps = (
        ("render other scenarios of the world", render_more),
        ("train the demo's model on, to be given pictures and videos", lambda s: torchrun(s.tasks)),
        ("animate, extend, connect, loop, edit, go on for a minute", abilities),
        ("write the page", report_abilities),
    )
    _go(size, steps, size.more_minutes, command)
    print(f"  one example of each:    {size.out.resolve() / 'abilities.html'}")
    print(f"  the model:              {size.out / 'tasks' / 'model'}")


def _go(
    size: Size,
    steps: Sequence[tuple[str, Callable[[Size], None]]],
    minutes: Sequence[float],
    command: str,
) -> None:
    begun = time.monotonic()
    for i, (title, step) in enumerate(steps):
        left = sum(minutes[i:])
        to_go = f"about {left:.0f} min to go" if left >= 1 else "less than a minute to go"
        print(f"\n[{i + 1}/{len(steps)}] {title} ({to_go})", flush=True)
        try:
            step(size)
        except SystemExit as end:
            what = "interrupted" if end.code == 130 else f"that failed with exit code {end.code}"
            print(f"\ndemo: {what}; {command} goes on from here")
            raise
    print(f"\nDone in {(time.monotonic() - begun) / 60:.1f} min.")


def _say_what_is_there(name: str, size: Size) -> None:
    out = size.out.resolve()
    print(f"  videos, curves, scores: {out / 'report.html'}")
    print(f"  one picture:            {out / 'contact-sheet.png'}")
    prompt = '"a red circle moving left on a blue background"'
    model, video = size.out / "model", size.out / "mine.mp4"
    print(f"  your own prompt:        .venv/bin/zoetrope sample {model} {prompt} -o {video}")
    if name != "world":
        print(
            "So short a training gives noise and scores near zero; plain make demo trains in earnest."
        )


if __name__ == "__main__":
    main(*sys.argv[1:3])
