"""`zoetrope eval VAE --suite vae`: everything opened and checked before the work, and the work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.vae_options import ClipSize, VAEOptions, check_size, check_tile, short_names, wanted_sizes
from eval.vae_tables import protocol

if TYPE_CHECKING:
    import torch

    from data.manifest import Manifest
    from dit.vae import VAE
    from eval.vae_compare import Judges, Measured
    from eval.world_suite import WorldSettings
    from sample.model import Model


@dataclass
class Setup:
    """Everything opened and checked: VAEs by name, sizes, judges, and the manifest if there is one."""

    vaes: dict[str, VAE]
    sizes: list[ClipSize]
    judges: Judges
    manifest: Manifest | None
    notes: list[str] = field(default_factory=list)


def prepare(folder: Path, options: VAEOptions, device: torch.device) -> Setup:
    """Opens and checks everything before anything is measured.

    Raises:
        FileNotFoundError, ValueError: a VAE, the manifest or a judge cannot be read, or they do not
            fit each other.
    """
    paths = [folder, *options.against]
    names = short_names(paths)
    # A misspelled manifest is not to be found after gigabytes of weights.
    manifest = None if options.manifest is None else _read(options.manifest)
    models = [open_model(path, device) for path in paths]
    vaes = {name: model.vae for name, model in zip(names, models)}
    sizes = wanted_sizes(options, models[0].info)
    for size in sizes:
        check_size(vaes, size)
        if options.tile is not None:
            check_tile(vaes, size, options.tile)
    judges, notes = _judges(options, device)
    if judges.perceptual is not None:
        least = judges.perceptual.min_size
        for size in sizes:
            if min(size.height, size.width) < least:
                raise ValueError(
                    f"{size.height}x{size.width} is too small for LPIPS with {options.backbone}; "
                    f"use at least {least}x{least} (--sizes), or leave --lpips-weights out"
                )
    if len(models) > 1 and len({model.info.fps for model in models}) > 1 and options.fps is None:
        notes.append(f"the VAEs were trained at different rates; clips have {sizes[0].fps:g} fps")
    return Setup(vaes, sizes, judges, manifest, notes)


def open_model(path: Path, device: torch.device) -> Model:
    """A model folder's VAE, or one in diffusers' format, in float32."""
    from sample.vae_import import open_vae

    return open_vae(path, device)


def _read(path: Path) -> Manifest:
    from data.manifest import read_manifest

    manifest = read_manifest(path)
    manifest.warn_of_bad_rows()
    return manifest


def _judges(options: VAEOptions, device: torch.device) -> tuple[Judges, list[str]]:
    """The judges that are asked for, and how to have the others."""
    from eval.frechet import Extractor
    from eval.vae_compare import Judges

    perceptual = extractor = None
    notes = []
    if options.lpips_weights is None:
        notes.append(
            "LPIPS left out: give --lpips-weights (torchvision's vgg16) and --lpips-linear (LPIPS's "
            "vgg.pth)"
        )
    else:
        from sample.weights import load_perceptual

        perceptual = load_perceptual(
            options.backbone, options.lpips_weights, options.lpips_linear
        ).to(device)
    if options.fvd_extractor is None:
        notes.append(
            "reconstruction FVD left out: give --fvd-extractor, a TorchScript file from video "
            "(b 3 f h w) in [0, 255] to features (b d)"
        )
    else:
        extractor = Extractor(options.fvd_extractor, device, pixels=options.pixels)
    return Judges(perceptual, extractor, options.tile, options.blend), notes


def _clips(
    setup: Setup, settings: WorldSettings, size: ClipSize, *, quiet: bool
) -> Iterator[tuple[str, np.ndarray]]:
    from eval.vae_suite import iter_clips
    from eval.world_suite import eval_scenes, real_clips

    if setup.manifest is not None:
        yield from iter_clips(setup.manifest, num=settings.num, quiet=quiet, **size.to_json())
        return
    scenes, prompts = eval_scenes(settings, **size.to_json())
    for scene, prompt in zip(scenes, prompts):
        yield prompt, real_clips([scene])[0]


def compare(
    folder: Path, options: VAEOptions, settings: WorldSettings, device: torch.device
) -> dict[str, Any]:
    """Everything that the command measures, as plain JSON values; `eval.vae_tables` shows them.

    Raises:
        FileNotFoundError, ValueError: see `prepare` and `eval.vae_compare.measure`.
    """
    from tqdm import tqdm

    from eval.vae_compare import as_json, measure
    from eval.vae_suite import batch_for

    setup = prepare(folder, options, device)
    rows = settings.num if setup.manifest is None else len(setup.manifest.rows)
    expected = min(settings.num, rows)
    found = []
    with tqdm(total=expected * len(setup.vaes) * len(setup.sizes), unit="clip") as bar:

        def advance(name: str, done: int) -> None:
            bar.set_description(f"{name} {size.height}x{size.width}")
            bar.update(done)

        for size in setup.sizes:
            batch_size = options.batch_size or batch_for(size.num_frames, size.height, size.width)
            measured = measure(
                setup.vaes,
                _clips(setup, settings, size, quiet=bool(found)),  # named once
                batch_size=batch_size,
                judges=setup.judges,
                progress=advance,
            )
            found.append({**size.to_json(), **as_json(measured)})
            setup.notes += _warnings(measured, size)
    return _results(folder, options, settings, setup, found)


def _warnings(measured: Measured, size: ClipSize) -> list[str]:
    """What is to be known of the FVD of so many clips."""
    from eval.vae_compare import GROUPS, motion_groups

    if not measured.features:
        return []
    num, dim = len(measured.clips), measured.features[0].shape[1]
    fewest, where = num, f"{num} clips"
    if len(measured.motion) >= len(GROUPS):
        groups = motion_groups(measured.motion)[1].values()
        fewest = min(len(group) for group in groups if len(group))
        where += f", {fewest} in the smallest group by motion,"
    if fewest > dim:
        return []
    return [
        f"FVD at {size.height}x{size.width}: {where} for features of {dim} dimensions; of fewer clips "
        "than dimensions it depends on --num, so compare equal numbers only"
    ]


def _results(
    folder: Path,
    options: VAEOptions,
    settings: WorldSettings,
    setup: Setup,
    found: list[dict[str, Any]],
) -> dict[str, Any]:
    first, names = found[0], list(setup.vaes)
    if setup.manifest is not None:
        source: dict[str, Any] = {"clips_from": str(options.manifest)}
        if first["num"] < settings.num:
            setup.notes.append(
                f"{options.manifest} has {first['num']} clips that can be read, fewer than --num "
                f"{settings.num}; all of them are measured"
            )
    else:
        source = {"level": settings.level, "split": settings.split, "seed": settings.seed}
    return {
        "suite": "vae",
        **{name: first[name] for name in ("num", "num_frames", "height", "width", "fps")},
        # The first VAE at the first size, as `run_vae_suite` gives it.
        "scores": {"vae": first["scores"][names[0]]},
        "vaes": {name: str(path) for name, path in zip(names, [folder, *options.against])},
        "tile": options.tile,
        "overlap": None if options.tile is None else options.blend,
        "sizes": found,
        "protocol": protocol(options, source),
        "notes": setup.notes,
        **source,
    }
