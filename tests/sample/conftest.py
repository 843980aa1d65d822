import copy
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from data.video import write_video
from dit.objective import DDPM, FlowMatching, Objective
from dit.text import TextConfig, TextEncoder
from dit.transformer import DiT, DiTConfig
from dit.vae import VAEConfig, VideoVAE
from sample.model import Model, ModelInfo, save_model
from sample.pipeline import TextToVideo
from train.cli import main


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
    changes |= {"references": 2, "given_noise": 0.1}
    model.info = model.info.model_copy(update=changes)
    path = tmp_path_factory.mktemp("models") / "tasks"
    save_model(path, model)
    return path


@pytest.fixture(scope="module")
def pipeline(tasks_folder):
    return TextToVideo.from_folder(tasks_folder, "cpu", dtype=torch.float32)


def write_media(folder: Path) -> None:
    """long.mp4 of 14 frames, other.mp4 of 9 and short.mp4 of 2, of 16x16 at 8 fps; wide.mp4 of another
    size and rate; pictures and masks."""
    rng = np.random.default_rng(0)
    for name, frames in (("long", 14), ("other", 9), ("short", 2)):
        colour = rng.integers(40, 200, 3)
        clip = np.broadcast_to(colour, (frames, 16, 16, 3)).astype(np.uint8).copy()
        for k in range(frames):
            clip[k, 4:8, k % 12 : k % 12 + 4] = 255 - colour
        write_video(folder / f"{name}.mp4", clip, fps=8)
    write_video(folder / "wide.mp4", rng.integers(0, 255, (24, 16, 48, 3), dtype=np.uint8), fps=16)
    for name, size in (("a", (16, 16)), ("b", (16, 16)), ("wide", (48, 16))):
        picture = Image.new("RGB", size, tuple(map(int, rng.integers(0, 255, 3))))
        picture.save(folder / f"{name}.png")
    pictures = [Image.new("RGB", (16, 16), (60 * k, 0, 0)) for k in range(3)]
    pictures[0].save(folder / "moves.webp", save_all=True, append_images=pictures[1:])
    (folder / "text.mp4").write_text("no video")
    mask = np.zeros((14, 16, 16, 3), np.uint8)
    mask[:, :, 8:] = 255
    write_video(folder / "mask.mp4", mask, fps=8)
    Image.fromarray(mask[0]).save(folder / "mask.png")
    Image.fromarray(0 * mask[0]).save(folder / "black.png")


@pytest.fixture(scope="session")
def smooth_videos():
    """What makes two videos (3 14 height width) of slow changes."""

    def make(height, width):
        generator = torch.Generator().manual_seed(3)
        low = torch.rand(2, 3, 4, 4, 4, generator=generator)
        size = (14, height, width)
        return list(torch.nn.functional.interpolate(low, size, mode="trilinear") * 1.4 - 0.7)

    return make


@pytest.fixture
def frames_of():
    """What gives all frames of a video, uint8 (f h w 3)."""

    def read(path):
        with av.open(str(path)) as container:
            return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])

    return read


@pytest.fixture
def zoetrope(tmp_path, monkeypatch, capsys):
    """`zoetrope sample MODEL ... --steps 2` in a folder with media; status, output and errors."""
    monkeypatch.chdir(tmp_path)
    write_media(tmp_path)

    def run(model, *arguments, prompt="a circle"):
        with pytest.raises(SystemExit) as stopped:
            main(["sample", str(model), prompt, "--steps", "2", *map(str, arguments)])
        return stopped.value.code, *capsys.readouterr()

    return run
