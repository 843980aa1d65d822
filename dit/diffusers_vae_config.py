"""The settings of published video VAEs, under diffusers' names: Wan, HunyuanVideo, CogVideoX, LTX-Video
and Mochi. What a config.json leaves out has diffusers' default.

The networks are in dit/diffusers_vae.py. Settings that these classes of diffusers never had another
value for, or don't compute with, have that one value here.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from dit.sizes import Depth, Size

Activation = Literal["silu", "swish", "mish", "gelu", "relu"]
Layers = Annotated[int, Field(gt=0, le=32)]  # of a block; with more, building it takes long
# One value for each block.
Sizes = Annotated[tuple[Size, ...], Field(min_length=1, max_length=16)]
Depths = Annotated[tuple[Layers, ...], Field(min_length=1, max_length=16)]
Flags = Annotated[tuple[bool, ...], Field(max_length=16)]
Epsilon = Annotated[float, Field(gt=0, lt=1)]


class DiffusersVAEConfig(BaseModel, ABC):
    """The settings of one of diffusers' VAEs, and what follows from them."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    class_name: ClassVar[str]
    own: ClassVar[frozenset[str]] = frozenset({"kind"})  # fields that diffusers does not have

    @property
    @abstractmethod
    def channels(self) -> int:
        """Of the latents."""

    @property
    @abstractmethod
    def factors(self) -> tuple[int, int]:
        """Frames of a latent frame, rows and columns of a latent pixel."""

    @property
    def statistics(self) -> tuple[Sequence[float], Sequence[float]] | None:
        """Mean and standard deviation of the latents, per channel; None where the weights have them."""
        return None

    def settings(self) -> dict[str, Any]:
        """What diffusers' class is made with."""
        return self.model_dump(mode="json", exclude=set(self.own))


class WanVAEConfig(DiffusersVAEConfig):
    """The settings of an AutoencoderKLWan.

    Wan 2.1 has 16 channels of latents at 4 x 8 x 8; Wan 2.2 TI2V-5B has 48 at 4 x 16 x 16, of which the
    last factor of 2 in space is a rearrangement of pixels (`patch_size`).
    """

    class_name: ClassVar[str] = "AutoencoderKLWan"

    kind: Literal["wan"] = "wan"
    base_dim: Size = 96
    decoder_base_dim: Size | None = None
    z_dim: Size = 16
    dim_mult: tuple[Size, ...] = (1, 2, 4, 4)
    num_res_blocks: Depth = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    latents_mean: tuple[float, ...]
    latents_std: tuple[PositiveFloat, ...]
    is_residual: bool = False
    in_channels: PositiveInt = 3
    out_channels: PositiveInt = 3
    patch_size: PositiveInt | None = None
    scale_factor_temporal: PositiveInt = 4
    scale_factor_spatial: PositiveInt = 8

    @model_validator(mode="after")
    def _consistent(self) -> "WanVAEConfig":
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.z_dim:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} numbers, z_dim={self.z_dim}"
                )
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(
                f"{len(self.temperal_downsample)} temperal_downsample for {len(self.dim_mult)} "
                "dim_mult; expected one less"
            )
        time = 2 ** sum(self.temperal_downsample)
        if not time == self.scale_factor_temporal == 4:  # what AutoencoderKLWan works in
            raise ValueError(
                f"temperal_downsample gives 1/{time} of the frames and scale_factor_temporal is "
                f"{self.scale_factor_temporal}; Wan's VAE has 4"
            )
        values = 3 * (self.patch_size or 1) ** 2
        if not self.in_channels == self.out_channels == values:
            raise ValueError(
                f"in_channels={self.in_channels} and out_channels={self.out_channels}; RGB in patches "
                f"of {self.patch_size or 1} has {values}"
            )
        space = 2 ** len(self.temperal_downsample) * (self.patch_size or 1)
        if space != self.scale_factor_spatial:
            raise ValueError(
                f"scale_factor_spatial={self.scale_factor_spatial} but the layers reduce by {space}"
            )
        return self

    @property
    def channels(self) -> int:
        return self.z_dim

    @property
    def factors(self) -> tuple[int, int]:
        return self.scale_factor_temporal, self.scale_factor_spatial

    @property
    def statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        return self.latents_mean, self.latents_std


def _scaled(channels: int, scaling_factor: float) -> tuple[list[float], list[float]]:
    """Statistics where the pipeline multiplies by a number."""
    return [0.0] * channels, [1 / scaling_factor] * channels


class HunyuanVideoVAEConfig(DiffusersVAEConfig):
    """The settings of an AutoencoderKLHunyuanVideo."""

    class_name: ClassVar[str] = "AutoencoderKLHunyuanVideo"

    kind: Literal["hunyuan_video"] = "hunyuan_video"
    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    latent_channels: Size = 16
    down_block_types: tuple[Literal["HunyuanVideoDownBlock3D"], ...] = Field(
        ("HunyuanVideoDownBlock3D",) * 4, max_length=16
    )
    up_block_types: tuple[Literal["HunyuanVideoUpBlock3D"], ...] = Field(
        ("HunyuanVideoUpBlock3D",) * 4, max_length=16
    )
    block_out_channels: Sizes = (128, 256, 512, 512)
    layers_per_block: Layers = 2
    act_fn: Activation = "silu"
    norm_num_groups: Size = 32
    scaling_factor: PositiveFloat = 0.476986
    spatial_compression_ratio: Size = 8
    temporal_compression_ratio: Literal[4] = 4
    mid_block_add_attention: bool = True

    @property
    def channels(self) -> int:
        return self.latent_channels

    @property
    def factors(self) -> tuple[int, int]:
        return self.temporal_compression_ratio, self.spatial_compression_ratio

    @property
    def statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        return _scaled(self.latent_channels, self.scaling_factor)


