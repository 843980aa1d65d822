"""Text to token-level states, through open_clip's tokenizer and text transformer.

Two ways to have one: small, from scratch, trained together with the DiT (the world does this), or a
pretrained CLIP text tower, frozen, read from a local checkpoint. Both give one state per token.
"""

from functools import lru_cache
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator
from torch import Tensor, nn

VOCAB_SIZE = 49_408  # CLIP's byte-pair vocabulary


class TextConfig(BaseModel):
    """The shape of a CLIP text transformer, and whether it is trained with the DiT."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    kind: Literal["open_clip"] = "open_clip"
    context_length: PositiveInt = 77
    width: PositiveInt = 512
    num_layers: PositiveInt = 12
    num_heads: PositiveInt = 8
    causal: bool = True  # as every CLIP tower; False lets each token see the whole caption
    quick_gelu: bool = False  # the activation of OpenAI's own CLIP weights
    trainable: bool = False

    @model_validator(mode="after")
    def _heads_fit(self) -> "TextConfig":
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} does not divide into num_heads={self.num_heads}")
        return self


@lru_cache(maxsize=4)
def _tokenizer(context_length: int):
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(context_length=context_length)


class TextEncoder(nn.Module):
    """Captions to states (b m width); `tokenize` on the host, `forward` on the device."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        from open_clip.transformer import QuickGELU, TextTransformer

        self.config = config
        self.transformer = TextTransformer(
            context_length=config.context_length,
            vocab_size=VOCAB_SIZE,
            width=config.width,
            heads=config.num_heads,
            layers=config.num_layers,
            no_causal_mask=not config.causal,
            use_pad_mask=not config.causal,
            output_dim=None,  # projects CLIP's pooled sentence embedding; only token states are used
            output_tokens=True,
            act_layer=QuickGELU if config.quick_gelu else nn.GELU,
        )
        self.requires_grad_(config.trainable)

    @property
    def width(self) -> int:
        return self.config.width

    def tokenize(self, captions: list[str]) -> Tensor:
        """Token ids (b context_length), zero-padded; a caption that is too long is cut at the end.

        Ids: start, words, end, then zeros. An empty caption is start and end alone.
        """
        return _tokenizer(self.config.context_length)(captions)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (b m) -> states (b m width) and context_mask (b m), True up to the end token."""
        _, states = self.transformer(ids)
        # The end token has the largest id, and everything behind it is padding.
        last = ids.argmax(dim=-1, keepdim=True)
        return states, torch.arange(ids.shape[1], device=ids.device) <= last
