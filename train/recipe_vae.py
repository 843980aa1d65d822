"""The VAE recipe: reconstruct clips through a narrow posterior."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.buckets import Size, size_name
from data.randomness import permuted_index
from data.video import to_float, to_uint8
from dit.perceptual import PerceptualDistance
from dit.vae import VAE, VideoVAE
from dit.vae_layers import ResidualBlock
from sample.model import Model, load_model, save_model
from sample.processes import Ranks
from sample.weights import load_perceptual
from train.clips import TrainingClips, read_rows, rows_of_one_size
from train.config import RunConfig
from train.config_recipes import VAERecipeConfig
from train.recipe import Batch, Recipe, TrainData, TrainedGroup, counted_noise
from train.vae_losses import (
    AdversarialLoss,
    charbonnier,
    kl_divergence,
    temporal_difference,
    with_gradient,
    zero_gradients,
)
from train.watchdog import beat

_CHUNK = 16  # clips per forward pass when measuring


def spread(num_frames: int, wanted: int | None) -> list[int]:
    """`wanted` of the frames (None: all), evenly spaced, the first and the last among them."""
    if wanted is None or wanted >= num_frames:
        return list(range(num_frames))
    if wanted == 1:
        return [num_frames // 2]
    return [round(i * (num_frames - 1) / (wanted - 1)) for i in range(wanted)]


def psnr(video: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB per clip (b,), of videos (b c f h w) in [-1, 1]."""
    error = (video.float().clamp(-1, 1) - reference).square().mean(dim=(1, 2, 3, 4))
    return -10 * torch.log10(error.clamp(min=1e-10) / 4)


