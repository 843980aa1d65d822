"""Checkpoints are written while training goes on, appear when complete, and fit any layout."""

import importlib.util
import os
import re
import threading
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from sample.processes import Ranks
from train import checkpoint, checkpoint_writer
from train.checkpoint import Files, find_newest, list_checkpoints, load_checkpoint, read_state
from train.checkpoint_writer import Checkpointer

_path = Path(__file__).with_name("resharding.py")
_spec = importlib.util.spec_from_file_location("resharding", _path)
toy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)

ALONE = Ranks(0, 1, torch.device("cpu"), None)
EXTRA = {"config": {"answer": 42}}


def start(folder, **changes):
    return Checkpointer(folder, toy.CONFIG.model_copy(update=changes), ALONE)


def steps(folder):
    return [step for step, _ in list_checkpoints(folder)]


FULL_FOR_RANK_1 = """
import os, sys
from train.checkpoint import Files
from train.cli import main

create_stream = Files.create_stream

def full(self, path, mode):
    if os.environ["RANK"] == "1" and "00000006" in str(path):
        raise OSError(28, "No space left on device")
    return create_stream(self, path, mode)

Files.create_stream = full
main(["train", sys.argv[1]])
"""


class Gate:
    """Stands in for torch's save: waits until it is opened, and keeps count."""

    def __init__(self, monkeypatch):
        self.open, self.events = threading.Event(), []
        monkeypatch.setattr(checkpoint_writer, "save", self.save)

    def save(self, tensors, **options):
        name = options["storage_writer"].path.name
        self.events.append(("begins", name))
        assert self.open.wait(60)
        result = save(tensors, **options)
        self.events.append(("ends", name))
        return result


@pytest.fixture
def state():
    state = toy.make_state()
    for step in range(toy.STEPS):
        toy.advance(state, step)
    return state


def test_what_is_written_is_the_state_at_the_call(state, tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    expected = toy.contents(state)
    window = {"loss": [1.0]}
    with start(tmp_path) as checkpoints:
        checkpoints.save(5, state, {**EXTRA, "window": window}, wait=False)
        window["loss"].append(2.0)
        for step in range(5, 8):
            toy.advance(state, step)
        assert steps(tmp_path) == []
        gate.open.set()
        checkpoints.finish()
    assert not toy.contents(state)["/model/scale"].equal(expected["/model/scale"])
    step, path, saved = find_newest(tmp_path, ALONE)
    assert step == 5
    assert saved == {"step": 5, **EXTRA, "window": {"loss": [1.0]}}
    other = toy.make_state(seed=1)
    load_checkpoint(path, other, ALONE)
    toy.assert_same(toy.contents(other), expected)


def test_one_at_a_time(state, tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    with start(tmp_path) as checkpoints:
        checkpoints.save(1, state, EXTRA, wait=False)
        threading.Timer(0.1, gate.open.set).start()
        checkpoints.save(2, state, EXTRA, wait=False)
        checkpoints.save(3, state, EXTRA, wait=True)
        assert steps(tmp_path) == [2, 3]
    names = [f".step-0000000{n}.partial" for n in (1, 2, 3)]
    assert gate.events == [(event, name) for name in names for event in ("begins", "ends")]
    assert checkpoints.write_seconds > 0
    assert checkpoints.blocked_seconds > checkpoints.write_seconds  # as the last one was waited for


def test_a_failure_is_told_at_the_next_save(state, tmp_path):
    """A real one, in the middle of a tensor: files may be no longer than 200 kB."""
    resource = pytest.importorskip("resource")
    state.trained["large"] = torch.nn.Parameter(torch.ones(300_000))
    with start(tmp_path) as checkpoints:
        checkpoints.save(1, state, EXTRA, wait=True)
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, most))
        try:
            checkpoints.save(2, state, EXTRA, wait=False)
            checkpoints._pending.exception()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        assert checkpoints.failed
        assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001"]
        text = (
            r"step-00000002: the checkpoint cannot be written \(__0_0.distcp \(the shard of rank 0\): "
            r"File too large\); see to that, and the same command goes on from the one before$"
        )
        with pytest.raises(OSError, match=text):
            checkpoints.save(3, state, EXTRA, wait=False)
        assert not checkpoints.failed
        checkpoints.save(3, state, EXTRA, wait=True)
    assert steps(tmp_path) == [1, 3]


def test_a_folder_that_nodes_do_not_share(state, tmp_path, monkeypatch):
    def lose(tensors, **options):
        save(tensors, **options)
        (options["storage_writer"].path / "__0_0.distcp").unlink()

    monkeypatch.setattr(checkpoint_writer, "save", lose)
    with (
        start(tmp_path) as checkpoints,
        pytest.raises(OSError, match=r"__0_0.distcp .* is missing, as seen by rank 0; all nodes"),
    ):
        checkpoints.save(1, state, EXTRA, wait=True)
    assert list(tmp_path.iterdir()) == []


