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
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from dit.vae_layers import (
    Blur,
    Pointwise,
    ResidualBlock,
    Stream,
    depth_to_space,
    haar_basis,
    space_to_depth,
)

Factor = tuple[PositiveInt, PositiveInt]  # time, space


class VAEConfig(BaseModel):
    """One stage per width: stage i first reduces by factors[i] = (time, space), then has its blocks."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    kind: Literal["causal"] = "causal"
    latent_channels: PositiveInt
    widths: tuple[PositiveInt, ...] = Field(min_length=1)
    factors: tuple[Factor, ...]
    # Residual blocks per stage, in the encoder and in the decoder: one number, or one for each stage.
    num_blocks: NonNegativeInt | tuple[NonNegativeInt, ...] = 1
    stem: Literal["space_to_depth", "haar"] = "space_to_depth"  # how the first stage sees pixels
    antialias: bool = False  # a low-pass at the resolution changes after the stem

    @model_validator(mode="after")
    def _stages_fit(self) -> "VAEConfig":
        if len(self.widths) != len(self.factors):
            raise ValueError(
                f"{len(self.widths)} widths but {len(self.factors)} factors; give one per stage"
            )
        if isinstance(self.num_blocks, tuple) and len(self.num_blocks) != len(self.widths):
            raise ValueError(
                f"{len(self.num_blocks)} num_blocks but {len(self.widths)} widths; give one number, or "
                "one per stage"
            )
        if self.stem == "haar" and any(n & (n - 1) for n in self.factors[0]):
            raise ValueError(
                f"stem=haar needs powers of 2 as factors of the first stage, got {self.factors[0]}"
            )
        return self

    @property
    def depths(self) -> tuple[int, ...]:
        """Residual blocks of each stage."""
        if isinstance(self.num_blocks, tuple):
            return self.num_blocks
        return (self.num_blocks,) * len(self.widths)

    def basis(self) -> Tensor | None:
        """What the stem expresses pixels in, if not themselves."""
        return haar_basis(3, *self.factors[0]) if self.stem == "haar" else None

    def blur(self, stage: int) -> Blur | None:
        """The low-pass before a stage's reduction; the decoder's, after its enlargement."""
        time, space = (factor > 1 for factor in self.factors[stage])
        if stage == 0 or not self.antialias or not (time or space):
            return None
        return Blur(time=time, space=space)


def _blocks(width: int, depth: int) -> nn.ModuleList:
    return nn.ModuleList(ResidualBlock(width) for _ in range(depth))


class Encoder(nn.Module):
    """Pixels (b 3 f h w) to the posterior's mean and log variance (b 2c f' h' w')."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.factors = config.factors
        channels, self.down, self.blocks = 3, nn.ModuleList(), nn.ModuleList()
        self.blurs = nn.ModuleList()
        for stage, ((ft, fs), width) in enumerate(zip(config.factors, config.widths)):
            self.blurs.append(config.blur(stage) or nn.Identity())
            basis = config.basis() if stage == 0 else None
            self.down.append(Pointwise(channels * ft * fs * fs, width, basis))
            self.blocks.append(_blocks(width, config.depths[stage]))
            channels = width
        self.head = Pointwise(channels, 2 * config.latent_channels)

    @property
    def halo(self) -> int:
        """Latent pixels around a tile that its latents depend on."""
        scale, reach = 1, 0  # in pixels
        for (_, fs), blur, blocks in zip(self.factors, self.blurs, self.blocks):
            reach += scale * getattr(blur, "reach", 0)
            scale *= fs
            reach += scale * ResidualBlock.reach * len(blocks)  # type: ignore[arg-type]
        return -(-reach // scale)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        first = stream is None or not stream.begun
        for (ft, fs), blur, down, blocks in zip(self.factors, self.blurs, self.down, self.blocks):
            if isinstance(blur, Blur):
                x = blur(x, stream)
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
        self.stem = Pointwise(config.latent_channels, config.widths[-1])
        self.up, self.blocks, self.blurs = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for stage in reversed(range(len(config.widths))):
            (ft, fs), width = config.factors[stage], config.widths[stage]
            after, basis = (config.widths[stage - 1], None) if stage else (3, config.basis())
            self.blocks.append(_blocks(width, config.depths[stage]))
            self.up.append(Pointwise(width, after * ft * fs * fs, basis, synthesis=True))
            self.blurs.append(config.blur(stage) or nn.Identity())

    @property
    def halo(self) -> int:
        """Latent pixels around a tile that its pixels depend on."""
        scale, reach = 1, Fraction(0)
        for (_, fs), blocks, blur in zip(self.factors, self.blocks, self.blurs):
            reach += Fraction(ResidualBlock.reach * len(blocks), scale)  # type: ignore[arg-type]
            scale *= fs
            reach += Fraction(getattr(blur, "reach", 0), scale)
        return math.ceil(reach)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        first, x = stream is None or not stream.begun, self.stem(x)
        for (ft, fs), blocks, up, blur in zip(self.factors, self.blocks, self.up, self.blurs):
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x, stream)
            x = depth_to_space(up(x), ft, fs, first=first)
            if isinstance(blur, Blur):
                x = blur(x, stream)
        if stream is not None:
            stream.begun = True
        return x


