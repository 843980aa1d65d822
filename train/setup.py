"""Everything that happens before the first step: data, networks, the newest checkpoint."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from data.files import lock
from data.manifest import read_manifest
from data.randomness import stream_seed
from sample.lora import lora_step
from sample.model import read_model_file
from sample.processes import AXES, Ranks, micro_batch_size
from train import checkpoint
from train.cache_folder import hash_weights
from train.checkpoint import TrainState
from train.config import RunConfig, TrainConfig, differing_key
from train.config_file import dump_config
from train.config_recipes import VAERecipeConfig
from train.ema import EMA
from train.optim import build_optimizer
from train.recipe import Recipe, TrainData
from train.recipe_dit import DiTRecipe
from train.recipe_vae import VAERecipe
from train.sizes import left_out


def open_data(config: RunConfig) -> TrainData:
    """The run's manifests, validated; rows that cannot be used are logged.

    Raises:
        ValueError: they are more than data.max_bad_share, or a bucket has no clips.
    """
    train = read_manifest(config.data.manifest)
    validation = train
    if config.data.validation is not None:
        validation = read_manifest(config.data.validation)
    for manifest in {id(m): m for m in (train, validation)}.values():
        manifest.warn_of_bad_rows(config.data.max_bad_share)
    if config.data.buckets or config.data.native is not None:
        left_out(train, config)  # which finds a bucket without clips
    return TrainData(train, validation)


def build_recipe(
    config: RunConfig, data: TrainData, ranks: Ranks, *, on_meta: bool = False
) -> Recipe:
    """The recipe, on the CPU, its fresh weights a function of the seed; `parallelize` moves it.

    Args:
        on_meta: leave it on the meta device, without weights, to be counted.
    Raises:
        ValueError: the global batch does not divide, or the recipe's parts do not fit together.
    """
    micro_batch_size(config.train.batch_size, config.train.grad_accum, ranks.num_data_ranks)
    torch.manual_seed(stream_seed(config.seed, "weights"))
    kind = VAERecipe if isinstance(config.recipe, VAERecipeConfig) else DiTRecipe
    if on_meta:
        return kind(config, data, ranks, torch.device("meta")).to("meta")
    recipe = kind(config, data, ranks, torch.device("cpu"))
    recipe.order.check(ranks.num_data_ranks, config.train.grad_accum)
    return recipe


def fresh_state(recipe: Recipe, config: TrainConfig) -> TrainState:
    """The state before the first step, of a recipe that is on its devices."""
    groups = recipe.groups()
    optimizer = build_optimizer(groups, config.optimizer, recipe.blocks())
    ema = EMA(groups[0].parameters, config.ema)
    return TrainState(recipe, recipe.trained(), groups, optimizer, ema)


@contextmanager
def locked_folder(config: RunConfig, ranks: Ranks) -> Iterator[None]:
    """Makes the run's folder, and keeps other runs out of it until this process ends the block.

    Raises:
        ValueError: another process is training into the folder.
        OSError: the folder cannot be made or written to; a ValueError on the other ranks.
    """
    file, error = None, None
    if ranks.is_main:
        try:
            config.out.mkdir(parents=True, exist_ok=True)
            file = (config.out / ".lock").open("a")
            if not lock(file):
                error = ValueError(
                    f"{config.out}: another process is training into this folder; wait for it or "
                    "choose another out"
                )
        except OSError as reason:
            error = reason
    try:
        ranks.agree(error)
        yield
    finally:
        if file is not None:
            file.close()


def hash_frozen(recipe: Recipe) -> dict[str, str]:
    """Hashes of what checkpoints do not hold, by name: networks, without adapters in them, and the
    settings of the models that training starts from."""
    hashes = {name: hash_weights(module) for name, module in recipe.frozen().items()}
    settings = recipe.start_settings()
    if settings:
        hashes["model.yaml"] = hashlib.sha256(settings.encode()).hexdigest()[:16]
    return hashes


def check_validation(config: RunConfig, recipe: Recipe, ranks: Ranks) -> None:
    """Reads the validation clips.

    Raises:
        ValueError: none of them can be read, on any rank.
    """
    count = torch.tensor([recipe.load_validation()], device=ranks.device)
    if not ranks.sum(count).item():
        manifest = config.data.validation or config.data.manifest
        raise ValueError(
            f"none of the first {config.logging.num_val_clips} clips of {manifest} can be read, "
            f"and validation needs one; run `zoetrope data check {manifest}`"
        )


def resume(
    config: RunConfig,
    data: TrainData,
    state: TrainState,
    frozen: dict[str, str],
    ranks: Ranks,
    allowed: Collection[str] = (),
) -> tuple[int, dict[str, Any]]:
    """Loads the newest checkpoint, if any; returns the steps done and its state.json.

    Args:
        frozen: from `hash_frozen`.
        allowed: keys of the config that have been changed on purpose.
    Raises:
        ValueError: it was made with another config, other data or other frozen networks; names
            what differs.
    """
    found = checkpoint.find_newest(config.out / "checkpoints", ranks)
    if found is None:
        return 0, {}
    (step, path, saved), error = found, None
    try:
        _compare(config, data, frozen, path, saved, allowed)
    except ValueError as reason:
        error = reason
    ranks.agree(error)
    checkpoint.load_checkpoint(path, state, ranks)
    return step, saved


def _compare(
    config: RunConfig,
    data: TrainData,
    frozen: dict[str, str],
    path: Path,
    saved: dict[str, Any],
    allowed: Collection[str],
) -> None:
    """Whether a checkpoint is one of this run.

    Args:
        saved: its state.json.
    Raises:
        ValueError: it is not; names what differs.
    """
    key = differing_key(_with_defaults(saved["config"]), config.model_dump(mode="json"), allowed)
    if key is not None:
        raise ValueError(
            f"{path} was made with another {key}; undo the change, go on with it on purpose "
            f"(--allow-change {key}), or train into another folder (out=...)"
        )
    if saved.get("data") != data.train.fingerprint() and "data.manifest" not in allowed:
        raise ValueError(
            f"{path} was made with other rows in {config.data.manifest}; restore them, go on with "
            "these on purpose (--allow-change data.manifest), or train into another folder (out=...)"
        )
    for name, digest in saved.get("frozen", {}).items():
        if frozen.get(name) != digest:
            raise ValueError(
                f"{path} was made with another {name}: its contents have hash {digest}, now "
                f"{frozen.get(name)}; restore them, or train into another folder (out=...)"
            )


def _with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """A saved config with the keys that did not exist yet when it was saved."""
    try:
        return RunConfig.model_validate(values).model_dump(mode="json")
    except ValidationError:  # of a version with other keys: let the comparison name one
        return values


def start_folder(config: RunConfig, ranks: Ranks) -> None:
    """Puts the resolved config into the run's folder."""
    if ranks.is_main:
        write_text(config.out / "config.yaml", dump_config(config))
    ranks.barrier()


