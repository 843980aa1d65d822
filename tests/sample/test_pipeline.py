"""Prompts to tensors: shapes, seeds, batches, and sizes that do not fit."""

import pytest
import torch

from sample.model import Model
from sample.pipeline import TextToVideo


@pytest.fixture(scope="module")
def pipeline(folder):
    return TextToVideo.from_folder(folder, "cpu")


def test_defaults_are_what_the_model_was_trained_on(pipeline):
    video = pipeline(["a red circle"], steps=2)
    assert video.shape == (1, 3, 5, 16, 16)
    assert video.dtype is torch.float32
    assert video.abs().max() <= 1
    assert video.std() > 1e-3


def test_other_sizes_and_a_single_image(pipeline):
    assert pipeline(["x"], frames=9, height=24, width=32, steps=1).shape == (1, 3, 9, 24, 32)
    assert pipeline(["x"], frames=1, steps=1).shape == (1, 3, 1, 16, 16)


def test_a_sample_depends_on_its_own_seed_alone(pipeline):
    together = pipeline(["a", "b", "c"], steps=3, seeds=[5, 6, 7])
    alone = pipeline(["b"], steps=3, seeds=[6])
    torch.testing.assert_close(together[1:2], alone, atol=2e-2, rtol=0)  # bfloat16 sums differ
    assert torch.equal(pipeline(["b"], steps=3, seeds=[6]), alone)
    assert (pipeline(["b"], steps=3, seeds=[8]) - alone).abs().max() > 0.1


def test_prompt_negative_guidance_and_shift_matter(pipeline):
    base = pipeline(["a red circle"], steps=3)
    for change in ({"guidance": 4.0}, {"negative": "blue"}, {"shift": 1.0}, {"sampler": "heun"}):
        assert (pipeline(["a red circle"], steps=3, **change) - base).abs().max() > 1e-3, change
    assert (pipeline(["two blue squares"], steps=3) - base).abs().max() > 1e-3


@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_ddpm_models(ddpm_folder, sampler):
    video = TextToVideo.from_folder(ddpm_folder, "cpu")(["x"], steps=3, sampler=sampler)
    assert torch.isfinite(video).all()


def test_progress(pipeline):
    seen = []
    pipeline(["x"], steps=3, progress=seen.append)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames": 16}, r"frames=16 does not fit the VAE: it needs 4\*k\+1; use 17 or 13"),
        ({"height": 18}, r"height=18 does not fit the VAE: it needs a multiple of 4; use 20 or 16"),
        ({"width": 20}, r"width=20 does not fit the DiT: it needs a multiple of 8; use 24 or 16"),
        ({"steps": 0}, "steps=0; use 1 or more"),
        ({"sampler": "ddim"}, "does not suit this model's objective; use euler or heun"),
        ({"seeds": [1, 2]}, "2 seeds for 1 prompts"),
    ],
)
def test_mistakes(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(["x"], **arguments)


def test_no_prompts_and_no_dit(pipeline, model):
    with pytest.raises(ValueError, match="no prompts given"):
        pipeline([])
    with pytest.raises(ValueError, match="holds a VAE alone"):
        TextToVideo(Model(model.vae, model.info))
