"""The layouts that a run could have on some GPUs, and the best of those that fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from train.plan_layouts import Layout, Machines, Memory, Model, memory, states
from train.plan_times import Times, exchanges, times

MODES = "none", "selective", "block"
NEARLY = 0.01  # of a step's time, within which layouts are as good as each other
COMFORTABLE = 0.85  # of the memory there is


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


def _layouts(model: Model, machines: Machines, context: int, mode: str) -> Iterator[Layout]:
    """Those with contexts of a size and a mode of activation checkpointing, whatever their memory."""
    gpus, batch = machines.gpus, model.config.train.batch_size
    if gpus % context or batch % (gpus // context):
        return
    per_rank = batch // (gpus // context)
    may_shard = any(p.unit in ("block", "rest") for p in model.parameters)
    of_node = max(1, machines.per_node // context)
    for shard in divisors(gpus // context):
        usual = shard & (shard - 1) == 0 or shard in (of_node, gpus // context)
        if usual and (shard * context == 1 or may_shard):
            for accum in divisors(per_rank):
                layout = Layout(gpus, shard, context, mode, accum, per_rank // accum)
                yield layout
                if accum > 1 and layout.weight_ranks > 1:
                    yield replace(layout, accumulate="sharded")


def _modes(model: Model) -> tuple[str, ...]:
    """What the run may compute anew, the least first; published VAEs nothing."""
    return MODES if model.num_units > 1 else MODES[:1]


def search(model: Model, machines: Machines) -> list[Option]:
    """Layouts that fit, the best first: the quickest, and of nearly equal ones those that leave some
    memory free, exchange less, and have larger micro-batches and less sharding. GPUs cost by the hour,
    so the quickest is the cheapest.

    More is computed anew, and clips are cut into smaller parts, only as long as nothing fits without.

    Raises:
        ValueError: the batch does not divide among so many GPUs in any way.
    """
    found: list[Option] = []
    any_layout = False
    for context in _contexts(model, machines):
        for mode in _modes(model):
            fitting = []
            for layout in _layouts(model, machines, context, mode):
                any_layout = True
                if states(model, layout).peak <= machines.usable:
                    option = consider(model, machines, layout)
                    fitting += [option] if option.fits else []
            found += fitting
            if fitting:
                break
        if any(option.layout.activation_checkpointing == "none" for option in found):
            break
    if not any_layout:
        raise ValueError(_does_not_divide(model, machines))
    if not found:
        return []
    unit = NEARLY * min(option.seconds for option in found)

    def rank(option: Option) -> tuple[float, ...]:
        x = option.layout
        waiting = sum(e.seconds for e in exchanges(model, machines, x))
        tight = option.memory.peak > COMFORTABLE * machines.usable
        return (
            *(round(option.seconds / unit), tight, round(waiting / unit)),
            *(x.grad_accum, x.weight_ranks),
        )

    best: dict[tuple[int, int, str], Option] = {}
    for option in sorted(found, key=rank):
        x = option.layout
        best.setdefault((x.shard, x.context, x.activation_checkpointing), option)
    return list(best.values())


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


def leanest(model: Model, machines: Machines) -> Option | None:
    """Of all layouts the one that takes the least memory, or nearly so; None where there is none."""
    layouts = [
        layout
        for context in _contexts(model, machines)
        for layout in _layouts(model, machines, context, _modes(model)[-1])
    ]
    if not layouts:
        return None

    def between_passes(layout: Layout) -> tuple[float, float]:
        known = states(model, layout)
        return known.step + known.gradients, layout.micro_batch / layout.context

    # Of each way the smallest: whether whole gradients or larger micro-batches take more is measured.
    smallest_last = sorted(layouts, key=between_passes)[::-1]
    ways = {(x.grad_accum > 1, x.accumulate, x.context): x for x in smallest_last}
    return min((consider(model, machines, x) for x in ways.values()), key=lambda o: o.memory.peak)


def enough(model: Model, machines: Machines) -> Machines | None:
    """Twice as many GPUs, or four times, and so on, until a layout fits; None below 4,096."""
    gpus = machines.gpus
    while (gpus := 2 * gpus) <= 4096:
        per_node = machines.per_node if machines.nodes > 1 else 8
        more = replace(machines, gpus=gpus, nodes=max(1, gpus // per_node))
        try:
            if search(model, more):
                return more
        except ValueError:  # the batch does not divide
            continue
    return None
