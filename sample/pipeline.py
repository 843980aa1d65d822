"""Prompts in, videos out."""

import logging
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from data.randomness import generator
from dit.grids import GridConfig
from dit.guidance import GuidanceConfig, GuidedDenoiser, Text, guided_denoiser
from dit.samplers import Denoiser, SamplerName, check_temperature, run_sampler, starting_noise
from dit.transformer import DiTConfig
from dit.vae import VAE
from dit.vae_parts import decode_in_parts
from sample.given import Given, given_pictures, given_references, joined, require_task
from sample.lora import GivenLoRAs, LoRA, add_loras, as_loras
from sample.model import Model, load_model

Module = TypeVar("Module", bound=nn.Module)
MAX_BATCH_CELLS = 64 * 9 * 32 * 32  # pixels of a batch, above which callers split it
DECODED_PIXELS = 2**22  # at once, where a VAE can work in parts
_MAX_CACHED_TEXTS = 64  # 8 MB each for Wan's text encoder


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


def quiet_compiler(device: torch.device) -> None:
    """On a CPU torch.compile warns of a CUDA toolkit without a GPU; this keeps it from that."""
    if device.type == "cpu":
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def two_experts(high: Denoiser, low: Denoiser, boundary: float) -> Denoiser:
    """`high` from t = 1 down to the boundary, `low` below it; the noisiest frame decides."""
    return lambda x, t: (high if (t >= boundary).any() else low)(x, t)


def latent_shape(
    vae: VAE, dit: DiTConfig, frames: int, height: int, width: int
) -> tuple[int, int, int, int]:
    """Latents (c f h w) of one clip.

    Raises:
        ValueError: VAE or DiT cannot make this size; says what fits.
    """
    shape = vae.latent_shape(frames, height, width)
    pf, ph, pw = dit.patch_size
    for name, size, patch in (("height", shape[2], ph), ("width", shape[3], pw)):
        if size % patch:
            step = patch * vae.spatial_factor
            below = size * vae.spatial_factor // step * step
            raise ValueError(
                f"{name}={size * vae.spatial_factor} does not fit the DiT: it needs a multiple of "
                f"{step}; use {below + step}" + (f" or {below}" if below else "")
            )
    if shape[1] % pf:
        raise ValueError(f"frames={frames} gives {shape[1]} latent frames, not a multiple of {pf}")
    return shape


def _moved(module: Module, device: torch.device) -> Module:
    """The module on a device; untouched if it is there, as `to` has FSDP give up gathered weights."""
    here = {parameter.device for parameter in module.parameters()}
    if all(d.type == device.type and device.index in (None, d.index) for d in here):
        return module
    return module.to(device)


@dataclass(frozen=True)
class Work:
    """What a call cost: clips that a DiT was asked about, and how often feature reuse answered."""

    num_evaluations: int
    num_skipped: int

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.num_evaluations + other.num_evaluations, self.num_skipped + other.num_skipped
        )