def test_everything_is_on_the_disk_before_the_name(state, tmp_path, monkeypatch):
    synced, at_rename = [], {}
    fsync, replace = os.fsync, os.replace

    def note_sync(descriptor):
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def note_rename(source, target):
        inodes = {path.name: path.stat().st_ino for path in (source, *source.iterdir())}
        at_rename.update(inodes=inodes, synced=set(synced))
        synced.clear()
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_rename)
    with start(tmp_path) as checkpoints:
        checkpoints.save(1, state, EXTRA, wait=True)
    names = {".step-00000001.partial", "__0_0.distcp", ".metadata", "state.json"}
    assert at_rename["inodes"].keys() == names
    assert set(at_rename["inodes"].values()) <= at_rename["synced"]
    assert synced == [tmp_path.stat().st_ino]


def test_rotation(state, tmp_path):
    with start(tmp_path, keep_every=4) as checkpoints:
        for step in range(1, 11):
            checkpoints.save(step, state, EXTRA, wait=step == 10)
    assert steps(tmp_path) == [4, 8, 9, 10]
    assert read_state(tmp_path / "step-00000008")["step"] == 8
    assert len(list(tmp_path.iterdir())) == 4


def test_leftovers_are_cleared_and_a_name_is_taken_over(state, tmp_path):
    for name in (".step-00000003.partial", ".step-00000001.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_bytes(b"half")
    with start(tmp_path) as checkpoints:
        assert list(tmp_path.iterdir()) == []
        for _ in range(2):
            checkpoints.save(3, state, EXTRA, wait=True)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_other_networks(state, tmp_path):
    with start(tmp_path) as checkpoints:
        checkpoints.save(1, state, EXTRA, wait=True)
    other = toy.make_state()
    other.trained["new"] = torch.nn.Parameter(torch.ones(1))
    text = r"does not fit the networks of this run \(Missing key .*model.new\.\)"
    with pytest.raises(ValueError, match=text):
        load_checkpoint(tmp_path / "step-00000001", other, ALONE)


def test_unreadable_is_not_damaged(state, tmp_path, monkeypatch):
    """Deleting the folder would not mend a disk that is away for a while."""
    with start(tmp_path) as checkpoints:
        checkpoints.save(1, state, EXTRA, wait=True)
    create_stream = checkpoint.FileSystem.create_stream

    def away(self, path, mode):
        if path.name.endswith(".distcp"):
            raise OSError(5, "Input/output error", str(path))
        return create_stream(self, path, mode)

    monkeypatch.setattr(checkpoint.FileSystem, "create_stream", away)
    with pytest.raises(OSError, match=r"rank 0\): Input/output error$"):
        load_checkpoint(tmp_path / "step-00000001", state, ALONE)


def test_resharding(nursery, tmp_path):
    """Four processes write, two read and write, four and one read; whole, FSDP and HSDP."""
    output = ""
    for processes, *tasks in ((4, "fail", "write"), (2, "read", "write"), (4, "read")):
        code, said = nursery.run(_path, tmp_path, *tasks, processes=processes)
        assert code == 0, said
        output += said
    written = sorted(tmp_path.glob("*.pt"))
    assert [path.stem for path in written] == ["2-fsdp", "2-whole", "4-fsdp", "4-hsdp", "4-whole"]
    assert len(list((tmp_path / "4-hsdp" / "step-00000005").glob("*.distcp"))) == 4
    for expected in written:
        state = toy.make_state(seed=1)
        load_checkpoint(tmp_path / expected.stem / "step-00000005", state, ALONE)
        toy.assert_same(toy.contents(state), torch.load(expected))
        assert output.count(f"{expected.stem} read as") == (5 if expected.stem[0] == "4" else 3)


def test_ctrl_c_while_a_last_checkpoint_is_written(state, tmp_path, monkeypatch):
    """Is what it is, not a disk that cannot be written to."""

    def interrupted(*_):
        raise KeyboardInterrupt

    with start(tmp_path) as checkpoints:
        monkeypatch.setattr(Files, "create_stream", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(1, state, EXTRA, wait=True)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_for_one_rank_stops_both(room, nursery, tmp_path):
    script = tmp_path / "full.py"
    script.write_text(FULL_FOR_RANK_1)
    config = room.write(tmp_path / "run", "vae", train={"steps": 500, "checkpoint_interval": 3})
    code, output = nursery.run(script, config, processes=2)
    assert code != 0
    # Both have it to say; torchrun may end one of them before it does.
    line = r"zoetrope: error: .*step-00000006: the checkpoint cannot be written .*No space.*; make room"
    assert re.search(line, output), output
    assert steps(tmp_path / "run" / "checkpoints") == [3]