class CogVideoXVAEConfig(DiffusersVAEConfig):
    """The settings of an AutoencoderKLCogVideoX.

    invert_scale_latents says how the image-to-video pipeline of CogVideoX 1.5 scales the latents of
    its picture. The latents of video are multiplied by scaling_factor by every pipeline.
    """

    class_name: ClassVar[str] = "AutoencoderKLCogVideoX"

    kind: Literal["cogvideox"] = "cogvideox"
    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    down_block_types: tuple[Literal["CogVideoXDownBlock3D"], ...] = Field(
        ("CogVideoXDownBlock3D",) * 4, max_length=16
    )
    up_block_types: tuple[Literal["CogVideoXUpBlock3D"], ...] = Field(
        ("CogVideoXUpBlock3D",) * 4, max_length=16
    )
    block_out_channels: Sizes = (128, 256, 256, 512)
    latent_channels: Size = 16
    layers_per_block: Layers = 3
    act_fn: Activation = "silu"
    norm_eps: Epsilon = 1e-6
    norm_num_groups: Size = 32
    temporal_compression_ratio: Literal[4] = 4  # the groups of frames below are of 2 latent frames
    sample_height: Size = 480
    sample_width: Size = 720
    scaling_factor: PositiveFloat = 1.15258426
    # No pipeline looks at these three.
    shift_factor: None = None
    latents_mean: None = None
    latents_std: None = None
    force_upcast: bool = True
    # diffusers makes these of the wrong size, so no VAE has them.
    use_quant_conv: Literal[False] = False
    use_post_quant_conv: Literal[False] = False
    invert_scale_latents: bool = False

    @property
    def channels(self) -> int:
        return self.latent_channels

    @property
    def factors(self) -> tuple[int, int]:
        return self.temporal_compression_ratio, 2 ** (len(self.block_out_channels) - 1)

    @property
    def statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        return _scaled(self.latent_channels, self.scaling_factor)


class LTXVideoVAEConfig(DiffusersVAEConfig):
    """The settings of an AutoencoderKLLTXVideo; the statistics of its latents are with its weights."""

    class_name: ClassVar[str] = "AutoencoderKLLTXVideo"
    own: ClassVar[frozenset[str]] = frozenset({"kind", "decode_timestep"})

    kind: Literal["ltx_video"] = "ltx_video"
    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    latent_channels: Size = 128
    block_out_channels: Sizes = (128, 256, 512, 512)
    down_block_types: tuple[Literal["LTXVideoDownBlock3D", "LTXVideo095DownBlock3D"], ...] = Field(
        ("LTXVideoDownBlock3D",) * 4, min_length=1, max_length=16
    )
    decoder_block_out_channels: Sizes = (128, 256, 512, 512)
    layers_per_block: Depths = (4, 3, 3, 3, 4)
    decoder_layers_per_block: Depths = (4, 3, 3, 3, 4)
    spatio_temporal_scaling: Flags = (True, True, True, False)
    decoder_spatio_temporal_scaling: Flags = (True, True, True, False)
    decoder_inject_noise: Flags = (False, False, False, False, False)
    downsample_type: tuple[Literal["conv", "spatial", "temporal", "spatiotemporal"], ...] = Field(
        ("conv",) * 4, max_length=16
    )
    upsample_residual: Flags = (False, False, False, False)
    upsample_factor: Sizes = (1, 1, 1, 1)
    timestep_conditioning: bool = False
    patch_size: Size = 4
    patch_size_t: Literal[1] = 1
    resnet_norm_eps: Epsilon = 1e-6
    scaling_factor: PositiveFloat = 1.0
    encoder_causal: bool = True
    decoder_causal: bool = False
    spatial_compression_ratio: Size | None = None
    temporal_compression_ratio: Size | None = None
    # LTXPipeline's argument of that name, and its default: what a decoder with timestep_conditioning
    # is told about the noise left in the latents. No noise is added to them.
    decode_timestep: Annotated[float, Field(ge=0, le=1)] = 0.0

    @property
    def channels(self) -> int:
        return self.latent_channels

    @property
    def factors(self) -> tuple[int, int]:
        scale = 2 ** sum(self.spatio_temporal_scaling)
        return (
            self.temporal_compression_ratio or self.patch_size_t * scale,
            self.spatial_compression_ratio or self.patch_size * scale,
        )


class MochiVAEConfig(DiffusersVAEConfig):
    """The settings of an AutoencoderKLMochi."""

    class_name: ClassVar[str] = "AutoencoderKLMochi"

    kind: Literal["mochi"] = "mochi"
    in_channels: Size = 15  # Fourier features of RGB
    out_channels: Literal[3] = 3
    encoder_block_out_channels: Sizes = (64, 128, 256, 384)
    decoder_block_out_channels: Sizes = (128, 256, 512, 768)
    latent_channels: Size = 12
    layers_per_block: Depths = (3, 3, 4, 6, 3)
    act_fn: Activation = "silu"
    temporal_expansions: Sizes = (1, 2, 3)
    spatial_expansions: Sizes = (2, 2, 2)
    add_attention_block: Flags = (False, True, True, True, True)
    latents_mean: tuple[float, ...]
    latents_std: tuple[PositiveFloat, ...]
    scaling_factor: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _per_channel(self) -> "MochiVAEConfig":
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.latent_channels:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} numbers, "
                    f"latent_channels={self.latent_channels}"
                )
        return self

    @property
    def channels(self) -> int:
        return self.latent_channels

    @property
    def factors(self) -> tuple[int, int]:
        return math.prod(self.temporal_expansions), math.prod(self.spatial_expansions)

    @property
    def statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        return self.latents_mean, [std / self.scaling_factor for std in self.latents_std]
