"""The training loop, for every recipe: read it top to bottom."""

from __future__ import annotations

import math
import time
from collections import ChainMap
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data.buckets import Size
from data.dataset import BadFiles
from sample import processes
from sample.processes import Ranks
from train.agreement import check_disjoint, check_program, check_same
from train.anomalies import (
    CHANGE_OF_MIND,
    NonFiniteError,
    SkippedLog,
    Spikes,
    check_weights,
    leave_batch,
)
from train.checkpoint import TrainState
from train.checkpoint_writer import Checkpointer
from train.clips import make_loader
from train.config import RunConfig
from train.logs import RunLog, Window, clock, describe, describe_unread, describe_validation
from train.optim import clip_gradients, schedule_factor, step_optimizer
from train.parallel import average_copies, gathered, keep_local, parallelize
from train.performance import Costs, Meter, peak_tflops
from train.plan import flops_per_sample
from train.profiling import Profiler, Steps
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
from train.sizes import describe_sizes
from train.stopping import EXIT_INTERRUPTED, EXIT_REQUEUE, Stop, catch_signals
from train.watchdog import beat, record_exchanges, watching


def train(config: RunConfig, profile: Steps | None = None, allowed: Collection[str] = ()) -> None:
    """Trains to the last step, from the newest checkpoint in the run's folder if there is one.

    Called by every process that torchrun started, or by a single one.

    Args:
        profile: the first and the last step to record a trace of.
        allowed: keys of the config in which the newest checkpoint may differ.
    Raises:
        ValueError: something in the config, the data or the checkpoint does not fit, or differs
            between ranks.
        NonFiniteError: training diverged.
        SystemExit: stopped by a signal, after writing a checkpoint: 75, or 130 after Ctrl-C. Or 2, on
            ranks beside one that says why.
    """
    parallel, stall = config.train.parallel, config.train.stall_timeout
    record_exchanges()
    ranks = processes.start(
        *(config.device, config.train.threads, parallel.shard, parallel.context),
        timeout=max(1800.0, 1.5 * stall),  # our watchdog, which names a rank, speaks first
    )
    with watching(ranks, config.out, stall):
        check_program(config, ranks)
        beat("opening the data")
        data = open_data(config)
        manifests = {"manifest": data.train, "validation": data.validation}
        check_same({f"data.{name}": m.fingerprint() for name, m in manifests.items()}, ranks)
        beat("building the networks")
        recipe = build_recipe(config, data, ranks)
        with locked_folder(config, ranks):
            _train(config, data, recipe, ranks, profile, allowed)
    processes.stop()


def _train(
    config: RunConfig,
    data: TrainData,
    recipe: Recipe,
    ranks: Ranks,
    profile: Steps | None,
    allowed: Collection[str],
) -> None:
    """`train`, once the run's folder is its own."""
    frozen = hash_frozen(recipe)
    check_same(frozen, ranks)
    model = parallelize(recipe, ranks)
    state = fresh_state(recipe, config.train)
    beat("reading the checkpoint")
    start_step, saved = resume(config, data, state, frozen, ranks, allowed)
    if start_step == config.train.steps and exported_step(recipe.export_folder) == start_step:
        if ranks.is_main:
            print(f"{config.out}: all {start_step} steps are done already")
        return

    profiler = Profiler(profile, config.out, ranks, start_step, config.train.steps)
    unread: dict[str, str] = saved.get("unread", {})
    recipe.quarantine.update(saved.get("quarantine", {}))
    beat("reading the validation clips")
    check_validation(config, recipe, ranks)
    start_folder(config, ranks)
    dataset, order = recipe.dataset(), recipe.order
    loader = make_loader(dataset, config, ranks, start_step, recipe.quarantine, order)
    batches = islice(loader.batches, config.train.grad_accum)
    numbers = [number for batch in batches for number in batch]
    check_disjoint(numbers, recipe.order.first(start_step), ranks)
    # The row that a checkpoint leaves to be made may be there: of a start that came no further.
    log = RunLog(config, ranks, start_step - bool(saved.get("unreported")))
    log.say(describe_run(config, state, ranks, start_step))
    for line in describe_sizes(data.train, config, recipe.order, recipe.num_tokens):
        log.say(line)
    run = Run(
        *(config, ranks, recipe, model, state, frozen, log),
        window=Window(**saved.get("window", {})),
        meter=_meter(config, data, recipe, model, ranks),
        spikes=Spikes(config.train.skip_spikes, saved.get("spikes")),
        bad_files=BadFiles(len(data.train.rows), config.data.max_bad_share, ranks.num_data_ranks),
        unread=unread,
        checkpoints=Checkpointer(config.out / "checkpoints", config.train, ranks),
        skipped=SkippedLog(config.out, start_step) if ranks.is_main else None,
    )
    with run.checkpoints, catch_signals() as stop:
        items = iter(loader)
        if saved.get("unreported"):
            run.report(start_step)
            run.show_samples(start_step, stop)
        for step in range(start_step, config.train.steps):
            done = step + 1
            profiler.before(done)
            exit_code = run.step(step, items, stop)
            profiler.after(done)
            last, due = done == config.train.steps, done % config.train.checkpoint_interval == 0
            if exit_code is not None and not last:
                # At once: the time until the machine is gone may not do for the row and the samples
                # that are due, so the resumed run makes those first.
                run.save(done, data, wait=True, unreported=True)
                log.say(f"stopped after step {done}; the same command goes on from here")
                log.close(exit_code)
                del items  # ends the loader's processes, which ignore what Python ends them with
                raise SystemExit(exit_code)
            run.report(done)
            if last or due:
                run.save(done, data, wait=last)
            run.show_samples(done, stop)
            if due and not last:
                run.export(done, data)
    run.export(config.train.steps, data)
    unread = run.all_unread()
    if unread:
        log.say(describe_unread(unread))
    log.say(f"{recipe.export_folder}: exported after {config.train.steps} steps")
    log.close()


