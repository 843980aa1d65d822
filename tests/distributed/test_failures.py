"""What goes wrong on one rank: a stall, another config, other rows, a signal, a sudden end. All ranks
end together, with one line that names it."""

import re
import socket
import time

import pytest
import torch
from safetensors.torch import load_file

from train.checkpoint import list_checkpoints
from train.logs import TIME_FIELDS, read_log

# Training in which one rank is odd; argv is the config and the rank.
START = """
import os, signal, sys, time
from train import cli
from train.clips import TrainingClips
from train.recipe_vae import VAERecipe

odd = os.environ.get("RANK", "0") == sys.argv[2]
calls = []
"""
STALL_IN_DATA = """
request = TrainingClips.request

def stalled(self, g, bad=()):
    if odd and g >= 8:
        time.sleep(1000)
    return request(self, g, bad)

TrainingClips.request = stalled
cli.main(["train", sys.argv[1]])
"""
STALL_IN_WORKER = """
from dataclasses import replace
request = TrainingClips.request
nobody_writes = sys.argv[1] + ".fifo"
os.mkfifo(nobody_writes)

def stalled(self, g, bad=()):
    asked = request(self, g, bad)
    return replace(asked, path=nobody_writes) if g >= 8 else asked

TrainingClips.request = stalled
cli.main(["train", sys.argv[1]])
"""
STALL_IN_FORWARD = """
forward = VAERecipe.forward

def stalled(self, batch):
    calls.append(1)
    if odd and len(calls) == 3:
        time.sleep(1000)
    return forward(self, batch)

VAERecipe.forward = stalled
cli.main(["train", sys.argv[1]])
"""
NOT_FINITE = """
import math
forward = VAERecipe.forward

def diverge(self, batch):
    losses, values = forward(self, batch)
    calls.append(1)
    return losses * (math.nan if odd and len(calls) == 3 else 1), values

VAERecipe.forward = diverge
cli.main(["train", sys.argv[1]])
"""
OTHER_SEED = """
cli.main(["train", sys.argv[1], *(["seed=3"] if odd else [])])
"""
OTHER_ROWS = """
from dataclasses import replace
import train.loop
opened = train.loop.open_data

def other(config):
    data = opened(config)
    if odd:
        data = replace(data, train=replace(data.train, rows=data.train.rows[:-1]))
    return data

train.loop.open_data = other
cli.main(["train", sys.argv[1]])
"""
# When there is a checkpoint, a rank dies; or it alone is told to stop, and its loader's process too.
INTERRUPT = """
import multiprocessing
import train.loop
step = train.loop.Run.step

def interrupted(self, number, loader, stop):
    if odd and number == 7 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGUSR1)
        os.kill(os.getpid(), signal.{signal})
    return step(self, number, loader, stop)

train.loop.Run.step = interrupted
cli.main(["train", sys.argv[1]])
"""
# So that others may come and go before it ends.
SLOW = """
import train.loop
step = train.loop.Run.step

def slow(self, number, loader, stop):
    time.sleep(0.25)
    return step(self, number, loader, stop)

train.loop.Run.step = slow
cli.main(["train", sys.argv[1]])
"""
SHORT = {"train": {"checkpoint_interval": 3}, "logging": {"interval": 2, "val_interval": 4}}


@pytest.fixture
def odd(nursery, tmp_path):
    """Runs a config with one odd rank of some; returns (exit code, all output)."""

    def run(text, config, rank=1, processes=2, restarts=0):
        path = tmp_path / "start.py"
        path.write_text(START + text)
        return nursery.run(path, config, rank, processes=processes, restarts=restarts)

    return run


@pytest.mark.parametrize(
    ("text", "phase"),
    [
        (STALL_IN_DATA, "waiting for data in step 3"),
        (STALL_IN_FORWARD, "in the forward pass in step 3"),
    ],
    ids=["data", "forward"],
)
def test_a_stalled_rank_is_named(room, odd, tmp_path, text, phase):
    config = room.write(tmp_path / "run", "vae", train={"stall_timeout": 6})
    code, output = odd(text, config)
    assert code == 1
    (line,) = (line for line in output.splitlines() if "error: stalled" in line)
    assert line.startswith("zoetrope: error: stalled: rank 1 (")
    assert f"has been {phase} for" in line
    assert "s; the other 1 waits for it" in line
    for rank in (0, 1):
        stacks = (tmp_path / "run" / "stalls" / f"rank-{rank}.txt").read_text()
        assert ("in stalled" in stacks) == (rank == 1)
    assert "exitcode  : 70" in output


def test_a_stall_of_a_single_process_is_named(room, odd, tmp_path):
    """With a loader process that waits for storage, say."""
    config = room.write(
        tmp_path / "run", "vae", train={"stall_timeout": 25}, data={"num_workers": 1}
    )
    code, output = odd(STALL_IN_WORKER, config, rank=0, processes=0)
    assert code == 70
    assert "stalled: this process (" in output
    assert "has been waiting for data in step 3 for" in output


