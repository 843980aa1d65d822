"""`zoetrope plan`: what a run will cost on a cluster, in words and tables of 100 columns."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from data.buckets import size_name
from train.config import RunConfig
from train.gpus import PRICE_DATE, find_gpu
from train.plan import count_parameters
from train.plan_activations import COMPILED_SHARE
from train.plan_layouts import GIB, LINK_SHARE, SPARE, Layout, Machines, Model, model_of, own_layout
from train.plan_recipe import recipe_on_meta
from train.plan_search import Option, consider, enough, leanest, search
from train.plan_times import EFFICIENCY, HOP, TF32, efficiency, exchanges, mfu, peak_rate
from train.recipe import Recipe

_SHOWN = 5  # layouts
_PREFIXES = {1e18: "E", 1e15: "P", 1e12: "T", 1e9: "G", 1e6: "M"}


def machines_of(
    gpu: str, gpus: int, nodes: int | None = None, network_gbps: float | None = None
) -> Machines:
    """The machines of a plan.

    Args:
        gpu: a name in train/gpus.py.
        nodes: that the GPUs are spread over; None for nodes of eight, or one of fewer.
        network_gbps: of each GPU to other nodes, in 1e9 bits a second and one direction; None for
            what is usual.
    Raises:
        ValueError: the GPU is not known, or a number is not possible.
    """
    kind = find_gpu(gpu)
    for name, value in (("gpus", gpus), ("nodes", nodes), ("network-gbps", network_gbps)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name}={value} is not possible; give a number above 0")
    if nodes is None:
        if gpus > 8 and gpus % 8:
            raise ValueError(
                f"--gpus={gpus} does not fill nodes of 8 GPUs; say with --nodes how many there are"
            )
        nodes = max(1, gpus // 8)
    if gpus % nodes:
        raise ValueError(f"--gpus={gpus} does not divide into --nodes={nodes}")
    network = kind.network if network_gbps is None else network_gbps * 1e9 / 8
    return Machines(kind, gpu.lower(), gpus, nodes, network)


def plan_run(
    config: RunConfig,
    machines: Machines,
    *,
    name: str = "the run",
    samples: int | None = None,
    price: float | None = None,
    vae: str = "wan2.1",
) -> str:
    """The report.

    Args:
        name: of the config.
        samples: to train on; None for the config's steps x batch.
        price: of a GPU, in dollars an hour; None for what is usual.
        vae: assumed for a DiT where the config's is not there; see train/plan_recipe.py.
    Raises:
        ValueError: no layout fits, or what training itself would raise about the config.
        FileNotFoundError: recipe.init is not there.
    """
    for option, value in (("samples", samples), ("price", price)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{option}={value} is not possible; give a number above 0")
    recipe, notes = recipe_on_meta(config, vae)
    with tqdm(desc="measuring", unit=" steps", leave=False, disable=None) as bar:
        model = model_of(recipe, bar.update)
        found = search(model, machines)
        if not found:
            raise ValueError(_nothing_fits(model, machines))
        own, complaint = _own(model, machines)
    shown = own or found[0]
    samples = samples or config.train.steps * config.train.batch_size
    price = price or machines.gpu.price
    bill = Bill(model, machines, samples, price)
    where = f"{f'{machines.gpus:,} {machines.name}'} in {count(machines.nodes, 'node')}"
    lines = [
        f"{name} on {where}",
        *(
            line
            for note in notes
            for line in textwrap.wrap(note, 98, initial_indent="  ", subsequent_indent="  ")
        ),
        *_about_work(recipe, model, shown.layout),
        *_about_layout(model, machines, shown, complaint),
        *bill.describe(shown),
        *bill.table(found[:_SHOWN]),
        *_assumptions(model, machines, price),
    ]
    return "\n".join(lines)


def two(value: float) -> str:
    """Two digits, which is more than is known of most of this."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = 1 - math.floor(math.log10(abs(value)))
    rounded = round(value, digits)
    return f"{rounded:,.{max(0, digits)}f}"


def gib(size: float) -> str:
    """Bytes in GiB: with one decimal, or two digits where that says nothing."""
    value = size / GIB
    return f"{value:,.1f}" if value >= 1 or not value else two(value)


def money(value: float) -> str:
    """Two digits as well, and short."""
    return f"{two(value / 1e6)}M" if value >= 1e6 else two(value)


def between(values: Sequence[float], say: Callable[[float], str] = two) -> str:
    """A range, or one number where both ends say the same."""
    low, high = (say(value) for value in sorted(values))
    return low if low == high else f"{low} to {high}"


