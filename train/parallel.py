"""How a recipe's networks are spread over processes; applied from outside, in this order:

    1. context parallelism: self-attention exchanges tokens (sample/context.py)
    2. activation checkpointing: of each block
    3. torch.compile: of each block's forward pass, with its exchanges and recomputation
    4. FSDP2 (Zhao et al. 2023, "PyTorch FSDP", and torch's fully_shard): weights are gathered around
       a compiled block, not inside it; or, without sharding, DistributedDataParallel

The optimizer and the averages (EMA) are made afterwards, and so of the shards.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    create_selective_checkpoint_contexts,
)
from torch.utils.checkpoint import checkpoint as recompute

from dit.transformer import DiT
from sample.context import share
from sample.pipeline import quiet_compiler
from sample.processes import Ranks
from train.config import TrainConfig
from train.recipe import Recipe


def parallelize(recipe: Recipe, ranks: Ranks) -> nn.Module:
    """The recipe as all ranks train it together, on their devices; gradients are means over ranks.

    Raises:
        ValueError: the config asks for what the recipe cannot do.
    """
    config = recipe.config.train
    if ranks.context > 1:
        share_contexts(recipe, ranks)
    if config.activation_checkpointing != "none":
        checkpoint_activations(recipe, selective=config.activation_checkpointing == "selective")
    if config.compile:
        compile_blocks(recipe, optional=config.compile == "auto")
    mesh = weights_mesh(ranks)
    if mesh is not None:
        shard_weights(recipe, mesh, config)
    recipe.to(ranks.device)  # what is not sharded; shards are there already
    if mesh is not None:
        return recipe
    if ranks.mesh is None or ranks.world_size == 1:
        return recipe
    model = DistributedDataParallel(recipe, gradient_as_bucket_view=True)
    model.broadcast_buffers = False  # they are the same on all ranks, and training changes none
    return model


def share_contexts(recipe: Recipe, ranks: Ranks) -> None:
    """Has neighbouring ranks work on one sequence of tokens."""
    networks = [module for module in recipe.modules() if isinstance(module, DiT)]
    recipe.context = share(networks, ranks, recipe.config.train.parallel.context_method)


def weights_mesh(ranks: Ranks) -> DeviceMesh | None:
    """The ranks that one copy of the weights is spread over, and copies where there are several;
    None where every rank has all of them."""
    if ranks.mesh is None:
        return None
    copies, shard, context = ranks.mesh.shape
    if shard * context == 1:
        return None
    if context == 1:
        return ranks.mesh["replicate", "shard"] if copies > 1 else ranks.mesh["shard"]
    # Ranks that share a context share weights as well: they are the nearest to each other.
    sizes, names = (copies, shard * context), ("replicate", "weights")
    mesh = init_device_mesh(ranks.mesh.device_type, sizes, mesh_dim_names=names)
    return mesh if copies > 1 else mesh["weights"]


def shard_weights(recipe: Recipe, mesh: DeviceMesh, config: TrainConfig) -> None:
    """Spreads the recipe's networks over the mesh, block by block; frozen networks and those that
    are not for sharding stay whole on each rank.

    In bfloat16 runs a DiT's blocks are gathered in bfloat16, as autocast would convert their matrices
    at once; gradients are added up in float32, which the weights keep.
    """
    policy = partial(MixedPrecisionPolicy, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # A block's output is a view; nothing here changes one in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    blocks = set(recipe.blocks())
    for network in recipe.networks():
        for parameter in network.parameters():  # shards know no channels last; activations do
            parameter.data = parameter.data.contiguous()
        half = isinstance(network, DiT) and config.dtype == "bfloat16"
        of_blocks = policy(param_dtype=torch.bfloat16 if half else None)
        for module in network.modules():
            if module in blocks:
                fully_shard(module, mesh=mesh, mp_policy=of_blocks)
        fully_shard(network, mesh=mesh, mp_policy=policy())
        if isinstance(network, DiT):  # whose weights are to be gathered for this as for `forward`
            register_fsdp_forward_method(network, "forward_packed")


def _shards(recipe: nn.Module) -> list[FSDPModule]:
    return [module for module in recipe.modules() if isinstance(module, FSDPModule)]


def keep_local(model: nn.Module, local: bool, accumulate: str) -> AbstractContextManager[None]:
    """Inside it, backward passes leave gradients unsynchronised if `local`; accumulated in shards, they
    are added up within each copy of the weights, but not among copies."""
    if isinstance(model, DistributedDataParallel):
        return model.no_sync() if local else nullcontext()
    for module in _shards(model):
        module.set_requires_gradient_sync(not local or accumulate == "sharded", recurse=False)
        module.set_requires_all_reduce(not local, recurse=False)
    return nullcontext()


def average_copies(model: nn.Module, ranks: Ranks) -> None:
    """Gradients of trained parameters beside the sharded ones as means over ranks; to be called
    after the last backward pass of a step."""
    if not _shards(model):
        return
    grads = [
        p.grad for p in model.parameters() if p.grad is not None and not isinstance(p, DTensor)
    ]
    if grads:
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat.div_(ranks.world_size))
        for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads])):
            grad.copy_(mean.view_as(grad))


@contextmanager
def gathered(recipe: Recipe) -> Iterator[None]:
    """Inside it every rank has all weights and works for itself: networks may be called anywhere and
    any number of times, with nothing to wait for. All ranks enter it, and leave it."""
    modules = _shards(recipe)
    with ExitStack() as stack:
        if recipe.context is not None:
            stack.enter_context(recipe.context.paused())
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            roots = recipe.networks() if modules else []
            for module in modules:
                module.set_reshard_after_forward(module not in roots, recurse=False)
                module.reshard()


def checkpoint_activations(recipe: Recipe, *, selective: bool) -> None:
    """Makes the repeated blocks keep their inputs alone, and compute the rest anew in the backward
    pass (Chen et al. 2016, "Training deep nets with sublinear memory cost").

    Args:
        selective: keep the results of products, fused attention and exchanges as well, which take
            most of the time and some of the memory (Korthikanti et al. 2022, section 5).
    """
    contexts = {"context_fn": _selective_contexts} if selective else {}
    for block in recipe.blocks():
        forward = block.forward

        def checkpointed(*args: Any, forward: Callable[..., Any] = forward, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            return recompute(forward, *args, use_reentrant=False, **contexts, **kwargs)

        block.forward = checkpointed


def _kept_operations() -> set[Any]:
    """Not bmm: attention by plain products has scores in it, whose number grows with the square of
    the number of tokens."""
    aten = torch.ops.aten
    kept = [aten.mm, aten.addmm, aten.convolution]
    names = (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_fused_attention_overrideable",
    )
    kept += [getattr(aten, name) for name in names if hasattr(aten, name)]
    return {op.default for op in (*kept, torch.ops._c10d_functional.all_to_all_single)}


def _selective_contexts() -> tuple[Any, Any]:
    kept = _kept_operations()

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = operation in kept
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def compile_blocks(recipe: Recipe, *, optional: bool) -> None:
    """Compiles the repeated blocks in place; where that cannot be and is optional, says so.

    Raises:
        ValueError: torch.compile does not work on this machine, and was asked for.
    """
    device = recipe.ranks.device
    quiet_compiler(device)
    probe = torch.ones(8, device=device)
    try:
        torch.compile(lambda x: x * 2 + 1)(probe)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        if optional:
            if recipe.ranks.is_main:
                print(f"training without torch.compile, which does not work here ({reason})")
            return
        raise ValueError(
            f"train.compile=true, but torch.compile does not work here ({reason}); it needs a "
            "C++ compiler (Triton on a GPU). Install one, or set train.compile=false"
        ) from None
    limit = torch._dynamo.config.recompile_limit  # one for each number of tokens, and its gradients
    shapes = len(recipe.config.data.sizes) * recipe.shapes_per_size
    torch._dynamo.config.recompile_limit = max(limit, 2 * shapes + 2)
    for block in recipe.blocks():
        block.forward = torch.compile(block.forward, dynamic=False)
