"""Classifier-free guidance, outside the model (Ho & Salimans 2022)."""

import torch
from torch import Tensor

from dit.samplers import Denoiser
from dit.transformer import DiT

Text = tuple[Tensor, Tensor]  # context (b m d), context_mask (b m)


def guided_denoiser(model: DiT, text: Text, negative: Text, guidance_scale: float) -> Denoiser:
    """A denoiser that moves the prediction away from the negative text's.

    negative + guidance_scale * (positive - negative), both in one batch. At a scale of 1 that is the
    positive prediction, and then only that one is computed.
    """
    if guidance_scale == 1:
        return lambda x, t: model(x, t, *text)
    context, mask = (torch.cat(pair) for pair in zip(text, negative))

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        both = model(torch.cat([x, x]), torch.cat([t, t]), context, mask)
        positive, away = both.float().chunk(2)
        return away + guidance_scale * (positive - away)

    return denoise
