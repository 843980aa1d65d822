"""Steps that must not count: one that is not finite ends a run, and a spike is left out.

A handful of bad clips, or an unlucky draw, can throw a run off for thousands of steps; PaLM (Chowdhery
et al. 2022, section 5.1) went back and left such batches out. Here they are left out at once.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sample.processes import Ranks
from train.config import SpikeConfig
from train.ema import local
from train.logs import read_log
from train.recipe import Batch

# How a run that has gone wrong is continued.
CHANGE_OF_MIND = (
    "The run goes on with a change where the same command has --allow-change with its key; without the "
    "newest folders in its checkpoints/, from an earlier step"
)


class NonFiniteError(ValueError):
    """A loss or gradient became infinite or NaN; every rank stops before the optimizer step."""


def check_weights(weights: Iterable[Tensor], ranks: Ranks, step: int) -> None:
    """Before an export after `step` steps; every rank calls it with its shards.

    Raises:
        NonFiniteError: some are infinite or NaN, on any rank.
    """
    bad = torch.stack([(~local(weight).isfinite()).sum() for weight in weights]).sum()
    if ranks.sum(bad.view(1)).item():
        raise NonFiniteError(
            f"after step {step} there are weights that are not finite, and nothing is exported. "
            f"{CHANGE_OF_MIND}"
        )


def leave_batch(folder: Path, batches: Sequence[Batch], about: Mapping[str, Any]) -> str:
    """Writes the tensors of a step, one file a micro-batch, and `batch.json` with what is known of it.

    Returns:
        Where they are, or why they are not: what went wrong with the step matters more.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "batch.json").write_text(json.dumps(about, indent=1) + "\n")
        for micro, batch in enumerate(batches):
            tensors = {name: value.detach().cpu().contiguous() for name, value in batch.items()}
            save_file(tensors, folder / f"micro-batch-{micro}.safetensors")
    except (OSError, SafetensorError) as error:
        return f"The batch is not in {folder}, which cannot be written ({error})"
    return f"The batch is in {folder}"


class Spikes:
    """Judges gradient norms; a function of the norms it has seen, so all ranks judge alike.

    Args:
        config: None never finds a spike.
        saved: from `state`, to go on as if never interrupted.
    """

    def __init__(self, config: SpikeConfig | None, saved: Mapping[str, Any] | None = None) -> None:
        self.config, saved = config, saved or {}
        length = config.window if config else 0
        norms = saved.get("norms", {})
        self._norms = {name: deque(values, maxlen=length) for name, values in norms.items()}
        self._in_a_row = int(saved.get("in_a_row", 0))

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, for JSON."""
        norms = {name: list(values) for name, values in self._norms.items()}
        return {"norms": norms, "in_a_row": self._in_a_row}

    def judge(self, norms: Mapping[str, float]) -> dict[str, Any] | None:
        """Takes note of a step's gradient norms, by name.

        Returns:
            Why the step is to be left out: `figure`, the name of the first norm that is a spike, and
            that `norm` and the `median` of its past; None for a usual step.
        Raises:
            ValueError: there were config.max_skips in a row, and this is one more.
        """
        config = self.config
        if config is None:
            return None
        for name, norm in norms.items():
            past = self._norms.get(name, ())
            usual = median(past) if len(past) == config.window else 0.0
            if usual and norm > config.factor * usual:
                self._in_a_row += 1
                if self._in_a_row > config.max_skips:
                    raise ValueError(
                        f"{config.max_skips} steps in a row were left out, and the next has a "
                        f"{name} of {norm:.4g}, the usual one being {usual:.4g}: that is no spike "
                        "any more; a lower train.optimizer.lr is the usual cure. " + CHANGE_OF_MIND
                    )
                return {"figure": name, "norm": norm, "median": usual}
        for name, norm in norms.items():
            self._norms.setdefault(name, deque(maxlen=config.window)).append(norm)
        self._in_a_row = 0
        return None


class SkippedLog:
    """skipped.jsonl of a run: a row a step that was left out, with the samples of all ranks.

    Args:
        start_step: rows of later steps are dropped, as a resumed run makes them again.
    """

    def __init__(self, out: Path, start_step: int) -> None:
        self.path = out / "skipped.jsonl"
        if self.path.is_file():
            kept = [row for row in read_log(self.path) if row["step"] <= start_step]
            partial = self.path.with_name(".skipped.jsonl.partial")
            partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
            os.replace(partial, self.path)

    def add(self, row: Mapping[str, Any]) -> None:
        """Appends a row, which has a `step`."""
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
