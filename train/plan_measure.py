"""Memory of a training step, measured without the memory: the real step on fake tensors.

Fake tensors (torch.export's and torch.compile's own) have shapes, dtypes and storages, and no data. The
recipe is parallelised among fake processes, goes forward and backward, clips, and updates weights and
averages, as in train/loop.py; a dispatch mode adds up the storages that are alive.

They stand on the CPU, where torch can do all of it without a GPU, made to do what a GPU would:
attention is fused, and autocast takes norms to float32, as CUDA's does and the CPU's does not.
"""

from __future__ import annotations

import copy
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.buckets import Size
from dit.transformer import DiT
from sample.processes import AXES, Ranks
from train.checkpoint import TrainState
from train.config import RunConfig, TrainConfig
from train.ema import local
from train.optim import clip_gradients, step_optimizer
from train.parallel import (
    average_copies,
    checkpoint_activations,
    keep_local,
    shard_weights,
    share_contexts,
    weights_mesh,
)
from train.plan_work import copy_of, example_of
from train.recipe import Batch, Recipe
from train.recipe_dit import DiTRecipe
from train.recipe_vae import VAERecipe
from train.setup import fresh_state

KINDS = ("parameters", "gradients", "optimizer", "ema", "other")


@dataclass(frozen=True)
class Case:
    """One way to run a step. `shard` of 1 without a context: weights are whole on each rank."""

    activation_checkpointing: str
    shard: int = 1
    context: int = 1
    micro_batch: int = 1
    grad_accum: int = 1
    accumulate: str = "whole"
    num_blocks: int | None = None  # of a DiT, the first so many; None: all
    num_steps: int = 1  # with 1 there is no update, and no optimizer state; with more, both


@dataclass(frozen=True)
class Measured:
    """Bytes of one rank: what is alive after the backward pass, by kind; and at most in each phase of
    a step, of `other` alone and together with the gradients there are."""

    state: dict[str, int]
    other: dict[str, int]  # by phase: forward, backward, update
    together: dict[str, int]


class Storages(TorchDispatchMode):
    """Adds up the bytes of storages that are alive, of those made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[int, str]] = {}  # by storage: bytes and kind
        self.now: Counter[str] = Counter()
        self.other: dict[str, int] = {}  # by phase, at most
        self.together: dict[str, int] = {}  # with gradients
        self._most = 0, 0

    def end_of(self, phase: str) -> None:
        """Takes note of the peaks since the last phase."""
        for known, most in zip((self.other, self.together), self._most):
            known[phase] = max(known.get(phase, 0), most)
        self._most = self.now["other"], self.now["other"] + self.now["gradients"]

    def mark(self, tensor: Tensor, kind: str) -> None:
        """Counts the tensor's storage as of a kind."""
        self._add(tensor)
        key = local(tensor).untyped_storage()._cdata
        self._resize(key, self.alive[key][0], kind)

    def _add(self, tensor: Tensor) -> None:
        storage = local(tensor).untyped_storage()
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = 0, "other"
            self._resize(key, storage.nbytes(), "other")
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        size, kind = self.alive.pop(key)
        self.now[kind] -= size

    def _resize(self, key: int, size: int, kind: str) -> None:
        before, old_kind = self.alive[key]
        self.now[old_kind] -= before
        self.now[kind] += size
        self.alive[key] = size, kind
        other = self.now["other"]
        self._most = max(self._most[0], other), max(self._most[1], other + self.now["gradients"])

    def __enter__(self) -> Storages:
        # FSDP frees gathered weights by resizing their storages, which no dispatch mode sees.
        self._original = original = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            if storage._cdata in self.alive:
                self._resize(storage._cdata, size, self.alive[storage._cdata][1])
            return result

        setattr(torch.UntypedStorage, "resize_", resize)  # noqa: B010 (its type says otherwise)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        torch.UntypedStorage.resize_ = self._original
        super().__exit__(*exception)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result


@contextmanager
def fake_ranks(shard: int, context: int, copies: int = 1, device: str = "cpu") -> Iterator[Ranks]:
    """Rank 0 of a group that exists in this process's imagination: collectives do nothing."""
    world_size = copies * shard * context
    if world_size == 1:
        yield Ranks(0, 1, torch.device(device), None)
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    complain = sys.excepthook  # which a process group wraps for good
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        mesh = init_device_mesh("cpu", (copies, shard, context), mesh_dim_names=AXES)
        yield Ranks(0, world_size, torch.device(device), mesh, context)
    finally:
        dist.destroy_process_group()
        sys.excepthook = complain


def with_train(config: RunConfig, **values: Any) -> RunConfig:
    """The config with other values in its train section, unchecked."""
    return config.model_copy(update={"train": config.train.model_copy(update=values)})