def test_another_config_on_one_rank(room, odd, tmp_path):
    code, output = odd(OTHER_SEED, room.write(tmp_path / "run", "vae"))
    assert code == 1
    (line,) = (line for line in output.splitlines() if line.startswith("zoetrope: error"))
    assert "error: rank 1 (" in line
    assert "have different config: seed=3 and seed=0; start all" in line
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_other_rows_on_one_rank(room, odd, tmp_path):
    code, output = odd(OTHER_ROWS, room.write(tmp_path / "run", "vae"))
    assert code == 1
    (line,) = (line for line in output.splitlines() if line.startswith("zoetrope: error"))
    assert "error: rank 1 (" in line
    assert "and rank 0 have different data.manifest: " in line


def test_an_occupied_folder_stops_both(room, nursery, tmp_path):
    with room.occupied(tmp_path / "run"):
        code, output = nursery.run("-m", "train", room.write(tmp_path / "run", "vae"), processes=2)
    assert code != 0
    assert "run: another process is training into this folder" in output


def test_a_loss_that_is_not_finite_on_one_rank_stops_both(room, odd, tmp_path):
    code, output = odd(NOT_FINITE, room.write(tmp_path / "run", "vae"))
    assert code != 0
    assert "zoetrope: error: step 2: loss nan" in output
    for rank in (0, 1):
        assert (tmp_path / "run" / f"nonfinite-step-2-rank-{rank}" / "batch.json").is_file()
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.fixture(scope="module")
def whole(room, tmp_path_factory):
    """The folder of a run in one process that nothing interrupts."""
    return room.train(tmp_path_factory.mktemp("whole") / "run", "vae", **SHORT)


def assert_same(out, whole):
    rows, expected = (read_log(folder / "log.jsonl") for folder in (out, whole))
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, one in zip(rows, expected):
        assert row.keys() == one.keys()
        figures = [key for key in one if key not in TIME_FIELDS]
        assert [row[key] for key in figures] == pytest.approx(
            [one[key] for key in figures], abs=1e-5, rel=1e-5
        )
    weights, others = (load_file(folder / "model" / "vae.safetensors") for folder in (whole, out))
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("number", "code"), [("SIGUSR1", 75), ("SIGINT", 130)])
def test_a_signal_to_one_rank_stops_all(room, odd, whole, tmp_path, number, code):
    """They write a checkpoint at once; one process makes the row and the validation that were due then,
    and goes on."""
    config = room.write(tmp_path / "run", "vae", **SHORT, data={"num_workers": 1})
    _, output = odd(INTERRUPT.format(signal=number), config)
    assert "stopped after step 8; the same command goes on from here" in output
    assert f"exitcode  : {code} " in output  # of the rank that torchrun saw end first
    assert [step for step, _ in list_checkpoints(tmp_path / "run" / "checkpoints")][-1] == 8
    assert read_log(tmp_path / "run" / "log.jsonl")[-1]["step"] == 6
    room.train(tmp_path / "run", "vae", **SHORT)
    assert_same(tmp_path / "run", whole)


def test_torchrun_starts_again_when_a_rank_dies(room, odd, whole, tmp_path):
    waits = {**SHORT["train"], "async_checkpoints": False}  # or it may not be written yet
    config = room.write(tmp_path / "run", "vae", **{**SHORT, "train": waits})
    code, output = odd(INTERRUPT.format(signal="SIGKILL"), config, restarts=1)
    assert code == 0, output
    assert "zoetrope: error: lost contact with another process of this run" in output
    assert "parameters, resumed, steps 6 to 12" in output
    assert_same(tmp_path / "run", whole)


def listening(port):
    for _ in range(600):
        with socket.socket() as sock:
            if sock.connect_ex(("localhost", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"nothing listens at port {port}")


def test_hosts_come_and_go(room, nursery, free_port, tmp_path):
    """`torchrun --nnodes 1:2`: one of two hosts is lost, the other goes on alone; a third comes."""
    slow = {"kind": "adamw", "lr": 2e-4}  # or rounding errors grow
    train = {"steps": 40, "checkpoint_interval": 5, "optimizer": slow}
    changes = {"train": train, "logging": {"interval": 1}}
    config = room.write(tmp_path / "run", "vae", **changes)
    script = tmp_path / "start.py"
    script.write_text(START + SLOW)

    def host():
        return nursery.start(script, config, 0, processes=1, restarts=3, port=port)

    def steps():
        log = tmp_path / "run" / "log.jsonl"
        return len(read_log(log)) if log.exists() else 0

    def wait_for(step):
        limit = time.monotonic() + 100
        while steps() < step and first.poll() is None and time.monotonic() < limit:
            time.sleep(0.05)
        assert steps() >= step, first.communicate()[0]

    port = free_port()
    first = host()
    listening(port)  # the store is with whoever is there first, and must outlive the second
    second = host()
    wait_for(8)
    nursery.kill_family(second.pid)
    wait_for(16)
    third = host()
    outputs = [process.communicate()[0] for process in (first, third)]
    assert (first.returncode, third.returncode) == (0, 0), outputs
    # Whichever is rank 0 says how many there are.
    said = re.findall(r"float32 on cpu in (\d) process", "".join(outputs))
    assert said == ["2", "1", "2"]
    one = room.train(tmp_path / "one", "vae", **changes)
    assert_same(tmp_path / "run", one)
