import pytest
import torch

from dit.transformer import DiT, DiTConfig
from dit.vae import VAEConfig, VideoVAE


def randomise(module: torch.nn.Module, seed: int = 0, std: float = 0.1) -> torch.nn.Module:
    """Replaces every zero-initialised parameter, without which a comparison compares zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.eq(0).all():
                parameter.normal_(0, std, generator=generator)
    return module


@pytest.fixture
def dit() -> DiT:
    torch.manual_seed(0)
    config = DiTConfig(
        in_channels=4, context_dim=12, dim=48, num_blocks=2, num_heads=4, mlp_dim=96, freq_dim=32
    )
    return randomise(DiT(config)).eval()


@pytest.fixture
def vae() -> VideoVAE:
    torch.manual_seed(0)
    config = VAEConfig(latent_channels=4, widths=(8, 16, 16), factors=((1, 2), (2, 2), (2, 1)))
    return randomise(VideoVAE(config)).eval()
