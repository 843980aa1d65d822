"""Checkpoints of a run: saved through torch.distributed.checkpoint, appearing only when complete.

A checkpoint is a folder `step-00001000`: the sharded tensors (weights, EMA, optimizer) and
`state.json` (step, config, fingerprint of the data, figures of the unfinished log interval).
Nothing else is needed to go on, because all randomness is counted, not carried.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from train.distributed import Ranks
from train.ema import EMA
from train.recipe import TrainedGroup

# What reading a checkpoint raises when a file of it is missing, empty, cut short or overwritten.
_DAMAGES = (
    CheckpointException,
    AssertionError,
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    ValueError,
    pickle.UnpicklingError,
)
_NAME = re.compile(r"step-(\d{8,})")


@dataclass
class TrainState:
    """Everything that training changes."""

    recipe: nn.Module
    trained: dict[str, nn.Parameter]
    groups: list[TrainedGroup]  # the same parameters, as they are clipped and updated
    optimizer: Optimizer
    ema: EMA

    def tensors(self) -> dict[str, Any]:
        """As a nested dict for torch.distributed.checkpoint; loading writes into it in place."""
        weights: dict[str, Tensor] = {name: p.detach() for name, p in self.trained.items()}
        optimizer = get_optimizer_state_dict(self.recipe, self.optimizer)
        return {"model": weights, "ema": self.ema.weights, "optimizer": optimizer}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that a single process saves as a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints as (step, path), oldest first."""
    if not folder.is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match)


def read_state(path: Path) -> dict[str, Any]:
    """The state.json of a checkpoint.

    Raises:
        ValueError: it is damaged.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        sound = isinstance(state, dict) and isinstance(state["config"], dict)
    except (OSError, ValueError, KeyError):
        sound = False
    if not sound:
        raise damaged(path)
    return state


def damaged(path: Path) -> ValueError:
    """What to say of a checkpoint that cannot be read."""
    return ValueError(
        f"checkpoint {path} is damaged; delete that folder, and the same command goes on from the "
        "one before it"
    )


def save_checkpoint(
    folder: Path, step: int, state: TrainState, extra: dict[str, Any], keep: int, ranks: Ranks
) -> None:
    """Writes checkpoint `step`, then removes all but the last `keep`. Every rank calls it.

    Args:
        folder: the run's checkpoints folder.
        extra: json-able values for state.json.
    Raises:
        OSError: it cannot be written; earlier ones are left as they are.
    """
    final, partial = folder / f"step-{step:08d}", folder / f".step-{step:08d}.partial"
    if ranks.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".step-*.partial"):
            shutil.rmtree(leftover)
        partial.mkdir()
    ranks.barrier()
    try:
        with _quiet():
            save(state.tensors(), checkpoint_id=partial, no_dist=ranks.mesh is None)
    except CheckpointException as error:
        reasons = {str(reason) for reason, _ in error.failures.values()}
        raise OSError(
            f"{final}: the checkpoint cannot be written ({'; '.join(sorted(reasons))}); make room, and "
            "the same command goes on from the one before"
        ) from error
    if ranks.is_main:
        (partial / "state.json").write_text(json.dumps({"step": step, **extra}, indent=1) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        for _, old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    ranks.barrier()


@torch.no_grad()
def load_checkpoint(path: Path, state: TrainState, ranks: Ranks) -> None:
    """Restores weights, EMA and optimizer, bit for bit. Every rank calls it.

    Raises:
        ValueError: a file of it is missing or cut short.
    """
    tensors = state.tensors()
    try:
        with _quiet():
            load(tensors, checkpoint_id=path, no_dist=ranks.mesh is None)
    except (torch.OutOfMemoryError, PermissionError):  # nothing that deleting it would mend
        raise
    except _DAMAGES as error:
        raise damaged(path) from error
    set_optimizer_state_dict(state.recipe, state.optimizer, tensors["optimizer"])
