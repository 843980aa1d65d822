"""Results as tables, for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """A titled table of text cells; `header` and every row have the same length."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    facts: str = ""


_FIGURES = {
    "colour": "colour",
    "shape": "shape",
    "motion": "motion",
    "background": "background",
    "joint": "all four together",
    "permanence": "permanence",
    "joint_permanence": "all four and permanence",
    "size": "size, where the prompt says it",
    "velocity_error": "velocity error, px/frame",
    "gravity_error": "gravity error, px/frame²",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "temporal_psnr": "temporal PSNR, dB",
    # Of the parts of the world suite, where a group may stand before a figure: "GROUP: NAME".
    "identity": "the right one of 100",
    "own_motion": "both right, each with its own motion",
    "binding": "which of the two has which motion",
    "copied_background": "background of a reference",
    "textured": "shows a texture",
    "object_found": "object found, share of clips",
    "outside": "largest change outside the object's box, of 255",
    "velocity_error_units": "velocity error, units/s",
    "velocity_error_after": "velocity error after the contact, units/s",
    "found": "found, share of frames",
    "jump": "jump in position, px",
    "velocity_change": "change of velocity, px/frame",
    "position_error": "distance from where it should be, px",
    "object_jump": "jump of the object's colour, of 255",
    "background_jump": "jump of the background's colour, of 255",
    "colour_kept": "colour kept",
    "shape_kept": "shape kept",
    "colour_drift": "drift of the colour, of 441",
    "speed_drift": "drift of the speed, as a share",
    "speed_ratio": "speed, as a share of the first",
}
_COLUMNS = {
    "generated": "generated",
    "vae": "VAE reconstructions",
    "real": "real clips (the tracker's ceiling)",
    "clips": "clips",
}


def cell(figure: Mapping[str, Any] | None, *, sign: bool = False, large: int = 1) -> str:
    """An estimate in JSON's form as text; empty for none.

    Args:
        sign: whether it is a difference, which has a sign.
        large: digits behind the point above 10; 3 below.
    """
    if figure is None or figure["num"] == 0:
        return ""
    digits = large if abs(figure["value"]) > 10 else 3
    plus = "+" if sign else ""
    numbers = [figure[name] for name in ("value", "low", "high")]
    value, *ends = (f"{number:{plus}.{digits}f}" for number in numbers if number is not None)
    interval = f" [{', '.join(ends)}]" if ends else ""
    return f"{value}{interval} N={figure['num']}"


def _figures(scores: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """All figures of the columns and their labels: those without a group in the order of _FIGURES, then
    the others as they come."""
    names = dict.fromkeys(name for rows in scores.values() for name in rows)
    ordered = [name for name in _FIGURES if name in names]
    ordered += [name for name in names if name not in _FIGURES]
    labels = []
    for name in ordered:
        group, colon, base = name.rpartition(": ")
        labels.append((name, group + colon + _FIGURES.get(base, base)))
    return labels


def score_table(results: Mapping[str, Any]) -> Table:
    """A table of what `run_world_suite`, a part of `eval.world_parts`, `score_manifest` or
    `run_vae_suite` returned."""
    scores = results["scores"]
    known = {**results.get("columns", {}), **_COLUMNS}
    columns = [name for name in known if name in scores]
    guesses = results.get("chance") or {}
    rows = []
    for figure, label in _figures(scores):
        cells = [cell(scores[column].get(figure)) for column in columns]
        if any(cells):
            guess = [f"{guesses[figure]:.3f}" if figure in guesses else ""] if guesses else []
            rows.append([label, *guess, *cells])
    drop = results.get("vae_joint_drop")
    if drop is not None:
        blanks = [""] * (len(columns) + bool(guesses))
        blanks[columns.index("vae") + bool(guesses)] = cell(drop)
        rows.append(["all four: real clips minus VAE", *blanks])
    head = [
        "",
        *([results.get("chance_is", "chance")] if guesses else []),
        *(known[name] for name in columns),
    ]
    facts = [f"{results['num']} {results.get('num_is', 'clips')}"]
    facts += [f"{name} {results[name]}" for name in ("level", "split", "seed") if name in results]
    if "height" in results:
        facts.append(f"{results['num_frames']} frames of {results['height']}x{results['width']}")
    facts += [f"{name} {value}" for name, value in results.get("sampling", {}).items()]
    if "avoided_captions" in results:
        avoided = results["avoided_captions"]
        facts.append(
            f"none of {avoided:,} training captions among the prompts"
            if avoided
            else "prompts may be training captions (--avoid MANIFEST leaves those out)"
        )
    kinds = [results[name] for name in ("part", "split") if name in results]
    title = ", ".join([f"{results['suite']} suite", *kinds])
    intervals = "95% intervals, bootstrap (exact where all clips agree)"
    return Table(title, head, rows, f"{', '.join(facts)}; {intervals}")


def as_text(table: Table) -> str:
    """The table in aligned columns."""
    lines = [list(table.header), *map(list, table.rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(table.header))]
    body = ["  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in lines]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([f"{table.title}: {table.facts}", body[0], rule, *body[1:]])