class TextToVideo:
    """A text-to-video model ready to sample.

    videos = TextToVideo.from_folder("runs/demo/model")(["a red circle moving left"])

    Args:
        dtype: that autocast multiplies in; float32 for none, and then the weights have to be. The
            VAE works in float32 in any case, as in training.
        compile_blocks: torch.compile for each block of the DiT, which takes a while at first use.
    """

    def __init__(
        self,
        model: Model,
        device: str | torch.device | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        compile_blocks: bool = False,
    ) -> None:
        if model.dit is None or model.text is None or model.objective is None:
            raise ValueError("this model folder holds a VAE alone; sampling needs a trained DiT")
        self.device, self.dtype = pick_device(device), dtype
        self.info, self.objective, self.sampling = model.info, model.objective, model.sampling
        self.vae = model.vae.float().to(self.device)
        self.text = _moved(model.text, self.device)
        self.dit = _moved(model.dit, self.device)
        self.experts = [self.dit]  # by falling noise level
        self.expert_boundary = model.expert_boundary
        if model.dit_low_noise is not None:
            self.experts.append(_moved(model.dit_low_noise, self.device))
        if compile_blocks:
            quiet_compiler(self.device)
            for expert in self.experts:
                for block in expert.blocks:
                    block.compile()
        self.work = self.all_work = Work(0, 0)  # of the latest call, and of all of them
        self.loras: list[LoRA] = []  # that are in its weights
        self._texts: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike[str],
        device: str | torch.device | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        compile_blocks: bool = False,
        lora: GivenLoRAs = (),
        lora_low: GivenLoRAs = (),
    ) -> "TextToVideo":
        """Loads a model folder onto a device: a GPU where there is one, unless told otherwise.

        Args:
            lora: LoRAs to add to its DiT, in the format of diffusers: one or several paths, each of
                which may end in :SCALE, or pairs of a path and a scale.
            lora_low: those for the low-noise expert of a model with two.
        Raises:
            FileNotFoundError, ValueError: see `sample.model.load_model` and
                `sample.lora.apply_lora`.
        """
        place = pick_device(device)
        model = load_model(folder, place, dtype=dtype)
        loras, loras_low = as_loras(lora), as_loras(lora_low)
        add_loras(model, loras, loras_low)
        pipeline = cls(model, place, dtype=dtype, compile_blocks=compile_blocks)
        pipeline.loras = [*loras, *loras_low]
        return pipeline

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Latents (c f h w) of one clip; see the function of this name."""
        return latent_shape(self.vae, self.dit.config, frames, height, width)

    @torch.no_grad()
    def text_states(self, prompts: Sequence[str]) -> Text:
        """Context (b m d) and context_mask (b m) of prompts; the latest ones are remembered.

        Precomputed ones can be given to a call in place of its prompts.
        """
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if new:
            with self._autocast():
                states, mask = self.text(self.text.tokenize(new).to(self.device))
            self._texts.update(zip(new, zip(states, mask)))
        for prompt in prompts:
            self._texts.move_to_end(prompt)
        rows = [self._texts[prompt] for prompt in prompts]
        while len(self._texts) > _MAX_CACHED_TEXTS:
            self._texts.popitem(last=False)
        contexts, masks = zip(*rows)
        return torch.stack(contexts), torch.stack(masks)

    @torch.no_grad()
    def __call__(
        self,
        prompts: str | Sequence[str] | Text,
        *,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: GuidanceConfig | float | None = None,
        guidance_low: float | None = None,
        guidance_references: float | None = None,
        sampler: SamplerName | None = None,
        grid: GridConfig | Tensor | None = None,
        shift: float | None = None,
        seeds: Sequence[int] | None = None,
        negative: str | Text = "",
        image: Tensor | None = None,
        keyframes: Mapping[int, Tensor] | None = None,
        references: Sequence[Tensor] = (),
        given: Given | None = None,
        noise: Tensor | None = None,
        temperature: float = 1.0,
        reuse: float | None = None,
        output: Literal["video", "latents"] = "video",
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """One video per prompt; what is None is as the model was trained or imported.

        Args:
            prompts: one or several; or their states and mask, as `text_states` gives them.
            steps: sampler steps.
            guidance: a config, or the scale of classifier-free guidance, 1 for none.
            guidance_low: scale for the low-noise expert of a model with two; None for the same.
            guidance_references: scale of pictures of subjects, where they are given; 1 for none.
            sampler: its name; grid: where it stops; shift: of that grid.
            seeds: one per prompt (default 0, 1, ...); a sample depends on its own seed alone.
            negative: what guidance moves away from; or its states and mask, one row or one per prompt.
            image: (3 h w) or one per prompt (b 3 h w) in [-1, 1], the first frame, for models that
                were trained with given ones.
            keyframes: the same at other frames, by number from 0; -1 is the last.
            references: pictures like these of subjects, in the order in which the prompts name them.
            given: latents that are known or to be edited.
            noise: the latents to start from (b c f h w), instead of drawing them.
            temperature: standard deviation of the noise to start from, above 0 to 1 (Popov et al.
                2021, Grad-TTS, section 4): the lower, the nearer to the mean of all samples.
            reuse: threshold of feature reuse, see `dit.reuse.FeatureReuse`; `work` counts.
            output: latents are normalised, (b c f h w).
            progress: called with the number of the step just done.
        Returns:
            video (b 3 f h w) in [-1, 1], or latents, float32, on the CPU.
        Raises:
            ValueError: a size, length, sampler or count that does not fit, saying what does.
        """
        size = (
            self.info.num_frames if frames is None else frames,
            self.info.height if height is None else height,
            self.info.width if width is None else width,
        )
        shape = self.latent_shape(*size)
        pictured = guidance_references if references else 1.0
        guidances = self._guidances(guidance, guidance_low, pictured)
        if given is not None and given.source is not None and given.strength < 1:
            # CFG-Zero* stands still at the first noise levels of all, which an edit does not see.
            moving = {"zero_steps": 0}
            guidances = [g.model_copy(update=moving) if g.zero_steps else g for g in guidances]
        check_temperature(temperature)
        if temperature < 1 and given is not None and given.source is not None:
            raise ValueError(
                f"temperature={temperature:g} is of noise to start from, and an edit starts from its "
                "video; leave it out"
            )
        prompts = [prompts] if isinstance(prompts, str) else prompts
        texts = self._texts_of(prompts, negative, all(g.is_none for g in guidances))
        count = len(texts[0][0])
        seeds = list(range(count) if seeds is None else seeds)
        if len(seeds) != count:
            raise ValueError(f"{len(seeds)} seeds for {count} prompts; give one per prompt")
        given = joined(self._pictures(image, keyframes or {}, count, size), given or Given())
        given = joined(given, given_references(self.vae, references, *size[1:], count, self.info))
        generators = [generator(seed, "sample", device=self.device) for seed in seeds]
        num_steps = self.sampling.steps if steps is None else steps
        tokens = prod(s // p for s, p in zip(shape[1:], self.dit.config.patch_size))
        with self._autocast():
            guided = [
                guided_denoiser(
                    *(expert, *texts, each),
                    reuse_threshold=reuse,
                    objective=self.objective,
                    beside=given.beside,
                )
                for expert, each in zip(self.experts, guidances)
            ]
            denoise: Denoiser = guided[0]
            if len(guided) == 2:
                assert self.expert_boundary is not None
                denoise = two_experts(guided[0], guided[1], self.expert_boundary)
            start, stops = starting_noise(generators, shape, noise), None
            denoise = given.applied(denoise, self.objective, start)
            start = temperature * start
            if given.source is not None:
                stops = self.objective.grid(num_steps, shift, num_tokens=tokens, grid=grid)
                start, stops = given.start(self.objective, start, stops)
            latents = run_sampler(
                self.sampling.sampler if sampler is None else sampler,
                denoise,
                generators,
                shape,
                num_steps if stops is None else len(stops) - 1,
                self.objective,
                shift=shift if stops is None else None,
                grid=grid if stops is None else stops,
                num_tokens=tokens,
                noise=start,
                progress=None if progress is None else lambda step, _: progress(step),
            )
        latents = given.finished(latents)
        self.work = _work(guided)
        self.all_work += self.work
        _check_finite(latents)
        return latents.float().cpu() if output == "latents" else self.decode(latents)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Latents (1 c f h w) of a video (3 f h w) in [-1, 1]: the posterior's mean."""
        return self.vae.encode(video[None].to(self.device)).mean

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The video (b 3 f h w) in [-1, 1], on the CPU, of normalised latents (b c f h w).

        Raises:
            ValueError: it has values that are not finite.
        """
        video = self._decoded(latents.to(self.device).float())
        _check_finite(video)
        return video.clamp(-1, 1).cpu()

    def _decoded(self, latents: Tensor) -> Tensor:
        """In parts where the whole clip is large and the VAE gives the same result from them."""
        if self.vae.halos is None:
            return self.vae.decode(latents)
        b, _, f, h, w = latents.shape
        pixels = b * self.vae.temporal_factor * self.vae.spatial_factor**2  # of a latent
        chunk = max(1, DECODED_PIXELS // (pixels * h * w))
        tile = max(8, math.isqrt(DECODED_PIXELS // pixels))
        return decode_in_parts(
            self.vae,
            latents,
            chunk=None if chunk >= f else chunk,
            tile=None if tile >= max(h, w) else tile,
        )

    def _autocast(self) -> torch.autocast:
        half = self.dtype is not torch.float32
        return torch.autocast(
            self.device.type, self.dtype if half else torch.bfloat16, enabled=half
        )

    def _guidances(
        self,
        guidance: GuidanceConfig | float | None,
        low: float | None,
        references: float | None,
    ) -> list[GuidanceConfig]:
        """One for each expert."""
        guidance = self.sampling.guidance if guidance is None else guidance
        if not isinstance(guidance, GuidanceConfig):
            guidance = GuidanceConfig.checked(scale=guidance)
        if guidance.references is None:
            references = self.sampling.guidance_references if references is None else references
            values = {**guidance.model_dump(), "references": references}
            guidance = GuidanceConfig.checked(**values)
        if len(self.experts) == 1:
            if low is not None:
                raise ValueError(
                    f"guidance_low={low:g}: this model has no low-noise expert; leave it out"
                )
            return [guidance]
        changes: dict[str, float] = {} if low is None else {"scale": low}
        if guidance.kind == "cfg_zero":  # the first noise levels are the other expert's
            changes["zero_steps"] = 0
        return [guidance, GuidanceConfig.checked(**{**guidance.model_dump(), **changes})]

    def _texts_of(
        self, prompts: Sequence[str] | Text, negative: str | Text, unguided: bool
    ) -> tuple[Text, Text]:
        """States of the prompts and of what to move away from, on the device."""
        if len(prompts) == 0:
            raise ValueError("no prompts given; give at least one")
        if isinstance(prompts[0], str):
            positive = self.text_states(prompts)  # type: ignore[arg-type]
        else:
            positive = self._checked(prompts)  # type: ignore[arg-type]
        if unguided:
            return positive, positive
        count = len(positive[0])
        if isinstance(negative, str):
            return positive, self.text_states([negative] * count)
        states, mask = self._checked(negative)
        if len(states) == 1:
            states = states.expand(count, -1, -1)
            mask = None if mask is None else mask.expand(count, -1)
        if len(states) != count:
            raise ValueError(
                f"{len(states)} negative texts for {count} prompts; give one, or one per prompt"
            )
        return positive, (states, mask)

    def _checked(self, text: Text) -> Text:
        states, mask = text
        width = self.text.width
        if states.ndim != 3 or states.shape[2] != width or not len(states):
            raise ValueError(
                f"text states have shape {tuple(states.shape)}; expected (b m {width})"
            )
        if mask is not None and mask.shape != states.shape[:2]:
            raise ValueError(
                f"text mask has shape {tuple(mask.shape)}; expected {tuple(states.shape[:2])}"
            )
        return states.to(self.device), None if mask is None else mask.to(self.device)

    def _pictures(
        self,
        image: Tensor | None,
        keyframes: Mapping[int, Tensor],
        count: int,
        size: tuple[int, int, int],
    ) -> Given:
        """Pictures at some frames, as latents."""
        total, pictures = size[0], {} if image is None else {0: image}
        for frame, picture in keyframes.items():
            place = total + frame if -total <= frame < 0 else frame
            if place in pictures:
                raise ValueError(f"two pictures are given for frame {place}; leave one of them out")
            pictures[place] = picture
        if 0 in pictures:
            require_task(self.info, "first", "a given first frame")
        if total - 1 in pictures.keys() - {0}:
            require_task(self.info, "last", "a given last frame")
        if pictures.keys() - {0, total - 1}:
            require_task(self.info, "keyframe", "a given frame in the middle")
        return given_pictures(self.vae, pictures, *size, count)


def _check_finite(sampled: Tensor) -> None:
    if not torch.isfinite(sampled).all():
        raise ValueError(
            "the sampled video has values that are not finite; use another guidance or sampler, or "
            "check the model's weights"
        )


def _work(guided: list[GuidedDenoiser]) -> Work:
    skipped = sum(reuse.num_skipped for each in guided for reuse in each.reuse)
    return Work(sum(each.num_evaluations for each in guided), skipped)
