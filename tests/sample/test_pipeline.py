"""Prompts to tensors: shapes, seeds, batches, and sizes that do not fit."""

from pathlib import Path

import pytest
import torch

from dit.guidance import GuidanceConfig
from dit.vae import VideoVAE
from sample.lora import as_loras
from sample.model import Model, SamplingDefaults, load_model
from sample.pipeline import TextToVideo, Work


@pytest.fixture(scope="module")
def pipeline(folder):
    return TextToVideo.from_folder(folder, "cpu")


def test_defaults_are_what_the_model_was_trained_on(pipeline):
    video = pipeline(["a red circle"], steps=2)
    assert video.shape == (1, 3, 5, 16, 16)
    assert video.dtype is torch.float32
    assert video.abs().max() <= 1
    assert video.std() > 1e-3


def test_one_prompt_needs_no_list(pipeline):
    assert torch.equal(pipeline("a red circle", steps=2), pipeline(["a red circle"], steps=2))


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


def test_matrices_held_in_half_precision_give_the_very_same_sample(pipeline, folder):
    """`from_folder` keeps the blocks' matrices in bfloat16, to which autocast would convert them."""
    whole = TextToVideo(load_model(folder), "cpu")
    assert pipeline.dit.blocks[0].self_attention.q.weight.dtype is torch.bfloat16
    assert whole.dit.blocks[0].self_attention.q.weight.dtype is torch.float32
    assert torch.equal(pipeline(["a"], steps=2), whole(["a"], steps=2))


def test_float32_is_no_autocast(folder):
    exact = TextToVideo.from_folder(folder, "cpu", dtype=torch.float32)
    seen = []
    exact.dit.head.register_forward_hook(lambda _, inputs, out: seen.append(out.dtype))
    assert torch.isfinite(exact(["a"], steps=1)).all()
    assert set(seen) == {torch.float32}


def test_the_vae_works_in_float32(pipeline):
    assert pipeline.dtype is torch.bfloat16
    latents = pipeline(["x"], steps=2, output="latents")
    with torch.no_grad():
        expected = pipeline.vae.decode(latents)
    video = pipeline(["x"], steps=2)
    torch.testing.assert_close(video, expected.clamp(-1, 1), atol=1e-5, rtol=1e-5)


def test_large_clips_are_decoded_in_parts(pipeline, monkeypatch):
    size = {"frames": 17, "height": 96, "width": 64}
    whole = pipeline(["x"], steps=1, **size)
    seen, decode = [], VideoVAE.decode

    def note(self, latents, stream):
        seen.append(latents.shape[2:])
        return decode(self, latents, stream)

    monkeypatch.setattr(VideoVAE, "decode", note)
    monkeypatch.setattr("sample.pipeline.DECODED_PIXELS", 4096)
    parts = pipeline(["x"], steps=1, **size)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    assert len(seen) > 10
    assert max(f * h * w for f, h, w in seen) < 17 * 96 * 64 / 4**3 / 4


def test_latents_noise_and_states(pipeline):
    """What a call draws and encodes itself can be given, and comes out the same."""
    shape = pipeline.latent_shape(5, 16, 16)
    latents = pipeline(["a", "b"], steps=2, output="latents")
    assert latents.shape == (2, *shape)
    assert latents.std() > 0.1
    states, mask = pipeline.text_states(["a", "b"])
    away = pipeline.text_states([""])
    again = pipeline((states, mask), negative=away, steps=2, output="latents")
    assert torch.equal(again, latents)
    noise = torch.randn(2, *shape)
    first = pipeline(["a", "b"], steps=2, output="latents", noise=noise)
    assert torch.equal(pipeline(["a", "b"], steps=2, output="latents", noise=noise), first)
    assert (first - latents).abs().max() > 0.1


def test_texts_are_encoded_once(folder):
    pipeline, encoded = TextToVideo.from_folder(folder, "cpu"), []
    tokenize = pipeline.text.tokenize
    pipeline.text.tokenize = lambda captions: (encoded.extend(captions), tokenize(captions))[1]
    for _ in range(2):
        pipeline(["a", "b", "a"], steps=1)
    assert encoded == ["a", "b", ""]
    pipeline.text_states([str(n) for n in range(100)])
    assert len(pipeline._texts) == 64
    pipeline(["a"], steps=1, guidance=1.0)
    assert encoded[-1] == "a"  # forgotten since; and no negative text without guidance


def test_work_is_counted(pipeline):
    pipeline(["a", "b"], steps=3)
    assert pipeline.work == Work(num_evaluations=12, num_skipped=0)
    pipeline(["a", "b"], steps=3, guidance=1.0)
    assert pipeline.work == Work(num_evaluations=6, num_skipped=0)
    pipeline(["a", "b"], steps=4, guidance=1.0, reuse=5.0)
    assert pipeline.work == Work(num_evaluations=8, num_skipped=6)


