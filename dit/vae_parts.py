"""Large clips through a VAE in parts: chunks of frames, tiles of the picture.

A chunk takes over what the chunk before it left in the causal convolutions. A tile is computed with a
halo as wide as the network sees, which is cut off again; both give what the whole clip gives. Where
that costs too much, or the network sees everything, tiles may instead overlap by less and be blended,
which is close and not equal: `blend_psnr` says how close. Memory beyond the clip itself and its
latents depends on the part alone. Sizes of parts are in latents: frames of a chunk, rows and columns
of a tile.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dit.vae import VAE, Posterior
from dit.vae_layers import Stream


@dataclass(frozen=True)
class Span:
    """A stretch of one axis, in latents.

    `outer` is computed and `inner` is wanted, both from start to stop. Of `inner`, the first `before`
    and the last `after` are shared with the neighbours, and blended.
    """

    inner: tuple[int, int]
    outer: tuple[int, int]
    before: int = 0
    after: int = 0

    def weights(self, factor: int, device: torch.device) -> Tensor:
        """Of the wanted values, `factor` to a latent; those of two neighbours add up to 1."""
        start, stop = self.inner
        weights = torch.ones((stop - start) * factor, device=device)
        if self.before:
            n = self.before * factor
            weights[:n] = (torch.arange(n, device=device) + 0.5) / n
        if self.after:
            n = self.after * factor
            weights[-n:] = ((torch.arange(n, device=device) + 0.5) / n).flip(0)
        return weights


def spans(size: int, length: int | None, halo: int) -> list[Span]:
    """Stretches of `length` (None: one of the whole axis) with a halo on both sides, where there is
    more of the axis."""
    step = size if length is None else length
    ends = [(start, min(start + step, size)) for start in range(0, size, step)]
    return [Span((a, b), (max(0, a - halo), min(size, b + halo))) for a, b in ends]


def blended_spans(size: int, length: int | None, overlap: int) -> list[Span]:
    """Stretches of `length`, each of which shares `overlap` with the one before it; the last one may
    be shorter."""
    if length is None or length >= size:
        return [Span((0, size), (0, size))]
    starts = range(0, size - overlap, length - overlap)
    found = []
    for start in starts:
        stop = min(start + length, size)
        after = overlap if stop < size else 0
        found.append(Span((start, stop), (start, stop), overlap if start else 0, after))
    return found


def encode_in_parts(
    vae: VAE,
    video: Tensor,
    *,
    chunk: int | None = None,
    tile: int | None = None,
    overlap: int | None = None,
) -> Posterior:
    """`VAE.encode`, a part at a time.

    Args:
        video: (b 3 f h w) in [-1, 1].
        chunk: latent frames at once; tile: latent rows and columns at once. None for all of them.
        overlap: latents that neighbouring tiles share and blend; None for the exact result.
    Raises:
        ValueError: the clip's size does not fit, a part is empty, or the VAE cannot work in such
            parts.
    """
    c, f, h, w = vae.latent_shape(*video.shape[2:])
    halo = _halo(vae, 0, chunk, tile, overlap)
    ft, fs = vae.temporal_factor, vae.spatial_factor
    out = torch.zeros(2, len(video), c, f, h, w, device=video.device)

    def run(start: int, stop: int, rows: Span, columns: Span, stream: Stream | None) -> None:
        frames = _frames(start, stop, ft)
        window = _window(rows.outer, fs), _window(columns.outer, fs)
        posterior = vae.encode(video[:, :, frames, *window], stream)
        inner = _inner(rows, 1), _inner(columns, 1)
        weights = _weights(rows, columns, 1, video.device)
        place = out[:, :, :, start:stop, slice(*rows.inner), slice(*columns.inner)]
        place[0] += weights * posterior.mean[..., *inner]
        place[1] += weights * posterior.std[..., *inner]

    _each_part(vae, (f, h, w), chunk, _tiles(h, w, tile, halo, overlap), run)
    return Posterior(*out)


def decode_in_parts(
    vae: VAE,
    latents: Tensor,
    *,
    chunk: int | None = None,
    tile: int | None = None,
    overlap: int | None = None,
) -> Tensor:
    """`VAE.decode`, a part at a time; arguments and errors as for `encode_in_parts`."""
    halo = _halo(vae, 1, chunk, tile, overlap)
    f, h, w = latents.shape[2:]
    ft, fs = vae.temporal_factor, vae.spatial_factor
    size = len(latents), 3, 1 + (f - 1) * ft, h * fs, w * fs
    out = torch.zeros(size, device=latents.device)

    def run(start: int, stop: int, rows: Span, columns: Span, stream: Stream | None) -> None:
        window = slice(*rows.outer), slice(*columns.outer)
        video = vae.decode(latents[:, :, start:stop, *window], stream)
        inner = video[..., _inner(rows, fs), _inner(columns, fs)]
        place = out[:, :, _frames(start, stop, ft), _window(rows.inner, fs)]
        place[..., _window(columns.inner, fs)] += inner * _weights(rows, columns, fs, out.device)

    _each_part(vae, (f, h, w), chunk, _tiles(h, w, tile, halo, overlap), run)
    return out


def blend_psnr(
    vae: VAE, latents: Tensor, *, tile: int, overlap: int, whole: Tensor | None = None
) -> Tensor:
    """How close blended tiles come to the whole: PSNR in dB per clip (b,), of decoded video in
    [-1, 1]; infinite where they are equal.

    Args:
        latents: normalised, (b c f h w); tile, overlap: see `encode_in_parts`.
        whole: what `VAE.decode` makes of the latents, if that is known already.
    """
    whole = vae.decode(latents) if whole is None else whole
    blended = decode_in_parts(vae, latents, tile=tile, overlap=overlap)
    error = blended.float().clamp(-1, 1) - whole.float().clamp(-1, 1)
    return -10 * torch.log10(error.square().flatten(1).mean(1).double() / 4)


def _halo(
    vae: VAE, direction: int, chunk: int | None, tile: int | None, overlap: int | None
) -> int:
    """The halo of exact tiles: the encoder's for direction 0, the decoder's for 1."""
    for name, value in (("chunk", chunk), ("tile", tile)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}; use 1 or more, or None for all at once")
    if overlap is not None:
        if tile is None:
            raise ValueError(f"overlap={overlap} is of tiles; give their size too")
        if not 0 <= 2 * overlap <= tile:
            raise ValueError(
                f"overlap={overlap} of tiles of {tile}; use 0 to {tile // 2}, half a tile"
            )
        return 0
    if tile is None:
        return 0
    if vae.halos is None:
        raise ValueError(
            f"{type(vae).__name__} sees the whole picture, so no tiles give its exact result; give an "
            "overlap, for tiles that are blended"
        )
    return vae.halos[direction]


def _tiles(
    h: int, w: int, tile: int | None, halo: int, overlap: int | None
) -> list[tuple[Span, Span]]:
    """Rows and columns of each tile."""
    if overlap is not None:
        rows, columns = (blended_spans(size, tile, overlap) for size in (h, w))
    else:
        rows, columns = (spans(size, tile, halo) for size in (h, w))
    return [(a, b) for a in rows for b in columns]


def _weights(rows: Span, columns: Span, factor: int, device: torch.device) -> Tensor:
    return rows.weights(factor, device)[:, None] * columns.weights(factor, device)


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
    vae: VAE,
    size: tuple[int, int, int],
    chunk: int | None,
    tiles: list[tuple[Span, Span]],
    run: Callable[[int, int, Span, Span, Stream | None], None],
) -> None:
    """Calls `run` for the chunks of each tile in turn, which share a stream."""
    for rows, columns in tiles:
        stream = None if chunk is None else vae.new_stream()
        for frames in spans(size[0], chunk, 0):  # the stream is their halo
            run(*frames.inner, rows, columns, stream)
