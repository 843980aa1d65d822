"""Large clips through a VAE in parts: chunks of frames, tiles of the picture, the same result.

A chunk takes over what the chunk before it left in the causal convolutions; a tile is computed with a
halo as wide as the network sees, which is cut off again. Memory beyond the clip itself and its latents
then depends on the part alone. Sizes of parts are in latents: frames of a chunk, rows and columns of a
tile.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dit.vae import Posterior, VideoVAE
from dit.vae_layers import Stream


@dataclass(frozen=True)
class Span:
    """A stretch of one axis: `inner` is wanted, `outer` is computed; both from start to stop."""

    inner: tuple[int, int]
    outer: tuple[int, int]


def spans(size: int, length: int | None, halo: int) -> list[Span]:
    """Stretches of `length` (None: one of the whole axis) with a halo on both sides, where there is
    more of the axis."""
    step = size if length is None else length
    ends = [(start, min(start + step, size)) for start in range(0, size, step)]
    return [Span((a, b), (max(0, a - halo), min(size, b + halo))) for a, b in ends]


def _check(**parts: int | None) -> None:
    for name, value in parts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}; use 1 or more, or None for all at once")


def encode_in_parts(
    vae: VideoVAE, video: Tensor, *, chunk: int | None = None, tile: int | None = None
) -> Posterior:
    """`VideoVAE.encode`, a part at a time.

    Args:
        video: (b 3 f h w) in [-1, 1].
        chunk: latent frames at once; tile: latent rows and columns at once. None for all of them.
    Raises:
        ValueError: the clip's size does not fit, or a part is empty.
    """
    _check(chunk=chunk, tile=tile)
    c, f, h, w = vae.latent_shape(*video.shape[2:])
    ft, fs = vae.temporal_factor, vae.spatial_factor
    out = torch.empty(2, len(video), c, f, h, w, device=video.device)

    def run(start: int, stop: int, rows: Span, columns: Span, stream: Stream | None) -> None:
        frames = _frames(start, stop, ft)
        window = _window(rows.outer, fs), _window(columns.outer, fs)
        posterior = vae.encode(video[:, :, frames, *window], stream)
        inner = _inner(rows, 1), _inner(columns, 1)
        place = out[:, :, :, start:stop, slice(*rows.inner), slice(*columns.inner)]
        place[0], place[1] = posterior.mean[..., *inner], posterior.std[..., *inner]

    _each_part((f, h, w), chunk, tile, vae.encoder.halo, run)
    return Posterior(*out)


def decode_in_parts(
    vae: VideoVAE, latents: Tensor, *, chunk: int | None = None, tile: int | None = None
) -> Tensor:
    """`VideoVAE.decode`, a part at a time; arguments and errors as for `encode_in_parts`."""
    _check(chunk=chunk, tile=tile)
    f, h, w = latents.shape[2:]
    ft, fs = vae.temporal_factor, vae.spatial_factor
    size = len(latents), 3, 1 + (f - 1) * ft, h * fs, w * fs
    out = torch.empty(size, device=latents.device)

    def run(start: int, stop: int, rows: Span, columns: Span, stream: Stream | None) -> None:
        window = slice(*rows.outer), slice(*columns.outer)
        video = vae.decode(latents[:, :, start:stop, *window], stream)
        frames = _frames(start, stop, ft)
        place = out[:, :, frames, _window(rows.inner, fs), _window(columns.inner, fs)]
        place.copy_(video[..., _inner(rows, fs), _inner(columns, fs)])

    _each_part((f, h, w), chunk, tile, vae.decoder.halo, run)
    return out


def _frames(start: int, stop: int, factor: int) -> slice:
    """The frames of some latent frames, of which the first has one and every other `factor`."""
    return slice(max(0, 1 + (start - 1) * factor), 1 + (stop - 1) * factor)


def _window(span: tuple[int, int], factor: int) -> slice:
    return slice(span[0] * factor, span[1] * factor)


def _inner(span: Span, factor: int) -> slice:
    """What is wanted, counted from where the computed stretch begins."""
    begin = span.outer[0]
    return slice((span.inner[0] - begin) * factor, (span.inner[1] - begin) * factor)


def _each_part(
    size: tuple[int, int, int],
    chunk: int | None,
    tile: int | None,
    halo: int,
    run: Callable[[int, int, Span, Span, Stream | None], None],
) -> None:
    """Calls `run` for the chunks of each tile in turn, which share a stream."""
    f, h, w = size
    for rows in spans(h, tile, halo):
        for columns in spans(w, tile, halo):
            stream = None if chunk is None else Stream()
            for frames in spans(f, chunk, 0):  # the stream is their halo
                run(*frames.inner, rows, columns, stream)