def measure(recipe: Recipe, case: Case, size: Size) -> Measured:
    """The memory of a rank's steps, but for the frozen networks'.

    Args:
        recipe: on the meta device; it is left as it is.
        size: of the clips.
    """
    batch = example_of(recipe, case.micro_batch, size)
    if isinstance(recipe, VAERecipe) and recipe.adversarial is not None:  # with its dearest term
        interval = recipe.adversarial.config.r1_interval
        batch["step"] = batch["step"] // interval * interval
    # Some are numbers that the recipe reads, which fake tensors made of others do not know.
    example = {name: x if x.is_meta else x.item() for name, x in batch.items()}
    with fake_ranks(case.shard, case.context) as ranks, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FSDP's, of views and of accumulated gradients
        recipe, mesh = _prepared(recipe, case, ranks), weights_mesh(ranks)
        with FakeTensorMode(), Storages() as storages:
            recipe._apply(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype))
            _parallelize(recipe, ranks, mesh)
            return _steps(recipe, case, example, ranks, storages)


def _parallelize(recipe: Recipe, ranks: Ranks, mesh: DeviceMesh | None) -> None:
    """As `train.parallel.parallelize`, but for torch.compile and DistributedDataParallel, which fake
    tensors do not go through, and for a mesh that is there: making one takes real numbers."""
    config = recipe.config.train
    if ranks.context > 1:
        share_contexts(recipe, ranks)
    if config.activation_checkpointing != "none":
        checkpoint_activations(recipe, selective=config.activation_checkpointing == "selective")
    if mesh is not None:
        shard_weights(recipe, mesh, config)


def _prepared(recipe: Recipe, case: Case, ranks: Ranks) -> Recipe:
    """A copy with the case's settings, with a GPU's ways, and without what is frozen beside it."""
    recipe = copy_of(recipe, case.num_blocks)
    parallel = recipe.config.train.parallel.model_copy(
        update={"shard": case.shard, "context": case.context, "accumulate": case.accumulate}
    )
    recipe.config = with_train(
        recipe.config,
        activation_checkpointing=case.activation_checkpointing,
        parallel=parallel,
    )
    recipe.ranks = ranks
    if isinstance(recipe, DiTRecipe):
        del recipe.vae
        if any(p.requires_grad for p in recipe.text.parameters()):
            recipe.text = copy.deepcopy(recipe.text)
        else:
            recipe.text = _States(recipe.text.width)  # type: ignore[assignment]
    for module in recipe.modules():
        if isinstance(module, DiT):
            module.use_attention("sdpa")
        if isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm):
            module.register_forward_pre_hook(_in_float32)
    return recipe


class _States(nn.Module):
    """In a frozen text encoder's place: states (b m width) and their mask."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(*ids.shape, self.width), torch.ones_like(ids, dtype=torch.bool)


def _in_float32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    if not torch.is_autocast_enabled("cpu"):
        return inputs
    return (inputs[0].float(), *inputs[1:])


def _fake(example: dict[str, Tensor | float]) -> Batch:
    """Tensors of their own, where one of an example may stand for several."""
    return {
        name: torch.zeros(value.shape, dtype=value.dtype)
        if isinstance(value, Tensor)
        else torch.tensor(value)
        for name, value in example.items()
    }


def _steps(
    recipe: Recipe, case: Case, example: dict[str, Tensor | float], ranks: Ranks, storages: Storages
) -> Measured:
    """The last step counts."""
    config = recipe.config.train
    state = fresh_state(recipe, config)
    for parameter in recipe.parameters():
        storages.mark(parameter, "parameters")
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(partial(_mark_gradient, storages))
    for average in state.ema.weights.values():
        storages.mark(average, "ema")
    counts: dict[str, int] = {}
    for step in range(case.num_steps):
        storages.end_of("what was before")
        storages.other.clear()
        storages.together.clear()
        batches = [_fake(example) for _ in range(case.grad_accum)]
        for micro, fake in enumerate(batches):
            _forward_and_backward(recipe, fake, micro == case.grad_accum - 1, storages)
        average_copies(recipe, ranks)
        storages.end_of("backward")
        counts = {kind: size for kind, size in storages.now.items() if kind != "other"}
        if case.num_steps > 1:
            _update(state, step, config, storages)
        del batches, fake
    return Measured(counts, storages.other, storages.together)


def _forward_and_backward(recipe: Recipe, batch: Batch, last: bool, storages: Storages) -> None:
    train = recipe.config.train
    half = train.dtype == "bfloat16"
    with keep_local(recipe, not last, train.parallel.accumulate):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            losses, _ = recipe(batch)
        storages.end_of("forward")
        losses.sum().backward()
    storages.end_of("backward")


def _update(state: TrainState, step: int, config: TrainConfig, storages: Storages) -> None:
    for group in state.groups:
        clip_gradients(group.parameters.values(), config.grad_clip)
    step_optimizer(state.optimizer, config.optimizer.lr, config.steps)
    for values in state.optimizer.state.values():
        for value in values.values():
            storages.mark(value, "optimizer")
    state.optimizer.zero_grad()
    state.ema.update(step)
    storages.end_of("update")


def _mark_gradient(storages: Storages, parameter: Tensor) -> None:
    if parameter.grad is not None:  # FSDP calls it again, after taking the gradient away
        storages.mark(parameter.grad, "gradients")
