"""Runs that are killed at random points, and continued by the same command, end as if nothing had
happened: the same weights, EMA, optimizer and log, bit for bit.

The short form is part of the suite. `make chaos` runs the long form, with real commands in place of
forks of the nursery, and writes docs/chaos.md.
"""

import contextlib
import datetime
import importlib.util
import os
import platform
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from train.checkpoint import list_checkpoints

_spec = importlib.util.spec_from_file_location(
    "test_resume", Path(__file__).parents[1] / "train" / "test_resume.py"
)
_resume = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_resume)

ROOT = Path(__file__).parents[2]
NUM_KILLS = int(os.environ.get("CHAOS_KILLS", 0))  # of the long form
INTERVAL = 3  # steps between checkpoints
RUNS = {  # name: recipe, processes (0: no torchrun), other settings
    "VAE, one process": ("gan", 0, {}),
    "DiT, one process": ("dit", 0, {}),
    "VAE, two replicas": ("gan", 2, {}),
    "DiT, sharded over two": ("dit", 2, {"parallel": {"shard": 2}}),
}


@dataclass(frozen=True)
class Kill:
    """When and whom. `start`: `delay` seconds after the command; `training`: `delay` seconds after a
    checkpoint of `step` or later; `write`: as soon as the next one after that is being written."""

    when: str
    step: int
    delay: float
    victim: int | None  # a rank, or None for all processes


