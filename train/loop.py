"""The training loop, for every recipe: read it top to bottom."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from data.dataset import BadFiles
from train import checkpoint, distributed
from train.checkpoint import TrainState
from train.clips import make_loader
from train.config import RunConfig
from train.distributed import Ranks
from train.logs import RunLog, Window, clock, describe, describe_unread
from train.optim import clip_gradients, schedule_factor, step_optimizer
from train.recipe import Batch, Recipe, TrainData
from train.setup import (
    build_recipe,
    check_validation,
    describe_run,
    exported_step,
    fresh_state,
    git_commit,
    hash_frozen,
    locked_folder,
    open_data,
    resume,
    start_folder,
)


class NonFiniteError(ValueError):
    """A loss or gradient became infinite or NaN; every rank stops before the optimizer step."""


def train(config: RunConfig) -> None:
    """Trains to the last step, from the newest checkpoint in the run's folder if there is one.

    Called by every process that torchrun started, or by a single one.

    Raises:
        ValueError: something in the config, the data or the checkpoint does not fit.
        NonFiniteError: training diverged.
        SystemExit: stopped by a signal, after writing a checkpoint; 130 or 143.
    """
    ranks = distributed.start(config.device, config.train.threads)
    data = open_data(config)
    recipe = build_recipe(config, data, ranks)
    with locked_folder(config, ranks):
        _train(config, data, recipe, ranks)
    distributed.stop()


def _train(config: RunConfig, data: TrainData, recipe: Recipe, ranks: Ranks) -> None:
    """`train`, once the run's folder is its own."""
    state, frozen = fresh_state(recipe, config.train), hash_frozen(recipe)
    start_step, saved = resume(config, data, state, frozen, ranks)
    if start_step == config.train.steps and exported_step(recipe.export_folder) == start_step:
        if ranks.is_main:
            print(f"{config.out}: all {start_step} steps are done already")
        return

    check_validation(config, recipe, ranks)
    start_folder(config, ranks)
    loader = iter(make_loader(recipe.dataset(), config, ranks, start_step))
    model = distributed.parallelize(recipe, ranks)
    log = RunLog(config, ranks, start_step)
    log.say(describe_run(config, state, ranks, start_step))
    bad_files = BadFiles(len(data.train.rows), config.data.max_bad_share, ranks.world_size)
    window, unread = Window(**saved.get("window", {})), saved.get("unread", {})
    run = Run(config, ranks, recipe, model, state, frozen, log, window, bad_files, unread)
    with catch_signals() as stop:
        for step in range(start_step, config.train.steps):
            stopping = run.step(step, loader, stop)
            done = step + 1
            run.report(done)
            last, due = done == config.train.steps, done % config.train.checkpoint_interval == 0
            if last or due or stopping:
                run.save(done, data)
            run.show_samples(done)
            if stopping and not last:
                log.say(f"stopped after step {done}; the same command goes on from here")
                exit_code = 128 + (stop.signal or signal.SIGTERM)
                log.close(exit_code)
                raise SystemExit(exit_code)
            if due and not last:
                run.export(done, data)
    run.export(config.train.steps, data)
    unread = run.all_unread()
    if unread:
        log.say(describe_unread(unread))
    log.say(f"{recipe.export_folder}: exported after {config.train.steps} steps")
    log.close()


@dataclass
class Stop:
    """Set by the first SIGINT or SIGTERM."""

    signal: int | None = None


