"""The one call from Python: what `zoetrope sample` does, with tensors."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from data.video import to_uint8, write_video
from sample.generate import generate
from sample.media import read_video
from sample.options import OutsideTraining
from sample.pipeline import TextToVideo

QUICK = {"steps": 2, "seed": 5}
pytestmark = pytest.mark.filterwarnings("ignore::sample.options.OutsideTraining")


@pytest.fixture(scope="module")
def videos(smooth_videos):
    return smooth_videos(16, 24)


@pytest.fixture
def size():
    return {"height": 16, "width": 24}


def test_given_frames_are_in_the_result_bit_for_bit(pipeline, videos, size):
    """Of a size that the model's own clips have not."""
    first, second = videos
    longer = generate(pipeline, "x", extend=first, seconds=1, both=True, **QUICK, **size)
    assert longer.shape == (3, 8 + 14 + 8, 16, 24)
    assert torch.equal(longer[:, 8:22], first)
    before = generate(pipeline, "x", extend=first, backward=True, **QUICK, **size)
    assert torch.equal(before[:, 8:], first)
    joined = generate(
        pipeline, "x", connect=(first, second), given_latents=1, frames=13, **QUICK, **size
    )
    assert joined.shape[1] == 14 + 7 + 14
    assert torch.equal(joined[:, :14], first)
    assert torch.equal(joined[:, -14:], second)
    mask = torch.zeros(9, 16, 24, dtype=torch.bool)
    mask[:, 8:] = True
    changed = generate(pipeline, "x", edit=first[:, :9], mask=mask, strength=0.8, **QUICK, **size)
    assert torch.equal(changed[:, :, :8], first[:, :9, :8])
    assert (changed - first[:, :9])[:, :, 12:].abs().max() > 0.05


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"frames": 33}, r"33 frames \(trained on 1 to 17\)"),
        ({"height": 32, "width": 32}, "32x32 = 1024 pixels"),
        ({"extend": 24, "seconds": 0.1}, r"width / height = 1.50"),
        ({"edit": 21}, "21 frames"),
        ({"minutes": 0.02, "noise_level": 0.3}, "given frames carried 0.1 at most"),
        ({"keyframes": {2: 0, -1: 1}}, "pictures of 2 frames are given"),
        ({"image": 0, "keyframes": {2: 0}}, "pictures of 2 frames are given"),
    ],
)
def test_what_the_model_was_not_trained_for_is_said(pipeline, videos, asked, said):
    video = torch.cat(videos, dim=1)
    asked = dict(asked)
    if "extend" in asked:
        asked["extend"] = video[:, :9, :, : asked["extend"]]
    if "edit" in asked:
        asked["edit"] = video[:, : asked["edit"], :16, :16]
    if "image" in asked:
        asked["image"] = video[:, 0, :, :16]
    if "keyframes" in asked:
        asked["keyframes"] = {k: video[:, n, :, :16] for k, n in asked["keyframes"].items()}
    with pytest.warns(OutsideTraining, match=said):
        generate(pipeline, "x", **asked, **QUICK)


def test_what_the_model_was_trained_for_needs_no_words(pipeline, videos):
    picture = videos[0][:, 0, :, :16]
    with warnings.catch_warnings(action="error", category=OutsideTraining):
        generate(pipeline, "x", frames=17, **QUICK)
        generate(pipeline, "x", keyframes={3: picture}, **QUICK)
        generate(pipeline, "x", minutes=0.02, noise_level=0.1, image=picture, **QUICK)


def test_pictures_go_with_text_loops_and_minutes(pipeline, videos, size):
    options = {"image": videos[0][:, 0], "references": [videos[1][:, 0]], **QUICK, **size}
    clip = generate(pipeline, "x", **options)
    assert torch.equal(clip, pipeline(["x"], seeds=[5], **_without_seed(options))[0])
    loop = generate(pipeline, "x", loop=True, keyframes={-1: videos[1][:, 0]}, **options)
    assert loop.shape[1] == 9 + 3
    minute = generate(pipeline, "0s: x | 2s: y", minutes=0.05, noise_level=0.1, **options)
    assert minute.shape == (3, 24, 16, 24)
    other = generate(pipeline, "0s: x | 2s: z", minutes=0.05, noise_level=0.1, **options)
    assert torch.equal(minute[:, :17], other[:, :17])
    assert not torch.equal(minute[:, 17:], other[:, 17:])


