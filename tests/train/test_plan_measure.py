"""What a plan is made of, against what really happens: FLOPs, memory, exchanges, large layouts."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from data.manifest import Manifest, Rows
from dit.layers import Attention
from sample.processes import Ranks
from train.config_file import load_config
from train.parallel import average_copies, checkpoint_activations, keep_local, parallelize
from train.plan_layouts import Layout, memory, model_of, own_layout
from train.plan_measure import Case, fake_ranks, measure
from train.plan_recipe import recipe_on_meta
from train.plan_report import machines_of
from train.plan_times import CONTEXTS, exchanges
from train.plan_work import count_work, list_parameters
from train.recipe import TrainData
from train.setup import build_recipe

PRESETS = Path(__file__).parents[2] / "configs" / "presets"
# 6 x 8 x 8 latents, which are 96 tokens.
CLIP = {"num_frames": 21, "height": 32, "width": 32}
BLOCKS = {"dim": 96, "num_blocks": 4, "num_heads": 4, "mlp_dim": 256}
HALF = {"dtype": "bfloat16"}


def config_of(room, folder, kind, **changes):
    changes = {"data": CLIP, **changes}
    if kind == "dit":
        changes = {"recipe": {"dit": BLOCKS}, **changes}
    return load_config(room.write(folder / "run", kind, **changes))


def on_cpu(config):
    """The recipe with its weights."""
    clips = Manifest(config.data.manifest, Rows(), [])
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    return build_recipe(config, TrainData(clips, clips), ranks)


@pytest.mark.parametrize("mode", ["none", "block"])
@pytest.mark.parametrize("kind", ["dit", "gan"])
def test_flops_are_those_of_a_real_step(room, tmp_path, kind, mode):
    config = config_of(room, tmp_path, kind)
    work = count_work(recipe_on_meta(config)[0])
    recipe = on_cpu(config)
    if mode == "block":
        checkpoint_activations(recipe, selective=False)
    for module in recipe.modules():
        if isinstance(module, Attention):
            # A fused kernel's backward pass is counted with its own repeats.
            module.backend = "plain"
    with FlopCounterMode(display=False) as counter:
        losses, _ = recipe(recipe.example_batch(1, "cpu", config.data.sizes[0]))
        assert work.forward == pytest.approx(counter.get_total_flops(), rel=0.01)
        losses.sum().backward()
    expected = work.forward + work.backward + work.recomputed(mode)
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert (work.recomputed(mode) > 0.2 * work.forward) == (mode == "block")


def test_flops_are_the_closed_form(room, tmp_path):
    """Of the DiT; the rest of the forward pass is the VAE's and the text's."""
    config = config_of(
        room, tmp_path, "dit", recipe={"dit": {**BLOCKS, "num_blocks": 12, "dim": 384}}
    )
    recipe, _ = recipe_on_meta(config)
    work = count_work(recipe)
    with FlopCounterMode(display=False) as counter:
        recipe.text(torch.zeros(1, 24, dtype=torch.long, device="meta"))
    closed = recipe.dit.config.num_flops(96, 24)
    assert work.tokens == 96
    assert work.forward - work.encoding - counter.get_total_flops() == pytest.approx(
        closed, rel=0.01
    )
    assert work.backward == pytest.approx(2 * (closed + counter.get_total_flops()), rel=0.01)


# kind, activation checkpointing, shard, context, grad_accum, micro-batch, other settings
LAYOUTS = {
    "one GPU": ("dit", "none", 1, 1, 1, 3, {}),
    "one GPU in float32": ("dit", "none", 1, 1, 1, 2, {"dtype": "float32"}),
    "one GPU, blocks anew": ("dit", "block", 1, 1, 2, 4, HALF),
    "sharded": ("dit", "none", 8, 1, 1, 8, HALF),
    "sharded, blocks anew": ("dit", "block", 4, 1, 1, 8, HALF),
    "sharded, accumulated": ("dit", "selective", 8, 1, 2, 4, HALF),
    "sharded, accumulated so": (
        *("dit", "none", 8, 1, 3, 4),
        {**HALF, "parallel": {"accumulate": "sharded"}},
    ),
    "contexts": ("dit", "selective", 4, 2, 1, 8, HALF),
    "contexts of 3, which heads do not divide into": ("dit", "none", 2, 3, 1, 4, HALF),
    "muon": ("dit", "none", 1, 1, 1, 1, {"optimizer": {"kind": "muon", "lr": 1e-3}}),
    "VAE": ("gan", "none", 1, 1, 1, 3, HALF),
    "VAE, sharded, blocks anew": ("vae", "block", 8, 1, 1, 3, HALF),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_memory_is_that_of_the_real_step(room, tmp_path, name):
    kind, mode, shard, context, accum, micro, train = LAYOUTS[name]
    config = config_of(room, tmp_path, kind, train=train)
    recipe, _ = recipe_on_meta(config)
    model = model_of(recipe)
    accumulate = config.train.parallel.accumulate
    layout = Layout(shard * context, shard, context, mode, accum, micro, accumulate)
    planned = memory(model, layout)
    case = Case(mode, shard, context, micro, accum, accumulate, num_steps=2)
    real = measure(recipe, case, config.data.sizes[0])

    frozen = sum(p.numel() * 4 for p in recipe.vae.parameters()) if kind == "dit" else 0
    unmeasured = micro * accum * model.activations.batch_bytes()[1]
    buffers = sum(buffer.nbytes for buffer in recipe.buffers())
    kinds = real.state
    assert planned.parameters - frozen - buffers == pytest.approx(kinds["parameters"], rel=0.05)
    assert planned.optimizer == pytest.approx(kinds["optimizer"], rel=0.05)
    assert planned.ema == pytest.approx(kinds["ema"], rel=0.05)
    if accum == 1:
        assert planned.gradients == pytest.approx(kinds["gradients"], rel=0.05)
        activations = max(real.other["forward"], real.other["backward"]) + unmeasured
        assert planned.activations == pytest.approx(activations, rel=0.05)
    base = kinds["parameters"] + kinds["optimizer"] + kinds["ema"] + frozen + buffers
    peak = base + max(real.together.values()) + unmeasured
    assert planned.step == pytest.approx(peak, rel=0.05)


class Received(TorchDispatchMode):
    """Adds up the bytes that collectives leave with a rank, by kind."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.rpartition("::")[2].strip("_")
        whole = {  # of what a rank has in the end, or of what it gives away to be added up
            "allgather_base": lambda: args[0],
            "reduce_scatter_base": lambda: args[1],
            "allreduce": lambda: args[0][0],
            "all_to_all_single": lambda: args[0],
            "alltoall_base": lambda: args[0],
        }.get(name)
        if whole is not None:
            self.bytes[name.replace("_", "").removesuffix("base")] += whole().nbytes
        return func(*args, **(kwargs or {}))


