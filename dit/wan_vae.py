"""Wan's pretrained video VAE behind the interface of our own: diffusers' AutoencoderKLWan.

Wan 2.1 has 16 channels of latents at 4 x 8 x 8; Wan 2.2 TI2V-5B has 48 at 4 x 16 x 16, of which the
last factor of 2 in space is a rearrangement of pixels (`patch_size`). Needs the extra `wan`.
"""

from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from dit.sizes import Depth, Size
from dit.vae import VAE
from dit.vae_layers import Stream


class WanVAEConfig(BaseModel):
    """The settings of an AutoencoderKLWan, under diffusers' names."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

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


class WanVAE(VAE):
    """AutoencoderKLWan with normalised latents outside, as `dit.vae.VideoVAE` has them.

    Raises:
        ValueError: diffusers is not installed; names the extra.
    """

    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        try:
            from diffusers import AutoencoderKLWan  # pyright: ignore[reportPrivateImportUsage]
        except ImportError as error:
            raise ValueError(
                f"Wan's VAE needs diffusers: pip install 'zoetrope[wan]' ({error})"
            ) from error
        self.config = config
        self.model = AutoencoderKLWan(**config.model_dump(mode="json", exclude={"kind"}))

    @property
    def latent_channels(self) -> int:
        return self.config.z_dim

    @property
    def temporal_factor(self) -> int:
        return self.config.scale_factor_temporal

    @property
    def spatial_factor(self) -> int:
        return self.config.scale_factor_spatial

    @property
    def latent_mean(self) -> Tensor:
        """(c,), on the device of the weights."""
        return torch.tensor(self.config.latents_mean, device=self.model.device)

    @property
    def latent_std(self) -> Tensor:
        return torch.tensor(self.config.latents_std, device=self.model.device)

    def moments(self, video: Tensor, stream: Stream | None = None) -> tuple[Tensor, Tensor]:
        self.latent_shape(*video.shape[2:])
        posterior = self.model.encode(video).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
        return posterior.mean, posterior.logvar

    def decode_raw(self, latents: Tensor, stream: Stream | None = None) -> Tensor:
        """As `VAE.decode_raw`; clamped to [-1, 1], as diffusers does."""
        latents = latents.to(self.model.dtype)
        return self.model.decode(latents).sample  # pyright: ignore[reportAttributeAccessIssue]
