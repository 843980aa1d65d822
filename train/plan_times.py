"""What a layout exchanges in a step, and how long the step takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from train.plan_layouts import Layout, Machines, Model, gathered_bytes
from train.plan_work import total

HOP = 10e-6  # seconds that each hop of a ring takes, however little it carries
TF32 = 0.5  # of the bfloat16 rate: how fast GPUs compute float32 convolutions, in TF32
SELECTIVE = 0.1  # of a forward pass's time, to compute anew all but the products
PCI_RATE = 20e9  # bytes a second to the CPU's memory
DDP_BUCKET = 25e6  # bytes of gradients that DistributedDataParallel sends at once
CONTEXTS = "tokens of contexts"
# Shares of a GPU's rate at which products and convolutions run, from the least to the most expected.
EFFICIENCY = {
    "compiled DiT": (0.4, 0.6),
    "DiT": (0.25, 0.45),
    "VAE": (0.15, 0.35),
    "float32": (0.4, 0.7),
}


@dataclass(frozen=True)
class Exchange:
    """One kind of communication: what a rank receives in a step, and how long that takes."""

    kind: str
    purpose: str
    volume: float
    rate: float  # bytes a second
    seconds: float


@dataclass(frozen=True)
class Times:
    """Seconds of a step, the least and the most expected."""

    compute: tuple[float, float]  # products and convolutions
    exposed: tuple[float, float]  # waiting for exchanges that nothing hides
    update: float  # of weights and averages
    step: tuple[float, float]


def efficiency(model: Model) -> tuple[str, tuple[float, float]]:
    """What is assumed for the run's trained network, and for what kind of network that is."""
    train = model.config.train
    kind = "VAE" if model.dit is None else "compiled DiT" if train.compile else "DiT"
    kind = "float32" if train.dtype == "float32" else kind
    return kind, EFFICIENCY[kind]


def exchanges(model: Model, machines: Machines, layout: Layout) -> list[Exchange]:
    """Of one step, by kind."""
    found = []

    def add(kind: str, purpose: str, size: float, ranks: int, stride: int, calls: float) -> None:
        """size: bytes that a rank has in the end, its own part of which it has already; over rings in
        as many calls."""
        if ranks > 1 and size:
            rate, volume = machines.rate(ranks, stride), size * (ranks - 1) / ranks
            seconds = volume / rate + calls * HOP * (ranks - 1)
            found.append(Exchange(kind, purpose, volume, rate, seconds))

    ranks, accum = layout.weight_ranks, layout.grad_accum
    shared = [p for p in model.parameters if p.trained and p.unit in ("block", "rest")]
    beside = 4 * total(p.size for p in model.parameters if p.trained and p.unit == "beside")
    gradients, units = 4 * total(p.size for p in shared), model.num_units
    if ranks == 1:
        whole = 2 * (gradients + beside)  # an all-reduce scatters sums, and gathers them
        add("all-reduce", "gradients", whole, layout.gpus, 1, whole / DDP_BUCKET)
    else:
        blocks, rest = (gathered_bytes(model, unit) for unit in ("block", "rest"))
        weights = 2 * blocks + rest  # blocks once more for the backward pass
        add("all-gather", "weights", accum * weights, ranks, 1, accum * 2 * units)
        often = accum if layout.accumulate == "sharded" else 1
        add("reduce-scatter", "gradients", often * gradients, ranks, 1, often * units)
        of_one = 4 * total(p.held(ranks) for p in shared)
        add("all-reduce", "gradients of replicas", 2 * of_one, layout.replicas, ranks, 2 * units)
        add("all-reduce", "gradients, unsharded", 2 * beside, layout.gpus, 1, 2)
    if layout.context > 1:
        kind = "all-to-all" if uses_ulysses(model, layout) else "gather"
        size, calls = context_bytes(model, layout)
        add(kind, CONTEXTS, size, layout.context, 1, calls)
    return found


def uses_ulysses(model: Model, layout: Layout) -> bool:
    """Whether contexts exchange heads, and not keys and values."""
    divides = model.dit is not None and model.dit.num_heads % layout.context == 0
    return divides and model.config.train.parallel.context_method != "gather"