def count(number: int, noun: str) -> str:
    """Such as "1 node" and "2 nodes"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _words(layout: Layout) -> str:
    names = (f"{key.split('.')[-1]}={value}" for key, value in layout.settings().items())
    return " ".join(names)


def _spread(layout: Layout) -> str:
    """Where weights are."""
    if layout.weight_ranks == 1:
        return f"weights whole on {count(layout.gpus, 'GPU')}"
    copies = "one copy" if layout.replicas == 1 else f"{layout.replicas:,} copies"
    return f"{copies} of the weights, spread over {count(layout.weight_ranks, 'GPU')}"


def flops(value: float) -> str:
    """Such as 1.23 PFLOPs."""
    if not value:
        return "none"
    scale = next((scale for scale in _PREFIXES if value >= scale), 1e6)
    return f"{value / scale:#.3g}".rstrip(".") + f" {_PREFIXES[scale]}FLOPs"


def _own(model: Model, machines: Machines) -> tuple[Option | None, str]:
    """The config's own layout, or None and why it cannot be."""
    try:
        layout = own_layout(model.config, machines.gpus)
    except ValueError as error:
        return None, str(error)
    option = consider(model, machines, layout)
    if option.fits:
        return option, ""
    peak, usable = option.memory.peak, machines.usable
    return None, (
        f"it needs {gib(peak)} GiB of each GPU's {gib(usable)}, {gib(peak - usable)} too many"
    )


def _nothing_fits(model: Model, machines: Machines) -> str:
    lean = leanest(model, machines)
    assert lean is not None  # else the search had complained
    peak, usable = gib(lean.memory.peak), gib(max(0, machines.usable))
    more = enough(model, machines)
    advice = "train a smaller network, on smaller clips"
    if more is not None:
        advice = f"{f'{more.gpus:,} {more.name}'} in {count(more.nodes, 'node')} would do"
    return (
        f"no layout fits {f'{machines.gpus:,} {machines.name}'}: the leanest needs {peak} GiB of "
        f"each GPU's {usable} ({lean.layout.overrides(model.config)}); {advice}"
    )


def _about_work(recipe: Recipe, model: Model, layout: Layout) -> list[str]:
    """Parameters, FLOPs and tokens."""
    lines = ["", f"{'Model':24}{'parameters':>18}{'in training':>18}"]
    for name, part in recipe.parts().items():
        total, trained = count_parameters(part)
        lines.append(f"  {name:22}{total:18,}{trained:18,}")
    work, train, mode = model.work, model.config.train, layout.activation_checkpointing
    data = model.config.data
    clips = ", ".join(size_name(size) for size in data.sizes)
    if data.native is not None:
        clips = f"{len(data.sizes)} native sizes beside {size_name(data.base_size)}"
    mean = " in the mean" if len(data.sizes) > 1 else ""
    samples = "packed rows" if data.packing else "samples"
    vae = f", of which {flops(work.encoding)} in the frozen VAE" if work.encoding else ""
    both = work.forward + work.backward
    return [
        *lines,
        "",
        f"A sample: {clips}, {work.tokens:,.0f} tokens{mean}",
        f"  forward         {flops(work.forward):>12}{vae}",
        f"  backward        {flops(work.backward):>12}",
        f"  recomputation   {flops(work.recomputed(mode)):>12} with activation_checkpointing={mode}",
        f"A step: {train.batch_size:,} {samples}, {work.tokens * train.batch_size:,.0f} tokens, "
        f"{flops(both * train.batch_size)} forward and backward",
    ]


def _about_layout(model: Model, machines: Machines, option: Option, complaint: str) -> list[str]:
    """Which one it is, its memory and its exchanges."""
    layout, needed = option.layout, option.memory
    lines = [""]
    if complaint:
        lines += [f"The config's own layout cannot be: {complaint}", "The best one instead:"]
    else:
        lines += ["The config's own layout:"]
    lines += [
        f"  {_words(layout)}",
        f"  {_spread(layout)}; micro-batches of {count(layout.micro_batch, 'sample')}"
        + (f", each shared by {layout.context:,} GPUs" if layout.context > 1 else ""),
        "",
        "Memory of a GPU             GiB",
    ]
    kinds = {
        "parameters": needed.parameters,
        "gradients": needed.gradients,
        "optimizer": needed.optimizer,
        "EMA": needed.ema,
        "activations": needed.activations,
        "peak of a step": needed.step,
        "while validating": needed.validation,
    }
    lines += [f"  {kind:20}{gib(size):>9}" for kind, size in kinds.items()]
    lines[-2] += f"  of {gib(machines.usable)} that tensors may take"
    lines[-1] += "  before activations"
    lines += ["", "Exchanges of a GPU in a step       GB received    GB/s    seconds"]
    found = exchanges(model, machines, layout)
    for e in found:
        what = f"{e.kind} of {e.purpose}"
        lines.append(
            f"  {what:34}{two(e.volume / 1e9):>10}{two(e.rate / 1e9):>8}{two(e.seconds):>11}"
        )
    return lines if found else [*lines[:-1], "Exchanges: none"]


