"""Whole samples against WanPipeline and WanImageToVideoPipeline: same noise and prompts, in float32."""

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline

from sample.pipeline import TextToVideo

PROMPT, NEGATIVE = "a red circle moving left", "blurry"
SIZE = {"height": 32, "width": 32, "num_frames": 5}


@pytest.fixture(scope="module")
def pipelines(wan_folders):
    made = {}

    def pair(kind, scheduler):
        if (kind, scheduler) not in made:
            theirs, ours = wan_folders(kind, scheduler)
            reference = WanPipeline.from_pretrained(theirs)
            reference.set_progress_bar_config(disable=True)
            pipeline = TextToVideo.from_folder(ours, "cpu", dtype=torch.float32)
            made[kind, scheduler] = reference, pipeline
        return made[kind, scheduler]

    return pair


def start(pipeline, b=1):
    torch.manual_seed(7)
    return torch.randn(b, *pipeline.latent_shape(5, 32, 32))


def assert_close(got, expected):
    """Within 1e-4, of latents that are about as large as they should be."""
    assert 0.3 < expected.std() < 5
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scheduler", ["unipc", "euler"])
@pytest.mark.parametrize("kind", ["t2v", "ti2v", "a14b"])
@pytest.mark.parametrize("steps", [3, 20])
def test_latents(pipelines, kind, scheduler, steps):
    theirs, ours = pipelines(kind, scheduler)
    noise = start(ours)
    scales = {"guidance_scale": 4.0}
    if kind == "a14b":
        scales["guidance_scale_2"] = 2.5
    expected = theirs(
        PROMPT,
        NEGATIVE,
        latents=noise,
        num_inference_steps=steps,
        output_type="latent",
        **SIZE,
        **scales,
    ).frames
    got = ours(
        [PROMPT],
        negative=NEGATIVE,
        noise=noise,
        steps=steps,
        guidance=4.0,
        guidance_low=scales.get("guidance_scale_2"),
        output="latents",
    )
    assert_close(got, expected)
    assert (got - noise).abs().max() > 0.3


@pytest.mark.parametrize("scheduler", ["unipc", "euler"])
def test_a_given_first_frame(pipelines, scheduler):
    reference, ours = pipelines("ti2v", scheduler)
    theirs = WanImageToVideoPipeline(
        **{
            **{k: v for k, v in reference.components.items() if "image" not in k},
            "expand_timesteps": True,
        }
    )
    theirs.set_progress_bar_config(disable=True)
    image, noise = torch.rand(1, 3, 32, 32), start(ours)
    expected = theirs(
        image,  # in [0, 1]
        PROMPT,
        NEGATIVE,
        latents=noise,
        num_inference_steps=5,
        guidance_scale=3.0,
        output_type="latent",
        **SIZE,
    ).frames
    settings = dict(negative=NEGATIVE, noise=noise, steps=5, guidance=3.0, output="latents")
    got = ours([PROMPT], image=image[0] * 2 - 1, **settings)
    assert_close(got, expected)
    encoded = ours.vae.encode(image[:, :, None] * 2 - 1).mean
    torch.testing.assert_close(got[:, :, :1], encoded, atol=1e-5, rtol=0)
    without = ours([PROMPT], **settings)
    assert (without[:, :, 1:] - got[:, :, 1:]).abs().max() > 0.1  # it steers the other frames


def test_video_and_the_usual_steps_and_guidance(pipelines):
    """Nothing given but the noise: WanPipeline's own defaults, but for the number of steps."""
    theirs, ours = pipelines("t2v", "unipc")
    noise = start(ours)
    expected = theirs(PROMPT, latents=noise, output_type="pt", num_inference_steps=6, **SIZE).frames
    assert (ours.sampling.steps, ours.sampling.guidance) == (50, 5.0)
    got = ours([PROMPT], noise=noise, steps=6)
    video = got.transpose(1, 2) / 2 + 0.5  # theirs is (b f c h w) in [0, 1]
    assert expected.std() > 1e-3
    torch.testing.assert_close(video, expected, atol=1e-4, rtol=0)


def test_prompt_states_of_two_prompts_without_guidance(pipelines):
    """Precomputed states, as both pipelines take them."""
    theirs, ours = pipelines("t2v", "euler")
    states = torch.zeros(2, 512, 16)
    states[:, :9] = torch.randn(2, 9, 16)
    noise = start(ours, 2)
    expected = theirs(
        prompt_embeds=states,
        latents=noise,
        guidance_scale=1.0,
        num_inference_steps=4,
        output_type="latent",
        **SIZE,
    ).frames
    got = ours((states, None), noise=noise, guidance=1.0, steps=4, output="latents")
    assert_close(got, expected)
    assert ours.work.num_evaluations == 4 * 2


def test_the_boundary_falls_on_the_same_steps(pipelines):
    """Which expert is asked at which timestep, for every step of a long sampling."""
    theirs, ours = pipelines("a14b", "unipc")
    asked = {"theirs": [], "ours": []}

    def listen(expert, who, number):
        def hook(_, args, kwargs):
            t = kwargs["timestep"] if who == "theirs" else 1000 * args[1]
            asked[who].append((number, round(t[0].item(), 3)))

        return expert.register_forward_pre_hook(hook, with_kwargs=True)

    hooks = [
        listen(expert, who, number)
        for who, experts in (
            ("theirs", (theirs.transformer, theirs.transformer_2)),
            ("ours", ours.experts),
        )
        for number, expert in enumerate(experts)
    ]
    noise = start(ours)
    theirs(
        PROMPT,
        latents=noise,
        guidance_scale=1.0,
        num_inference_steps=30,
        output_type="latent",
        **SIZE,
    )
    ours([PROMPT], noise=noise, guidance=1.0, steps=30, output="latents")
    for hook in hooks:
        hook.remove()
    assert asked["ours"] == asked["theirs"]
    assert {number for number, _ in asked["ours"]} == {0, 1}
    assert len(asked["ours"]) == 30
