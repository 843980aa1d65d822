"""A causal video VAE: 1 + k * ft frames in, 1 + k latent frames out.

Everything is causal in time and local in space: a latent frame sees its own and earlier frames only,
so the first frame alone gives the first latent frame and an image is a clip of one frame.
Resolution changes are space-to-depth rearrangements followed by a linear map (as in DC-AE, Chen et
al. 2024); in time the first frame is repeated ft - 1 times in front, so that it fills a group of its
own, and the decoder drops those repeats again. Normalisation is over channels at each position,
never over space or time. Outside the residual blocks the whole path from pixels to latents and back
is linear, so training starts near a linear codec and adds what convolutions can.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

Factor = tuple[PositiveInt, PositiveInt]  # time, space


class VAEConfig(BaseModel):
    """One stage per width: stage i first reduces by factors[i] = (time, space), then has its blocks."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    kind: Literal["causal"] = "causal"
    latent_channels: PositiveInt
    widths: tuple[PositiveInt, ...] = Field(min_length=1)
    factors: tuple[Factor, ...]
    num_blocks: NonNegativeInt = 1  # residual blocks per stage, in the encoder and in the decoder

    @model_validator(mode="after")
    def _stages_fit(self) -> "VAEConfig":
        if len(self.widths) != len(self.factors):
            raise ValueError(
                f"{len(self.widths)} widths but {len(self.factors)} factors; give one per stage"
            )
        return self


class Stream:
    """What a network remembers of a clip between one chunk of frames and the next: for every causal
    convolution the last frames that it saw. With it, chunks give what the whole clip gives."""

    def __init__(self) -> None:
        self.begun = False  # whether the clip's first frame has been seen
        self._frames: dict[nn.Module, Tensor] = {}

    def extend(self, layer: nn.Module, x: Tensor, count: int) -> Tensor:
        """x (b c f h w) with the `count` frames before it, which at the clip's start repeat its first;
        remembers those before the next chunk."""
        before = self._frames[layer] if self.begun else _repeat_first(x, count)
        x = torch.cat([before, x], dim=2)
        self._frames[layer] = x[:, :, -count:].clone()  # a view would keep all of x
        return x


def _repeat_first(x: Tensor, count: int) -> Tensor:
    return x[:, :, :1].expand(-1, -1, count, -1, -1)


def space_to_depth(x: Tensor, ft: int, fs: int, *, first: bool = True) -> Tensor:
    """(b c f h w) -> (b c*ft*fs*fs f' h/fs w/fs), f' = 1 + (f - 1) / ft; frame 1 fills its group.

    A later chunk of a clip, `first` false, has f' = f / ft.
    """
    if ft > 1 and first:
        x = torch.cat([_repeat_first(x, ft - 1), x], dim=2)
    return rearrange(x, "b c (f i) (h j) (w k) -> b (c i j k) f h w", i=ft, j=fs, k=fs)


def depth_to_space(x: Tensor, ft: int, fs: int, *, first: bool = True) -> Tensor:
    """The inverse of `space_to_depth`, with the repeats of the first frame dropped."""
    x = rearrange(x, "b (c i j k) f h w -> b c (f i) (h j) (w k)", i=ft, j=fs, k=fs)
    return x[:, :, ft - 1 :] if first else x


class ChannelNorm(nn.Module):
    """Divides each position of (b c f h w) by the RMS of its channels."""

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
        return x * (x.shape[1] ** 0.5 / (norm + 1e-4)).to(x.dtype)


class CausalConv(nn.Conv3d):
    """3x3x3 convolution that sees two earlier frames; before the clip, its first frame repeats."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=(0, 1, 1))

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        if stream is None:
            return super().forward(torch.cat([_repeat_first(x, 2), x], dim=2))
        return super().forward(stream.extend(self, x, 2))


_CONVS = 2  # in a residual block, each of which sees a pixel further in every direction


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), the last convolution starting at zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm_1, self.conv_1 = ChannelNorm(), CausalConv(channels, channels)
        self.norm_2, self.conv_2 = ChannelNorm(), CausalConv(channels, channels)
        nn.init.zeros_(self.conv_2.weight)
        nn.init.zeros_(self.conv_2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        y = self.conv_1(F.silu(self.norm_1(x)), stream)
        return x + self.conv_2(F.silu(self.norm_2(y)), stream)


def _pointwise(in_channels: int, out_channels: int) -> nn.Conv3d:
    layer = nn.Conv3d(in_channels, out_channels, kernel_size=1)
    nn.init.orthogonal_(layer.weight)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


class Encoder(nn.Module):
    """Pixels (b 3 f h w) to the posterior's mean and log variance (b 2c f' h' w')."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.factors = config.factors
        channels, self.down, self.blocks = 3, nn.ModuleList(), nn.ModuleList()
        for width, (ft, fs) in zip(config.widths, config.factors):
            self.down.append(_pointwise(channels * ft * fs * fs, width))
            blocks = [ResidualBlock(width) for _ in range(config.num_blocks)]
            self.blocks.append(nn.ModuleList(blocks))
            channels = width
        self.head = _pointwise(channels, 2 * config.latent_channels)

    @property
    def halo(self) -> int:
        """Latent pixels around a tile that its latents depend on."""
        scale, reach = 1, 0  # in pixels
        for (_, fs), blocks in zip(self.factors, self.blocks):
            scale *= fs
            reach += scale * _CONVS * len(blocks)  # type: ignore[arg-type]
        return -(-reach // scale)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        first = stream is None or not stream.begun
        for (ft, fs), down, blocks in zip(self.factors, self.down, self.blocks):
            x = down(space_to_depth(x, ft, fs, first=first))
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x, stream)
        if stream is not None:
            stream.begun = True
        return self.head(x)


