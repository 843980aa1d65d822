"""What a run's batches are, without its weights: for `zoetrope data show` and `zoetrope data check`."""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm

from data.dataset import ClipDataset, Sample
from data.manifest import read_manifest
from data.randomness import numpy_generator
from data.show import ShownBatch, ShownClip, write_page
from data.video import parse_size
from sample.processes import Ranks
from train.clips import TrainingClips
from train.config import RunConfig
from train.recipe import Recipe
from train.setup import build_recipe, open_data


def recipe_of(run: RunConfig) -> Recipe:
    """A run's recipe with shapes alone.

    Raises:
        ValueError, FileNotFoundError: what training would raise about data and networks.
    """
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    return build_recipe(run, open_data(run), ranks, on_meta=True)


def dataset_of_run(run: RunConfig) -> ClipDataset:
    """The clips that a run trains on."""
    recipe = recipe_of(run)
    return TrainingClips(recipe.data.train, run, recipe.order)


def dataset_of_manifest(
    manifest: str, num_frames: int, fps: float, size: str, batch_size: int
) -> ClipDataset:
    """Clips of one size.

    Args:
        size: pixels, as `parse_size` takes them.
    """
    if num_frames < 1 or not 0 < fps <= 1000:
        raise ValueError(f"--frames {num_frames} must be positive and --fps {fps:g} in (0, 1000]")
    height, width = parse_size(size)
    rows = read_manifest(manifest)
    rows.warn_of_bad_rows()
    clip = {"num_frames": num_frames, "height": height, "width": width, "fps": fps}
    return ClipDataset(rows, **clip, seed=0, batch_size=batch_size)


def show_batches(
    out: Path, name: str, dataset: ClipDataset, steps: int, batches: int, clips: int, seed: int
) -> int:
    """Writes a page with clips of steps drawn at random; how many there are.

    Args:
        name: of what is shown.
        steps: of the run.
        batches: steps to show; clips: of each, at most.
    """
    drawn = numpy_generator(seed, "show").choice(steps, min(batches, steps), replace=False)
    order, found = dataset.order, []
    for step in tqdm(sorted(drawn.tolist()), desc="reading", unit="step", disable=None):
        first, batch = order.first(step), order.batch(step)
        samples = [dataset[g] for g in range(first, first + min(batch, clips))]
        sizes = {tuple(sample["video"].shape[1:]) for sample in samples}
        of = f", {len(samples)} of its {batch:,} clips" if len(samples) < batch else ""
        what = " and ".join("x".join(map(str, size)) for size in sorted(sizes, reverse=True))
        found.append(
            ShownBatch(
                title=f"step {step}: {what}{of}",
                clips=[_shown(dataset, sample) for sample in samples],
                bad=[entry for sample in samples for entry in sample["bad"]],
            )
        )
    intro = (
        f"Steps drawn at random from {steps:,}: each clip as the network gets it, after cropping and "
        f"resizing, at {dataset.fps:g} frames per second, with the caption that was drawn for it."
    )
    write_page(out, f"Training batches of {name}", intro, found, dataset.fps)
    return sum(len(batch.clips) for batch in found)


def _shown(dataset: ClipDataset, sample: Sample) -> ShownClip:
    manifest, row = dataset.manifest, sample["row"]
    video = sample["video"].permute(1, 2, 3, 0).numpy()
    request = dataset.request(sample["g"], sample["bad"])
    piece = dataset.manifest.rows[row]
    where = f"{piece.path}, line {manifest.lines[row]}"
    if request.start or request.end is not None:
        where += (
            f", {request.start:g} s to {'the end' if request.end is None else f'{request.end:g} s'}"
        )
    if request.references:
        where += f"; references: {', '.join(piece.references or ())}"
    return ShownClip(video, sample["caption"], where)
