"""What the adversarial loss asks: a discriminator of patches of video."""

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor, nn


class DiscriminatorConfig(BaseModel):
    """Layer i halves rows and columns, and from the second on frames; widths double up to 8 times."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: PositiveInt = 64  # channels of the first layer
    num_layers: PositiveInt = 3


class _Conv(nn.Conv3d):
    """A convolution over three frames, of which the outermost repeat at the ends: an image is the clip
    of one frame."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 0, 0, 0, 1, 1), mode="replicate"))


class PatchDiscriminator(nn.Module):
    """Video (b 3 f h w) to a logit for each patch (b f' h' w'): positive for real ones.

    PatchGAN (Isola et al. 2017, section 3.2.2) with convolutions over time, as MAGVIT and its
    successors have it. Normalisation is over groups of a sample's own channels: statistics over the
    batch would make a sample's loss depend on the others, and on the number of processes.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        channels = 3
        for index in range(config.num_layers):
            width = config.width * min(2**index, 8)
            stride = (2 if index else 1, 2, 2)
            layers.append(_Conv(channels, width, (3, 4, 4), stride, padding=(0, 1, 1)))
            if index:
                layers.append(nn.GroupNorm(_num_groups(width), width))
            layers.append(nn.LeakyReLU(0.2))
            channels = width
        layers.append(_Conv(channels, 1, (3, 3, 3), padding=(0, 1, 1)))
        self.layers = nn.Sequential(*layers)

    @property
    def smallest(self) -> int:
        """Rows and columns that a video needs."""
        return 2**self.config.num_layers

    def forward(self, video: Tensor) -> Tensor:
        return self.layers(video).squeeze(1)


def _num_groups(width: int) -> int:
    """As many as divide the width, up to 8, and of two channels at least: a single value, which is all
    that the smallest clips have in a channel, is its own mean."""
    return next(n for n in range(max(1, min(8, width // 2)), 0, -1) if width % n == 0)