def describe_run(config: RunConfig, state: TrainState, ranks: Ranks, start_step: int) -> str:
    """The line that opens a run."""
    train = config.train
    micro = micro_batch_size(train.batch_size, train.grad_accum, ranks.num_data_ranks)
    processes = "1 process" if ranks.world_size == 1 else f"{ranks.world_size} processes"
    resumed = "resumed, " if start_step else ""
    spread = ""
    if ranks.mesh is not None and ranks.world_size > 1:
        sizes = dict(zip(AXES, ranks.mesh.shape))
        spread = f" ({' x '.join(f'{name} {n}' for name, n in sizes.items() if n > 1)})"
    rows = " packed rows" if config.data.packing else ""
    return (
        f"{config.out}: {sum(p.numel() for p in state.trained.values()):,} parameters, "
        f"{resumed}steps {start_step} to {train.steps}, batch {train.batch_size}{rows} = "
        f"{ranks.num_data_ranks} x {train.grad_accum} x {micro}, {train.dtype} on "
        f"{ranks.device.type} in {processes}{spread}, {torch.get_num_threads()} threads each"
    )


def git_commit() -> str | None:
    """The commit of the code that runs, or None outside a repository."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        result = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def exported_step(folder: Path) -> int | None:
    """After how many steps a run's export was written; None when there is none."""
    if (folder / "model.yaml").is_file():
        step = read_model_file(folder).info.provenance.get("step")
        return step if isinstance(step, int) else None
    return lora_step(folder)


def write_text(path: Path, text: str) -> None:
    """Writes a file that appears only when complete."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    except OSError as error:  # a full disk does not say which
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