def context_bytes(model: Model, layout: Layout) -> tuple[float, float]:
    """What a rank has in the end of the exchanges of its context in a step, and how many there are."""
    assert model.dit is not None
    each = 2 if model.config.train.dtype == "bfloat16" else 4
    tokens = model.work.tokens * layout.micro_batch
    if uses_ulysses(model, layout):  # its share of q, k, v and what comes of them
        size, calls = 4 * tokens / layout.context * model.dit.dim, 2
    else:  # all of k and v
        size, calls = 2 * tokens * model.dit.dim, 1
    # Forward and backward; once more where the forward pass is computed anew.
    passes = 3 if layout.activation_checkpointing == "block" else 2
    patches = 2 * tokens * model.dit.in_channels * math.prod(model.dit.patch_size)
    values = passes * model.num_blocks * size + patches
    return layout.grad_accum * each * values, layout.grad_accum * passes * model.num_blocks * calls


def update_seconds(model: Model, machines: Machines, layout: Layout) -> float:
    """To read and write weights, gradients, the optimizer's states and averages."""
    rate, offload = machines.gpu.memory_rate, model.config.train.ema.offload
    seconds = 0.0
    for p in model.parameters:
        if p.trained:
            held = 4 * p.held(layout.weight_ranks)
            seconds += (3 + 2 * p.num_states) * held / rate
            if p.averaged:
                seconds += held / PCI_RATE if offload else 3 * held / rate
    return seconds


def times(model: Model, machines: Machines, layout: Layout) -> Times:
    """Of a step."""
    train, of_vae = efficiency(model)[1], EFFICIENCY["VAE"]
    update = update_seconds(model, machines, layout)
    most = [_passes(model, machines, layout, train[k], of_vae[k]) for k in (1, 0)]
    compute, exposed = ((most[0][k], most[1][k]) for k in (0, 1))
    low, high = (sum(pair) + update for pair in most)
    return Times(compute, exposed, update, (low, high))


def _passes(
    model: Model, machines: Machines, layout: Layout, share: float, vae_share: float
) -> tuple[float, float]:
    """Seconds of computing, and of waiting for exchanges beside it, at shares of the GPU's rates."""
    work, gpu, context = model.work, machines.gpu, layout.context
    mode, accum = layout.activation_checkpointing, layout.grad_accum
    peak = peak_rate(model, machines) * share * context
    forward = (work.forward - work.encoding) / peak
    backward = (work.backward + work.recomputed(mode)) / peak
    backward += SELECTIVE * forward if mode == "selective" else 0
    forward += work.encoding / (gpu.bfloat16 * TF32 * vae_share)  # each rank of a context does all
    forward, backward = forward * layout.micro_batch, backward * layout.micro_batch

    seconds = {"all-gather": 0.0, "reduce-scatter": 0.0, CONTEXTS: 0.0, "gradients": 0.0}
    for exchange in exchanges(model, machines, layout):
        kind = exchange.kind if exchange.kind in seconds else exchange.purpose
        seconds[kind if kind in seconds else "gradients"] += exchange.seconds
    # In each backward pass, and in the last one of a step.
    gathering = seconds["all-gather"] / accum / 2
    each, last = gathering, gathering + seconds["gradients"] + seconds["reduce-scatter"]
    if layout.accumulate == "sharded":
        scattering = seconds["reduce-scatter"] / accum
        each, last = gathering + scattering, gathering + seconds["gradients"] + scattering
    exposed = accum * max(0.0, gathering - forward) + seconds[CONTEXTS]
    exposed += (accum - 1) * max(0.0, each - backward) + max(0.0, last - backward)
    return accum * (forward + backward), exposed


def peak_rate(model: Model, machines: Machines) -> float:
    """FLOPs a second of one GPU, in the run's precision."""
    half = model.config.train.dtype == "bfloat16"
    return machines.gpu.bfloat16 if half else machines.gpu.float32


def mfu(model: Model, machines: Machines, layout: Layout, seconds: float) -> float:
    """Model FLOPs utilisation: of forward and backward passes alone, without what is computed anew
    (Chowdhery et al. 2022, appendix B)."""
    flops = model.config.train.batch_size * (model.work.forward + model.work.backward)
    return flops / (seconds * layout.gpus * peak_rate(model, machines))