def _without_seed(options):
    return {name: value for name, value in options.items() if name != "seed"}


def test_it_is_what_the_command_writes(zoetrope, tasks_folder, frames_of):
    assert zoetrope(tasks_folder, "--extend", "long.mp4", "--seed", 5)[0] == 0
    pipeline = TextToVideo.from_folder(tasks_folder, "cpu")
    given = read_video("--extend", Path("long.mp4"), 16, 16, 8.0)
    made = to_uint8(generate(pipeline, "a circle", extend=given, **QUICK)).permute(1, 2, 3, 0)
    write_video("made.mp4", made.numpy(), fps=8)
    assert np.array_equal(frames_of("out.mp4"), frames_of("made.mp4"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("extend", "edit"), "extend and edit: use one at a time"),
        (("loop", "minutes"), "loop and minutes: use one at a time"),
        (("extend", "image"), "image goes with text, loop, minutes, and not with extend"),
        (("edit", "keyframes"), "keyframes goes with text, loop, and not with edit"),
        (("minutes", "keyframes"), "keyframes goes with text, loop, and not with minutes"),
        (
            ("minutes", "frames"),
            "frames goes with text, extend, connect, loop, and not with minutes",
        ),
        (("mask",), "mask goes with edit, and not with text"),
        (("edit", "given_latents"), "given_latents goes with extend, connect, loop, minutes, and"),
        (("loop", "backward"), "backward goes with extend, and not with loop"),
        (("extend", "backward", "both"), "backward and both: use one of them"),
        (("extend", "seconds"), "seconds=-1; use a number above 0"),
        (("strength",), "strength goes with edit, and not with text"),
        (("edit", "seconds"), "seconds goes with extend, and not with edit"),
        (("extend", "noise_level"), "noise_level goes with minutes, and not with extend"),
        (("extend", "seeds"), "seeds is for TextToVideo itself"),
        (("edit", "mask"), "the mask is of torch.uint8; expected torch.bool"),
        (("connect",), "connect: got 1 videos; give two"),
    ],
)
def test_what_does_not_go_together(pipeline, videos, size, names, message):
    given = {"extend": videos[0], "edit": videos[0][:, :9], "image": videos[0][:, 0]}
    given |= {"loop": True, "minutes": 0.05, "keyframes": {4: videos[0][:, 0]}, "frames": 9}
    given |= {"strength": 0.3, "noise_level": 7.0, "seeds": [1], "connect": (videos[0],)}
    given |= {"mask": torch.ones(9, 16, 24, dtype=torch.uint8), "given_latents": 1, "seconds": -1}
    given |= {"backward": True, "both": True}
    with pytest.raises(ValueError, match=message):
        generate(pipeline, "x", **{name: given[name] for name in names}, **size)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.zeros(1, 3, 9, 16, 24), r"Tensor of shape \(1, 3, 9, 16, 24\); expected a tensor"),
        (np.zeros((3, 9, 16, 24)), r"extend: got ndarray of shape \(3, 9, 16, 24\); expected"),
        (torch.zeros(3, 9, 16, 16), "width=24, and the video to extend has 16; scale it before"),
    ],
)
def test_what_is_no_video_of_the_size(pipeline, size, video, message):
    with pytest.raises(ValueError, match=message):
        generate(pipeline, "x", extend=video, **size)
    with pytest.raises(
        ValueError, match=r"connect: videos of 16x16 and 16x24; give two of one size"
    ):
        generate(pipeline, "x", connect=(torch.zeros(3, 9, 16, 16), torch.zeros(3, 9, 16, 24)))


def test_doubles_are_as_floats(pipeline, videos, size):
    made = [
        generate(pipeline, "x", extend=video, **QUICK, **size)
        for video in (videos[0], videos[0].double())
    ]
    assert torch.equal(made[0], made[1])


def test_two_pictures_for_one_frame(pipeline, videos, size):
    picture = videos[0][:, 0]
    for keyframes in ({0: picture}, {-9: picture}):
        with pytest.raises(ValueError, match="two pictures are given for frame 0"):
            pipeline(["x"], image=picture, keyframes=keyframes, steps=1, **size)
    with pytest.raises(ValueError, match="a picture for frame -10, and the clip's are 0 to 8"):
        pipeline(["x"], keyframes={-10: picture}, steps=1, **size)
