"""The losses of the VAE recipe. All are per sample, (b,): what a sample costs depends on nothing else
in its batch, so batches may be split among processes and micro-batches at will."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.discriminator import PatchDiscriminator
from train.config_recipes import AdversarialConfig

_MAX_ADAPTIVE = 1e4


def charbonnier(error: Tensor, epsilon: float) -> Tensor:
    """sqrt(error^2 + epsilon^2), mean over (c f h w) (Charbonnier et al. 1994); L1 with epsilon 0.

    Args:
        error: (b c f h w).
    """
    size = error.abs() if epsilon == 0 else (error.square() + epsilon**2).sqrt()
    return size.mean(dim=(1, 2, 3, 4))


def temporal_difference(error: Tensor) -> Tensor:
    """Mean size of the error of frame differences: of error (b c f h w) from one frame to the next. It
    punishes flicker and is 0 for an error that stays; 0 for images."""
    if error.shape[2] == 1:
        return error.new_zeros(len(error))
    return error.diff(dim=2).abs().mean(dim=(1, 2, 3, 4))


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(posterior || standard normal) in nats, summed over latents (b c f h w) (Kingma & Welling
    2014, appendix B)."""
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
    return kl.sum(dim=(1, 2, 3, 4))


def _watched(x: Tensor) -> Tensor:
    """x alone, for gradients with respect to it; no leaf, which torch's flop counter cannot take."""
    leaf = x.detach().requires_grad_(True)
    return leaf.view_as(leaf)


def r1_penalty(discriminator: Callable[[Tensor], Tensor], video: Tensor) -> Tensor:
    """Half the squared gradient of the mean logit with respect to real video, in float32 and with a
    graph of its own (Mescheder et al. 2018, eq. 9).

    Args:
        video: (b 3 f h w).
    """
    device = video.device.type  # meta, where runs are counted, has no autocast to be disabled
    with torch.autocast("cpu" if device == "meta" else device, enabled=False):
        video = _watched(video.float())
        logits = discriminator(video).flatten(1).mean(1)
        (gradient,) = torch.autograd.grad(logits.sum(), video, create_graph=True)
    return 0.5 * gradient.square().sum(dim=(1, 2, 3, 4))


def zero_gradients(module: nn.Module) -> Tensor:
    """Zero, with the gradient zero for every parameter: one that gets none keeps
    DistributedDataParallel waiting, and has no state to go on from in a checkpoint."""
    return torch.stack([p.sum() for p in module.parameters()]).sum() * 0.0


@dataclass(frozen=True)
class Verdict:
    """What the discriminator says of a batch: its own loss, and the generator's with its gradient
    with respect to the reconstruction; figures to log."""

    discriminator_loss: Tensor
    generator_loss: Tensor
    gradient: Tensor
    values: dict[str, Tensor]


class AdversarialLoss(nn.Module):
    """Non-saturating losses (Goodfellow et al. 2014) with an R1 penalty, from a step of the run on.

    The discriminator learns from the step where it starts, and the generator's share grows from
    nothing over `ramp_steps`, so that nothing is learned from an opponent who knows nothing yet. Both
    are updated together from one backward pass.
    """

    def __init__(self, config: AdversarialConfig) -> None:
        super().__init__()
        self.config = config
        self.discriminator = PatchDiscriminator(config.discriminator)

    def has_started(self, step: int) -> bool:
        return step >= self.config.start_step

    def forward(self, output: Tensor, video: Tensor, step: int) -> Verdict:
        """The losses of reconstructions against the originals, both (b 3 f h w)."""
        config = self.config
        seen = _watched(output)
        fake = self.discriminator(seen).float().flatten(1)
        generator = F.softplus(-fake).mean(1)
        # With respect to what is seen alone: the discriminator must not learn to be fooled.
        (gradient,) = torch.autograd.grad(generator.sum(), seen, retain_graph=True)
        real = self.discriminator(video).float().flatten(1)
        loss = (F.softplus(fake) + F.softplus(-real)).mean(1)
        values = {
            "adversarial": generator,
            "discriminator": loss,
            "logit_real": real.mean(1),
            "logit_fake": fake.mean(1),
        }
        if config.r1_weight and step % config.r1_interval == 0:
            # Taken less often, and weighted up for it (Karras et al. 2020, section 3.1).
            r1 = r1_penalty(self.discriminator, video)
            values["r1"] = r1
            loss = loss + config.r1_interval * config.r1_weight * r1
        return Verdict(loss, generator.detach(), gradient, values)

    def weights(self, step: int, reconstruction: Tensor, adversarial: Tensor) -> Tensor:
        """What the generator's gradient is multiplied with, (b,).

        Adaptive: so that it is as large as that of the reconstruction's losses, times the weight (Esser
        et al. 2021, eq. 7); taken at the output (Défossez et al. 2022, section 3.4) and per sample.

        Args:
            reconstruction, adversarial: gradients with respect to the output, (b 3 f h w).
        """
        config = self.config
        ramp = (step + 1 - config.start_step) / config.ramp_steps if config.ramp_steps else 1.0
        weight = config.weight * min(1.0, ramp)
        if not config.adaptive:
            return torch.full((len(reconstruction),), weight, device=reconstruction.device)
        ours, theirs = (x.flatten(1).norm(dim=1) for x in (reconstruction, adversarial))
        return weight * (ours / theirs.clamp(min=1e-12)).clamp(max=_MAX_ADAPTIVE)


def with_gradient(losses: Tensor, output: Tensor, gradient: Tensor) -> Tensor:
    """`losses` (b,) in value, with a given gradient with respect to `output` (b 3 f h w) in place of
    their own."""
    handle = (output * gradient.detach()).sum(dim=(1, 2, 3, 4))
    return losses.detach() + handle - handle.detach()