def test_a_models_own_way_of_sampling(folder):
    model = load_model(folder)
    usual = TextToVideo(model, "cpu")(["a"], steps=2, guidance=3.0, sampler="heun")
    model.sampling = SamplingDefaults(sampler="heun", steps=2, guidance=3.0)
    assert torch.equal(TextToVideo(model, "cpu")(["a"]), usual)


def test_two_experts_share_the_noise_levels(experts_folder):
    pipeline = TextToVideo.from_folder(experts_folder, "cpu")
    seen = []
    for number, expert in enumerate(pipeline.experts):
        expert.register_forward_pre_hook(
            lambda _, args, number=number: seen.append((number, args[1].max().item()))
        )
    pipeline(["a"], steps=6, guidance=GuidanceConfig(kind="cfg_zero", scale=2.0))
    assert all((number == 0) == (t >= 0.7) for number, t in seen)
    assert {number for number, _ in seen} == {0, 1}
    assert len(seen) == 5  # CFG-Zero* stands still at the first noise level, and only there


def test_a_held_first_frame_is_seen_clean(image_folder):
    pipeline = TextToVideo.from_folder(image_folder, "cpu")
    seen = []
    pipeline.dit.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    image = torch.rand(3, 16, 16) * 2 - 1
    latents = pipeline(["a", "b"], image=image, steps=3, output="latents")
    assert torch.equal(latents[0, :, 0], latents[1, :, 0])
    for x, t in seen:
        assert (t[:, 0] == 0).all()
        assert (t[:, 1:] > 0.5).all()
        torch.testing.assert_close(x[:2, :, 0], latents[:, :, 0], atol=1e-6, rtol=0)
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames": 0}, "frames=0 does not fit the VAE"),
        ({"frames": 16}, r"frames=16 does not fit the VAE: it needs 4\*k\+1; use 17 or 13"),
        ({"height": 18}, r"height=18 does not fit the VAE: it needs a multiple of 4; use 20 or 16"),
        ({"width": 20}, r"width=20 does not fit the DiT: it needs a multiple of 8; use 24 or 16"),
        ({"steps": 0}, "steps=0; use 1 or more"),
        ({"sampler": "ddim"}, "does not suit this model's objective; use euler, heun"),
        ({"seeds": [1, 2]}, "2 seeds for 1 prompts"),
        ({"noise": torch.zeros(1, 4, 2, 4, 5)}, r"noise has shape \(1, 4, 2, 4, 5\); expected"),
        ({"negative": (torch.zeros(1, 3, 8), None)}, r"text states have shape \(1, 3, 8\)"),
        ({"negative": (torch.zeros(2, 3, 16), None)}, "2 negative texts for 1 prompts"),
        (
            {"negative": (torch.zeros(1, 3, 16), torch.ones(1, 2, dtype=torch.bool))},
            r"text mask has shape \(1, 2\); expected \(1, 3\)",
        ),
        (
            {"image": torch.zeros(3, 16, 16)},
            "a given first frame needs a model that was trained for it",
        ),
        ({"guidance_low": 2.0}, "guidance_low=2: this model has no low-noise expert"),
    ],
)
def test_mistakes(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(["x"], **arguments)


def test_an_image_of_another_size(image_folder):
    pipeline = TextToVideo.from_folder(image_folder, "cpu")
    with pytest.raises(
        ValueError, match=r"a given picture has shape \(3, 8, 8\); expected \(3 16 16\)"
    ):
        pipeline(["x"], image=torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match=r"is ndarray; expected a tensor \(3 16 16\) in \[-1, 1\]"):
        pipeline(["x"], image=torch.zeros(3, 16, 16).numpy())


def test_no_prompts_and_no_dit(pipeline, model):
    with pytest.raises(ValueError, match="no prompts given"):
        pipeline([])
    with pytest.raises(ValueError, match="holds a VAE alone"):
        TextToVideo(Model(model.vae, model.info))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a/lora", [(Path("a/lora"), 1.0)]),
        (Path("a/lora"), [(Path("a/lora"), 1.0)]),
        (["a:0.5", ("b", 2)], [(Path("a"), 0.5), (Path("b"), 2.0)]),
        ((), []),
    ],
)
def test_ways_to_give_loras(given, expected):
    assert as_loras(given) == expected


def test_a_lora_that_is_not_there(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="lora"):
        TextToVideo.from_folder(folder, "cpu", lora=str(tmp_path / "lora"))
