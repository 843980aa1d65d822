"""What is trained, and on which losses: the recipes of a config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from dit.discriminator import DiscriminatorConfig
from dit.objective import DDPM, FlowMatching
from dit.text import TextConfig
from dit.transformer import DiTConfig
from dit.vae import VAEConfig
from train.config_data import Betas, Section, Share


def given_once(value: Any, info: ValidationInfo) -> Any:
    """A value that comes with the model that `init` names, or is given where there is none.

    Raises:
        ValueError: it is given twice, or not at all.
    """
    init = info.data.get("init", ...)  # ... where init itself is wrong
    if init is None and value is None:
        raise PydanticCustomError("missing", "Field required")
    if isinstance(init, Path) and value is not None and info.field_name != "objective":
        raise ValueError(f"comes with recipe.init={init}; leave it out")
    return value


class PerceptualConfig(Section):
    """Distance of features of a frozen image network from timm (Zhang et al. 2018), in float32."""

    weight: PositiveFloat = 1.0
    backbone: str = "vgg16"  # a timm model that gives features
    weights: Path | None = None  # a file; without it the loss is off, and the run says so
    linear: Path | None = None  # LPIPS's weights of its channels; else all count alike
    num_frames: PositiveInt | None = None  # of a clip, evenly spaced, that are compared; None: all


class AdversarialConfig(Section):
    """A discriminator of video patches, see train/vae_losses.py."""

    start_step: NonNegativeInt  # late: once reconstructions are good
    ramp_steps: NonNegativeInt = 500  # over which the generator's share grows
    weight: PositiveFloat = 0.5
    adaptive: bool = True  # the weight is relative to the gradient of the other losses
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    r1_weight: NonNegativeFloat = 1.0  # on half the squared gradient of the mean logit
    r1_interval: PositiveInt = 16  # steps
    lr_ratio: PositiveFloat = 1.0  # of the discriminator's learning rate to the VAE's
    betas: Betas = (0.5, 0.9)  # of its optimizer


class VAERecipeConfig(Section):
    """Reconstruction, KL and adversarial losses, per pixel value.

    From nothing it needs vae; with `init` it goes on from the VAE of a model folder.
    """

    kind: Literal["vae"] = "vae"
    init: Path | None = None
    vae: VAEConfig | None = Field(None, validate_default=True)
    freeze_encoder: bool = False  # the decoder alone learns, and latents stay what they are
    l1_weight: NonNegativeFloat = 1.0
    charbonnier_epsilon: NonNegativeFloat = 0.0  # of the L1 term: sqrt(x^2 + epsilon^2)
    l2_weight: NonNegativeFloat = 0.0
    temporal_weight: NonNegativeFloat = 0.0  # on the L1 error of frame differences
    kl_weight: NonNegativeFloat = 1e-6
    perceptual: PerceptualConfig | None = None
    adversarial: AdversarialConfig | None = None
    channels_last: bool = False  # layout of kernels and activations, quicker on most GPUs
    num_statistics_clips: PositiveInt = 256  # training clips that latent mean and std come from

    _vae_once = field_validator("vae")(given_once)

    @model_validator(mode="after")
    def _frozen_is_trained(self) -> VAERecipeConfig:
        if self.freeze_encoder and self.init is None:
            raise ValueError(
                "freeze_encoder=true is for a VAE that has been trained; set recipe.init too"
            )
        return self

    @model_validator(mode="after")
    def _has_something_to_learn(self) -> VAERecipeConfig:
        if not (self.l1_weight or self.l2_weight or self.perceptual):
            raise ValueError(
                "l1_weight and l2_weight are 0 and there is no perceptual loss, so that nothing asks "
                "for reconstructions; give one of them"
            )
        return self


class DiTSection(DiTConfig):
    """A DiTConfig without what follows from the VAE and the text encoder."""

    in_channels: PositiveInt = Field(default=1, exclude=True, repr=False)
    context_dim: PositiveInt = Field(default=1, exclude=True, repr=False)

    @model_validator(mode="before")
    @classmethod
    def _derived(cls, value: Any) -> Any:
        for name, source in (("in_channels", "VAE"), ("context_dim", "text encoder")):
            if isinstance(value, dict) and name in value:
                raise ValueError(f"{name} follows from the {source}; leave it out")
        return value

    def resolve(self, in_channels: int, context_dim: int) -> DiTConfig:
        """The whole config of the network."""
        return DiTConfig(in_channels=in_channels, context_dim=context_dim, **self.model_dump())


class TextSection(TextConfig):
    """A TextConfig, and the checkpoint of a pretrained one."""

    checkpoint: Path | None = None  # a CLIP model from open_clip: .safetensors, .pt or .bin

    @model_validator(mode="after")
    def _frozen_is_pretrained(self) -> TextSection:
        if not self.trainable and self.checkpoint is None:
            raise ValueError(
                "a frozen text encoder needs a pretrained checkpoint; give one, or trainable: true"
            )
        return self

    def resolve(self) -> TextConfig:
        """The config of the network alone."""
        return TextConfig(**self.model_dump(exclude={"checkpoint"}))


class LoRAConfig(Section):
    """Low-rank updates of linear layers, W + alpha / rank * B A (Hu et al. 2021, section 4.1)."""

    rank: PositiveInt
    alpha: PositiveFloat | None = None  # None: as the rank, so that the factor is 1
    # In every block: the linear layers of both attentions, and those of the MLP.
    targets: Annotated[tuple[Literal["q", "k", "v", "out", "mlp"], ...], Field(min_length=1)] = (
        "q",
        "k",
        "v",
        "out",
    )


# The samples of a step have one shape, so their tasks are of one of these families: nothing beside the
# clip, its first frame alone, one picture or two beside it, or a clip without its first latent frame.
FAMILIES: dict[str, tuple[str, ...]] = {
    "clip": ("text", "first", "leading", "trailing", "sides", "random", "independent"),
    "image": ("image",),
    "beside": ("last", "ends", "keyframe"),
    "beside two": ("keyframes",),
    "window": ("window",),
}
BESIDE = tuple(family for family in FAMILIES if family.startswith("beside"))


class TasksConfig(Section):
    """What of a clip is given to the network, clean, and the rest asked for: drawn for each sample,
    as often as these numbers relate to each other. Given frames have no loss.
    """

    text: NonNegativeFloat = 1.0  # nothing: text to video
    image: NonNegativeFloat = 0.0  # nothing, of a clip's first frame alone: text to image
    first: NonNegativeFloat = 0.0  # the first frame
    last: NonNegativeFloat = 0.0  # a picture of the last frame
    ends: NonNegativeFloat = 0.0  # both
    keyframe: NonNegativeFloat = 0.0  # a picture of some frame
    keyframes: NonNegativeFloat = 0.0  # of two frames, and for half of them the first frame too
    leading: NonNegativeFloat = 0.0  # the first few latent frames
    trailing: NonNegativeFloat = 0.0  # the last few
    sides: NonNegativeFloat = 0.0  # the first few and the last few
    random: NonNegativeFloat = 0.0  # any of them
    independent: NonNegativeFloat = 0.0  # none, each with a noise level of its own
    window: NonNegativeFloat = 0.0  # the first few of a clip that has begun before
    # Of the steps of clips that have pictures of their subjects (the manifest's `references`), those
    # in which these are given: in half of them alone, in the others with what the task gives.
    references: Share = 0.0
    # Of half of what is given, the most noise that it carries (as t), which the network is told:
    # against drift, where generated frames are given in turn.
    noise: Share = 0.0

    @property
    def weights(self) -> dict[str, float]:
        """Of the tasks that occur."""
        return {k: v for k, v in self.model_dump(exclude={"noise", "references"}).items() if v}

    @property
    def only_text(self) -> bool:
        """Whether nothing is ever given."""
        return set(self.weights) == {"text"} and not self.references

    @model_validator(mode="after")
    def _some_task(self) -> TasksConfig:
        if not self.weights:
            raise ValueError("all tasks are 0; give at least one, such as text: 1")
        return self


class DiTRecipeConfig(Section):
    """A diffusion transformer on the latents of a trained VAE.

    From nothing it needs vae, dit, text and objective; with `init` it starts from the model there.
    Then an objective replaces the model's own, and a vae its decoder.
    """

    kind: Literal["dit"] = "dit"
    init: Path | None = None  # a model folder to fine-tune, such as one from `zoetrope import`
    expert: Literal["high", "low"] | None = None  # of a model with two, which one trains
    lora: LoRAConfig | None = None  # train these adapters and nothing else
    # A model folder; beside init, one of the same latents, for its decoder.
    vae: Path | None = Field(None, validate_default=True)
    dit: DiTSection | None = Field(None, validate_default=True)
    text: TextSection | None = Field(None, validate_default=True)
    objective: FlowMatching | DDPM | None = Field(None, discriminator="kind", validate_default=True)
    tasks: TasksConfig = TasksConfig()  # what of a clip is given
    caption_dropout: Share = 0.1  # of samples that train on the empty caption, for guidance
    latent_cache: Path | None = None  # made when missing; else the VAE encodes every batch. Needs
    # data.random_start=false, as it holds each row's start only
    cache_dtype: Literal["float16", "float32"] = "float16"

    @field_validator("expert", "lora")
    @classmethod
    def _starts_from_a_model(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and info.data.get("init", ...) is None:
            raise ValueError(
                "this is for a run that starts from a trained model; set recipe.init too"
            )
        return value

    @field_validator("vae")
    @classmethod
    def _vae_of_the_model(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value is not None and info.data.get("lora") is not None:
            raise ValueError("adapters are saved without a VAE; leave it out")
        return value if info.data.get("init") is not None else given_once(value, info)

    _parts_once = field_validator("dit", "text", "objective")(given_once)