@contextmanager
def catch_signals() -> Iterator[Stop]:
    """Inside it the first SIGINT or SIGTERM only takes note; a second one acts as usual."""
    stop = Stop()
    before: dict[int, Any] = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        stop.signal = number
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Run:
    """What the loop works on; its methods are the loop's body."""

    config: RunConfig
    ranks: Ranks
    recipe: Recipe
    model: nn.Module
    state: TrainState
    frozen: dict[str, str]  # hashes of the networks that checkpoints leave out
    log: RunLog
    window: Window
    bad_files: BadFiles
    unread: dict[str, str]  # clips that could not be read before the run was resumed, and why
    batches: list[Batch] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def autocast(self) -> torch.autocast:
        enabled = self.config.train.dtype == "bfloat16"
        return torch.autocast(self.ranks.device.type, dtype=torch.bfloat16, enabled=enabled)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """EMA weights and autocast, without torch.compile: another batch size or no_grad would have
        it compile anew, and make training's own graph a dynamic, slower one."""
        eager = torch.compiler.set_stance("force_eager")
        with self.state.ema.applied(), self.autocast(), eager:
            yield

    def step(self, step: int, loader: Iterator[dict[str, Any]], stop: Stop) -> bool:
        """Forward, backward and update; True when any rank was told to stop.

        Everything that ranks must agree on (the mean loss, whether to stop) travels in one sum.
        """
        config, begin = self.config.train, time.perf_counter()
        lr = config.optimizer.lr * schedule_factor(config.schedule, step, config.steps)
        names, totals, wait = self._accumulate(step, loader, stop)
        groups = self.state.groups
        norms = [clip_gradients(group.parameters.values(), config.grad_clip) for group in groups]
        figures = torch.cat([totals, *(norm.double().view(1) for norm in norms)]).tolist()
        values = {name: total / config.batch_size for name, total in zip(names, figures)}
        num_stops, *norms = figures[len(names) :]
        values.update((group.norm_name, norm) for group, norm in zip(groups, norms))
        if not all(map(math.isfinite, [values["loss"], *norms])):
            self._fail(step, values)
        step_optimizer(self.state.optimizer, lr, step)
        self.state.optimizer.zero_grad()
        self.state.ema.update(step)
        self.window.add({**values, "lr": lr}, config.batch_size, time.perf_counter() - begin, wait)
        return num_stops > 0

    def _accumulate(
        self, step: int, loader: Iterator[dict[str, Any]], stop: Stop
    ) -> tuple[list[str], Tensor, float]:
        """Gradients of the mean loss over the global batch.

        Returns:
            Names of the logged figures, their sums over the global batch (then the number of ranks
            told to stop), and the seconds spent waiting for data.
        """
        config, names, wait = self.config.train, ["loss"], 0.0
        totals = torch.zeros(0, device=self.ranks.device, dtype=torch.float64)
        # DistributedDataParallel averages over ranks; the loss is a mean over all of their samples.
        scale = self.ranks.world_size / config.batch_size
        self.batches, self.samples = [], []
        for micro in range(config.grad_accum):
            asked = time.perf_counter()
            items = next(loader)
            wait += time.perf_counter() - asked
            self.bad_files.add(items.get("bad", ()), items.get("rows", ()))
            batch = self.recipe.make_batch(items, step)
            self.batches.append(batch)
            self.samples.append({"g": items["g"], "captions": items["captions"]})
            with distributed.keep_local(self.model, micro < config.grad_accum - 1):
                with self.autocast():
                    losses, values = self.model(batch)
                (losses.sum() * scale).backward()
            names = ["loss", *values]
            sums = torch.stack([losses.detach().sum(), *(v.sum() for v in values.values())])
            totals = sums.double() if micro == 0 else totals + sums
        told = torch.full((1,), float(stop.signal is not None), device=totals.device)
        return names, self.ranks.sum(torch.cat([totals, told.double()])), wait

    def _fail(self, step: int, values: dict[str, float]) -> None:
        """Leaves this rank's share of the step behind, and stops; every rank is here together."""
        folder = self.config.out / f"nonfinite-step-{step}-rank-{self.ranks.rank}"
        folder.mkdir(parents=True, exist_ok=True)
        for micro, batch in enumerate(self.batches):
            tensors = {name: value.detach().cpu().contiguous() for name, value in batch.items()}
            save_file(tensors, folder / f"micro-batch-{micro}.safetensors")
        report = {"step": step, "values": {k: repr(v) for k, v in values.items()}}
        text = json.dumps({**report, "micro_batches": self.samples}, indent=1)
        (folder / "batch.json").write_text(text + "\n")
        self.log.close(1)
        raise NonFiniteError(
            f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; stopped "
            f"before the update. The batch is in {folder}; a lower train.optimizer.lr or a longer "
            "warm-up is the usual cure"
        )

    def all_unread(self) -> dict[str, str]:
        """Clips that could not be read so far, on any rank, and why; every rank calls it."""
        for reasons in self.ranks.gather(self.bad_files.reasons):
            self.unread.update(reasons)
        return self.unread

    def report(self, done: int) -> None:
        """The row that is due after `done` steps."""
        logging, last = self.config.logging, done == self.config.train.steps
        row: dict[str, float] = {}
        if last or done % logging.interval == 0:
            row = self.window.take()
            steps_left = self.config.train.steps - done
            left = steps_left * self.config.train.batch_size / row["samples_per_second"]
            line = describe(done, self.config.train.steps, row)
            self.log.say(f"{line}  left {clock(left)}")
            unread = self.all_unread()
            if unread:
                row["bad_clips"] = len(unread)
        if last or done % logging.val_interval == 0:
            with self.evaluating():
                row.update(self.recipe.validate())
                self.log.histograms(done, self.recipe.histograms)
        if row:
            self.log.row(done, row)

    def show_samples(self, done: int) -> None:
        """The videos that are due after `done` steps; a model that fails to make some trains on."""
        if done == self.config.train.steps or done % self.config.logging.sample_interval == 0:
            if self.ranks.is_main:
                try:
                    with self.evaluating():
                        self.log.videos(done, self.recipe.samples())
                except ValueError as error:
                    self.log.say(f"no samples after step {done}: {error}")
            self.ranks.barrier()

    def save(self, done: int, data: TrainData) -> None:
        extra = {
            "config": self.config.model_dump(mode="json"),
            "data": data.train.fingerprint(),
            "frozen": self.frozen,
            "unread": self.all_unread(),
            "window": {"saved": self.window.values, "seconds": self.window.seconds},
        }
        folder = self.config.out / "checkpoints"
        keep = self.config.train.keep_checkpoints
        checkpoint.save_checkpoint(folder, done, self.state, extra, keep, self.ranks)

    def export(self, done: int, data: TrainData) -> None:
        provenance = {
            "step": done,
            "config_hash": self.config.hash(),
            "data_fingerprint": data.train.fingerprint(),
            "git_commit": git_commit(),
        }
        with self.state.ema.applied(), torch.compiler.set_stance("force_eager"):
            self.recipe.export(self.recipe.export_folder, provenance)
        self.ranks.barrier()
