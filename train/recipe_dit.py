"""The DiT recipe: denoise the latents of a trained VAE, given a caption."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.buckets import Size, size_name
from data.loader import Source
from data.randomness import numpy_generator
from data.video import to_float, to_uint8
from dit.objective import Objective
from dit.text import TextEncoder
from dit.transformer import DiT
from dit.vae import VAE, VideoVAE
from sample.lora import KNOWS
from sample.model import Model, ModelInfo, also_knowing, load_model, save_model
from sample.pipeline import MAX_BATCH_CELLS, TextToVideo
from sample.processes import Ranks
from train.clips import TrainingClips
from train.config import RunConfig
from train.config_recipes import DiTRecipeConfig
from train.dit_validation import ValidationSet, read_validation, validate, validate_tasks
from train.latents import cached_latents
from train.lora import add_adapters, check_objective, export_lora
from train.packed import packed_batch, packed_losses
from train.recipe import Batch, Recipe, TrainData, counted_noise, counted_uniform
from train.tasks import beside_frames, family_of, given_batch, mean_asked
from train.text_checkpoint import load_text_weights

_log = logging.getLogger(__name__)
_CHUNK = 32  # clips per forward pass when validating or sampling; large ones are fewer


@lru_cache(maxsize=2)
def strata(seed: int, step: int, batch_size: int) -> Tensor:
    """A permutation of range(batch_size): which stratum of t each sample of a step draws from."""
    order = numpy_generator(seed, "t-strata", step).permutation(batch_size)
    return torch.from_numpy(order)


def share_below(objective: Objective, t: float, num_tokens: int) -> float:
    """The share of the objective's training noise levels below t: the inverse of its `sample_t`."""
    if not 0 < t < 1:
        return float(t >= 1)
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        u = torch.tensor([middle], dtype=torch.float64)
        if objective.sample_t(u, num_tokens).item() < t:
            low = middle
        else:
            high = middle
    return high


