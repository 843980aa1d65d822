"""Prompts in, videos out."""

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from data.randomness import generator
from dit.guidance import guided_denoiser
from dit.samplers import SamplerName, run_sampler
from sample.model import Model, load_model

DEFAULT_STEPS = 20
DEFAULT_GUIDANCE = 2.0


def pick_device(name: str | torch.device | None = None) -> torch.device:
    """The named device, or a GPU where there is one.

    Raises:
        ValueError: torch knows no such device, or this machine has none.
    """
    try:
        if name is not None and torch.device(name).type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("not a device to compute on")
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"device={name} cannot be used ({reason}); use cpu or cuda") from None
    return device


class TextToVideo:
    """A text-to-video model ready to sample.

    videos = TextToVideo.from_folder("runs/demo/model")(["a red circle moving left"])
    """

    def __init__(self, model: Model, device: str | torch.device | None = None) -> None:
        if model.dit is None or model.text is None or model.objective is None:
            raise ValueError("this model folder holds a VAE alone; sampling needs a trained DiT")
        self.device = pick_device(device)
        self.info, self.objective = model.info, model.objective
        self.vae = model.vae.to(self.device)
        self.dit = model.dit.to(self.device)
        self.text = model.text.to(self.device)

    @classmethod
    def from_folder(
        cls, folder: str | os.PathLike[str], device: str | torch.device | None = None
    ) -> "TextToVideo":
        """Loads a model folder onto a device: a GPU where there is one, unless told otherwise.

        Raises:
            FileNotFoundError, ValueError: see `sample.model.load_model`.
        """
        return cls(load_model(folder), device)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Latents (c f h w) of one clip.

        Raises:
            ValueError: VAE or DiT cannot make this size; says what fits.
        """
        shape = self.vae.latent_shape(frames, height, width)
        pf, ph, pw = self.dit.config.patch_size
        for name, size, patch, factor in (
            ("height", shape[2], ph, self.vae.spatial_factor),
            ("width", shape[3], pw, self.vae.spatial_factor),
        ):
            if size % patch:
                step = patch * factor
                below = size * factor // step * step
                raise ValueError(
                    f"{name}={size * factor} does not fit the DiT: it needs a multiple of {step}; "
                    f"use {below + step}" + (f" or {below}" if below else "")
                )
        if shape[1] % pf:
            raise ValueError(
                f"frames={frames} gives {shape[1]} latent frames, not a multiple of {pf}"
            )
        return shape

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str],
        *,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int = DEFAULT_STEPS,
        guidance: float = DEFAULT_GUIDANCE,
        sampler: SamplerName | None = None,
        shift: float | None = None,
        seeds: Sequence[int] | None = None,
        negative: str = "",
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """One video per prompt; size and length default to what the model was trained on.

        Args:
            prompts: at least one.
            steps: sampler steps; guidance: classifier-free guidance scale, 1 for none.
            sampler: None for the objective's default (euler for flow, ddim for DDPM).
            shift: of the flow's grid of t; None for the one it was trained with.
            seeds: one per prompt (default 0, 1, ...); a sample depends on its own seed alone.
            negative: what guidance moves away from.
            progress: called with the number of the step just done.
        Returns:
            video (b 3 f h w) in [-1, 1], float32, on the CPU.
        Raises:
            ValueError: a size, length, sampler or count that does not fit, saying what does.
        """
        prompts, seeds = list(prompts), list(range(len(prompts)) if seeds is None else seeds)
        if not prompts:
            raise ValueError("no prompts given; give at least one")
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one per prompt")
        info = self.info
        wanted = (frames, height, width)
        trained = (info.num_frames, info.height, info.width)
        shape = self.latent_shape(*(b if a is None else a for a, b in zip(wanted, trained)))
        generators = [generator(seed, "sample", device=self.device) for seed in seeds]
        bfloat16 = torch.autocast(self.device.type, torch.bfloat16)
        with bfloat16:
            positive = self.text(self.text.tokenize(prompts).to(self.device))
            away = self.text(self.text.tokenize([negative] * len(prompts)).to(self.device))
            latents = run_sampler(
                sampler,
                guided_denoiser(self.dit, positive, away, guidance),
                generators,
                shape,
                steps,
                self.objective,
                shift=shift,
                progress=None if progress is None else lambda step, _: progress(step),
            )
            video = self.vae.decode(latents)
        video = video.float()
        if not torch.isfinite(video).all():
            raise ValueError(
                "the sampled video has values that are not finite; use another guidance or sampler, "
                "or check the model's weights"
            )
        return video.clamp(-1, 1).cpu()
