"""Published video VAEs behind the interface of our own, through diffusers' classes: Wan, HunyuanVideo,
CogVideoX, LTX-Video and Mochi; docs/public-vaes.md compares them.

Normalised latents are what each model's pipeline in diffusers gives to its transformer. Needs the extra
`wan`.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.diffusers_vae_config import (
    CogVideoXVAEConfig,
    DiffusersVAEConfig,
    HunyuanVideoVAEConfig,
    LTXVideoVAEConfig,
    MochiVAEConfig,
    WanVAEConfig,
)
from dit.vae import VAE
from dit.vae_layers import Stream


def _diffusers_class(name: str) -> Any:
    try:
        import diffusers

        return getattr(diffusers, name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{name} needs diffusers: pip install 'zoetrope[wan]' ({error})"
        ) from error


class DiffusersVAE(VAE):
    """A VAE of diffusers, which is `model`, with normalised latents outside.

    Raises:
        ValueError: diffusers is not installed (names the extra), or has no VAE of such settings.
    """

    config: DiffusersVAEConfig
    model: Any

    def __init__(self, config: DiffusersVAEConfig) -> None:
        super().__init__()
        network = _diffusers_class(config.class_name)
        self.config = config
        try:
            self.model = network(**config.settings())
        except Exception as error:  # whatever it trips over
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"no VAE can have these sizes ({reason})") from error

    @property
    def latent_channels(self) -> int:
        return self.config.channels

    @property
    def temporal_factor(self) -> int:
        return self.config.factors[0]

    @property
    def spatial_factor(self) -> int:
        return self.config.factors[1]

    @property
    def latent_mean(self) -> Tensor:
        """(c,), on the device of the weights."""
        return self._statistics(0)

    @property
    def latent_std(self) -> Tensor:
        return self._statistics(1)

    def _statistics(self, which: int) -> Tensor:
        assert self.config.statistics is not None
        return torch.tensor(self.config.statistics[which], device=self.model.device)

    def moments(self, video: Tensor, stream: Stream | None = None) -> tuple[Tensor, Tensor]:
        f, h, w = video.shape[2:]
        self.chunk_shape(f, h, w, stream)
        video = video.to(self.model.dtype)
        if stream is None:
            posterior = self.model.encode(video).latent_dist
            return posterior.mean, posterior.logvar
        mean, log_variance = self._encode_chunk(video, stream).chunk(2, dim=1)
        stream.begun = True
        return mean, log_variance.clamp(-30, 20)  # as diffusers' DiagonalGaussianDistribution does

    def decode_raw(self, latents: Tensor, stream: Stream | None = None) -> Tensor:
        latents = latents.to(self.model.dtype)
        if stream is None:
            return self._decode_whole(latents)
        video = self._decode_chunk(latents, stream)
        stream.begun = True
        return video

    def _decode_whole(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents).sample

    def _encode_chunk(self, video: Tensor, stream: Stream) -> Tensor:
        """What the encoder says, (b 2c f' h' w').

        Raises:
            ValueError: as `new_stream`.
        """
        raise AssertionError(self.new_stream())

    def _decode_chunk(self, latents: Tensor, stream: Stream) -> Tensor:
        raise AssertionError(self.new_stream())

    def check_sizes(self) -> None:
        """Compares what the network makes of clips with `latent_shape`; meant for the meta device.

        Raises:
            ValueError: they differ, or the network cannot take such a clip.
        """
        size, parameter = 2 * self.spatial_factor, next(self.model.parameters())
        for frames in (1, 1 + self.frame_step):
            shape = 3, frames, size, size
            try:
                latents = self.moments(parameter.new_zeros(1, *shape))[0]
                video = self.decode_raw(latents)
            except Exception as error:  # whatever the network trips over
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise ValueError(f"no VAE can have these sizes ({reason})") from error
            expected = self.latent_shape(frames, size, size)
            if tuple(latents.shape[1:]) != expected or tuple(video.shape[1:]) != shape:
                raise ValueError(
                    f"settings contradict each other: a clip of {frames}x{size}x{size} has latents of "
                    f"{tuple(latents.shape[1:])}, expected {expected}, and comes back as "
                    f"{tuple(video.shape[1:])}"
                )


class WanStream(Stream):
    """Of a WanVAE, whose convolutions keep what they remember in a list of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: list[Any] | None = None


class WanVAE(DiffusersVAE):
    """Wan's: a frame and then groups of 4 go through its causal convolutions, which remember the frames
    before; norms are per position, and attention is within a frame. Video is clamped to [-1, 1]."""

    config: WanVAEConfig

    def new_stream(self) -> Stream:
        return WanStream()

    def _through(self, network: nn.Module, stream: Stream) -> Callable[..., Tensor]:
        """Goes on from the stream; the cache has a place for each convolution, and some to spare."""
        assert isinstance(stream, WanStream)
        if stream.cache is None:
            stream.cache = [None] * len(list(network.modules()))
        return lambda x, **more: network(x, feat_cache=stream.cache, feat_idx=[0], **more)

    def _encode_chunk(self, video: Tensor, stream: Stream) -> Tensor:
        from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

        if self.config.patch_size is not None:
            video = patchify(video, self.config.patch_size)
        first, encode = int(not stream.begun), self._through(self.model.encoder, stream)
        groups = [video[:, :, :1]] if first else []
        if video.shape[2] > first:
            groups += video[:, :, first:].split(self.temporal_factor, dim=2)
        return self.model.quant_conv(torch.cat([encode(group) for group in groups], dim=2))

    def _decode_chunk(self, latents: Tensor, stream: Stream) -> Tensor:
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        decode, first = self._through(self.model.decoder, stream), not stream.begun
        frames = self.model.post_quant_conv(latents).split(1, dim=2)
        out = [decode(frame, first_chunk=first and i == 0) for i, frame in enumerate(frames)]
        video = torch.cat(out, dim=2)
        if self.config.patch_size is not None:
            video = unpatchify(video, self.config.patch_size)
        return video.clamp(-1, 1)


class HunyuanVideoVAE(DiffusersVAE):
    """HunyuanVideo's. Group norms over all frames: no chunks. diffusers blends overlapping stretches
    of more than 16 frames, and so does this."""


class CogVideoXVAE(DiffusersVAE):
    """CogVideoX's. It takes 1 + 8k frames, as it was trained: group norms are over 8 frames at a time,
    of 2 latent frames, and an odd one belongs to the first group."""

    @property
    def frame_step(self) -> int:
        return self.model.num_sample_frames_batch_size

    def new_stream(self) -> Stream:
        raise ValueError(
            "CogVideoXVAE normalises over groups of frames, so chunks give another result than the "
            "whole clip, which goes through group by group anyway; leave the chunk out"
        )

    def _decode_whole(self, latents: Tensor) -> Tensor:
        if latents.shape[2] % self.model.num_latent_frames_batch_size != 1:
            raise ValueError(
                f"{latents.shape[2]} latent frames do not fit CogVideoX's VAE: it needs an odd number"
            )
        return super()._decode_whole(latents)


class LTXVideoVAE(DiffusersVAE):
    """LTX-Video's. Its decoder sees later frames too: no chunks."""

    config: LTXVideoVAEConfig

    @property
    def latent_mean(self) -> Tensor:
        return self.model.latents_mean.float()

    @property
    def latent_std(self) -> Tensor:
        return self.model.latents_std.float() / self.config.scaling_factor

    def _decode_whole(self, latents: Tensor) -> Tensor:
        """Where the decoder injects noise (0.9.1), it is the same at every call."""
        t = None
        if self.config.timestep_conditioning:
            t = latents.new_full((len(latents),), self.config.decode_timestep)
        if not any(self.config.decoder_inject_noise):
            return self.model.decode(latents, t).sample
        with _fixed_noise(latents.device):
            return self.model.decode(latents, t).sample


@contextmanager
def _fixed_noise(device: torch.device) -> Iterator[None]:
    """The device's own random numbers begin at seed 0, and go on afterwards as if nothing had been."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        if cuda:
            torch.cuda.manual_seed(0)
        else:
            torch.default_generator.manual_seed(0)
        yield


class _Shared:
    """What the layers of a MochiVAE know of the chunk that goes through them."""

    def __init__(self) -> None:
        self.stream: Stream | None = None
        self.calls: Counter[nn.Module] = Counter()  # of each attention, in this chunk


class _StreamedConv(nn.Module):
    """A CogVideoXCausalConv3d that repeats the border, as Mochi's do, and goes on from a stream, which
    diffusers' own cannot."""

    def __init__(self, theirs: Any, shared: _Shared) -> None:
        super().__init__()
        self.conv, self.padding, self.shared = theirs.conv, theirs.time_causal_padding, shared

    def forward(self, x: Tensor, conv_cache: None = None) -> tuple[Tensor, None]:
        stream = self.shared.stream
        if stream is None:
            return self.conv(F.pad(x, self.padding, mode="replicate")), None
        *space, past, _ = self.padding
        keep = self.conv.kernel_size[0] - self.conv.stride[0]  # none where it reduces time
        if not stream.begun:
            x = torch.cat([x[:, :, :1].expand(-1, -1, past, -1, -1), x], dim=2)
        elif keep:
            x = torch.cat([stream.frames[self], x], dim=2)
        if keep:
            stream.frames[self] = x[:, :, -keep:].clone()  # a view would keep all of x
        return self.conv(F.pad(x, (*space, 0, 0), mode="replicate")), None


class _StreamedAttention:
    """MochiVaeAttnProcessor2_0, at each position over its own and earlier frames, which goes on from a
    stream with the keys and values of them all."""

    def __init__(self, theirs: Any, shared: _Shared) -> None:
        self.theirs, self.shared = theirs, shared

    def __call__(self, attn: Any, x: Tensor, **others: Any) -> Tensor:
        stream = self.shared.stream
        if stream is None:
            return self.theirs(attn, x, **others)
        # Many positions come in portions, in the same order in every chunk.
        place = attn, self.shared.calls[attn]
        self.shared.calls[attn] += 1
        q, k, v = (
            project(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        known = torch.stack([attn.norm_k(k), v])  # (2 n heads f d), n positions
        if stream.begun:
            known = torch.cat([stream.frames[place], known], dim=3)
        stream.frames[place] = known
        mask = torch.ones(x.shape[1], known.shape[3], dtype=torch.bool, device=x.device)
        mask = mask.tril(known.shape[3] - x.shape[1])
        y = F.scaled_dot_product_attention(attn.norm_q(q), *known, attn_mask=mask)
        return attn.to_out[0](y.transpose(1, 2).flatten(2).to(x.dtype))


class MochiVAE(DiffusersVAE):
    """Mochi's: all is per frame, but for causal convolutions and, in the encoder, attention at each
    position to every earlier frame, whose keys and values its streams keep."""

    def __init__(self, config: MochiVAEConfig) -> None:
        super().__init__(config)
        from diffusers.models.attention_processor import Attention
        from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d

        self.shared = _Shared()
        for parent in list(self.model.modules()):
            if isinstance(parent, Attention):
                streamed = _StreamedAttention(parent.processor, self.shared)
                parent.processor = streamed  # pyright: ignore[reportAttributeAccessIssue]
            for name, child in list(parent.named_children()):
                if isinstance(child, CogVideoXCausalConv3d):
                    setattr(parent, name, _StreamedConv(child, self.shared))

    def new_stream(self) -> Stream:
        return Stream()

    def _through(self, network: nn.Module, x: Tensor, stream: Stream) -> Tensor:
        self.shared.stream = stream
        self.shared.calls.clear()
        try:
            return network(x)[0]
        finally:
            self.shared.stream = None

    def _encode_chunk(self, video: Tensor, stream: Stream) -> Tensor:
        return self._through(self.model.encoder, video, stream)

    def _decode_chunk(self, latents: Tensor, stream: Stream) -> Tensor:
        video = self._through(self.model.decoder, latents, stream)
        return video if stream.begun else video[:, :, self.temporal_factor - 1 :]


_NETWORKS: dict[type[DiffusersVAEConfig], type[DiffusersVAE]] = {
    WanVAEConfig: WanVAE,
    HunyuanVideoVAEConfig: HunyuanVideoVAE,
    CogVideoXVAEConfig: CogVideoXVAE,
    LTXVideoVAEConfig: LTXVideoVAE,
    MochiVAEConfig: MochiVAE,
}


def published_vae(config: DiffusersVAEConfig) -> DiffusersVAE:
    """The network for its settings, without weights; see `DiffusersVAE` for errors."""
    return _NETWORKS[type(config)](config)