def _meter(
    config: RunConfig, data: TrainData, recipe: Recipe, model: nn.Module, ranks: Ranks
) -> Meter:
    """For the run's sizes of clips; FLOPs are counted where the log's MFU needs them."""
    peak, sizes = peak_tflops(config, ranks.device), list(recipe.order.rows)
    flops: dict[Size, float] = {}
    if peak is not None and ranks.is_main:
        counted = build_recipe(config, data, ranks, on_meta=True)
        flops = {size: flops_per_sample(counted, size) for size in sizes}
    costs = Costs({size: recipe.num_tokens(size) for size in sizes}, flops, peak)
    spread = ranks.world_size > 1 and not isinstance(model, DistributedDataParallel)
    return Meter(ranks, costs, meets=spread)


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
    meter: Meter
    spikes: Spikes
    bad_files: BadFiles
    unread: dict[str, str]  # clips that could not be read before the run was resumed, and why
    checkpoints: Checkpointer
    skipped: SkippedLog | None  # on the main rank
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
        with self.state.ema.applied(), gathered(self.recipe), self.autocast(), eager:
            yield

    def step(self, step: int, loader: Iterator[dict[str, Any]], stop: Stop) -> int | None:
        """Forward, backward and update; the exit code to stop with, when any rank was told to.

        Everything that ranks must agree on (the mean loss, whether to stop) travels in one sum.
        """
        config, begin = self.config.train, time.perf_counter()
        lr = config.optimizer.lr * schedule_factor(config.schedule, step, config.steps)
        names, totals, wait = self._accumulate(step, loader, stop)
        beat("adding up over all ranks")
        groups = self.state.groups
        norms = [clip_gradients(group.parameters.values(), config.grad_clip) for group in groups]
        figures = torch.cat([totals, *(norm.double().view(1) for norm in norms)]).tolist()
        samples = self.recipe.order.counts(step)
        num_samples = sum(samples.values())
        num_counted = num_samples * self.ranks.context  # ranks of a context count the same
        values = {name: total / num_counted for name, total in zip(names, figures)}
        num_stops, num_interrupts, *norms = figures[len(names) :]
        values.update((group.norm_name, norm) for group, norm in zip(groups, norms))
        if not all(map(math.isfinite, [values["loss"], *norms])):
            self._fail(step, values)
        started = {g.norm_name: norm for g, norm in zip(groups, norms) if step >= g.start_step}
        spike = self.spikes.judge(started)
        if spike is None:
            step_optimizer(self.state.optimizer, lr, step)
        else:
            self._skip(step, spike)
            values = {}
        self.state.optimizer.zero_grad()
        if spike is None:
            self.state.ema.update(step)
        values["lr"] = lr
        if config.skip_spikes is not None:
            values["skipped_share"] = float(spike is not None)
        busy = time.perf_counter() - begin
        self.window.add(values, num_samples, busy, wait)
        self.meter.add(samples, busy, wait)
        if num_interrupts:
            return EXIT_INTERRUPTED
        return EXIT_REQUEUE if num_stops else None

    def _accumulate(
        self, step: int, loader: Iterator[dict[str, Any]], stop: Stop
    ) -> tuple[list[str], Tensor, float]:
        """Gradients of the mean loss over the global batch.

        Returns:
            Names of the logged figures, their sums over the global batch (then the numbers of ranks
            told to stop, and told so by Ctrl-C), and the seconds spent waiting for data.
        """
        config, names, wait = self.config.train, ["loss"], 0.0
        totals = torch.zeros(0, device=self.ranks.device, dtype=torch.float64)
        # Gradients are averaged over ranks; the loss is a mean over all samples. In a context all ranks
        # have the same loss, and each the gradients of the parts that it computes in all of them.
        scale = self.ranks.num_data_ranks / self.recipe.order.batch(step)
        self.batches, self.samples = [], []
        for micro in range(config.grad_accum):
            asked = time.perf_counter()
            beat("waiting for data", step + 1)
            items = next(loader)
            wait += time.perf_counter() - asked
            beat("in the forward pass")
            self.meter.begin()
            self.bad_files.add(items.get("bad", ()), items.get("rows", ()))
            batch = self.recipe.make_batch(items, step)
            self.batches.append(batch)
            self.samples.append({key: items[key] for key in ("g", "rows", "captions")})
            more = micro < config.grad_accum - 1
            with keep_local(self.model, more, config.parallel.accumulate):
                with self.autocast():
                    losses, values = self.model(batch)
                loss = losses.sum() * scale
                beat("in the backward pass")
                self.meter.end_with(loss)
                loss.backward()
            names = ["loss", *values]
            sums = torch.stack([losses.detach().sum(), *(v.sum() for v in values.values())])
            totals = sums.double() if micro == 0 else totals + sums
        average_copies(self.model, self.ranks)
        # A checkpoint that failed stops all ranks as a signal does: `save` then raises on each.
        stopping = stop.signal is not None or self.checkpoints.failed
        # Filled on the device: a copy from here would wait for all that the device has yet to do.
        told = [totals.new_full((1,), float(flag)) for flag in (stopping, stop.interrupted)]
        return names, self.ranks.sum(torch.cat([totals, *told])), wait

    def _skip(self, step: int, spike: dict[str, Any]) -> None:
        """Notes a step that is left out; every rank is here together."""
        mine = {"rank": self.ranks.rank, "micro_batches": self.samples}
        found = self.ranks.gather(mine)[:: self.ranks.context]
        if self.skipped is not None:
            self.skipped.add({"step": step + 1, **spike, "samples": found})
            self.log.say(
                f"step {step + 1} is left out: its {spike['figure']} of {spike['norm']:.4g} is "
                f"{spike['norm'] / spike['median']:.3g} times the usual one; see {self.skipped.path}"
            )

    def _fail(self, step: int, values: dict[str, float]) -> None:
        """Leaves this rank's share of the step behind, and stops; every rank is here together."""
        folder = self.config.out / f"nonfinite-step-{step}-rank-{self.ranks.rank}"
        figures = {name: repr(value) for name, value in values.items()}
        about = {"step": step, "values": figures, "micro_batches": self.samples}
        where = leave_batch(folder, self.batches, about)
        self.log.close(1)
        self.ranks.barrier()  # torchrun would end those that are still writing
        raise NonFiniteError(
            f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; stopped "
            f"before the update. {where}; a lower train.optimizer.lr or a longer warm-up is the "
            f"usual cure. {CHANGE_OF_MIND}"
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
            beat("comparing ranks")
            row = {**self.window.take(), **self.meter.take(self.checkpoints.write_seconds)}
            steps_left = self.config.train.steps - done
            line = describe(done, self.config.train.steps, row)
            if row[
                "samples_per_second"
            ]:  # none, for a row that an interrupted run left to this one
                a_step = sum(self.recipe.order.mean_counts().values())
                left = steps_left * a_step / row["samples_per_second"]
                line = f"{line}  left {clock(left)}"
            self.log.say(line)
            unread = self.all_unread()
            if unread:
                row["bad_clips"] = len(unread)
        if last or done % logging.val_interval == 0:
            beat("validating")
            with self.evaluating():
                figures = self.recipe.validate()
                row.update(figures)
                self.log.say(describe_validation(done, self.config.train.steps, figures))
                self.log.histograms(done, self.recipe.histograms)
        if row:
            self.log.row(done, row)

    def show_samples(self, done: int, stop: Stop) -> None:
        """The videos that are due after `done` steps; a model that fails to make some trains on, and
        one that is told to stop does so before its time is up."""

        def go_on(*_: Any) -> None:
            beat()
            if stop.signal is not None:
                raise ValueError("the run is to stop")

        if done == self.config.train.steps or done % self.config.logging.sample_interval == 0:
            beat("making samples")
            with self.evaluating():
                if self.ranks.is_main:
                    try:
                        self.log.videos(done, self.recipe.samples(go_on))
                    except ValueError as error:
                        self.log.say(f"no samples after step {done}: {error}")
                self.ranks.barrier()

    def save(self, done: int, data: TrainData, *, wait: bool, unreported: bool = False) -> None:
        """A checkpoint.

        Args:
            unreported: the row and the samples that are due after `done` steps are still to be made.
        """
        beat("writing a checkpoint")
        extra = {
            "config": self.config.model_dump(mode="json"),
            "data": data.train.fingerprint(),
            "frozen": self.frozen,
            "unread": self.all_unread(),
            "quarantine": dict(ChainMap(*self.ranks.gather(self.recipe.quarantine))),
            "window": {"saved": self.window.values, "seconds": self.window.seconds},
            "spikes": self.spikes.state(),
            "unreported": unreported,
        }
        self.checkpoints.save(done, self.state, extra, wait=wait)
        self.meter.add_checkpoint(self.checkpoints.blocked_seconds)

    def export(self, done: int, data: TrainData) -> None:
        beat("exporting the model")
        check_weights(self.state.trained.values(), self.ranks, done)
        provenance = {
            "step": done,
            "config_hash": self.config.hash(),
            "data_fingerprint": data.train.fingerprint(),
            "git_commit": git_commit(),
        }
        with self.state.ema.applied(), torch.compiler.set_stance("force_eager"):
            with gathered(self.recipe):
                self.recipe.measure()
            self.recipe.export(self.recipe.export_folder, provenance)
        self.ranks.barrier()
