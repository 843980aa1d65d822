"""The comparison of VAEs as tables, one a size and one by motion, and in words how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eval.tables import Table, cell

if TYPE_CHECKING:
    from eval.vae_options import VAEOptions

_FIGURES = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "temporal_psnr": "temporal PSNR, dB",
    "fvd": "reconstruction FVD",
}
# What stands in every row about every clip, and where it has no value.
_ALWAYS = ("psnr", "ssim", "temporal_psnr")


def comparison_tables(results: Mapping[str, Any]) -> list[Table]:
    """What `eval.vae_cli.compare` returned, a column a VAE."""
    tables = []
    for size in results["sizes"]:
        tables.append(_size_table(results, size))
        if size["motion"] is not None:
            tables.append(_motion_table(results, size))
    return tables


def _rows(
    scores: Mapping[str, Mapping[str, Any]], names: Sequence[str], suffix: str = ""
) -> list[list[str]]:
    rows = []
    for figure, label in _FIGURES.items():
        if figure in _ALWAYS or any(figure in scores[name] for name in names):
            cells = [cell(scores[name].get(figure), large=2) or "n/a" for name in names]
            rows.append([label + suffix, *cells])
    return rows


def _facts(results: Mapping[str, Any], size: Mapping[str, Any]) -> str:
    facts = [f"{size['num']} clips", f"{size['num_frames']} frames at {size['fps']:g} fps"]
    facts += [f"{name} {results[name]}" for name in ("level", "split", "seed") if name in results]
    facts += [f"from {results[name]}" for name in ("clips_from",) if name in results]
    return f"{', '.join(facts)}; 95% intervals, bootstrap"


def _size_table(results: Mapping[str, Any], size: Mapping[str, Any]) -> Table:
    names, scores = list(results["vaes"]), size["scores"]
    rows = _rows(scores, names)
    if results.get("tile") is not None:
        label = f"tiles with a blend of {results['overlap']} latents against the whole, dB"
        rows.append([label, *(cell(scores[name].get("blend_psnr"), large=2) for name in names)])
    for figure, label in _FIGURES.items():
        found = [size["differences"].get(name, {}).get(figure) for name in names]
        if any(found):
            what = f"{label}: {names[0]} minus this"
            rows.append([what, *(cell(each, sign=True, large=2) for each in found)])
    title = f"vae suite, {size['height']}x{size['width']}"
    return Table(title, ["", *names], rows, _facts(results, size))


def _motion_table(results: Mapping[str, Any], size: Mapping[str, Any]) -> Table:
    names, motion = list(results["vaes"]), size["motion"]
    by_group = {
        group: _rows(scores, names, f", {group}")
        for group, scores in motion["scores"].items()
        if scores[names[0]]["psnr"]["num"]  # alike clips are in one group, and leave others empty
    }
    rows = [row for same in zip(*by_group.values()) for row in same]
    low, high = (f"{boundary:.3g}" for boundary in motion["boundaries"])
    facts = (
        f"still up to {low}, middle up to {high}, fast beyond: mean absolute difference of "
        "neighbouring frames of the originals, in levels of 255"
    )
    return Table(f"by motion, {size['height']}x{size['width']}", ["", *names], rows, facts)


def protocol(options: VAEOptions, source: Mapping[str, Any]) -> list[str]:
    """How the figures come about, a sentence a line."""
    from eval.metrics import NUM_RESAMPLES
    from eval.vae_suite import MAX_PSNR

    if "clips_from" in source:
        origin = (
            f"the first clips of {source['clips_from']} that can be read, from the start of each row's "
            "piece, frames by the file's timestamps, resized (bilinear, antialiased) to cover the size "
            "and cut at the middle"
        )
    else:
        origin = "scenes of the procedural world, written as .mp4 and read back"
    lines = [
        f"clips: {origin}; the same for every VAE",
        "latents are the posterior's mean, computed in float32; what is decoded is clamped and rounded "
        "to uint8 before comparing",
        "PSNR and SSIM are per clip over all its pixels, then averaged over clips; equal clips count "
        f"as {MAX_PSNR:g} dB",
        "temporal PSNR is that of the changes x[k+1] - x[k] between frames, peak 255: an error that "
        "stays costs nothing, flicker does",
        f"intervals: 95%, bootstrap over clips, {NUM_RESAMPLES:,} resamples; differences clip by clip",
    ]
    if options.lpips_weights is not None:
        lines.append(
            f"LPIPS: {options.backbone} from {options.lpips_weights}, weights per channel from "
            f"{options.lpips_linear}; mean over frames, then over clips"
        )
    if options.fvd_extractor is not None:
        from eval.frechet import NUM_RESAMPLES as FEW

        scale = "[0, 255]" if options.pixels == "255" else "[-1, 1]"
        lines.append(
            f"FVD: Fréchet distance between features of the clips and of their reconstructions, by "
            f"{options.fvd_extractor} from pixels in {scale}; {FEW} resamples"
        )
    return lines
