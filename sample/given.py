"""What a clip is generated from beside its text: pictures and videos as latents, in a sampling run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dit.conditions import (
    BesideFrames,
    keyframe_position,
    reference_position,
    with_held_frames,
    with_known_region,
)
from dit.objective import Objective
from dit.samplers import Denoiser
from dit.vae import VAE
from sample.model import ModelInfo

# The tasks (train/tasks.py) that teach each way to be given something; one of them is enough.
TAUGHT_BY: dict[str, tuple[str, ...]] = {
    "first": ("first", "ends", "leading", "random", "sides"),
    "last": ("last", "ends", "keyframe", "keyframes"),
    "keyframe": ("keyframe", "keyframes"),
    "leading": ("leading", "random", "sides"),
    "trailing": ("trailing", "random", "sides"),
    "sides": ("sides", "random"),
    "window": ("window",),
}


def require_task(info: ModelInfo, way: str, what: str) -> None:
    """Raises ValueError: the model was never given frames in this way when it was trained.

    Args:
        way: a key of TAUGHT_BY.
        what: was asked for.
    """
    if way == "first" and info.image_to_video:
        return
    tasks: tuple[str, ...] = TAUGHT_BY[way]
    if not set(tasks) & set(info.tasks):
        known = ", ".join(info.tasks) or "text alone"
        wanted = ("one of " if len(tasks) > 1 else "") + ", ".join(tasks)
        raise ValueError(
            f"{what} needs a model that was trained for it (recipe.tasks: {wanted}), and this one was "
            f"trained with {known}"
        )


@dataclass(frozen=True)
class Given:
    """What is given of a batch of clips.

    Attributes:
        known: clean latents (b c f h w), of which some frames count.
        levels: at which noise level each known frame is shown, (b f), 0 for clean; NaN for others.
        beside: pictures that are no latent frames of the clips.
        source: latents (b c f h w) to edit; strength: the noise level in (0, 1] to start at.
        kept: True where the source stays as it is, broadcastable to it.
    """

    known: Tensor | None = None
    levels: Tensor | None = None
    beside: BesideFrames | None = None
    source: Tensor | None = None
    strength: float = 1.0
    kept: Tensor | None = None

    def applied(self, denoise: Denoiser, objective: Objective, noise: Tensor) -> Denoiser:
        """A denoiser of what is not given.

        Args:
            noise: of the clips, (b c f h w); the known frames' noise and the source's come of it.
        """
        if self.kept is not None:
            assert self.source is not None
            denoise = with_known_region(denoise, objective, self.source, noise, self.kept)
        if self.known is not None and self.levels is not None:
            shown = objective.add_noise(self.known, noise, self.levels.nan_to_num(0.0))
            denoise = with_held_frames(denoise, shown, objective.network_t(self.levels))
        return denoise

    def start(self, objective: Objective, noise: Tensor, stops: Tensor) -> tuple[Tensor, Tensor]:
        """Latents to start from, and the sampler's stops: all of them, or, of an edit, those below its
        strength (SDEdit, Meng et al. 2022, algorithm 1)."""
        if self.source is None:
            return noise, stops
        # A DDPM's stops are whole training steps, a thousandth apart.
        below = stops[(stops < self.strength - 1e-3) | (stops == 0)]
        first = torch.full_like(stops[:1], self.strength)
        at = torch.full((len(noise),), self.strength, device=noise.device)
        return objective.add_noise(self.source, noise, at), torch.cat([first, below])

    def finished(self, latents: Tensor) -> Tensor:
        """Sampled latents, with what was known in its place."""
        if self.known is not None and self.levels is not None:
            held = ~self.levels.isnan()[:, None, :, None, None]
            latents = torch.where(held, self.known, latents)
        if self.kept is not None and self.source is not None:
            latents = torch.where(self.kept, self.source, latents)
        return latents


def known_frames(frames: Tensor, count: int, place: slice, level: float = 0.0) -> Given:
    """Some of the latent frames of clips of `count`.

    Args:
        frames: clean latents (b c k h w); place: where they are among the clip's.
        level: the noise level that they are shown at.
    """
    b, c, _, h, w = frames.shape
    known = frames.new_zeros(b, c, count, h, w)
    levels = frames.new_full((b, count), torch.nan)
    known[:, :, place] = frames
    levels[:, place] = level
    return Given(known=known, levels=levels)


def joined(one: Given, other: Given) -> Given:
    """Both; where both know a frame, the other's."""
    known, levels = one.known, one.levels
    if known is None or levels is None:
        known, levels = other.known, other.levels
    elif other.known is not None and other.levels is not None:
        here = ~other.levels.isnan()
        known = torch.where(here[:, None, :, None, None], other.known, known)
        levels = torch.where(here, other.levels, levels)
    beside = [each.beside for each in (one, other) if each.beside is not None]
    if len(beside) == 2:
        pairs = [
            (getattr(beside[0], name), getattr(beside[1], name)) for name in ("t", "positions")
        ]
        latents = torch.cat([each.latents for each in beside], dim=2)
        beside = [BesideFrames(latents, *(torch.cat(pair, dim=1) for pair in pairs))]
    source = one if one.source is not None else other
    return replace(source, known=known, levels=levels, beside=beside[0] if beside else None)


