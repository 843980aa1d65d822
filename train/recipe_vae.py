"""The VAE recipe: reconstruct clips through a narrow posterior."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.randomness import permuted_index
from data.video import to_float, to_uint8
from dit.vae import VideoVAE
from dit.vae_layers import ResidualBlock
from sample.model import Model, save_model
from train.clips import TrainingClips, read_rows
from train.config import RunConfig, VAERecipeConfig
from train.distributed import Ranks
from train.recipe import Batch, Recipe, TrainData, counted_noise

_CHUNK = 16  # clips per forward pass when measuring


def psnr(video: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB per clip (b,), of videos (b c f h w) in [-1, 1]."""
    error = (video.float().clamp(-1, 1) - reference).square().mean(dim=(1, 2, 3, 4))
    return -10 * torch.log10(error.clamp(min=1e-10) / 4)


class VAERecipe(Recipe):
    """L1, optional L2 and KL losses, all per pixel value (Rombach et al. 2022, appendix G).

    Latent mean and standard deviation per channel are measured on export, with the weights that are
    exported; training itself works on latents as the encoder gives them.
    """

    def __init__(
        self, config: RunConfig, data: TrainData, ranks: Ranks, weights_device: torch.device
    ) -> None:
        super().__init__(config, data, ranks, weights_device)
        assert isinstance(config.recipe, VAERecipeConfig)
        self.options = config.recipe
        with self.weights_device:
            self.vae = VideoVAE(config.recipe.vae)
        clip = config.data
        self.latent_shape = self.vae.latent_shape(clip.num_frames, clip.height, clip.width)
        self._validation: Tensor | None = None

    def parts(self) -> dict[str, nn.Module]:
        return {"vae encoder": self.vae.encoder, "vae decoder": self.vae.decoder}

    def load_validation(self) -> int:
        return len(self._validation_clips())

    def blocks(self) -> list[nn.Module]:
        return [module for module in self.vae.modules() if isinstance(module, ResidualBlock)]

    def dataset(self) -> TrainingClips:
        return TrainingClips(self.data.train, self.config)

    def make_batch(self, items: dict[str, Any], step: int) -> Batch:
        device = self.ranks.device
        noise = counted_noise(self.config.seed, "posterior", items["g"], self.latent_shape, device)
        return {"video": items["video"].to(device, non_blocking=True), "noise": noise}

    def example_batch(self, batch_size: int, device: str) -> Batch:
        clip = self.config.data
        video = (batch_size, 3, clip.num_frames, clip.height, clip.width)
        return {
            "video": torch.zeros(video, dtype=torch.uint8, device=device),
            "noise": torch.zeros(batch_size, *self.latent_shape, device=device),
        }

    def num_tokens(self) -> int:
        _, f, h, w = self.latent_shape
        return f * h * w

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        video = to_float(batch["video"])
        mean, log_variance = (x.float() for x in self.vae.moments(video))
        latents = mean + (0.5 * log_variance).exp() * batch["noise"]
        error = self.vae.decode_raw(latents).float() - video
        l1, l2 = (x.mean(dim=(1, 2, 3, 4)) for x in (error.abs(), error.square()))
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        kl = kl.sum(dim=(1, 2, 3, 4)) / video[0].numel()
        options = self.options
        losses = options.l1_weight * l1 + options.l2_weight * l2 + options.kl_weight * kl
        values = {"l1": l1, "kl": kl, "psnr": -10 * torch.log10(l2.clamp(min=1e-10) / 4)}
        return losses, {name: value.detach() for name, value in values.items()}

    @torch.no_grad()
    def reconstruct(self, video: Tensor) -> Tensor:
        """Video (b 3 f h w) in [-1, 1] through the posterior mean and back, unclamped."""
        return self.vae.decode(self.vae.encode(video).mean)

    def _validation_clips(self) -> Tensor:
        """This rank's share of the validation clips, uint8 (n 3 f h w)."""
        if self._validation is None:
            count = min(self.config.logging.num_val_clips, len(self.data.validation.rows))
            rows = range(self.ranks.rank, count, self.ranks.world_size)
            _, self._validation = read_rows(self.data.validation, rows, self.config.data)
        return self._validation

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        sums = torch.zeros(3, dtype=torch.float64)  # psnr, l1, number of clips
        clips = self._validation_clips()
        for first in range(0, len(clips), _CHUNK):
            chunk = clips[first : first + _CHUNK]
            video = to_float(chunk.to(self.ranks.device))
            output = self.reconstruct(video)
            l1 = (output - video).abs().mean(dim=(1, 2, 3, 4))
            figures = [psnr(output, video).sum().item(), l1.sum().item(), float(len(chunk))]
            sums += torch.tensor(figures, dtype=torch.float64)
        total = self.ranks.sum(sums.to(self.ranks.device)).tolist()
        return {"val/psnr": total[0] / total[2], "val/l1": total[1] / total[2]}

    @torch.no_grad()
    def samples(self) -> dict[str, Tensor]:
        """Clips with their reconstructions to the right of them."""
        videos = self._validation_clips()[: self.config.logging.num_samples]
        sides = {}
        for number, clip in enumerate(videos):
            output = self.reconstruct(to_float(clip[None].to(self.ranks.device)))
            pair = [clip, to_uint8(output[0]).cpu()]
            sides[f"reconstruction-{number}"] = torch.cat(pair, dim=-1)
        return sides

    @torch.no_grad()
    def measure_latents(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation per channel (c,) of posterior draws for training clips, which
        the seed chooses.

        Raises:
            ValueError: none of them can be read.
        """
        seed, num_rows = self.config.seed, len(self.data.train.rows)
        count = min(self.options.num_statistics_clips, num_rows)
        share = range(self.ranks.rank, count, self.ranks.world_size)
        rows = [permuted_index(seed, number, num_rows) for number in share]
        device = self.ranks.device
        sums = torch.zeros(3, self.latent_shape[0], dtype=torch.float64, device=device)
        for first in range(0, len(rows), _CHUNK):
            kept, clips = read_rows(self.data.train, rows[first : first + _CHUNK], self.config.data)
            if not kept:
                continue
            mean, log_variance = self.vae.moments(to_float(clips.to(device)))
            noise = counted_noise(seed, "statistics", kept, self.latent_shape, device)
            latents = (mean + (0.5 * log_variance).exp() * noise).double()
            values = latents.transpose(0, 1).flatten(1)
            sums[0] += values.sum(1)
            sums[1] += values.square().sum(1)
            sums[2] += values.shape[1]
        total, squares, number = self.ranks.sum(sums)
        if not number.any():
            raise ValueError(
                f"none of the {count} clips of {self.data.train.path} that latent statistics come "
                f"from can be read; run `zoetrope data check {self.data.train.path}`"
            )
        mean = total / number
        return mean.float(), (squares / number - mean.square()).clamp(min=1e-12).sqrt().float()

    def export(self, folder: Path, provenance: dict[str, Any]) -> None:
        mean, std = self.measure_latents()
        if not self.ranks.is_main:
            return
        self.vae.latent_mean.copy_(mean)
        self.vae.latent_std.copy_(std)
        try:
            save_model(folder, Model(self.vae, self.model_info(provenance)))
        finally:  # training and validation go on in the encoder's own units
            self.vae.latent_mean.zero_()
            self.vae.latent_std.fill_(1)
