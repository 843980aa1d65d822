"""Wan's pretrained text encoder behind the interface of our own: umT5 from transformers.

Wan pads the encoder's states with zeros up to a fixed length and lets the DiT attend to all of them,
padding too (`WanPipeline._get_t5_prompt_embeds` in diffusers); so does this. Needs the extra `wan`.
"""

import html
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator
from torch import Tensor, nn

from dit.sizes import Depth, Size


class UMT5Config(BaseModel):
    """The shape of a umT5 encoder; its tokenizer's files are in the model folder."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    kind: Literal["umt5"] = "umt5"
    context_length: Size = 512
    vocab_size: Size
    width: Size
    num_layers: Depth
    num_heads: Size
    head_dim: Size
    mlp_dim: Size
    num_buckets: Annotated[int, Field(ge=4, le=2**16)] = 32  # of relative positions
    max_distance: Size = 128
    eps: float = 1e-6
    activation: Literal["gated-gelu", "relu"] = "gated-gelu"
    pad_token: NonNegativeInt = 0
    eos_token: NonNegativeInt = 1
    trainable: bool = False

    @model_validator(mode="after")
    def _buckets_fit(self) -> "UMT5Config":
        # Half of the buckets are for either direction, and half of those for a distance each.
        if self.max_distance <= self.num_buckets // 4:
            raise ValueError(
                f"max_distance={self.max_distance}; with num_buckets={self.num_buckets} it must be "
                f"above {self.num_buckets // 4}"
            )
        return self


def clean_prompt(text: str) -> str:
    """A prompt as Wan's encoder was given it: Unicode and HTML mended, white space single."""
    import ftfy
    import regex

    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return regex.sub(r"\s+", " ", text).strip()


class UMT5Encoder(nn.Module):
    """Prompts to states (b context_length width); `tokenize` on the host, `forward` on the device.

    Args:
        tokenizer: transformers' tokenizer of this encoder.
    Raises:
        ValueError: transformers is not installed; names the extra.
    """

    def __init__(self, config: UMT5Config, tokenizer: Any) -> None:
        super().__init__()
        try:
            import transformers
        except ImportError as error:
            raise ValueError(
                f"Wan's text encoder needs transformers: pip install 'zoetrope[wan]' ({error})"
            ) from error
        self.config, self.tokenizer = config, tokenizer
        shape = transformers.UMT5Config(
            vocab_size=config.vocab_size,
            d_model=config.width,
            d_kv=config.head_dim,
            d_ff=config.mlp_dim,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            relative_attention_num_buckets=config.num_buckets,
            relative_attention_max_distance=config.max_distance,
            layer_norm_epsilon=config.eps,
            feed_forward_proj=config.activation,
            dropout_rate=0.0,
        )
        # The whole model would hold the token embedding twice, as `shared` and in the encoder.
        self.encoder = transformers.UMT5EncoderModel(shape).encoder
        self.register_load_state_dict_pre_hook(_one_embedding)
        self.requires_grad_(config.trainable)

    @property
    def width(self) -> int:
        return self.config.width

    def tokenize(self, captions: list[str]) -> Tensor:
        """Token ids (b context_length), padded; a caption that is too long is cut at the end."""
        return self.tokenizer(
            [clean_prompt(caption) for caption in captions],
            padding="max_length",
            max_length=self.config.context_length,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        ).input_ids

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (b m) -> states (b m width), zero behind the prompt; mask (b m), True everywhere."""
        places = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        length = (places * (ids != self.config.pad_token)).amax(dim=1, keepdim=True)
        prompt = places <= length
        # transformers looks into the mask, and on the meta device there is nothing to see.
        mask = None if ids.is_meta else prompt.long()
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return states * prompt[..., None], torch.ones_like(prompt)


def _one_embedding(module: nn.Module, weights: dict[str, Any], *_: Any) -> None:
    """Checkpoints name the token embedding `shared.weight`, `encoder.embed_tokens.weight` or both."""
    if "shared.weight" in weights:
        weights["encoder.embed_tokens.weight"] = weights.pop("shared.weight")