def draw_kills(seed, number, steps, processes, startup):
    """Random kills, each later in the run than the one before; a third of them hits a write."""
    rng = random.Random(seed)
    moments = [("write", "training", "start")[i % 3] for i in range(number)]
    rng.shuffle(moments)
    targets = sorted(rng.sample(range(INTERVAL, steps * 2 // 3), number))
    kills = []
    for when, step in zip(moments, targets):
        delay = rng.uniform(0, startup if when == "start" else 0.3)
        victim = rng.randrange(processes) if processes and rng.random() < 0.7 else None
        kills.append(Kill(when, step, delay, victim))
    return kills


def newest(out):
    """The step of the last complete checkpoint."""
    return max((step for step, _ in list_checkpoints(out / "checkpoints")), default=0)


def partials(out):
    """Names of the unfinished checkpoints."""
    return {path.name for path in (out / "checkpoints").glob(".step-*.partial")}


def strike(kill, start, out, nursery):
    """Starts, waits for the moment and kills; returns what it hit, and whether that was a write."""
    stale = partials(out)  # of an earlier start, until this one clears them

    def is_writing():
        names = partials(out)
        stale.intersection_update(names)
        return bool(names - stale)

    process = start()
    if kill.when == "start":
        time.sleep(kill.delay)
    else:
        while newest(out) < kill.step and process.poll() is None:
            is_writing()
            time.sleep(0.002)
        if kill.when == "training":
            time.sleep(kill.delay)
        while kill.when == "write" and not is_writing() and process.poll() is None:
            pass
    ranks = nursery.list_children(process.pid)
    # Under torchrun there may be no ranks yet.
    alone = kill.victim is not None and kill.victim < len(ranks)
    if alone:
        with contextlib.suppress(ProcessLookupError):
            os.kill(ranks[kill.victim], 9)
    else:
        nursery.kill_family(process.pid)
    writing = is_writing()
    output = process.communicate(timeout=120)[0]  # where one rank was killed, torchrun must end
    assert process.returncode != 0, f"the run ended before it was killed:\n{output}"
    return ("rank " + str(kill.victim) if alone else "all"), writing


def survive(kills, start, out, nursery):
    """Starts, kills and starts again; returns a row about each kill."""
    rows = []
    for kill in kills:
        victim, writing = strike(kill, start, out, nursery)
        rows.append((kill.when, victim, newest(out), writing))
    process = start()
    output = process.communicate(timeout=1800)[0]
    assert process.returncode == 0, output
    assert not list((out / "checkpoints").glob(".*"))
    return rows


def settings(kind, steps, more):
    optimizer = {"kind": "muon" if kind == "dit" else "adamw", "lr": 2e-3}
    train = {"steps": steps, "checkpoint_interval": INTERVAL, "optimizer": optimizer, **more}
    # Rows are never due at a checkpoint: the unfinished window must survive as well.
    logging = {"interval": 7, "val_interval": steps - 1}
    return {"train": train, "data": {"num_workers": 1}, "logging": logging}


@pytest.mark.parametrize(
    ("kind", "processes", "moments"),
    [("gan", 0, [("write", None), ("training", None)]), ("dit", 2, [("write", 1)])],
)
def test_killed_runs_end_the_same(room, nursery, tmp_path, kind, processes, moments):
    changes = settings(kind, 24, {})
    if processes:
        config = room.write(tmp_path / "whole", kind, **changes)
        code, output = nursery.run("-m", "train", config, processes=processes)
        assert code == 0, output
    else:
        room.train(tmp_path / "whole", kind, **changes)
    config = room.write(tmp_path / "killed", kind, **changes)
    kills = [Kill(when, 6 + 6 * i, 0.05, victim) for i, (when, victim) in enumerate(moments)]
    rows = survive(
        kills,
        lambda: nursery.start("-m", "train", config, processes=processes),
        tmp_path / "killed",
        nursery,
    )
    assert len(rows) == len(kills)
    _resume.assert_same_run(tmp_path / "whole", tmp_path / "killed", tmp_path)


@pytest.fixture(scope="module")
def report():
    """What the long form has found, by run; written down when all of it went well."""
    results = {}
    yield results
    if results.keys() == RUNS.keys():
        (ROOT / "docs" / "chaos.md").write_text(describe(results))


@pytest.mark.timeout(7200)
@pytest.mark.skipif(not NUM_KILLS, reason="for make chaos")
@pytest.mark.parametrize("name", RUNS)
def test_long(room, nursery, tmp_path, report, name):
    kind, processes, more = RUNS[name]
    changes = settings(kind, 40 + 10 * NUM_KILLS, more)
    command = [sys.executable, "-m", "train"]
    if processes:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, "--nproc-per-node", str(processes), "-m", "train"]

    def start(out):
        config = room.write(out, kind, **changes)
        return subprocess.Popen(
            [*command, str(config)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    begin = time.monotonic()
    whole = start(tmp_path / "whole")
    while not newest(tmp_path / "whole") and whole.poll() is None:
        time.sleep(0.01)
    startup = time.monotonic() - begin
    output = whole.communicate()[0]
    assert whole.returncode == 0, output
    seed = list(RUNS).index(name)
    kills = draw_kills(seed, NUM_KILLS, changes["train"]["steps"], processes, startup)
    out = tmp_path / "killed"
    rows = survive(kills, lambda: start(out), out, nursery)
    _resume.assert_same_run(tmp_path / "whole", out, tmp_path)
    report[name] = changes["train"]["steps"], rows


def describe(results):
    """docs/chaos.md."""
    lines = [
        "# Killed, continued, equal",
        "",
        "`make chaos` kills runs with SIGKILL at random points, starts the same command again each",
        "time, and compares what comes out in the end with a run that was left alone: weights, EMA,",
        "optimizer and log.jsonl (but for its times) have to be the same bit for bit. It is the long",
        "form of tests/distributed/test_chaos.py, and writes this page when all is equal; the short",
        "form is part of the test suite.",
        "",
        f"A checkpoint is written every {INTERVAL} steps, while training goes on. A kill comes a",
        "random time after the start of the command (importing, loading and resuming are hit as",
        "well), a random time after a random step, or as soon as a checkpoint is being written. Under",
        "torchrun a random rank dies, after which torchrun has to end by itself, or all processes do.",
        "",
        f"Last result: {datetime.datetime.now(datetime.UTC):%Y-%m-%d}, `make chaos`, "
        f"torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}, "
        f"{os.cpu_count()} CPU cores: all equal.",
        "",
    ]
    for name, (steps, rows) in results.items():
        lines += [
            f"## {name}",
            "",
            f"{steps} steps, {len(rows)} kills, {sum(row[3] for row in rows)} of them during a write.",
            "",
            "| kill | meant for | killed | newest checkpoint | a checkpoint was being written |",
            "| --- | --- | --- | --- | --- |",
        ]
        for i, (when, victim, step, writing) in enumerate(rows, 1):
            lines.append(f"| {i} | {when} | {victim} | {step} | {'yes' if writing else 'no'} |")
        lines.append("")
    return "\n".join(lines)