# copies, shard, context, grad_accum, settings
EXCHANGES = {
    "shards": (1, 4, 1, 2, {}),
    "sharded gradients": (2, 4, 1, 3, {"parallel": {"accumulate": "sharded"}}),
    "copies of shards in bfloat16": (2, 4, 1, 1, HALF),
    "heads of contexts": (1, 2, 2, 1, {"activation_checkpointing": "block"}),
    "keys and values of contexts": (2, 1, 3, 1, HALF),
}


@pytest.mark.parametrize("name", EXCHANGES)
def test_exchanges_are_those_of_the_real_step(room, tmp_path, name):
    """Of tiny networks, among ranks that are not there; DistributedDataParallel takes none."""
    copies, shard, context, accum, train = EXCHANGES[name]
    parallel = {**train.get("parallel", {}), "shard": shard, "context": context}
    train = {**train, "grad_accum": accum, "batch_size": 24 * accum, "parallel": parallel}
    config = config_of(room, tmp_path, "dit", train=train)
    recipe, _ = recipe_on_meta(config)
    gpus = copies * shard * context
    layout = own_layout(config, gpus)
    planned = Counter()
    for exchange in exchanges(model_of(recipe), machines_of("h100", gpus), layout):
        size = {CONTEXTS: context, "gradients of replicas": copies}.get(
            exchange.purpose, gpus if exchange.kind == "all-reduce" else shard * context
        )
        whole = exchange.volume * size / (size - 1)
        # A ring adds up in one round and gives out in another.
        planned[exchange.kind] += whole / 2 if exchange.kind == "all-reduce" else whole

    recipe = on_cpu(config)
    example = recipe.example_batch(layout.micro_batch, "cpu", config.data.sizes[0])
    with fake_ranks(shard, context, copies) as ranks:
        recipe.ranks = ranks
        model = parallelize(recipe, ranks)
        with Received() as received:
            for micro in range(accum):
                half = torch.autocast("cpu", torch.bfloat16, enabled="dtype" in train)
                local = micro < accum - 1
                with keep_local(model, local, parallel.get("accumulate", "whole")), half:
                    losses, _ = model(example)
                losses.sum().backward()
            average_copies(model, ranks)
    names = {"all-to-all": "alltoallsingle", "gather": "alltoallsingle"}
    found = {kind: received.bytes[names.get(kind, kind.replace("-", ""))] for kind in planned}
    assert found == pytest.approx(planned, rel=0.01)  # padding of uneven shards is extra
    assert sum(received.bytes.values()) == sum(found.values())


def test_a_layout_of_1024_ranks_is_built():
    """Of the 14B preset on the meta device: 4 copies, spread over 128 ranks times contexts of 2."""
    changes = ["train.parallel.shard=128", "train.parallel.context=2", "train.compile=false"]
    config = load_config(PRESETS / "14b.yaml", [*changes, "train.batch_size=1024"])
    recipe, _ = recipe_on_meta(config)
    whole = {name: p.shape for name, p in recipe.named_parameters() if p.requires_grad}
    with fake_ranks(128, 2, 4, "meta") as ranks:
        recipe.ranks = ranks
        parallelize(recipe, ranks)
        parts = {name: p for name, p in recipe.named_parameters() if p.requires_grad}
        assert parts.keys() == whole.keys()
        sharded = {name: p for name, p in parts.items() if isinstance(p, DTensor)}
        assert {p.device_mesh.shape for p in sharded.values()} == {(4, 256)}
        assert all(p.shape == whole[name] for name, p in sharded.items())
        held = sum(p.to_local().numel() for p in sharded.values())
    planned = [p for p in list_parameters(recipe_on_meta(config)[0]) if p.unit in ("block", "rest")]
    assert held == sum(p.held(256) for p in planned)
    assert held == pytest.approx(sum(p.size for p in planned) / 256, rel=0.01)
