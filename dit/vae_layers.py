"""The layers of the causal VAE: all see a bounded stretch of space and of the past, and no more."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class Stream:
    """What a network remembers of a clip between one chunk of frames and the next: for every layer
    the last frames that it saw. With it, chunks give what the whole clip gives.

    A stream belongs to one clip (or batch of clips), one direction and one tile.
    """

    def __init__(self) -> None:
        self.begun = False  # whether the clip's first frame has been seen
        self.frames: dict[Any, Tensor] = {}

    def extend(self, layer: nn.Module, x: Tensor, count: int) -> Tensor:
        """x (b c f h w) with the `count` frames before it, which at the clip's start repeat its first;
        remembers those before the next chunk."""
        before = self.frames[layer] if self.begun else _repeat_first(x, count)
        x = torch.cat([before, x], dim=2)
        self.frames[layer] = x[:, :, -count:].clone()  # a view would keep all of x
        return x


def _repeat_first(x: Tensor, count: int) -> Tensor:
    return x[:, :, :1].expand(-1, -1, count, -1, -1)


def _with_past(layer: nn.Module, x: Tensor, stream: Stream | None) -> Tensor:
    """x with the two frames before it."""
    if stream is None:
        return torch.cat([_repeat_first(x, 2), x], dim=2)
    return stream.extend(layer, x, 2)


def space_to_depth(x: Tensor, ft: int, fs: int, *, first: bool = True) -> Tensor:
    """(b c f h w) -> (b c*ft*fs*fs f' h/fs w/fs), f' = 1 + (f - 1) / ft; frame 1 fills its group.

    A later chunk of a clip, `first` false, has f' = f / ft.
    """
    if ft > 1 and first:
        x = torch.cat([_repeat_first(x, ft - 1), x], dim=2)
    return rearrange(x, "b c (f i) (h j) (w k) -> b (c i j k) f h w", i=ft, j=fs, k=fs)


def depth_to_space(x: Tensor, ft: int, fs: int, *, first: bool = True) -> Tensor:
    """The inverse of `space_to_depth`, with the repeats of the first frame dropped."""
    x = rearrange(x, "b (c i j k) f h w -> b c (f i) (h j) (w k)", i=ft, j=fs, k=fs)
    return x[:, :, ft - 1 :] if first else x


def haar_matrix(size: int) -> Tensor:
    """The orthonormal Haar wavelet transform of `size` values (Haar 1910); size is a power of 2.

    Row 0 is the mean times sqrt(size); then come differences, from coarse to fine.
    """
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        coarse = torch.kron(matrix, torch.tensor([[1.0, 1.0]]))
        fine = torch.kron(torch.eye(len(matrix)), torch.tensor([[1.0, -1.0]]))
        matrix = torch.cat([coarse, fine]) / math.sqrt(2)
    return matrix


def haar_basis(channels: int, ft: int, fs: int) -> Tensor:
    """The Haar transform over time, rows and columns of what `space_to_depth` puts in a position, per
    channel: orthogonal (n n), n = channels * ft * fs * fs. Outputs are ordered by band, so that the
    channels' means come first."""
    time, space = haar_matrix(ft), haar_matrix(fs)
    bands = torch.kron(time, torch.kron(space, space))
    basis = torch.kron(torch.eye(channels), bands)
    n = ft * fs * fs
    order = [c * n + band for band in range(n) for c in range(channels)]
    return basis[order]


class Pointwise(nn.Conv3d):
    """A linear map of the channels at each position, orthogonal at first.

    Args:
        basis: an orthogonal matrix that inputs are expressed in first; outputs, with `synthesis`.
            It becomes part of the kernel, and costs nothing.
    """

    basis: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        basis: Tensor | None = None,
        *,
        synthesis: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1)
        nn.init.orthogonal_(self.weight)
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]
        self.register_buffer("basis", basis, persistent=False)
        self.synthesis = synthesis

    def forward(self, x: Tensor) -> Tensor:
        if self.basis is None:
            return super().forward(x)
        weight, bias = self.weight[:, :, 0, 0, 0], self.bias
        if self.synthesis:
            assert bias is not None
            weight, bias = self.basis.T @ weight, self.basis.T @ bias
        else:
            weight = weight @ self.basis
        return F.conv3d(x, weight[:, :, None, None, None], bias)


class Blur(nn.Module):
    """The binomial low-pass [1 2 1] / 4 over rows and columns, and causally over time: taken before a
    reduction and after an enlargement it keeps both from aliasing (Zhang 2019, "Making convolutional
    networks shift-invariant again"). At the border, and before the clip, the outermost value repeats.
    """

    def __init__(self, *, time: bool, space: bool) -> None:
        super().__init__()
        self.time, self.space = time, space

    @property
    def reach(self) -> int:
        """Pixels that it sees in every direction."""
        return int(self.space)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        if self.time:
            x = _with_past(self, x, stream)
            x = (x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]) / 4
        if self.space:
            x = F.pad(x, (1, 1, 1, 1, 0, 0), mode="replicate")
            x = (x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]) / 4
            x = (x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]) / 4
        return x


class ChannelNorm(nn.Module):
    """Divides each position of (b c f h w) by the RMS of its channels, which float32 computes."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=dtype)
        return x * (x.shape[1] ** 0.5 / (norm + 1e-4)).to(x.dtype)


class CausalConv(nn.Conv3d):
    """3x3x3 convolution that sees two earlier frames; before the clip, its first frame repeats."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=(0, 1, 1))

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        if stream is None and x.shape[2] == 1:
            # All three frames are one, so their kernels add up: a third of the work for images.
            weight = self.weight.sum(dim=2, keepdim=True)
            return F.conv3d(x, weight, self.bias, padding=(0, 1, 1))
        return super().forward(_with_past(self, x, stream))


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), the last convolution starting at zero."""

    reach = 2  # pixels that it sees in every direction: one per convolution

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm_1, self.conv_1 = ChannelNorm(), CausalConv(channels, channels)
        self.norm_2, self.conv_2 = ChannelNorm(), CausalConv(channels, channels)
        nn.init.zeros_(self.conv_2.weight)
        nn.init.zeros_(self.conv_2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        y = self.conv_1(F.silu(self.norm_1(x)), stream)
        return x + self.conv_2(F.silu(self.norm_2(y)), stream)
