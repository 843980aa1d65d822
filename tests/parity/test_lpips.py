"""Our perceptual distance against the package of the LPIPS paper's authors."""

import warnings
from pathlib import Path

import pytest
import torch
from torchvision.models import vgg16

from sample.weights import load_perceptual

lpips = pytest.importorskip("lpips")

LINEAR = Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Theirs and ours with the same random VGG, as torchvision saves it, and their linear weights."""
    torch.manual_seed(0)
    with warnings.catch_warnings():  # they call torchvision by an old name
        warnings.simplefilter("ignore")
        theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    # Their slices keep torchvision's numbers. The head may be of any kind.
    state = {
        f"features.{key.split('.', 2)[2]}": value.clone()
        for key, value in theirs.state_dict().items()
        if key.startswith("net.slice")
    }
    with torch.device("meta"):
        names = vgg16(weights=None).state_dict().keys()
    assert {key for key in names if key.startswith("features.")} == state.keys()
    state |= {key: torch.zeros(2) for key in names if key.startswith("classifier.")}
    path = tmp_path_factory.mktemp("lpips") / "vgg16.pth"
    torch.save(state, path)
    return theirs, load_perceptual("vgg16", path, LINEAR)


@pytest.mark.parametrize("size", [(16, 16), (33, 50), (64, 48)])
def test_videos_have_the_distance_of_their_frames(pair, size):
    theirs, ours = pair
    gen = torch.Generator().manual_seed(1)
    first = torch.rand(2, 3, 3, *size, generator=gen) * 2 - 1
    second = (first + 0.5 * torch.randn(first.shape, generator=gen)).clamp(-1, 1)
    with torch.no_grad():
        frames = [theirs(first[:, :, k], second[:, :, k]).flatten() for k in range(3)]
        expected = torch.stack(frames).mean(0)
        found = ours(first, second)
    assert expected.min() > 1e-3
    assert (found - expected).abs().max() <= 1e-5
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_gradients_agree(pair):
    gen = torch.Generator().manual_seed(2)
    first, second = (torch.rand(1, 3, 1, 24, 24, generator=gen) * 2 - 1 for _ in range(2))
    gradients = []
    for distance, drop in zip(pair, (True, False)):
        x = second.clone().requires_grad_()
        distance(*((v[:, :, 0] if drop else v) for v in (first, x))).sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-8)