@dataclass(frozen=True)
class Posterior:
    """A diagonal normal over latents, normalised unless it says otherwise; mean and std are
    (b c f h w)."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """A draw, for standard normal noise like the mean."""
        return self.mean + self.std * noise


def check_pixels(video: Tensor) -> None:
    """Raises ValueError: not floating-point video (b 3 f h w) with finite values in [-1, 1]."""
    if video.ndim != 5 or video.shape[1] != 3 or not video.numel():
        raise ValueError(f"got video of shape {tuple(video.shape)}, expected (b 3 f h w)")
    if not video.is_floating_point():
        raise ValueError(
            f"got {str(video.dtype).removeprefix('torch.')} pixels, expected floats in [-1, 1]; "
            "data.video.to_float makes them of uint8"
        )
    if video.device.type == "meta" or torch.compiler.is_compiling():
        return
    low, high = torch.stack(torch.aminmax(video.detach())).tolist()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("the video has pixels that are NaN or infinite, expected [-1, 1]")
    if low < -1.001 or high > 1.001:  # a little for rounding in low precision
        raise ValueError(
            f"got pixels in [{low:.4g}, {high:.4g}], expected [-1, 1]; scale or clamp them"
        )


class VAE(nn.Module, ABC):
    """What every video VAE is: ours below, and published ones (dit/diffusers_vae.py).

    Video (b 3 f h w) in [-1, 1] to latents (b c f' h' w') of unit variance per channel, and back.
    `latent_mean` and `latent_std` (c,) are measured over training clips; everything outside sees
    normalised latents, and only training the VAE itself works with `moments` and `decode_raw`.
    """

    latent_mean: Tensor
    latent_std: Tensor
    # Of a trained posterior, before normalisation; the VAE's own training does not know it.
    max_log_variance: float = math.inf

    @property
    @abstractmethod
    def latent_channels(self) -> int: ...

    @property
    @abstractmethod
    def temporal_factor(self) -> int: ...

    @property
    @abstractmethod
    def spatial_factor(self) -> int: ...

    @property
    def frame_step(self) -> int:
        """Clips have 1 + k times as many frames."""
        return self.temporal_factor

    @property
    def halos(self) -> tuple[int, int] | None:
        """Latent pixels around a tile that encoder and decoder depend on; None: on all."""
        return None

    def new_stream(self) -> Stream:
        """A fresh stream for one clip in one direction.

        Raises:
            ValueError: this VAE cannot go on from an earlier chunk.
        """
        raise ValueError(
            f"{type(self).__name__} cannot work in chunks of frames with the result of the whole clip; "
            "leave the chunk out"
        )

    def encoding_state(self) -> dict[str, Tensor]:
        """Weights and buffers that latents depend on, or may depend on."""
        return self.state_dict()

    @abstractmethod
    def moments(self, video: Tensor, stream: Stream | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the posterior before normalisation, both (b c f' h' w').

        Raises:
            ValueError: the clip's size does not fit.
        """

    @abstractmethod
    def decode_raw(self, latents: Tensor, stream: Stream | None = None) -> Tensor:
        """`decode`, from latents before normalisation."""

    def encode(self, video: Tensor, stream: Stream | None = None) -> Posterior:
        """Posterior over normalised latents of video (b 3 f h w) in [-1, 1].

        Args:
            stream: from `new_stream`, for the chunks of a longer clip in turn: the first has
                1 + k * temporal_factor frames, the others k * temporal_factor.
        Raises:
            ValueError: the clip's size does not fit, or its pixels are no such numbers.
        """
        check_pixels(video)
        raw = self.raw_posterior(video, stream)
        center, scale = (s.view(-1, 1, 1, 1) for s in (self.latent_mean, self.latent_std))
        return Posterior((raw.mean - center) / scale, raw.std / scale)

    def raw_posterior(self, video: Tensor, stream: Stream | None = None) -> Posterior:
        """`encode`, before normalisation and without looking at the pixels."""
        mean, log_variance = (x.float() for x in self.moments(video, stream))
        return Posterior(mean, (0.5 * log_variance.clamp(max=self.max_log_variance)).exp())

    def decode(self, latents: Tensor, stream: Stream | None = None) -> Tensor:
        """Video (b 3 f h w), about [-1, 1] and not clamped, from normalised latents (b c f' h' w').

        Args:
            stream: as for `encode`; chunks are of any length.
        """
        center, scale = (s.view(-1, 1, 1, 1) for s in (self.latent_mean, self.latent_std))
        return self.decode_raw(latents * scale + center, stream)

    def latent_shape(self, f: int, h: int, w: int) -> tuple[int, int, int, int]:
        """Shape (c, f', h', w') of the latents of one clip.

        Raises:
            ValueError: the VAE cannot make such a clip; names the nearest sizes that fit.
        """
        step, fs = self.frame_step, self.spatial_factor
        if f < 1 or (f - 1) % step:
            below = max(1, (f - 1) // step * step + 1)
            fitting = f"use {below + step} or {below}" if f > 1 else "use 1"
            raise ValueError(f"frames={f} does not fit the VAE: it needs {step}*k+1; {fitting}")
        for name, size in (("height", h), ("width", w)):
            if size < fs or size % fs:
                below = size // fs * fs
                fitting = f"{below + fs} or {below}" if below > 0 else f"{fs}"
                raise ValueError(
                    f"{name}={size} does not fit the VAE: it needs a multiple of {fs}; use {fitting}"
                )
        return self.latent_channels, 1 + (f - 1) // self.temporal_factor, h // fs, w // fs

    def chunk_shape(
        self, f: int, h: int, w: int, stream: Stream | None
    ) -> tuple[int, int, int, int]:
        """`latent_shape` of what comes next in a stream.

        Raises:
            ValueError: as `latent_shape`, or it is no whole number of latent frames.
        """
        if stream is None or not stream.begun:
            return self.latent_shape(f, h, w)
        if f < 1 or f % self.temporal_factor:
            raise ValueError(
                f"a later chunk of {f} frames does not fit the VAE: it needs a multiple of "
                f"{self.temporal_factor}"
            )
        c, with_first, *size = self.latent_shape(f + 1, h, w)
        return c, with_first - 1, size[0], size[1]


class VideoVAE(VAE):
    """The causal VAE of this file. Its latent statistics are stored with the weights.

    Its posterior is never broader than the prior that the KL term compares it with. A small KL weight
    leaves the variance free wherever training clips did not go, and we have seen one of exp(17) in a
    corner of one clip in 16,000: one draw of that would be a step of training, or all statistics.
    """

    max_log_variance = 0.0

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

    @property
    def halos(self) -> tuple[int, int]:
        return self.encoder.halo, self.decoder.halo

    def new_stream(self) -> Stream:
        return Stream()

    def encoding_state(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.state_dict().items() if not k.startswith("decoder.")}

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Replaces `latent_mean` and `latent_std`, (c,)."""
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    def moments(self, video: Tensor, stream: Stream | None = None) -> tuple[Tensor, Tensor]:
        f, h, w = video.shape[2:]
        self.chunk_shape(f, h, w, stream)
        mean, log_variance = self.encoder(video, stream).chunk(2, dim=1)
        # Beyond these bounds exp() overflows bfloat16's useful range and the KL gradient with it.
        return mean, log_variance.clamp(-30, 20)

    def decode_raw(self, latents: Tensor, stream: Stream | None = None) -> Tensor:
        return self.decoder(latents, stream)
