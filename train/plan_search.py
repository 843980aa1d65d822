"""The layouts that a run could have on some GPUs, and the best of those that fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from train.plan_layouts import Layout, Machines, Memory, Model, memory, states
from train.plan_times import Times, exchanges, times

MODES = "none", "selective", "block"
NEARLY = 0.01  # of a step's time, within which layouts are as good as each other


@dataclass(frozen=True)
class Option:
    """A layout, and what it costs on some machines."""

    layout: Layout
    memory: Memory
    times: Times
    fits: bool

    @property
    def seconds(self) -> float:
        """Of a step, between the least and the most expected."""
        return sum(self.times.step) / 2


def consider(model: Model, machines: Machines, layout: Layout) -> Option:
    """A layout's costs."""
    needed = memory(model, layout)
    fits = needed.peak <= machines.usable
    return Option(layout, needed, times(model, machines, layout), fits)


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _layouts(model: Model, machines: Machines, context: int) -> Iterator[Layout]:
    """Those with contexts of a size, whatever their memory."""
    gpus, batch = machines.gpus, model.config.train.batch_size
    if gpus % context or batch % (gpus // context):
        return
    per_rank = batch // (gpus // context)
    may_shard = any(p.unit in ("block", "rest") for p in model.parameters)
    of_node = max(1, machines.per_node // context)
    for shard in divisors(gpus // context):
        usual = shard & (shard - 1) == 0 or shard in (of_node, gpus // context)
        if not usual or (shard * context > 1 and not may_shard):
            continue
        for accum in divisors(per_rank):
            for mode in MODES if model.num_units > 1 else MODES[:1]:
                yield Layout(gpus, shard, context, mode, accum, per_rank // accum)


def search(model: Model, machines: Machines) -> list[Option]:
    """Layouts that fit, the best first: the quickest, and of nearly equal ones that which exchanges
    less and then takes less memory. GPUs cost by the hour, so the quickest is the cheapest.

    Raises:
        ValueError: the batch does not divide among so many GPUs in any way.
    """
    found: list[Option] = []
    any_layout = False
    for context in _contexts(model, machines):
        options = []
        for layout in _layouts(model, machines, context):
            any_layout = True
            if states(model, layout).peak <= machines.usable:
                options.append(consider(model, machines, layout))
        found += [option for option in options if option.fits]
        if any(o.fits and o.layout.activation_checkpointing == "none" for o in options):
            break  # smaller parts of a clip are for those that do not fit
    if not any_layout:
        raise ValueError(_does_not_divide(model, machines))
    if not found:
        return []
    unit = NEARLY * min(option.seconds for option in found)

    def rank(option: Option) -> tuple[float, float, float]:
        waiting = sum(e.seconds for e in exchanges(model, machines, option.layout))
        return round(option.seconds / unit), round(waiting / unit), option.memory.peak

    return sorted(found, key=rank)


def _contexts(model: Model, machines: Machines) -> list[int]:
    """Sizes of contexts to try: those that stay within a node, where exchanges are quick; any, where
    the batch has fewer samples than there are GPUs."""
    if model.dit is None:
        return [1]
    method = model.config.train.parallel.context_method
    fitting = [
        context
        for context in divisors(machines.gpus)
        if context <= model.work.tokens
        and (method != "ulysses" or model.dit.num_heads % context == 0)
    ]
    batch = model.config.train.batch_size
    near = [c for c in fitting if machines.per_node % c == 0]
    divides = [c for c in near if batch % (machines.gpus // c) == 0]
    return near if divides else fitting


def _does_not_divide(model: Model, machines: Machines) -> str:
    batch, gpus = model.config.train.batch_size, machines.gpus
    down, up = batch // gpus * gpus, (batch // gpus + 1) * gpus
    return (
        f"train.batch_size={batch} does not divide among {gpus} GPUs; use "
        f"{f'{up} or {down}' if down else up}"
    )


def least_memory(model: Model, machines: Machines) -> float:
    """Bytes of a rank in the layout that takes the least of them."""
    needs = []
    for context in _contexts(model, machines)[-1:]:
        layouts = list(_layouts(model, machines, context))
        if layouts:
            leanest = max(layouts, key=lambda x: (x.weight_ranks, MODES.index(x.activation_checkpointing), x.grad_accum==1))
            needs.append(memory(model, leanest).peak)
    return min(needs)
