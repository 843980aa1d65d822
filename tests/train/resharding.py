"""A small state in training, whole or sharded; as a script under torchrun it reads the checkpoints in a
folder and writes its own (`read`, `write`), or has them fail (`fail`)."""

import shutil
import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sample.processes import start, stop, whole
from train.checkpoint import Files, TrainState, find_newest, list_checkpoints, load_checkpoint
from train.checkpoint_writer import Checkpointer
from train.config import AdamWConfig, EMAConfig, TrainConfig
from train.ema import EMA
from train.optim import build_optimizer, step_optimizer
from train.recipe import TrainedGroup

STEPS = 5
CONFIG = TrainConfig(steps=99, batch_size=4, optimizer=AdamWConfig(lr=0.1), keep_checkpoints=2)


class Toy(nn.Module):
    """Widths that do not divide by 4 or 2, a scale that is never sharded, and a late adversary."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 11), nn.Linear(11, 3))
        self.judge = nn.Linear(3, 5)
        self.scale = nn.Parameter(torch.ones(2))


def make_state(mesh=None, seed=0):
    """Fresh; its weights are sharded if there is a mesh."""
    torch.manual_seed(seed)
    toy = Toy()
    if mesh is not None:
        for part in (*toy.net, toy.judge):
            fully_shard(part, mesh=mesh)
    trained = dict(toy.named_parameters())
    net, judge, scale = (
        {name: p for name, p in trained.items() if name.startswith(part)}
        for part in ("net", "judge", "scale")
    )
    groups = [
        TrainedGroup("", net),
        TrainedGroup("judge", judge, start_step=3, lr_ratio=2.0, betas=(0.0, 0.9)),
        TrainedGroup("scale", scale),
    ]
    ema = EMA({**net, **scale}, EMAConfig(decay=0.9))
    return TrainState(toy, trained, groups, build_optimizer(groups, CONFIG.optimizer), ema)


def advance(state, step):
    """An optimizer step with made-up gradients."""
    for number, parameter in enumerate(state.trained.values()):
        generator = torch.Generator().manual_seed(1000 * step + number)
        grad = torch.randn(parameter.shape, generator=generator)
        if isinstance(parameter, DTensor):
            grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements)
        parameter.grad = grad
    step_optimizer(state.optimizer, 0.1 / (step + 1), step)
    state.ema.update(step)


def contents(state):
    """All that a checkpoint holds, flat and whole; all ranks call it."""
    found = {}

    def collect(value, name):
        nested = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in nested:
            if isinstance(item, (dict, list, tuple)):
                collect(item, f"{name}/{key}")
            else:
                is_tensor = isinstance(item, torch.Tensor)
                found[f"{name}/{key}"] = whole(item).clone() if is_tensor else item

    collect(state.tensors(), "")
    return found


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert any("exp_avg_sq" in name for name in left)
    for name, value in left.items():
        same = torch.equal(value, right[name]) if torch.is_tensor(value) else value == right[name]
        assert same, name


def layouts(ranks):
    """Meshes for the weights, by name."""
    found = {"whole": None, "fsdp": ranks.mesh["shard"]}
    if ranks.world_size == 4:
        found["hsdp"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return found


def write_all(folder, ranks):
    """A checkpoint of every layout, written while training goes on, and what has to be in it."""
    for name, mesh in layouts(ranks).items():
        state = make_state(mesh)
        for step in range(STEPS):
            advance(state, step)
        expected = contents(state)
        target = folder / f"{ranks.world_size}-{name}"
        with Checkpointer(target, CONFIG, ranks) as checkpoints:
            checkpoints.save(STEPS, state, {"config": {}}, wait=False)
            advance(state, STEPS)
            checkpoints.finish()
        if ranks.is_main:
            torch.save(expected, folder / f"{target.name}.pt")
    ranks.barrier()


def read_all(folder, ranks):
    """Every checkpoint there is into every layout."""
    for expected in sorted(folder.glob("*.pt")):
        for name, mesh in layouts(ranks).items():
            state = make_state(mesh, seed=1)
            step, path, _ = find_newest(folder / expected.stem, ranks)
            load_checkpoint(path, state, ranks)
            assert step == STEPS
            assert_same(contents(state), torch.load(expected))
            if ranks.is_main:
                print(f"{expected.stem} read as {ranks.world_size}-{name}")


def raised(action, *arguments):
    """The text of the error that an action ends with."""
    try:
        action(*arguments)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def fail_together(folder, ranks):
    """A disk that is full for one rank, then shards that are lost: all ranks hear of it."""
    folder = folder / "failing"
    create_stream = Files.create_stream

    def full(self, path, mode):
        raise OSError(f"{path.name}: No space left on device")

    state = make_state(ranks.mesh["shard"])
    advance(state, 0)
    with Checkpointer(folder, CONFIG, ranks) as checkpoints:
        checkpoints.save(1, state, {"config": {}}, wait=False)
        checkpoints.finish()
        if ranks.rank == 2:
            Files.create_stream = full
        checkpoints.save(2, state, {"config": {}}, wait=False)
        errors = ranks.gather(raised(checkpoints.finish))
        Files.create_stream = create_stream
        assert len(set(errors)) == 1, errors
        assert (
            "step-00000002: the checkpoint cannot be written (__2_0.distcp: No space" in errors[0]
        )
        assert [path.name for path in folder.iterdir()] == ["step-00000001"]
        ranks.barrier()
        checkpoints.save(2, state, {"config": {}}, wait=True)
    assert [step for step, _ in list_checkpoints(folder)] == [1, 2]

    path = folder / "step-00000002"
    shard = path / "__2_0.distcp"
    size = shard.stat().st_size
    ranks.barrier()
    if ranks.is_main:
        shard.write_bytes(bytes(size))
    ranks.barrier()
    part = "step-00000002 is damaged: __2_0.distcp (the shard of rank 2)"
    errors = ranks.gather(raised(load_checkpoint, path, state, ranks))
    assert all(f"{part} cannot be read" in error for error in errors), errors
    if ranks.is_main:
        shard.write_bytes(bytes(size - 1))
    errors = ranks.gather(raised(find_newest, folder, ranks))
    assert f"{part} is cut short at {size - 1} of {size} bytes" in errors[0], errors
    assert all("another process" in error for error in errors[1:]), errors
    if ranks.is_main:
        shutil.rmtree(path)
    ranks.barrier()
    assert find_newest(folder, ranks)[0] == 1


def main(folder, *tasks):
    ranks = start("cpu", 1, shard="auto")
    for task in tasks:
        {"read": read_all, "write": write_all, "fail": fail_together}[task](folder, ranks)
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
