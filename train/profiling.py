"""Traces of chosen steps, for chrome://tracing and https://ui.perfetto.dev: `--profile FIRST:LAST`."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from sample.processes import Ranks

Steps = tuple[int, int]  # the first and the last, counted from 1 as in the log


def parse_steps(text: str) -> Steps:
    """From `FIRST:LAST`, or one number.

    Raises:
        ValueError: it is something else, or there are none from FIRST to LAST.
    """
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text.strip())
    if match is None:
        raise ValueError(f"--profile={text}: expected FIRST:LAST, the numbers of two steps")
    first, last = int(match[1]), int(match[2] or match[1])
    if not 1 <= first <= last:
        raise ValueError(f"--profile={text}: no step is from {first} to {last}; they count from 1")
    return first, last


class Profiler:
    """Records steps of every rank into files of their own.

    Args:
        steps: to record; None for none.
        out: the run's folder; traces go to `profile` in it.
        start_step, num_steps: those done already, and those there are.
    Raises:
        ValueError: the run has not so many steps. Those that are done already are left out.
    """

    def __init__(
        self,
        steps: Steps | None,
        out: Path,
        ranks: Ranks,
        start_step: int,
        num_steps: int,
    ) -> None:
        if steps is not None and steps[1] > num_steps:
            raise ValueError(
                f"--profile={steps[0]}:{steps[1]}: this run has {num_steps} steps; choose some of them"
            )
        if steps is not None and steps[0] <= start_step and ranks.is_main:  # started again, usually
            print(f"--profile={steps[0]}:{steps[1]}: {start_step} steps are done already")
        self._steps, self._out, self._ranks = steps, out, ranks
        self._profile: profile | None = None
        self._span = record_function("step")

    def before(self, step: int) -> None:
        """To be called when step `step`, counted from 1, is about to begin."""
        if self._steps is None or not self._steps[0] <= step <= self._steps[1]:
            return
        if self._profile is None:
            activities = [ProfilerActivity.CPU]
            if self._ranks.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities, record_shapes=True)
            self._profile.start()
        self._span = record_function(f"step {step}")
        self._span.__enter__()

    def after(self, step: int) -> None:
        """To be called when it has ended; says where the traces are. One that cannot be written is no
        reason to stop."""
        if self._profile is None or self._steps is None:
            return
        self._span.__exit__(None, None, None)
        if step < self._steps[1]:
            return
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)
        self._profile.stop()
        folder, (first, last) = self._out / "profile", self._steps
        path = folder / f"steps-{first}-{last}-rank-{self._ranks.rank}.json.gz"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            print(f"{path}: the trace cannot be written ({error})", flush=True)
        else:
            if self._ranks.is_main:
                print(
                    f"{folder}: traces of steps {first} to {last}, a file a rank, for "
                    "https://ui.perfetto.dev",
                    flush=True,
                )
        self._profile = None
