"""What a recipe is: the part of training that differs between the VAE and the DiT.

The loop (train/loop.py) knows losses, steps and ranks; a recipe knows networks and batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.buckets import Size
from data.loader import Source
from data.manifest import Manifest
from data.order import SampleOrder
from data.randomness import generator, stream_seed
from sample.context import ContextGroup
from sample.model import ModelInfo
from sample.processes import Ranks
from train.config import RunConfig
from train.sizes import sample_order

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class TrainedGroup:
    """Parameters in training whose gradients are clipped together, from a step of the run on; the
    optimizer's own learning rate and betas, but for what is given here."""

    name: str
    parameters: dict[str, nn.Parameter]
    start_step: int = 0
    lr_ratio: float = 1.0
    betas: tuple[float, float] | None = None

    @property
    def norm_name(self) -> str:
        """What the gradient norm is logged as."""
        return f"grad_norm_{self.name}" if self.name else "grad_norm"


@dataclass(frozen=True)
class TrainData:
    """The clips of a run; `validation` is the training manifest where a run has no other."""

    train: Manifest
    validation: Manifest


class Recipe(nn.Module, ABC):
    """Networks in training, frozen ones beside them, and everything the loop asks for.

    Parameters with requires_grad are trained; the rest is frozen. `forward` runs under autocast,
    and inside DistributedDataParallel; `validate`, `samples` and `histograms` with all weights on
    every rank (train/parallel.py).
    """

    def __init__(
        self, config: RunConfig, data: TrainData, ranks: Ranks, weights_device: torch.device
    ) -> None:
        """Weights are made or read on the CPU, where fresh ones depend on the seed alone, and moved
        afterwards; or on the meta device, by a recipe that is there to be counted."""
        super().__init__()
        self.config, self.data, self.ranks = config, data, ranks
        self.context: ContextGroup | None = None  # where several ranks share a sequence
        self.weights_device = weights_device
        self.quarantine: dict[str, str] = {}  # files that this run does not touch again, and why

    @property
    def shapes_per_size(self) -> int:
        """How many numbers of tokens the clips of one size come in."""
        return 1

    @cached_property
    def order(self) -> SampleOrder:
        """Which samples each step has.

        Raises:
            ValueError: see `sample_order`.
        """
        return sample_order(self.data.train, self.config, self.num_tokens)

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters in training, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def groups(self) -> list[TrainedGroup]:
        """The parameters in training; those of the first group are averaged (EMA) and exported."""
        return [TrainedGroup("", self.trained())]

    def model_info(self, provenance: dict[str, Any]) -> ModelInfo:
        """What an exported model says of itself: the clips that this run trains on."""
        clip = self.config.data
        return ModelInfo(
            fps=clip.fps,
            num_frames=clip.num_frames,
            height=clip.height,
            width=clip.width,
            provenance=provenance,
        )

    @abstractmethod
    def parts(self) -> dict[str, nn.Module]:
        """The networks by name, for counting parameters."""

    def frozen(self) -> dict[str, nn.Module]:
        """The networks that training reads and never changes, by name; they may hold adapters."""
        return {}

    def start_settings(self) -> str:
        """What the models that training starts from say of themselves, apart from weights; the run's
        config does not."""
        return ""

    @property
    def export_folder(self) -> Path:
        """Where `export` writes."""
        return self.config.out / "model"

    @abstractmethod
    def load_validation(self) -> int:
        """Reads this rank's share of the validation clips, and keeps them; how many there are."""

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The repeated modules, each of which is compiled, recomputed and sharded on its own."""

    @abstractmethod
    def networks(self) -> list[nn.Module]:
        """Those whose weights may be sharded: `forward` calls them, and nothing inside them from
        outside.

        Raises:
            ValueError: there are none.
        """

    @abstractmethod
    def dataset(self) -> Source:
        """Items by global sample counter g; built once, when training starts."""

    @abstractmethod
    def make_batch(self, items: dict[str, Any], step: int) -> Batch:
        """Tensors for `forward` on the device; a function of the items and counters alone."""

    @abstractmethod
    def example_batch(self, batch_size: int, device: str, size: Size) -> Batch:
        """A batch of the right shapes for clips of a size, with meaningless content."""

    @abstractmethod
    def num_tokens(self, size: Size) -> int:
        """Positions that the network works on, for a clip of a size."""

    @abstractmethod
    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss per sample (b,), and figures to log, each (b,) and detached."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Figures on the validation clips with the current weights; all ranks share the work."""

    @abstractmethod
    def samples(self, progress: Callable[..., None]) -> dict[str, Tensor]:
        """Videos to look at, uint8 (3 f h w) by name. Called on the main rank only.

        Args:
            progress: called often, with whatever.
        """

    def histograms(self) -> dict[str, Tensor]:
        """Values whose distribution is to be seen in wandb, by name. Called on the main rank only."""
        return {}

    def measure(self) -> None:
        """Whatever an export says of its weights; called with those, all of them on every rank."""

    @abstractmethod
    def export(self, folder: Path, provenance: dict[str, Any]) -> None:
        """Writes the model folder, or what else is kept. All ranks call it, with weights that may be
        sharded; the main one writes."""


def counted_noise(
    seed: int, purpose: str, g: Sequence[int], shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """Standard normal (len(g), *shape): row i is a function of (seed, purpose, g[i]) alone."""
    noise = torch.empty(len(g), *shape, device=device)
    for row, index in zip(noise, g):
        row.normal_(generator=generator(seed, purpose, index, device=device))
    return noise


def counted_uniform(seed: int, purpose: str, g: Sequence[int]) -> Tensor:
    """Uniform float64 draws in [0, 1), (len(g),): row i depends on (seed, purpose, g[i]) alone."""
    bits = torch.tensor([stream_seed(seed, purpose, i) >> 10 for i in g], dtype=torch.int64)
    return bits.double() / 2**53
