"""How large the demos are: their trainings, the clips for these, and what is scored."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

LAWS = ("uniform", "collision", "parabola")
SHORT = 9  # frames of a clip


@dataclass(frozen=True)
class Stage:
    """A training that goes on for longer.

    clips: that are rendered for it: folder of the world, scenario, how many, and seed; none where it
    has those of the training before. frames: of each. others: folders of the world that it has too.
    """

    config: Path
    clips: tuple[tuple[str, str, int, int], ...] = ()
    others: tuple[str, ...] = ()
    frames: int = SHORT


@dataclass(frozen=True)
class Size:
    """How large a demo is; minutes are measured on two CPU cores."""

    out: Path  # of the world and the trainings
    shown: Path  # of the model, and of what it makes
    vae: Path
    decoder: Path
    dit: Path
    tasks: Path
    clips: int  # of plain shapes, for the VAE and the texts
    mixed: dict[str, int]  # by scenario, for all tasks
    held_out: int
    prompts: int
    minutes: tuple[float, ...]  # per step; 0: not in this demo
    long_decoder: Path | None = None  # the VAE's, on clips as long as the longer trainings have
    longer: tuple[Stage, ...] = ()
    parts: dict[str, int] = field(default_factory=dict)  # of the world suite, and clips of each
    long_minutes: float = 1.0  # of the longest video


WORLD = Size(
    out=Path("runs/demo"),
    shown=Path("runs/demo"),
    vae=Path("configs/world/vae.yaml"),
    decoder=Path("configs/world/decoder.yaml"),
    dit=Path("configs/world/dit.yaml"),
    tasks=Path("configs/world/tasks.yaml"),
    clips=20_000,
    mixed={"shapes": 10_000, "bounces": 3_000, **dict.fromkeys(LAWS, 500), "subjects": 1_500},
    held_out=256,
    prompts=300,
    minutes=(1.3, 6, 14, 7, 0, 0.4, 2, 1.5, 0, 0.1),
)
SIZES = {
    "world": WORLD,
    "long": replace(
        WORLD,
        shown=Path("runs/demo-long"),
        long_decoder=Path("configs/world/long-decoder.yaml"),
        longer=(
            Stage(
                Path("configs/world/long-1.yaml"),
                (
                    ("long/subjects", "subjects", 12_000, 4),
                    ("long/bounces", "bounces", 5_000, 4),
                    *((f"long/{law}", law, 2_000, 4) for law in LAWS),
                ),
                ("mixed/shapes",),
            ),
            Stage(
                Path("configs/world/long-2.yaml"),
                (
                    ("longer/shapes", "shapes", 16_000, 1),
                    ("longer/subjects", "subjects", 12_000, 5),
                    ("longer/bounces", "bounces", 5_000, 5),
                    *((f"longer/{law}", law, 2_000, 5) for law in LAWS),
                ),
                frames=17,
            ),
            Stage(
                Path("configs/world/long-3.yaml"),
                (("longest/subjects", "subjects", 24_000, 6),),
                ("longer/shapes", "longer/bounces", *(f"longer/{law}" for law in LAWS)),
                frames=17,
            ),
            Stage(Path("configs/world/long-4.yaml"), frames=17),
        ),
        parts={"identity": 100, "extension": 192, "physics": 48, "edit": 48, "minute": 4},
        minutes=(8, 6, 14, 7, 273, 0.4, 1, 3, 15, 0.1),
    ),
    "tiny": Size(
        out=Path("runs/demo-tiny"),
        shown=Path("runs/demo-tiny"),
        vae=Path("configs/world/tiny-vae.yaml"),
        decoder=Path("configs/world/tiny-decoder.yaml"),
        dit=Path("configs/world/tiny-dit.yaml"),
        tasks=Path("configs/world/tiny-tasks.yaml"),
        clips=128,
        mixed={"shapes": 32, **dict.fromkeys(LAWS, 16), "subjects": 32},
        held_out=16,
        prompts=8,
        minutes=(0.1, 0.3, 0.4, 0.3, 0.3, 0.2, 0.3, 0.2, 0.2, 0.1),
        long_decoder=Path("configs/world/tiny-long-decoder.yaml"),
        longer=(
            Stage(
                Path("configs/world/tiny-long.yaml"),
                (("long/shapes", "shapes", 32, 1), ("long/subjects", "subjects", 32, 4)),
                frames=17,
            ),
        ),
        parts={"identity": 4, "physics": 2},
        long_minutes=0.05,
    ),
}