class Decoder(nn.Module):
    """Latents (b c f' h' w') to pixels (b 3 f h w); the encoder's stages in reverse."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.factors = config.factors[::-1]
        self.stem = _pointwise(config.latent_channels, config.widths[-1])
        self.up, self.blocks = nn.ModuleList(), nn.ModuleList()
        widths = config.widths[::-1]
        for width, after, (ft, fs) in zip(widths, (*widths[1:], 3), self.factors):
            blocks = [ResidualBlock(width) for _ in range(config.num_blocks)]
            self.blocks.append(nn.ModuleList(blocks))
            self.up.append(_pointwise(width, after * ft * fs * fs))

    @property
    def halo(self) -> int:
        """Latent pixels around a tile that its pixels depend on."""
        scale, reach = 1, Fraction(0)
        for (_, fs), blocks in zip(self.factors, self.blocks):
            reach += Fraction(_CONVS * len(blocks), scale)  # type: ignore[arg-type]
            scale *= fs
        return math.ceil(reach)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        first, x = stream is None or not stream.begun, self.stem(x)
        for (ft, fs), blocks, up in zip(self.factors, self.blocks, self.up):
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x, stream)
            x = depth_to_space(up(x), ft, fs, first=first)
        if stream is not None:
            stream.begun = True
        return x


@dataclass(frozen=True)
class Posterior:
    """A diagonal normal over normalised latents; mean and std are (b c f h w)."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """A draw, for standard normal noise like the mean."""
        return self.mean + self.std * noise


class VAE(nn.Module, ABC):
    """What every video VAE is: ours below, and Wan's (dit/wan_vae.py).

    Video (b 3 f h w) in [-1, 1] to latents (b c f' h' w') of unit variance per channel, and back.
    """

    @property
    @abstractmethod
    def latent_channels(self) -> int: ...

    @property
    @abstractmethod
    def temporal_factor(self) -> int: ...

    @property
    @abstractmethod
    def spatial_factor(self) -> int: ...

    @abstractmethod
    def encode(self, video: Tensor) -> Posterior:
        """Posterior over normalised latents of video (b 3 f h w) in [-1, 1]."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Video (b 3 f h w), about [-1, 1] and not clamped, from normalised latents (b c f' h' w')."""

    def latent_shape(self, f: int, h: int, w: int) -> tuple[int, int, int, int]:
        """Shape (c, f', h', w') of the latents of one clip.

        Raises:
            ValueError: the VAE cannot make such a clip; names the nearest sizes that fit.
        """
        ft, fs = self.temporal_factor, self.spatial_factor
        if f < 1 or (f - 1) % ft:
            below = max(1, (f - 1) // ft * ft + 1)
            fitting = f"use {below + ft} or {below}" if f > 1 else "use 1"
            raise ValueError(f"frames={f} does not fit the VAE: it needs {ft}*k+1; {fitting}")
        for name, size in (("height", h), ("width", w)):
            if size < fs or size % fs:
                below = size // fs * fs
                fitting = f"{below + fs} or {below}" if below > 0 else f"{fs}"
                raise ValueError(
                    f"{name}={size} does not fit the VAE: it needs a multiple of {fs}; use {fitting}"
                )
        return self.latent_channels, 1 + (f - 1) // ft, h // fs, w // fs


class VideoVAE(VAE):
    """Video in [-1, 1] to normalised latents and back.

    `latent_mean` and `latent_std` (c,) are measured over training clips and stored with the weights;
    everything outside this class sees latents of unit variance per channel.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    @property
    def temporal_factor(self) -> int:
        return math.prod(ft for ft, _ in self.config.factors)

    @property
    def spatial_factor(self) -> int:
        return math.prod(fs for _, fs in self.config.factors)

    def moments(self, video: Tensor, stream: Stream | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the posterior before normalisation, both (b c f' h' w').

        Raises:
            ValueError: the clip's size does not fit.
        """
        f, h, w = video.shape[2:]
        later = stream is not None and stream.begun
        if later and f % self.temporal_factor:
            raise ValueError(
                f"a later chunk of {f} frames does not fit the VAE: it needs a multiple of "
                f"{self.temporal_factor}"
            )
        self.latent_shape(f + 1 if later else f, h, w)
        mean, log_variance = self.encoder(video, stream).chunk(2, dim=1)
        # Beyond these bounds exp() overflows bfloat16's useful range and the KL gradient with it.
        return mean, log_variance.clamp(-30, 20)

    def encode(self, video: Tensor, stream: Stream | None = None) -> Posterior:
        mean, log_variance = self.moments(video, stream)
        center, scale = (s.view(-1, 1, 1, 1) for s in (self.latent_mean, self.latent_std))
        return Posterior(
            (mean.float() - center) / scale, (0.5 * log_variance.float()).exp() / scale
        )

    def decode(self, latents: Tensor, stream: Stream | None = None) -> Tensor:
        center, scale = (s.view(-1, 1, 1, 1) for s in (self.latent_mean, self.latent_std))
        return self.decoder(latents * scale + center, stream)
