import copy

import pytest
import torch

from dit.objective import DDPM, FlowMatching, Objective
from dit.text import TextConfig, TextEncoder
from dit.transformer import DiT, DiTConfig
from dit.vae import VAEConfig, VideoVAE
from sample.model import Model, ModelInfo, save_model


def make_model(objective: Objective | None = None) -> Model:
    """A tiny random model of 5 frames of 16x16 that says something for every input."""
    torch.manual_seed(0)
    vae = VideoVAE(VAEConfig(latent_channels=4, widths=(8, 8), factors=((2, 2), (2, 2))))
    text = TextEncoder(TextConfig(context_length=16, width=16, num_layers=1, num_heads=2))
    dit = DiT(
        DiTConfig(
            in_channels=4,
            context_dim=16,
            dim=24,
            num_blocks=2,
            num_heads=2,
            mlp_dim=48,
            freq_dim=32,
        )
    )
    with torch.no_grad():
        for parameter in dit.parameters():
            if parameter.eq(0).all():
                parameter.normal_(0, 0.3)
    info = ModelInfo(fps=8, num_frames=5, height=16, width=16, provenance={"step": 3})
    return Model(vae, info, dit, text, objective or FlowMatching(shift=3.0))


@pytest.fixture
def model() -> Model:
    return make_model()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "flow"
    save_model(path, make_model())
    return path


@pytest.fixture(scope="session")
def ddpm_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "ddpm"
    save_model(path, make_model(DDPM()))
    return path


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """A model that says it knows given first frames."""
    model = make_model()
    model.info = model.info.model_copy(update={"image_to_video": True})
    path = tmp_path_factory.mktemp("models") / "image"
    save_model(path, model)
    return path


@pytest.fixture(scope="session")
def experts_folder(tmp_path_factory):
    """A model with a second DiT for t below 0.7."""
    model = make_model()
    assert model.dit is not None
    model.dit_low_noise, model.expert_boundary = copy.deepcopy(model.dit), 0.7
    with torch.no_grad():
        model.dit_low_noise.head.weight.mul_(-1)
    path = tmp_path_factory.mktemp("models") / "experts"
    save_model(path, model)
    return path


@pytest.fixture(scope="session")
def tasks_folder(tmp_path_factory):
    """A model of 9 frames, 3 latent ones, that says it was given everything there is."""
    model = make_model()
    tasks = ("text", "image", "first", "last", "keyframe", "random", "sides", "window")
    changes = {"num_frames": 9, "tasks": tasks, "sizes": ((9, 16, 16), (17, 16, 16))}
    model.info = model.info.model_copy(update={**changes, "references": 2})
    path = tmp_path_factory.mktemp("models") / "tasks"
    save_model(path, model)
    return path