class VAERecipe(Recipe):
    """Losses of reconstruction and of the posterior, all per pixel value (Rombach et al. 2022, appendix
    G), and optionally of a discriminator.

    Latent mean and standard deviation per channel are measured on export, with the weights that are
    exported; training itself works on latents as the encoder gives them.
    """

    def __init__(
        self, config: RunConfig, data: TrainData, ranks: Ranks, weights_device: torch.device
    ) -> None:
        super().__init__(config, data, ranks, weights_device)
        assert isinstance(config.recipe, VAERecipeConfig)
        self.options = config.recipe
        self._settings = ""
        self._num_measured: int | None = None  # clips that latent statistics come from
        self.vae = self._build_vae()
        if self.options.channels_last:
            self.vae.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        clip = config.data
        self.latent_shape = self.vae.latent_shape(clip.num_frames, clip.height, clip.width)
        self.perceptual = self._build_perceptual()
        self.adversarial: AdversarialLoss | None = None
        if self.options.adversarial is not None:
            with self.weights_device:
                self.adversarial = AdversarialLoss(self.options.adversarial)
        for size in config.data.sizes:
            self._check_size(size)
        self._validation: Tensor | None = None

    def _check_size(self, size: Size) -> None:
        """Raises ValueError: some network cannot take clips of a size of the training batches."""
        where = f"bucket {size_name(size)}: " if size != self.config.data.base_size else ""
        try:
            self.vae.latent_shape(*size)
        except ValueError as error:
            raise ValueError(f"{where}{error}") from None
        needs = []
        if self.adversarial is not None:
            change = "use fewer layers, recipe.adversarial.discriminator.num_layers"
            needs.append(("discriminator", self.adversarial.discriminator.smallest, change))
        if self.perceptual is not None:
            change = "use another recipe.perceptual.backbone"
            needs.append(("perceptual network", self.perceptual.min_size, change))
        for name, smallest, change in needs:
            if min(size[1:]) < smallest:
                raise ValueError(
                    f"{where}clips of {size[1]}x{size[2]} are too small for the {name}, which needs "
                    f"{smallest}x{smallest}; {change}"
                )

    def _build_vae(self) -> VAE:
        if self.options.vae is not None:
            with self.weights_device:
                return VideoVAE(self.options.vae)
        assert self.options.init is not None
        model = load_model(self.options.init, self.weights_device, vae_only=True)
        self._settings, vae = model.file().model_dump_json(include={"vae"}), model.vae
        options = self.config.train
        anew = options.activation_checkpointing != "none"
        asked = options.compile, anew, self.options.channels_last
        if not isinstance(vae, VideoVAE) and any(asked):
            raise ValueError(
                f"recipe.init={self.options.init}: train.compile, train.activation_checkpointing and "
                "recipe.channels_last know our own VAE only; leave them out"
            )
        if not isinstance(vae, VideoVAE) and self.options.freeze_encoder:
            raise ValueError(
                f"recipe.init={self.options.init}: recipe.freeze_encoder knows our own VAE only; leave "
                "it out"
            )
        if not all(p.is_meta or p.isfinite().all() for p in vae.parameters()):
            raise ValueError(
                f"recipe.init={self.options.init}: has weights that are NaN or infinite"
            )
        vae.float().requires_grad_(True)
        if isinstance(vae, VideoVAE) and self.options.freeze_encoder:
            vae.encoder.requires_grad_(False)
        return vae

    def _build_perceptual(self) -> PerceptualDistance | None:
        """The frozen network, or None where there is none, or no weights for it."""
        options = self.options.perceptual
        if options is None:
            return None
        if options.weights is None:
            if self.ranks.is_main:
                print(
                    "training without the perceptual loss: recipe.perceptual.weights is not given"
                )
            return None
        return load_perceptual(options.backbone, options.weights, options.linear)

    def parts(self) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module] = {"vae": self.vae}
        if isinstance(self.vae, VideoVAE):
            parts = {"vae encoder": self.vae.encoder, "vae decoder": self.vae.decoder}
        if self.adversarial is not None:
            parts["discriminator"] = self.adversarial.discriminator
        return {**parts, **self.frozen()}

    def groups(self) -> list[TrainedGroup]:
        own = {f"vae.{k}": p for k, p in self.vae.named_parameters() if p.requires_grad}
        groups = [TrainedGroup("", own)]
        if self.adversarial is not None:
            its = {f"adversarial.{k}": p for k, p in self.adversarial.named_parameters()}
            options = self.adversarial.config
            rest = {"lr_ratio": options.lr_ratio, "betas": options.betas}
            groups.append(TrainedGroup("discriminator", its, start_step=options.start_step, **rest))
        return groups

    def frozen(self) -> dict[str, nn.Module]:
        frozen: dict[str, nn.Module] = {}
        if self.options.freeze_encoder:
            assert isinstance(self.vae, VideoVAE)
            frozen["vae encoder"] = self.vae.encoder
        if self.perceptual is not None:
            frozen["perceptual network"] = self.perceptual
        return frozen

    def start_settings(self) -> str:
        return self._settings

    def load_validation(self) -> int:
        return len(self._validation_clips())

    def networks(self) -> list[nn.Module]:
        """Not the discriminator: its gradients are taken twice in a step, and it is small."""
        if not isinstance(self.vae, VideoVAE):
            raise ValueError(
                f"train.parallel.shard={self.config.train.parallel.shard} knows our own VAE only, and "
                f"recipe.init={self.options.init} is another; use 1"
            )
        trained: list[nn.Module] = [self.vae.encoder, self.vae.decoder]
        return trained[1:] if self.options.freeze_encoder else trained

    def blocks(self) -> list[nn.Module]:
        every = [module for module in self.vae.modules() if isinstance(module, ResidualBlock)]
        return [block for block in every if any(p.requires_grad for p in block.parameters())]

    def dataset(self) -> TrainingClips:
        return TrainingClips(self.data.train, self.config, self.order)

    def make_batch(self, items: dict[str, Any], step: int) -> Batch:
        device = self.ranks.device
        video = items["video"].to(device, non_blocking=True)
        shape = self.vae.latent_shape(*video.shape[2:])
        noise = counted_noise(self.config.seed, "posterior", items["g"], shape, device)
        return {"video": video, "noise": noise, "step": torch.tensor(step)}

    def example_batch(self, batch_size: int, device: str, size: Size) -> Batch:
        latents = self.vae.latent_shape(*size)
        return {
            "video": torch.zeros(batch_size, 3, *size, dtype=torch.uint8, device=device),
            "noise": torch.zeros(batch_size, *latents, device=device),
            "step": torch.tensor(self.config.train.steps - 1),  # with everything that starts late
        }

    def num_tokens(self, size: Size) -> int:
        return math.prod(self.vae.latent_shape(*size)[1:])

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        video = to_float(batch["video"])
        if self.options.channels_last:
            video = video.contiguous(memory_format=torch.channels_last_3d)
        mean, log_variance = (x.float() for x in self.vae.moments(video))
        latents = mean + (0.5 * log_variance).exp() * batch["noise"]
        output = self.vae.decode_raw(latents).float()
        losses, values = self._reconstruction(output, video)
        if not isinstance(self.vae, VideoVAE):  # some have layers that a single frame passes by
            losses = losses + zero_gradients(self.vae)
        kl = kl_divergence(mean, log_variance) / video[0].numel()
        values["kl"] = kl
        if self.adversarial is None:
            losses = losses + self.options.kl_weight * kl
        else:
            step = int(batch["step"])
            losses, more = self._with_adversary(self.adversarial, losses, output, video, step)
            losses = losses + self.options.kl_weight * kl
            values.update(more)
        return losses, {name: value.detach() for name, value in values.items()}

    def _reconstruction(self, output: Tensor, video: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted loss of reconstructions (b,), and its terms."""
        options, error = self.options, output - video
        l1, l2 = charbonnier(error, options.charbonnier_epsilon), error.square().mean((1, 2, 3, 4))
        losses = options.l1_weight * l1 + options.l2_weight * l2
        values = {"l1": l1, "psnr": -10 * torch.log10(l2.clamp(min=1e-10) / 4)}
        if options.temporal_weight:
            values["temporal"] = temporal_difference(error)
            losses = losses + options.temporal_weight * values["temporal"]
        if self.perceptual is not None:
            assert options.perceptual is not None
            shown = spread(video.shape[2], options.perceptual.num_frames)
            values["perceptual"] = self.perceptual(output[:, :, shown], video[:, :, shown])
            losses = losses + options.perceptual.weight * values["perceptual"]
        return losses, values

    def _with_adversary(
        self, adversarial: AdversarialLoss, losses: Tensor, output: Tensor, video: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses with the discriminator's own, and with its part in the gradient of the output."""
        if not adversarial.has_started(step):
            return losses + zero_gradients(adversarial), {}
        verdict = adversarial(output, video, step)
        (gradient,) = torch.autograd.grad(losses.sum(), output)
        weight = adversarial.weights(step, gradient, verdict.gradient)
        gradient = gradient + weight.view(-1, 1, 1, 1, 1) * verdict.gradient
        losses = losses + weight * verdict.generator_loss
        values = {**verdict.values, "adversarial_weight": weight}
        return with_gradient(losses, output, gradient) + verdict.discriminator_loss, values

    @torch.no_grad()
    def reconstruct(self, video: Tensor) -> Tensor:
        """Video (b 3 f h w) in [-1, 1] through the posterior mean and back, unclamped; without the
        latent statistics, which export changes and a resumed run does not know."""
        return self.vae.decode_raw(self.vae.moments(video)[0])

    def _validation_clips(self) -> Tensor:
        """This rank's share of the validation clips, uint8 (n 3 f h w)."""
        if self._validation is None:
            usable = rows_of_one_size(self.data.validation, self.config.data)
            rows = usable[: self.config.logging.num_val_clips]
            rows = rows[self.ranks.rank :: self.ranks.world_size]
            _, self._validation, _ = read_rows(
                *(self.data.validation, rows, self.config.data, self.quarantine)
            )
        return self._validation

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        sums = torch.zeros(3, dtype=torch.float64)  # psnr, l1, number of clips
        clips = self._validation_clips()
        for first in range(0, len(clips), _CHUNK):
            beat()
            chunk = clips[first : first + _CHUNK]
            video = to_float(chunk.to(self.ranks.device))
            output = self.reconstruct(video)
            l1 = (output - video).abs().mean(dim=(1, 2, 3, 4))
            figures = [psnr(output, video).sum().item(), l1.sum().item(), float(len(chunk))]
            sums += torch.tensor(figures, dtype=torch.float64)
        total = self.ranks.sum(sums.to(self.ranks.device)).tolist()
        return {"val/psnr": total[0] / total[2], "val/l1": total[1] / total[2]}

    @torch.no_grad()
    def samples(self, progress: Callable[..., None]) -> dict[str, Tensor]:
        """Clips with their reconstructions to the right of them."""
        videos = self._validation_clips()[: self.config.logging.num_samples]
        sides = {}
        for number, clip in enumerate(videos):
            progress()
            output = self.reconstruct(to_float(clip[None].to(self.ranks.device)))
            pair = [clip, to_uint8(output[0]).cpu()]
            sides[f"reconstruction-{number}"] = torch.cat(pair, dim=-1)
        return sides

    @torch.no_grad()
    def measure_latents(self) -> tuple[Tensor, Tensor, int]:
        """Mean and standard deviation per channel (c,) of posterior draws for training clips, which
        the seed chooses, and how many clips that were.

        Raises:
            ValueError: none of them can be read.
        """
        seed, usable = self.config.seed, rows_of_one_size(self.data.train, self.config.data)
        count = min(self.options.num_statistics_clips, len(usable))
        share = range(self.ranks.rank, count, self.ranks.world_size)
        rows = [usable[permuted_index(seed, number, len(usable))] for number in share]
        device = self.ranks.device
        sums = torch.zeros(4, self.latent_shape[0], dtype=torch.float64, device=device)
        for first in range(0, len(rows), _CHUNK):
            part = rows[first : first + _CHUNK]
            kept, clips, _ = read_rows(self.data.train, part, self.config.data, self.quarantine)
            if not kept:
                continue
            posterior = self.vae.raw_posterior(to_float(clips.to(device)))
            noise = counted_noise(seed, "statistics", kept, self.latent_shape, device)
            latents = posterior.sample(noise).double()
            values = latents.transpose(0, 1).flatten(1)
            sums[0] += values.sum(1)
            sums[1] += values.square().sum(1)
            sums[2] += values.shape[1]
            sums[3] += len(kept)
        total, squares, number, clips = self.ranks.sum(sums)
        if not number.any():
            raise ValueError(
                f"none of the {count} clips of {self.data.train.path} that latent statistics come "
                f"from can be read; run `zoetrope data check {self.data.train.path}`"
            )
        mean = total / number
        std = (squares / number - mean.square()).clamp(min=1e-12).sqrt()
        return mean.float(), std.float(), int(clips[0])

    @torch.no_grad()
    def histograms(self) -> dict[str, Tensor]:
        """Latents of validation clips as the encoder gives them, and each channel's deviation."""
        video = to_float(self._validation_clips()[:_CHUNK].to(self.ranks.device))
        mean, log_variance = self.vae.moments(video)
        return {
            "latents/mean": mean.flatten(),
            "latents/log_variance": log_variance.flatten(),
            "latents/std_of_channels": mean.transpose(0, 1).flatten(1).std(1),
        }

    def measure(self) -> None:
        """A published VAE, and one whose encoder is frozen, keep their statistics: models of their
        latents rely on them."""
        if isinstance(self.vae, VideoVAE) and not self.options.freeze_encoder:
            mean, std, self._num_measured = self.measure_latents()
            self.vae.set_statistics(mean, std)

    def export(self, folder: Path, provenance: dict[str, Any]) -> None:
        if self._num_measured is not None:
            provenance = {**provenance, "statistics_clips": self._num_measured}
        model = Model(self.vae, self.model_info(provenance))
        save_model(folder, model, write=self.ranks.is_main)