def given_pictures(
    vae: VAE, pictures: Mapping[int, Tensor], frames: int, height: int, width: int, count: int
) -> Given:
    """Pictures at some frames of the clips: the first is a latent frame, others stand beside them.

    Args:
        pictures: by frame, (3 h w) or one per clip (b 3 h w), in [-1, 1].
        frames, height, width: of the clips, of which there are `count`.
    Raises:
        ValueError: a picture of another size, or none, or at a frame that the clips have not.
    """
    result = Given()
    for frame, picture in pictures.items():
        if not 0 <= frame < frames:
            raise ValueError(
                f"a picture for frame {frame}, and the clip's are 0 to {frames - 1}; move it, or ask "
                "for a longer clip"
            )
        latents = _encoded(vae, picture, height, width, count)
        if frame == 0:
            length = vae.latent_shape(frames, height, width)[1]
            result = joined(result, known_frames(latents, length, slice(0, 1)))
        else:
            place = keyframe_position(frame, vae.temporal_factor)
            result = joined(result, _beside(latents, place))
    return result


def given_references(
    vae: VAE,
    references: Sequence[Tensor],
    height: int,
    width: int,
    count: int,
    info: ModelInfo,
) -> Given:
    """Pictures of subjects, in the order in which the prompts name them.

    Args:
        references: each (3 h w) or one per clip (b 3 h w), in [-1, 1].
        height, width: of the clips, of which there are `count`.
    Raises:
        ValueError: more than the model was trained with, or a picture of another size.
    """
    require_references(info, len(references))
    result = Given()
    for number, picture in enumerate(references):
        latents = _encoded(vae, picture, height, width, count)
        result = joined(result, _beside(latents, reference_position(number)))
    return result


def require_references(info: ModelInfo, count: int) -> None:
    """Raises ValueError: the model was trained with fewer reference pictures than `count`."""
    if count > info.references:
        knows = f"at most {info.references}" if info.references else "none"
        raise ValueError(
            f"{count} reference picture(s), and the model was trained with {knows} "
            "(recipe.tasks.references); give fewer, or use another model"
        )


def _encoded(vae: VAE, picture: Tensor, height: int, width: int, count: int) -> Tensor:
    """Latents (b c 1 h w) of a picture (3 h w) or one per clip (b 3 h w)."""
    if not isinstance(picture, Tensor):
        raise ValueError(
            f"a given picture is {type(picture).__name__}; expected a tensor (3 {height} {width}) in "
            "[-1, 1], as data.video.to_float makes of uint8"
        )
    images = picture[None] if picture.ndim == 3 else picture
    if images.shape[1:] != (3, height, width) or len(images) not in (1, count):
        raise ValueError(
            f"a given picture has shape {tuple(picture.shape)}; expected (3 {height} {width}) or "
            f"({count} 3 {height} {width})"
        )
    images = images[:, :, None].to(vae.latent_mean.device)
    return vae.encode(images).mean.expand(count, -1, -1, -1, -1)


def _beside(latents: Tensor, place: float) -> Given:
    """A clean picture (b c 1 h w) that stands beside each clip, at a place along time."""
    levels = latents.new_zeros(len(latents), 1)
    return Given(beside=BesideFrames(latents, levels, torch.full_like(levels, place)))