class DiTRecipe(Recipe):
    """One objective, a DiT and a text encoder (trained with it, or frozen); the VAE is frozen.

    From nothing but a VAE, or from the model in recipe.init: then all of its DiT is trained, or the
    adapters of recipe.lora, or one of its two experts on that expert's range of t.
    """

    def __init__(
        self, config: RunConfig, data: TrainData, ranks: Ranks, weights_device: torch.device
    ) -> None:
        super().__init__(config, data, ranks, weights_device)
        assert isinstance(config.recipe, DiTRecipeConfig)
        self.options, clip = config.recipe, config.data
        # A plain attribute: an expert that is not trained stays out of this module, and on the CPU.
        self._start = self._fresh() if self.options.init is None else self._from_init()
        assert self._start.text is not None
        assert self._start.objective is not None
        self.vae, self.text = self._start.vae, self._start.text
        self.objective = self.options.objective or self._start.objective
        if self.options.lora is not None:
            check_objective(self.objective, self._start.objective)
        low = self.options.expert == "low"
        dit = self._start.dit_low_noise if low else self._start.dit
        assert dit is not None
        self.dit = dit
        self.latent_shape = self.vae.latent_shape(clip.num_frames, clip.height, clip.width)
        for size in (clip.base_size, *clip.sizes):
            self._check_size(size)
        boundary = self._start.expert_boundary or 0.0
        self.t_range = (0.0, boundary) if low else (boundary, 1.0)
        self._t_shares: dict[int, tuple[float, float]] = {}
        self.chunk = MAX_BATCH_CELLS // (clip.num_frames * clip.height * clip.width)
        self.chunk = min(max(1, self.chunk), _CHUNK)
        self._token_ids: dict[str, Tensor] = {}
        self._validation: ValidationSet | None = None

    def _check_size(self, size: Size) -> None:
        """Raises ValueError: VAE or DiT cannot take clips of a size of the training batches."""
        where = f"bucket {size_name(size)}: " if size != self.config.data.base_size else ""
        patch = self.dit.config.patch_size
        try:
            shape = self.vae.latent_shape(*size)[1:]
        except ValueError as error:
            raise ValueError(f"{where}{error}") from None
        if any(s % p for s, p in zip(shape, patch)):
            change = "data.* or recipe.dit.patch_size" if self.options.init is None else "data.*"
            raise ValueError(
                f"{where}latents of {'x'.join(map(str, shape))} do not divide into "
                f"patches of {'x'.join(map(str, patch))}; change {change}"
            )

    def _fresh(self) -> Model:
        """A model with a trained VAE, the rest of it new."""
        options, clip = self.options, self.config.data
        assert options.vae is not None
        assert options.dit is not None
        assert options.text is not None
        source = load_model(options.vae, self.weights_device, vae_only=True)
        if source.info.fps != clip.fps:
            raise ValueError(
                f"data.fps={clip.fps:g} but the VAE in {options.vae} was trained at "
                f"{source.info.fps:g}; use the same"
            )
        vae = source.vae.float()
        channels = vae.latent_shape(clip.num_frames, clip.height, clip.width)[0]
        with self.weights_device:
            text = TextEncoder(options.text.resolve())
            dit = DiT(options.dit.resolve(channels, text.width))
        if options.text.checkpoint is not None:
            load_text_weights(text, options.text.checkpoint)
        return Model(vae, self.model_info({}), dit, text, options.objective)

    def _from_init(self) -> Model:
        """The model in recipe.init, with gradients and in float32 where it is trained.

        Raises:
            ValueError: it has no DiT, or recipe.expert does not fit it; or there is no peft.
        """
        options = self.options
        assert options.init is not None
        model = load_model(options.init, self.weights_device)
        if model.dit is None or model.text is None:
            raise ValueError(
                f"recipe.init={options.init} holds a VAE alone; give a model with a DiT, or this one "
                "as recipe.vae with recipe.dit, recipe.text and recipe.objective"
            )
        if model.info.fps != self.config.data.fps and self.ranks.is_main:
            _log.warning(
                "data.fps=%g, but the model in %s is sampled at %g; its motion will change speed",
                *(self.config.data.fps, options.init, model.info.fps),
            )
        if (model.dit_low_noise is None) != (options.expert is None):
            raise ValueError(
                f"recipe.expert={options.expert}, but {options.init} has one DiT; leave it out"
                if options.expert is not None
                else f"{options.init} has two experts; set recipe.expert=high (t from 1 to "
                f"{model.expert_boundary:g}) or low (below)"
            )
        # The VAE works in float32 whatever the autocast; a frozen base only where all does.
        model.vae.float()
        if options.vae is not None:
            model.vae = self._with_its_latents(model.vae, options.vae)
        dit = model.dit_low_noise if options.expert == "low" else model.dit
        assert dit is not None
        if options.lora is None or self.config.train.dtype == "float32":
            dit.float()
        if options.lora is not None:
            with self.weights_device:
                add_adapters(dit, options.lora)
        else:
            dit.requires_grad_(True)
            if model.text.config.trainable:
                model.text.float().requires_grad_(True)
        dit.train()
        return model

    def _with_its_latents(self, before: VAE, folder: Path) -> VAE:
        """The VAE in a model folder, of the same latents as the model's own; its decoder is another.

        Raises:
            ValueError: its latents are others, or one of them is a published VAE.
        """
        vae = load_model(folder, self.weights_device, vae_only=True).vae.float()
        if not isinstance(vae, VideoVAE) or not isinstance(before, VideoVAE):
            raise ValueError(
                f"recipe.vae={folder}, beside recipe.init={self.options.init}: another decoder can be "
                "given where both VAEs are our own only; leave it out"
            )
        states = vae.encoding_state(), before.encoding_state()
        if vae.config != before.config or not all(
            value.is_meta or torch.equal(value, states[1][name])  # counting knows no weights
            for name, value in states[0].items()
        ):
            raise ValueError(
                f"recipe.vae={folder} has other latents than the VAE of recipe.init="
                f"{self.options.init}; use one whose decoder alone was trained on "
                "(recipe.freeze_encoder), or leave it out"
            )
        return vae

    def model_info(self, provenance: dict[str, Any]) -> ModelInfo:
        given = self.options.tasks
        trained: dict[str, Any] = {
            "tasks": () if given.only_text else tuple(given.weights),
            "sizes": tuple(self.config.data.sizes),
            "given_noise": None if given.only_text else given.noise,
        }
        if self.config.gives_references:
            seen = np.concatenate([np.asarray(rows, int) for rows in self.order.rows.values()])
            trained["references"] = int(self.data.train.num_references[seen].max(initial=0))
        info = super().model_info(provenance).model_copy(update=trained)
        if self.options.init is None:
            return info
        before = self._start.info
        origin = {**before.provenance, **provenance, "init": str(self.options.init)}
        if self.options.vae is not None:
            origin["vae"] = str(self.options.vae)
        return also_knowing(before, info).model_copy(update={"provenance": origin})

    @property
    def shapes_per_size(self) -> int:
        families = len({family_of(task) for task in self.options.tasks.weights})
        if not self.config.gives_references:
            return families
        return families * (1 + len(np.unique(self.data.train.num_references)))

    def parts(self) -> dict[str, nn.Module]:
        return {"dit": self.dit, "text": self.text, "vae (frozen)": self.vae}

    def frozen(self) -> dict[str, nn.Module]:
        text_trains = any(p.requires_grad for p in self.text.parameters())
        text = {} if text_trains else {"text encoder": self.text}
        base = {} if self.options.lora is None else {"DiT": self.dit}
        return {"VAE": self.vae, **text, **base}

    def start_settings(self) -> str:
        return self._start.file().model_dump_json(exclude={"info", "sampling"})

    @property
    def export_folder(self) -> Path:
        return self.config.out / ("model" if self.options.lora is None else "lora")

    def load_validation(self) -> int:
        self._validation = self._validation or read_validation(self)
        return len(self._validation.rows)

    def blocks(self) -> list[nn.Module]:
        return list(self.dit.blocks)

    def networks(self) -> list[nn.Module]:
        text_trains = any(p.requires_grad for p in self.text.parameters())
        return [self.dit, self.text] if text_trains else [self.dit]

    def dataset(self) -> Source:
        if self.options.latent_cache is None:
            return TrainingClips(self.data.train, self.config, self.order)
        return cached_latents(self)

    def tokenize(self, captions: list[str]) -> Tensor:
        """Token ids (b m), each caption's made once; b may be 0."""
        for caption in captions:
            if caption not in self._token_ids:
                if len(self._token_ids) > 100_000:
                    self._token_ids.clear()
                self._token_ids[caption] = self.text.tokenize([caption])[0]
        none = torch.empty(0, self.text.config.context_length, dtype=torch.long)
        return torch.stack([self._token_ids[c] for c in captions]) if captions else none

    def sample_t(self, u: Tensor, num_tokens: int) -> Tensor:
        """Noise levels for uniform draws (b,), as the shift is for a clip of so many tokens; of an
        expert, those of its part of the distribution."""
        if num_tokens not in self._t_shares:
            first, last = (share_below(self.objective, t, num_tokens) for t in self.t_range)
            self._t_shares[num_tokens] = first, last - first
        first, share = self._t_shares[num_tokens]
        return self.objective.sample_t(first + share * u, num_tokens)

    def shown(self, g: Sequence[int], captions: Sequence[str]) -> list[str]:
        """The captions that the network sees: those of some samples, by counter, are empty."""
        dropped = counted_uniform(self.config.seed, "caption-dropout", g)
        drops = (dropped < self.options.caption_dropout).tolist()
        return ["" if drop else text for drop, text in zip(drops, captions)]

    def text_states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """States (b m d) and context_mask (b m) of a batch's captions."""
        if "context" in batch:
            return batch["context"], batch["context_mask"]
        return self.text(batch["ids"])

    def make_batch(self, items: dict[str, Any], step: int) -> Batch:
        g, device, config = items["g"], self.ranks.device, self.config
        seed, batch_size = config.seed, self.order.batch(step)
        position = torch.tensor(g) - self.order.first(step)
        stratum = strata(seed, step, batch_size)[position]
        uniform = (stratum + counted_uniform(seed, "t", g)) / batch_size
        if "context" in items:
            context, mask = (items[key].to(device) for key in ("context", "context_mask"))
            batch: Batch = {"context": context.float(), "context_mask": mask}
        else:
            batch = {"ids": self.tokenize(self.shown(g, items["captions"])).to(device)}
        if "sizes" in items:
            return batch | packed_batch(self, items, uniform)
        if "mean" in items:
            shape = tuple(items["mean"].shape[1:])
        else:
            shape = self.vae.latent_shape(*items["video"].shape[2:])
        batch["noise"] = counted_noise(seed, "noise", g, shape, device)
        posterior_noise = counted_noise(seed, "posterior", g, shape, device)
        batch |= self.latents_of(items, posterior_noise)
        if self.options.tasks.only_text:
            return batch | {"t": self.sample_t(uniform, self.tokens_of(shape)).to(device)}
        return batch | given_batch(self, items, step, uniform, batch)

    def latents_of(self, items: dict[str, Any], posterior_noise: Tensor) -> Batch:
        """Latents drawn from cached posteriors, or the video that they are to be made of."""
        device = self.ranks.device
        if "mean" in items:
            mean, std = (items[key].to(device).float() for key in ("mean", "std"))
            return {"latents": torch.addcmul(mean, std, posterior_noise)}
        video = items["video"].to(device, non_blocking=True)
        return {"video": video, "posterior_noise": posterior_noise}

    def example_batch(self, batch_size: int, device: str, size: Size) -> Batch:
        latents = torch.zeros(batch_size, *self.vae.latent_shape(*size), device=device)
        length = self.text.config.context_length
        batch = {
            "t": torch.zeros(batch_size, device=device),
            "ids": torch.zeros(batch_size, length, dtype=torch.long, device=device),
            "noise": latents,
        }
        if self.options.latent_cache is not None:
            return {**batch, "latents": latents}
        return {
            **batch,
            "video": torch.zeros(batch_size, 3, *size, dtype=torch.uint8, device=device),
            "posterior_noise": latents,
        }

    def num_tokens(self, size: Size) -> int:
        return self.tokens_of(self.vae.latent_shape(*size))

    def tokens_of(self, shape: Sequence[int]) -> int:
        """Patches of latents (c f h w)."""
        return prod(s // p for s, p in zip(shape[1:], self.dit.config.patch_size))

    @torch.no_grad()
    def encode(self, video: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents of uint8 video, in float32 whatever the autocast; without noise their mean."""
        with torch.autocast(self.ranks.device.type, enabled=False):
            posterior = self.vae.encode(to_float(video))
        return posterior.mean if noise is None else posterior.sample(noise)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if "sizes" in batch:
            return packed_losses(self, batch), {}
        if "latents" in batch:
            x_0 = batch["latents"]
        else:
            x_0 = self.encode(batch["video"], batch["posterior_noise"])
        noise, t = batch["noise"], batch["t"]
        x_0 = x_0[:, :, -noise.shape[2] :]  # without the first frame, where a step leaves that out
        x_t = self.objective.add_noise(x_0, noise, t)
        told, text = self.objective.network_t(t), self.text_states(batch)
        pred = self.dit(x_t, told, *text, beside=beside_frames(self, batch))
        losses = self.objective.loss(pred, x_0, noise, t)
        return mean_asked(losses, batch["asked"]) if "asked" in batch else losses.mean(dim=1), {}

    def validate(self) -> dict[str, float]:
        self._validation = self._validation or read_validation(self)
        return {**validate(self, self._validation), **validate_tasks(self, self._validation)}

    def _model(self, provenance: dict[str, Any]) -> Model:
        model = replace(self._start, info=self.model_info(provenance), objective=self.objective)
        if type(self.objective) is not type(
            self._start.objective
        ):  # the sampler is for the old one
            model.sampling = model.sampling.model_copy(update={"sampler": None})
        return model

    def samples(self, progress: Callable[..., None]) -> dict[str, Tensor]:
        logging, clip = self.config.logging, self.config.data
        prompts = list(logging.prompts)
        if not prompts:
            count = min(logging.num_samples, len(self.data.validation.rows))
            prompts = [row.captions[0] for row in self.data.validation.rows[:count]]
        if not prompts:
            return {}
        half = self.config.train.dtype == "bfloat16"
        pipeline = TextToVideo(
            self._model({}), self.ranks.device, dtype=torch.bfloat16 if half else torch.float32
        )
        videos = []
        for first in range(0, len(prompts), self.chunk):
            progress()
            part = prompts[first : first + self.chunk]
            videos += pipeline(
                part,
                frames=clip.num_frames,
                height=clip.height,
                width=clip.width,
                steps=logging.sample_steps,
                guidance=logging.guidance,
                seeds=list(range(first, first + len(part))),
                progress=lambda _: progress(),
            )
        for expert in (self._start.dit, self._start.dit_low_noise):
            if expert is not None and expert is not self.dit:
                expert.to("cpu")  # only sampling needs it
        return {f"{n}-{_slug(p)}": to_uint8(v) for n, (p, v) in enumerate(zip(prompts, videos))}

    def export(self, folder: Path, provenance: dict[str, Any]) -> None:
        write = self.ranks.is_main
        if self.options.lora is None:
            save_model(folder, self._model(provenance), write=write)
            return
        about: dict[str, Any] = {"base": str(self.options.init)}
        if self.options.expert is not None:
            about["expert"] = self.options.expert
        info = self.model_info(provenance).model_dump(mode="json")
        about["trained"] = {name: info[name] for name in KNOWS}
        about["provenance"] = provenance
        export_lora(folder, self.dit, self.options.lora, about, write=write)


def _slug(prompt: str) -> str:
    words = "".join(c if c.isalnum() else " " for c in prompt.lower()).split()
    return "-".join(words)[:60]
