"""Who is behind when nothing gets on; and the signals that ask a run to stop."""

import json
import os
import signal
import threading
from dataclasses import asdict, replace

import pytest
import torch
from torch.distributed import HashStore

from sample.processes import Ranks
from train import clips, watchdog
from train.config_file import load_config
from train.stopping import EXIT_REQUEUE, PREEMPTIONS, catch_signals
from train.watchdog import Report, Watchdog, beat, describe_stall


def report(rank, phase="in the backward pass", progress=(9, 4), seconds=50.0, **more):
    values = {"host": f"node{rank // 2}", "step": 120, "number": 1, **more}
    return Report(rank=rank, phase=phase, progress=list(progress), seconds=seconds, **values)


def test_the_rank_that_is_behind_is_named():
    reports = [report(rank) for rank in range(4)]
    reports[3] = report(3, "waiting for data", (7, 4), 50.2)
    assert describe_stall(reports) == (
        "rank 3 (node1) has been waiting for data in step 120 for 50 s; the other 3 wait for it"
    )
    # In the same phase, but with fewer exchanges begun: the others are in one that waits for it.
    reports[3] = report(3)
    reports[:3] = [report(rank, progress=(9, 5)) for rank in range(3)]
    assert describe_stall(reports).startswith("rank 3 (node1) has been in the backward pass")
    reports[0] = report(0)
    assert describe_stall(reports).startswith("ranks 0 and 3 (node0, node1) have been in the backw")
    assert describe_stall(reports).endswith("the other 2 wait for them")


def test_a_silent_rank_is_named_whatever_it_said_last():
    reports = [report(0), report(1, progress=(11, 6), silent=True)]
    assert describe_stall(reports) == (
        "rank 1 (node0) gives no sign of life, last in the backward pass in step 120; the other 1 "
        "waits for it"
    )


def test_no_rank_behind_and_no_others():
    assert "all 2 ranks have been in the backward pass in step 120 for 50 s" in describe_stall(
        [report(0), report(1)]
    )
    alone = describe_stall([report(0, "opening the data", step=None)])
    assert alone == "this process (node0) has been opening the data for 50 s"


class Ended(Exception):
    """Instead of the process."""


@pytest.fixture
def watch(monkeypatch, tmp_path):
    """A watchdog of rank 0 of two, with a store and without its thread, to be asked step by step."""
    now = [1000.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    beat("in the forward pass", 7)
    watch = Watchdog(Ranks(0, 2, torch.device("cpu"), None), tmp_path, timeout=80.0)
    watch._store, watch.now = HashStore(), now
    watch.ended.wait = lambda interval: now.__setitem__(0, now[0] + interval)

    def end(reports):
        raise Ended(describe_stall(reports))

    monkeypatch.setattr(watch, "_end", end)
    return watch


def tell(watch, other, **changes):
    other = replace(other, number=other.number + 1, **changes)
    watch._store.set("1", json.dumps(asdict(other)))
    return other


def test_waiting_for_a_rank_that_gets_on_is_no_stall(watch):
    """Rank 0 makes samples, say; the others wait without a beat for long."""
    other, rounds = report(1, progress=(0, 0), seconds=3.0), 0

    def wait(interval):
        nonlocal other, rounds
        watch.now[0] += interval
        rounds += 1
        other = tell(watch, other)  # alive, and never long without a beat
        if rounds == 50:
            other = tell(watch, other, seconds=200.0)
        return rounds > 50

    watch.ended.wait = wait
    with pytest.raises(Ended, match=r"rank 1 .* in the backward pass in step 120 for 200 s"):
        watch.run()
    assert rounds == 50
    assert watch.now[0] - 1000 == 50 * watch.interval


def test_a_process_that_stands_still_is_found(watch):
    other = tell(watch, report(1, seconds=0.5, progress=(99, 99)))  # its last words
    with pytest.raises(
        Ended, match=r"rank 1 \(node0\) gives no sign of life, last in the backward"
    ):
        watch.run()
    assert other.seconds == 0.5
    assert watch.now[0] - 1000 <= 80 + 2 * watch.interval


def test_a_beat_is_a_sign_of_life(watch):
    rounds = []

    def wait(interval):
        watch.now[0] += interval
        rounds.append(1)
        tell(watch, report(1, seconds=200.0))
        beat() if len(rounds) % 3 else beat("validating")
        return len(rounds) > 60

    watch.ended.wait = wait
    watch.run()
    assert watchdog._now.step == 7
    assert watchdog._now.phase == "validating"


@pytest.mark.parametrize("kind", ["vae", "dit"])
def test_long_phases_beat_as_they_get_on(room, tmp_path, monkeypatch, kind):
    """One clip at a time, validation, samples and a latent cache may take long together."""
    beats = {}

    def count(phase=None, step=None):
        if phase is not None:
            beats["now"] = phase
        beats[beats["now"]] = beats.get(beats["now"], 0) + 1

    for module in ("clips", "latent_cache", "loop", "dit_validation", "recipe_vae"):
        monkeypatch.setattr(f"train.{module}.beat", count)
    cached = {"latent_cache": str(tmp_path / "latents"), "cache_dtype": "float32"}
    room.train(
        tmp_path / "run",
        kind,
        recipe=cached if kind == "dit" else {},
        data={"random_start": False},
        train={"steps": 2},
        logging={"sample_interval": 2, "num_samples": 1},
    )
    assert beats["waiting for data"] == beats["in the forward pass"] == 2
    # One when it begins, and one for each part of it.
    assert beats["reading the validation clips"] > (4 if kind == "vae" else 5)
    assert beats["validating"] > 1
    assert beats["making samples"] > 1
    assert beats["writing a checkpoint"] == 1


def test_the_first_signal_takes_note_and_a_second_ctrl_c_acts():
    seen = []
    before = {n: signal.signal(n, lambda *_: seen.append(1)) for n in (signal.SIGINT, *PREEMPTIONS)}
    try:
        with catch_signals() as stop:
            assert stop.signal is None
            signal.raise_signal(signal.SIGUSR1)
            assert (stop.signal, stop.interrupted, seen) == (signal.SIGUSR1, False, [])
            signal.raise_signal(signal.SIGTERM)  # as when the time is up, and it is still writing
            signal.raise_signal(signal.SIGUSR1)
            assert seen == []
            signal.raise_signal(signal.SIGINT)
            assert seen == [1]
        with catch_signals() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.interrupted
        signal.raise_signal(signal.SIGTERM)
        assert seen == [1, 1]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert EXIT_REQUEUE == os.EX_TEMPFAIL


def test_loader_processes_leave_signals_to_the_training(room, tmp_path):
    run = load_config(room.write(tmp_path / "run", "vae", data={"num_workers": 1}))
    loader = clips.make_loader(None, run, Ranks(1, 2, torch.device("cpu"), None), 0)
    assert {signal.SIGINT, *loader.signals} == {signal.SIGINT, *PREEMPTIONS}


def test_watching_ends_with_its_block(tmp_path):
    with watchdog.watching(Ranks(0, 1, torch.device("cpu"), None), tmp_path, 1000.0):
        assert any(thread.name == "watchdog" for thread in threading.enumerate())
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())
