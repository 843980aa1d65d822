"""How different two videos look: distance between features of a frozen picture network (LPIPS)."""

from __future__ import annotations

import difflib
from typing import Any

import timm
import torch
from einops import rearrange
from torch import Tensor, nn

_EPSILON = 1e-10  # LPIPS's: keeps a position without any feature at zero


class PerceptualDistance(nn.Module):
    """Distance between frames in the feature spaces of a picture classifier (Zhang et al. 2018, eq. 1).

    The network is one of timm's, of any weights until some are loaded (`sample.weights.load_perceptual`
    does). Its features are taken where their size halves next; of a VGG that is LPIPS's relu1_2 to
    relu5_3. With `learned`, the weights of the channels in `linear` are LPIPS's for that network, not
    negative; without, all channels weigh the same (their mean) and nothing but the classifier is
    needed. Everything is frozen and stays in eval mode; gradients flow to the videos alone.

    Args:
        backbone: timm's name of a convolutional network, such as vgg16 or resnet18.
        learned: whether there are weights per channel; ones until loaded.
    Raises:
        ValueError: timm has no such network, or it does not give feature maps of any picture size.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: str, *, learned: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        config, taps = _describe(backbone)
        self.net = timm.create_model(
            backbone, pretrained=False, features_only=True, out_indices=taps
        )
        info: Any = self.net.feature_info
        self.channels: list[int] = info.channels()
        self.min_size: int = max(info.reduction())  # pixels: one position in the deepest features
        # From [-1, 1] to what the classifier was trained on, which is given for [0, 1].
        for name, offset in (("mean", 1.0), ("std", 0.0)):
            values = [2 * value - offset for value in config[name]]
            buffer = torch.tensor(values, device="cpu").view(3, 1, 1)
            self.register_buffer(name, buffer, persistent=False)
        weights = [nn.Parameter(torch.ones(c)) for c in self.channels] if learned else []
        self.linear = nn.ParameterList(weights)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> PerceptualDistance:
        """Always eval mode: batch statistics would make a distance depend on its neighbours."""
        return super().train(False)

    def features(self, frames: Tensor) -> list[Tensor]:
        """Features of frames (n 3 h w) in [-1, 1], of length 1 at each position, (n c h' w') each."""
        normalised = (frames.float() - self.mean) / self.std
        maps = self.net(normalised)
        return [m / (torch.linalg.vector_norm(m, dim=1, keepdim=True) + _EPSILON) for m in maps]

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """The distance of each pair of videos, in float32 whatever autocast says.

        Args:
            first, second: alike, (b 3 f h w) in [-1, 1].
        Returns:
            (b,), 0 for equal videos: the mean over frames of the sum over stages of the mean over
            positions of weighted squared differences.
        Raises:
            ValueError: shapes differ or are no such videos, or frames are too small.
        """
        self._check(first, second)
        frames = first.shape[2]
        device = first.device.type  # meta, where runs are counted, has no autocast to be disabled
        with torch.autocast("cpu" if device == "meta" else device, enabled=False):
            pair = [
                self.features(rearrange(v, "b c f h w -> (b f) c h w")) for v in (first, second)
            ]
            total = first.new_zeros(first.shape[0] * frames, dtype=torch.float32)
            for stage, (a, b) in enumerate(zip(*pair)):
                squares = (a - b).square().mean(dim=(2, 3))  # (b f) c
                total = total + (squares @ self.linear[stage] if self.linear else squares.mean(1))
        return rearrange(total, "(b f) -> b f", f=frames).mean(1)

    def _check(self, first: Tensor, second: Tensor) -> None:
        if first.shape != second.shape or first.ndim != 5 or first.shape[1] != 3:
            raise ValueError(
                f"got videos of shapes {tuple(first.shape)} and {tuple(second.shape)}, expected two "
                "alike (b 3 f h w)"
            )
        h, w = first.shape[3:]
        if min(h, w) < self.min_size:
            raise ValueError(
                f"got frames of {h}x{w}, too small for the perceptual distance: {self.backbone} needs "
                f"at least {self.min_size}x{self.min_size}; use larger frames or another backbone"
            )


def _describe(backbone: str) -> tuple[dict[str, Any], tuple[int, ...]]:
    """What timm says of a network's pictures, and which of its feature maps are compared."""
    if not timm.is_model(backbone):
        close = difflib.get_close_matches(backbone, timm.list_models(), n=3)
        nearest = f"the nearest are {', '.join(close)}" if close else "vgg16 is LPIPS's"
        raise ValueError(f"backbone={backbone}: timm has no such network; {nearest}")
    try:
        with torch.device("meta"):
            whole: Any = timm.create_model(backbone, pretrained=False)
            net: Any = timm.create_model(backbone, pretrained=False, features_only=True)
    except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"backbone={backbone} gives no feature maps ({reason}); use a convolutional network such "
            "as vgg16"
        ) from None
    config = whole.pretrained_cfg
    # Networks for pictures of one size, and those with channels last, are of attention.
    if config.get("fixed_input_size") or getattr(net, "output_fmt", None) == "NHWC":
        raise ValueError(
            f"backbone={backbone} takes pictures of one size only; use a convolutional network such as "
            "vgg16"
        )
    # timm adds the last pooling of a VGG, whose values relu5_3 has already.
    names = net.feature_info.module_name()
    pools = [isinstance(getattr(net, name.replace(".", "_"), None), nn.MaxPool2d) for name in names]
    return config, tuple(i for i, pool in enumerate(pools) if not pool)
