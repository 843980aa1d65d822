import copy
import warnings

import pytest
import torch
from torch import nn

from data.randomness import generator
from data.world import make_scene
from dit.objective import FlowMatching
from dit.text import TextConfig, TextEncoder
from dit.transformer import DiT, DiTConfig
from dit.vae import VAEConfig, VideoVAE
from sample.model import Model, ModelInfo


def first_scenes(num, **wanted):
    """The first scenes of a stream whose object has the wanted attributes."""
    options = {"level": 1, "seed": 11, "split": "held-out"}
    options |= {k: wanted.pop(k) for k in list(wanted) if k in ("level", "seed", "split")}
    found, index = [], 0
    while len(found) < num:
        scene = make_scene(index=index, **options)
        if all(getattr(scene.objects[0], name) == value for name, value in wanted.items()):
            found.append(scene)
        index += 1
    return found


@pytest.fixture(scope="session")
def scenes_with():
    return first_scenes


@pytest.fixture(scope="session")
def tiny_model():
    """A text-to-video model of random weights; its VAE only rearranges pixels, so it is exact."""
    torch.manual_seed(0)
    # 2 x 2 x 4 pixels of 3 colours fit into 48 channels, and orthogonal layers lose nothing.
    vae = VideoVAE(VAEConfig(latent_channels=48, widths=(48,), factors=((4, 2),), num_blocks=0))
    with torch.no_grad():
        vae.encoder.head.weight[:48] = torch.eye(48)[:, :, None, None, None]
        vae.decoder.stem.weight.copy_(torch.eye(48)[:, :, None, None, None])
        down = vae.encoder.down[0].weight.view(48, 48)
        vae.decoder.up[0].weight.copy_(down.T.reshape(48, 48, 1, 1, 1))
    text = TextEncoder(TextConfig(context_length=24, width=16, num_layers=1, num_heads=2))
    dit = DiT(
        DiTConfig(
            in_channels=48,
            context_dim=16,
            dim=24,
            num_blocks=1,
            num_heads=2,
            mlp_dim=32,
            patch_size=(1, 4, 4),
        )
    )
    gen = generator(0, "tiny model")
    for part in (text, dit):
        for weight in part.parameters():
            weight.data = 0.1 * torch.randn(weight.shape, generator=gen)
    info = ModelInfo(fps=8.0, num_frames=9, height=32, width=32)
    parts = [part.eval().requires_grad_(False) for part in (vae, dit, text)]
    return Model(parts[0], info, parts[1], parts[2], FlowMatching())


@pytest.fixture(scope="session")
def lossy_model(tiny_model):
    """The VAE of tiny_model alone, without half of what it decodes from."""
    vae = copy.deepcopy(tiny_model.vae)
    with torch.no_grad():
        vae.decoder.stem.weight[24:] = 0
    return Model(vae, tiny_model.info)


@pytest.fixture(scope="session")
def other_model():
    """A VAE with another rule of sizes: 2k + 1 frames, multiples of 3 pixels."""
    torch.manual_seed(1)
    vae = VideoVAE(VAEConfig(latent_channels=8, widths=(8,), factors=((2, 3),), num_blocks=1))
    for weight in vae.parameters():  # residual blocks that do something
        weight.data += 0.2 * torch.randn(weight.shape)
    info = ModelInfo(fps=6.0, num_frames=5, height=36, width=36)
    return Model(vae.eval().requires_grad_(False), info)


class ColourMeans(nn.Module):
    def forward(self, video: torch.Tensor) -> torch.Tensor:
        return video.mean(dim=[2, 3, 4])


@pytest.fixture(scope="session")
def extractor_file(tmp_path_factory):
    """A TorchScript file: from video to the mean of each colour."""
    path = tmp_path_factory.mktemp("extractor") / "colours.pt"
    with warnings.catch_warnings():  # newer versions of torch would have it otherwise
        warnings.simplefilter("ignore")
        torch.jit.script(ColourMeans()).save(path)
    return path