@dataclass(frozen=True)
class Bill:
    """Time and money for a number of samples."""

    model: Model
    machines: Machines
    samples: int
    price: float

    def days(self, option: Option) -> tuple[float, float]:
        steps = self.samples / self.model.config.train.batch_size
        low, high = option.times.step
        return low * steps / 86400, high * steps / 86400

    def dollars(self, option: Option) -> tuple[float, float]:
        low, high = self.days(option)
        a_day = 24 * self.machines.gpus * self.price
        return a_day * low, a_day * high

    def describe(self, option: Option) -> list[str]:
        """A step's time, and the run's."""
        spent, layout = option.times, option.layout
        shares = [100 * mfu(self.model, self.machines, layout, t) for t in spent.step[::-1]]
        steps = self.samples / self.model.config.train.batch_size
        lines = [
            "",
            f"A step: {between(spent.step)} s, MFU {between(shares)}%",
            f"  computing                    {between(spent.compute)} s",
            f"  waiting for exchanges        {between(spent.exposed)} s",
            f"  updating weights and EMA     {two(spent.update)} s",
            f"{self.samples:,} samples, {steps:,.0f} steps: {between(self.days(option))} days, "
            f"${between(self.dollars(option), money)}",
        ]
        share = self.model.work.encoding and _encoding_share(self.model, option)
        if share > 0.1:
            lines += [
                f"The frozen VAE takes about {share:.0%} of the computing, at every step anew;",
                "recipe.latent_cache, with data.random_start=false, does it once",
            ]
        return lines

    def table(self, options: Sequence[Option]) -> list[str]:
        """The best layouts."""
        lines = [
            "",
            "Layouts that fit, the best first: quick, then of few exchanges, then little sharded",
            f"  {'shard':>5} {'context':>7} {'checkpointing':>13} {'accum':>13} {'micro-batch':>11} "
            f"{'GiB':>6}   {'step, s':12} {'days':12} dollars",
        ]
        for option in options:
            x = option.layout
            accum = str(x.grad_accum) + (", sharded" if x.accumulate == "sharded" else "")
            lines.append(
                f"  {x.shard:5} {x.context:7} {x.activation_checkpointing:>13} {accum:>13} "
                f"{x.micro_batch:11} {gib(option.memory.peak):>6}   "
                f"{between(option.times.step):12} {between(self.days(option)):12} "
                f"{between(self.dollars(option), money)}"
            )
        changes = options[0].layout.overrides(self.model.config)
        return [*lines, f"To use the first one: {changes or 'it is the own one of the config'}"]


def _encoding_share(model: Model, option: Option) -> float:
    """Of the time of computing."""
    half = TF32 * sum(EFFICIENCY["VAE"]) / sum(efficiency(model)[1])
    encoding = model.work.encoding / half * option.layout.context
    mode = option.layout.activation_checkpointing
    rest = model.work.forward - model.work.encoding + model.work.backward
    return encoding / (encoding + rest + model.work.recomputed(mode))


def _assumptions(model: Model, machines: Machines, price: float) -> list[str]:
    """A line each."""
    gpu, (kind, (low, high)) = machines.gpu, efficiency(model)
    assumed = price == gpu.price
    vae_low, vae_high = EFFICIENCY["VAE"]
    lines = [
        "",
        "Assumed",
        f"  {machines.name}: {peak_rate(model, machines) / 1e12:,.0f} TFLOP/s in "
        f"{model.config.train.dtype}, {gpu.link / 1e9:,.0f} GB/s to GPUs of its node, "
        f"{machines.network / 1e9:,.3g} to others (--network-gbps)",
        f"  a {kind} computes at {low:.0%} to {high:.0%} of that rate",
        f"  exchanges reach {LINK_SHARE:.0%} of these rates, with {HOP * 1e6:.0f} us a hop; all but "
        "contexts' hide behind computing",
        f"  {SPARE[1]:.0%} and {SPARE[0] / GIB:.0f} GiB of the GPU's {gpu.memory / GIB:.1f} are for "
        "CUDA, NCCL and fragmentation",
        "  data are there in time; validation, samples, checkpoints and restarts take no time",
        f"  ${price:.2f} an hour and GPU"
        + (f", about the middle of clouds' lists in {PRICE_DATE} (--price)" if assumed else ""),
    ]
    if model.work.encoding:
        lines.insert(
            4,
            f"  the frozen VAE at {vae_low:.0%} to {vae_high:.0%} of half of it, in float32 (TF32)",
        )
    if model.config.train.compile and model.dit is not None:
        lines.append(
            f"  torch.compile works there, and its blocks keep {COMPILED_SHARE:.0%} of the activations"
        )
    return lines
