"""Ways to lay a run out over GPUs, and what each costs: memory, communication, time.

Closed forms over the figures that train/plan_work.py counts and train/plan_measure.py measures. The
assumptions are constants here, and the report states them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter

from dit.transformer import DiTConfig
from train.config import RunConfig
from train.gpus import GPU
from train.plan_activations import Activations
from train.plan_work import Parameter, Work, count_work, list_parameters, total
from train.recipe import Recipe
from train.recipe_dit import DiTRecipe

GIB = 2**30
SPARE = 2 * GIB, 0.05  # bytes, and share of a GPU, for CUDA, NCCL, workspaces and fragmentation
LINK_SHARE = 0.8  # of its rate that an exchange reaches


@dataclass(frozen=True)
class Machines:
    """The GPUs of a run, of one kind and evenly spread over nodes."""

    gpu: GPU
    name: str
    gpus: int
    nodes: int
    network: float  # bytes a second between nodes, of each GPU, in one direction

    @property
    def per_node(self) -> int:
        return self.gpus // self.nodes

    @property
    def usable(self) -> float:
        """Bytes of a GPU's memory that tensors may take."""
        return self.gpu.memory * (1 - SPARE[1]) - SPARE[0]

    def rate(self, size: int, stride: int) -> float:
        """Bytes a second that each rank of a ring receives, of `size` ranks, each `stride` ranks from
        the next. A ring passes each border between nodes once, for which all its ranks there lend it
        their networks."""
        span = size * stride
        if span <= self.per_node:
            return self.gpu.link * LINK_SHARE
        members = max(1, self.per_node // stride)
        return min(self.gpu.link, self.network * members) * LINK_SHARE


@dataclass(frozen=True)
class Layout:
    """How GPUs share a step."""

    gpus: int
    shard: int
    context: int
    activation_checkpointing: str
    grad_accum: int
    micro_batch: int
    accumulate: str = "whole"  # gradients, or "sharded" ones

    @property
    def weight_ranks(self) -> int:
        """Ranks among which a copy of the weights is spread."""
        return self.shard * self.context

    @property
    def replicas(self) -> int:
        return self.gpus // self.weight_ranks

    def settings(self) -> dict[str, str | int]:
        """The config's keys that make it this layout."""
        return {
            "train.parallel.shard": self.shard,
            "train.parallel.context": self.context,
            "train.activation_checkpointing": self.activation_checkpointing,
            "train.grad_accum": self.grad_accum,
            **({"train.parallel.accumulate": self.accumulate} if self.grad_accum > 1 else {}),
        }

    def overrides(self, config: RunConfig) -> str:
        """What to write behind a command that trains from the config, which may be nothing."""
        settings = self.settings().items()
        changes = ((key, value) for key, value in settings if value != attrgetter(key)(config))
        return " ".join(f"{key}={value}" for key, value in changes)


def own_layout(config: RunConfig, gpus: int) -> Layout:
    """The config's.

    Raises:
        ValueError: it does not divide so many GPUs, or the batch does not divide among them.
    """
    train, parallel = config.train, config.train.parallel
    shard = gpus // parallel.context if parallel.shard == "auto" else parallel.shard
    shard = max(1, shard)
    if gpus % (shard * parallel.context):
        raise ValueError(
            f"train.parallel.shard={parallel.shard} x context={parallel.context} does not divide "
            f"{gpus} GPUs"
        )
    parts = gpus // parallel.context * train.grad_accum
    if train.batch_size % parts:
        raise ValueError(
            f"train.batch_size={train.batch_size} does not divide into {gpus // parallel.context} "
            f"groups of GPUs x train.grad_accum={train.grad_accum}"
        )
    return Layout(
        *(gpus, shard, parallel.context, train.activation_checkpointing, train.grad_accum),
        micro_batch=train.batch_size // parts,
        accumulate=parallel.accumulate,
    )


@dataclass(frozen=True)
class Model:
    """What a run is, wherever it runs."""

    config: RunConfig
    work: Work
    parameters: list[Parameter]
    activations: Activations
    buffers: float  # bytes of the networks that are no parameters
    num_units: int  # that weights are gathered in
    dit: DiTConfig | None

    @property
    def num_blocks(self) -> int:
        """Of a DiT, else 0."""
        return self.activations.num_blocks


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank at most, by kind."""

    parameters: float  # with frozen networks
    gradients: float
    optimizer: float
    ema: float
    activations: float  # and whatever else lives for a part of a step, such as gathered weights
    step: float  # of all kinds together, which do not all have their most at one time
    validation: float  # weights, and what stays beside them, while all weights are gathered

    @property
    def peak(self) -> float:
        return max(self.step, self.validation)


def states(model: Model, layout: Layout) -> Memory:
    """The part that follows from the parameters; `step` is what is there between steps."""
    ranks = layout.weight_ranks
    trained = [p for p in model.parameters if p.trained]
    weights = total(p.bytes_each * p.held(ranks) for p in model.parameters) + model.buffers
    own = total(p.bytes_each * p.held(ranks) for p in trained)
    optimizer = total(4 * p.num_states * p.held(ranks) for p in trained)
    offload = model.config.train.ema.offload
    averages = 0.0 if offload else total(4 * p.held(ranks) for p in trained if p.averaged)
    base = weights + optimizer + averages
    # While validating, the weights make room for the averages.
    validation = base + own
    if ranks > 1:
        validation += gathered_bytes(model, "block") + gathered_bytes(model, "rest")
    elif layout.gpus > 1:  # the buckets of DistributedDataParallel stay
        validation += own
    # Of sharded weights they are whole until the last micro-batch, and sharded after it; or after each.
    whole = ranks > 1 and layout.grad_accum > 1 and layout.accumulate == "whole"
    gradients = total(4 * p.size for p in trained) if whole else own
    return Memory(weights, gradients, optimizer, averages, 0.0, base, validation)


def memory(model: Model, layout: Layout) -> Memory:
    """Of a layout's ranks."""
    known = states(model, layout)
    ranks, micro, accum = layout.weight_ranks, layout.micro_batch, layout.grad_accum
    mode, context = layout.activation_checkpointing, layout.context
    most = model.activations.most(mode, sharded=ranks > 1, context=context, micro_batch=micro)
    whole_batch, unmeasured = model.activations.batch_bytes()
    batches = micro * (unmeasured + (accum - 1) * whole_batch)
    activations = max(most.step, micro * model.activations.encoding()) + batches
    together = known.gradients + activations
    # Gradients that are not there from the start come block by block, as activations go.
    if accum == 1 and not (ranks == 1 and layout.gpus > 1):
        blocks = (p for p in model.parameters if p.trained and p.unit == "block")
        first = total(p.bytes_each * p.held(ranks) for p in blocks) / max(1, model.num_blocks)
        first *= model.num_blocks > 0
        together = max(activations, known.gradients - first + most.last + batches)
    together = max(together, known.gradients + most.update + batches)
    return replace(known, activations=activations, step=known.step + together)


def gathered_bytes(model: Model, unit: str) -> float:
    """Of all parameters of a unit as they are when sharded ones are gathered."""
    half = model.config.train.dtype == "bfloat16" and unit == "block"
    sizes = ((p.size, p.bytes_each) for p in model.parameters if p.unit == unit)
    return total(size * (min(2, each) if half else each) for size, each in sizes)


def model_of(recipe: Recipe, on_step: Callable[[], object] = lambda: None) -> Model:
    """Counts and, when asked, measures a recipe on the meta device; calls `on_step` before each step
    that it measures."""
    buffers = total(buffer.nbytes for buffer in recipe.buffers())
    dit = recipe.dit.config if isinstance(recipe, DiTRecipe) else None
    parameters, work = list_parameters(recipe), count_work(recipe)
    units = len(recipe.blocks()) + 1
    return Model(recipe.config, work, parameters, Activations(recipe, on_step), buffers, units, dit)
