"""Animating, extending, connecting, looping and editing, through the real commands."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.video import to_float, to_uint8
from dit.grids import UniformGrid
from dit.guidance import GuidanceConfig
from sample.edit import edit, kept_latents
from sample.extend import (
    Window,
    connect,
    extend_backward,
    extend_forward,
    lengthen,
    loop,
    window_of,
)
from sample.media import read_video
from sample.pipeline import TextToVideo


@pytest.fixture
def pipeline(pipeline_of_tasks):
    return pipeline_of_tasks


@pytest.fixture(scope="module")
def videos(smooth_videos):
    return smooth_videos(16, 16)


QUICK = {"steps": 2, "seeds": [5]}


@pytest.mark.parametrize(
    ("flags", "length"),
    [
        ("--image a.png", 9),
        ("--last b.png", 9),
        ("--image a.png --last b.png", 9),
        ("--reference a.png", 9),
        ("--reference a.png --reference b.png --image a.png", 9),
        ("--reference a.png --extend long.mp4 --seconds 0.5", 14 + 4),
        ("--keyframe 0.5:a.png --keyframe 0.25:b.png --last a.png", 9),
        ("--extend long.mp4 --seconds 1", 14 + 8),
        ("--extend long.mp4 --seconds 0.5 --backward --given 1", 14 + 4),
        ("--extend long.mp4 --seconds 0.25 --both --given 1", 14 + 4),
        ("--connect long.mp4 other.mp4 --frames 13 --given 1", 14 + 7 + 9),
        ("--loop --given 1", 9 + 3),
        ("--image a.png --loop", 9 + 3),
        ("--edit long.mp4 --strength 0.5", 13),
        ("--edit other.mp4 --strength 0.9 --mask mask.mp4", 9),
        ("--edit other.mp4 --mask mask.png", 9),
        ("--minutes 0.05", 24),
        ("--minutes 0.04 --image a.png --reference b.png --given 1 --noise-level 0.1", 19),
    ],
)
def test_each_ability(zoetrope, tasks_folder, flags, length, frames_of):
    """Its length; the same again by the same seed, and another by another one."""
    made = []
    for seed in (1, 1, 2):
        code, out, errors = zoetrope(tasks_folder, *flags.split(), "--seed", seed)
        assert code == 0, errors
        assert out == "out.mp4\n"
        made.append(frames_of("out.mp4"))
    assert made[0].shape == (length, 16, 16, 3)
    assert np.array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])


def test_a_name_with_a_colon(zoetrope, folder):
    """Which ffmpeg would take for a protocol."""
    assert zoetrope(folder, "-o", "12:30.mp4")[:2] == (0, "12:30.mp4\n")


def test_what_is_given_is_in_the_file(zoetrope, tasks_folder, frames_of):
    """Its own frames, but for what H.264 does to them."""
    long, other = frames_of("long.mp4").astype(int), frames_of("other.mp4").astype(int)

    def near(found, true):
        assert np.abs(found - true).mean() < 3

    assert zoetrope(tasks_folder, "--extend", "long.mp4", "--both", "--seconds", 0.5)[0] == 0
    near(frames_of("out.mp4")[4:18], long)
    assert zoetrope(tasks_folder, "--connect", "long.mp4", "other.mp4", "--frames", 13)[0] == 0
    near(frames_of("out.mp4")[:14], long)
    near(frames_of("out.mp4")[-9:], other)
    assert zoetrope(tasks_folder, "--edit", "other.mp4", "--mask", "mask.png")[0] == 0
    near(frames_of("out.mp4")[:, :, :7], other[:, :, :7])
    assert np.abs(frames_of("out.mp4")[:, :, 11:] - other[:, :, 11:]).mean() > 5


def test_one_frame_is_a_picture(zoetrope, tasks_folder):
    code, out, errors = zoetrope(tasks_folder, "--frames", 1, "--num", 2)
    assert (code, out) == (0, "out-000.png\nout-001.png\n"), errors
    assert Image.open("out-000.png").size == (16, 16)
    assert "warning" not in errors
    code, _, errors = zoetrope(tasks_folder, "--frames", 1, "-o", "x.mp4")
    assert code != 0
    assert "single frames are written as .png; use x.png" in errors


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--frames 33", "33 frames (trained on 1 to 17)"),
        ("--size 32", "32x32 = 1024 pixels (trained on 256 to 256)"),
        ("--size 16x24", "width / height = 1.50 (trained on 1.00 to 1.00)"),
        ("--image wide.png", "--image wide.png is 16x48, of another aspect than 16x16: 67%"),
        ("--edit long.mp4", "the VAE takes 4*k+1 frames, so the last 1 of 14 are left out"),
        ("--edit long.mp4 --size 24", "24x24 = 576 pixels (trained on 256 to 256)"),
        ("--extend wide.mp4", "--extend wide.mp4 is 16x48, of another aspect than 16x16: 67%"),
        ("--image moves.webp", "moves.webp has 3 pictures; the first is used"),
        ("--extend wide.mp4", "wide.mp4 has 16 frames a second, and the model's clips have 8"),
        ("--minutes 0.02 --noise-level 0.3", "given frames carried 0.1 at most"),
    ],
)
def test_what_is_done_all_the_same_is_said(zoetrope, tasks_folder, flags, said):
    code, _, errors = zoetrope(tasks_folder, *flags.split())
    assert code == 0, errors
    assert said in errors
    assert "warning" not in zoetrope(tasks_folder, "--frames", 17)[2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--extend short.mp4 --given 2", "the given video has 2 frames, and 5 are needed"),
        ("--extend none.mp4", "--extend none.mp4: no such file"),
        ("--extend text.mp4", "--extend text.mp4: "),
        ("--connect long.mp4 short.mp4", "the given video has 2 frames"),
        ("--extend long.mp4 --given 3", "given=3 of a clip of 3 latent frames; use 1 to 2"),
        ("--connect long.mp4 other.mp4 --frames 5", "too short"),
        ("--extend long.mp4 --given 2 --backward", "leaves nothing to make in front"),
        ("--edit long.mp4 --strength 0", "--strength 0: use 0.001 (nothing changes) to 1"),
        ("--edit long.mp4 --strength 1.5", "--strength 1.5: use 0.001"),
        ("--edit long.mp4 --strength nan", "--strength nan: use 0.001"),
        ("--edit long.mp4 --mask black.png", "the mask is black everywhere"),
        ("--edit long.mp4 --frames 9", "--frames: an edited video has its own length"),
        ("--edit long.mp4 --extend long.mp4", "--extend and --edit: use one at a time"),
        ("--loop --connect long.mp4 other.mp4", "--connect and --loop: use one at a time"),
        ("--seconds 2", "--seconds goes with --extend, which is not there"),
        ("--strength 0.5", "--strength goes with --edit"),
        ("--extend long.mp4 --seconds -1", "--seconds -1: use a number above 0"),
        ("--extend long.mp4 --both --backward", "--backward and --both: use one of them"),
        ("--extend long.mp4 --image a.png", "--image does not go with a given video"),
        ("--given 1", "--given goes with --extend, --connect, --loop or --minutes"),
        ("--noise-level 0.1", "--noise-level goes with --minutes"),
        ("--minutes 0", "--minutes 0: use a number above 0, at most 60"),
        ("--minutes 1 --loop", "a given video or --loop does not go with --minutes"),
        ("--minutes 1 --context 2", "--context 2 does not go with --minutes"),
        ("--minutes 1 --batch-size 2", "--batch-size does not go with --minutes"),
        ("--loop --batch-size 2", "--batch-size: such videos are made one at a time"),
        ("--image a.png --keyframe 0:b.png", "two pictures are given for frame 0"),
        ("--image a.png --last b.png --frames 1", "two pictures are given for frame 0"),
        ("--edit long.mp4 --mask wide.png", "--mask wide.png is 16x48, and long.mp4 is 16x16"),
        ("--edit long.mp4 -o long.mp4", "long.mp4 is one of the files that are given"),
        ("--image a.png --sheet a.png", "a.png is one of the files that are given"),
        ("--frames 1 -o c.png --sheet c.png", "--sheet c.png: is what -o writes too"),
        ("--frames 1 -o " + "n" * 230 + ".png", "the name has more than 220 bytes"),
        ("--image .", "--image .: is no file"),
        ("--keyframe -0.01:a.png", "--keyframe -0.01:a.png: the clip's frames are at 0 to 1"),
        ("--edit moves.webp", "--edit moves.webp: an animated picture of 3 frames; make a video"),
        ("--keyframe 0:a.png --frames 1 -o a.png", "a.png is one of the files that are given"),
        ("--image a.png --frames 1 -o a.png", "a.png is one of the files that are given"),
        ("--minutes 1 --last b.png", "--last does not go with --minutes"),
        ("--minutes 1 --given 2", "given=2 of windows of 2 latent frames; use 1 to 1"),
        ("--minutes 1 --noise-level 1", "noise level 1 of given frames"),
        ("--keyframe a.png", "--keyframe a.png: expected SECONDS:PATH"),
        ("--keyframe 2:a.png", "--keyframe 2:a.png: the clip's frames are at 0 to 1 seconds"),
        ("--keyframe 1:a.png --last b.png", "a --keyframe is at the last frame too"),
        ("--keyframe 0.5:a.png --keyframe 0.51:b.png", "there is another picture for that frame"),
        ("--keyframe 0.5:none.png", "--keyframe none.png: no such file"),
        ("--reference none.png", "--reference none.png: no such file"),
        ("--guidance-references 2", "--guidance-references goes with --reference"),
        ("--reference a.png --guidance-references -1", "references=-1.0; expected greater than"),
        ("--reference text.mp4", "--reference text.mp4: not a picture that can be read"),
        (
            "--reference a.png --reference b.png --reference a.png",
            "3 reference picture(s), and the model was trained with at most 2",
        ),
    ],
)
def test_mistakes_are_one_line(zoetrope, tasks_folder, tmp_path, flags, message):
    before = set(tmp_path.iterdir())
    code, _, errors = zoetrope(tasks_folder, *flags.split())
    assert code not in (0, None)
    said = ("warning", "sampling: ", "windows: ")  # and bars
    (line,) = [line for line in errors.splitlines() if line and not line.startswith(said)]
    assert message in line
    assert "Traceback" not in errors
    assert {path for path in tmp_path.iterdir() if path.suffix == ".mp4"} <= before


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ("--image a.png", "a given first frame"),
        ("--last a.png", "a given last frame"),
        ("--keyframe 0.25:a.png", "a given frame in the middle"),
        ("--extend long.mp4", "extending a video"),
        ("--extend long.mp4 --backward", "extending a video backwards"),
        ("--connect long.mp4 other.mp4 --frames 13", "connecting videos"),
        ("--loop --frames 9", "connecting videos"),
        ("--minutes 1", "a video in windows"),
    ],
)
def test_a_model_of_text_alone_says_what_it_would_need(zoetrope, folder, flags, what):
    code, _, errors = zoetrope(folder, *flags.split())
    assert code != 0
    assert f"{what} needs a model that was trained for it (recipe.tasks: " in errors
    assert errors.splitlines()[-1].endswith("trained with text alone")


def test_a_model_without_references_says_so(zoetrope, folder):
    code, _, errors = zoetrope(folder, "--reference", "a.png")
    assert code != 0
    assert "1 reference picture(s), and the model was trained with none" in errors


def test_the_scale_of_references(pipeline):
    """The model's own by default; 1 is none, and takes two evaluations instead of three."""
    picture = torch.full((3, 16, 16), 0.5)
    options = {"references": [picture], "steps": 2, "seeds": [0]}
    made = [
        pipeline(["a"], guidance_references=scale, **options) for scale in (None, 2.0, 3.0, 1.0)
    ]
    assert torch.equal(made[0], made[1])
    assert (made[1] - made[2]).abs().max() > 1e-3
    assert pipeline.work.num_evaluations == 4
    pipeline(["a"], **options)
    assert pipeline.work.num_evaluations == 6
    pipeline(["a"], steps=2)
    assert pipeline.work.num_evaluations == 4


def test_references_stand_beside_the_clip_in_their_order(pipeline):
    """Clean, with the text and without, each in a place of its own; one a clip, or one for all."""
    seen, whole = [], pipeline.dit.forward
    pipeline.dit.forward = lambda *a, **k: seen.append(k["beside"]) or whole(*a, **k)
    pictures = [torch.full((3, 16, 16), value) for value in (-0.5, 0.5)]
    swapped = [torch.stack([pictures[k], pictures[1 - k]]) for k in (0, 1)]
    options = {"steps": 1, "guidance": 2.0, "keyframes": {4: pictures[0]}, "seeds": [0, 0]}
    try:
        one = pipeline(["a", "a"], references=pictures, **options)
        other = pipeline(["a", "a"], references=swapped, **options)
    finally:
        pipeline.dit.forward = whole
    assert len(seen) == 4
    for neither in seen[1::2]:  # of guidance towards the pictures
        assert neither.positions.shape[1] == 1
    for beside in seen[::2]:
        assert beside.positions[:, 1:].tolist() == [[-16.0, -24.0]] * len(beside.positions)
        assert (beside.t == 0).all()
        true = torch.cat([pipeline.encode(p[:, None]) for p in pictures], dim=2)
        torch.testing.assert_close(beside.latents[:1, :, 1:], true)
    assert torch.equal(one[0], one[1])
    assert torch.equal(other[0], one[0])
    assert not torch.allclose(other[1], one[1], atol=1e-3)


def test_extensions_begin_where_the_video_ends(pipeline, videos):
    """The network is shown the video's own latents, and colours are brought to those of the video."""
    seen = []
    whole = pipeline.dit.forward
    pipeline.dit.forward = lambda x, t, *a, **k: seen.append((x.clone(), t)) or whole(x, t, *a, **k)
    try:
        new = extend_forward(pipeline, "x", videos[0], Window(2, 1), **QUICK)
        before = extend_backward(pipeline, "x", videos[0], Window(1, 2), **QUICK)
    finally:
        pipeline.dit.forward = whole
    assert new.shape == (3, 4, 16, 16)
    assert before.shape == (3, 4, 16, 16)  # 9 frames, of which 4 are given, and one is shown before
    with torch.no_grad():
        end = pipeline.vae.encode(videos[0][None, :, -5:]).mean
        begin = pipeline.vae.encode(videos[0][None, :, :5]).mean[:, :, 1:]
    torch.testing.assert_close(seen[0][0][:1, :, :2], end)
    assert seen[0][1][0].tolist()[:2] == [0, 0]
    assert seen[0][1][0, 2] > 0.9
    torch.testing.assert_close(seen[-1][0][:1, :, 2:], begin)
    assert seen[-1][1][0, 2] == 0


def test_long_extensions_pass_through_the_vae_once(pipeline, videos, monkeypatch):
    """The second window is given what the first one made, as it is; the first is `extend_forward`'s."""
    calls, encoded = [], []
    sample, encode = TextToVideo.__call__, pipeline.encode

    def look(self, *arguments, **options):
        made = sample(self, *arguments, **options)
        calls.append((options["given"], options["seeds"], made))
        return made

    monkeypatch.setattr(TextToVideo, "__call__", look)
    monkeypatch.setattr(pipeline, "encode", lambda v: encoded.append(v.shape[1]) or encode(v))
    window = Window(2, 1)
    longer = lengthen(pipeline, "x", videos[0], window, 10, iter([5, 6, 7]), steps=2)
    assert encoded == [5]
    assert longer.shape == (3, 14 + 10, 16, 16)
    assert torch.equal(longer[:, :14], videos[0])
    assert [seeds for _, seeds, _ in calls] == [[5], [6], [7]]
    assert [made.shape[2] for _, _, made in calls] == [3, 2, 2]
    for (_, _, before), (given, _, _) in pairwise(calls):
        assert torch.equal(given.known[:, :, 0], before[:, :, -1])
        assert given.levels[0, 0] == 0
        assert given.levels[0, 1].isnan()
    first = extend_forward(pipeline, "x", videos[0], window, **QUICK)
    torch.testing.assert_close(longer[:, 14:18], first, atol=1e-4, rtol=0)


def test_colours_do_not_jump(pipeline, videos, monkeypatch):
    """A decoder that is off by a constant is brought back."""
    straight = extend_forward(pipeline, "x", videos[0], Window(2, 1), **QUICK)
    decode = pipeline.vae.decode
    monkeypatch.setattr(pipeline.vae, "decode", lambda *a, **k: decode(*a, **k) + 0.05)
    shifted = extend_forward(pipeline, "x", videos[0], Window(2, 1), **QUICK)
    off = (shifted - straight).abs()  # but where the decoder's values are clipped
    assert off.quantile(0.95) < 1e-3


def test_connections_see_both_videos(pipeline, videos):
    window = Window(1, 2)
    one = connect(pipeline, "x", videos[0], videos[1], window, **QUICK)
    assert one.shape == (3, 13 - 1 - 4 - 1, 16, 16)
    for others in (videos[::-1], [videos[0], videos[0]]):
        other = connect(pipeline, "x", *others, window, **QUICK)
        assert (other - one).abs().max() > 1e-3
    same = loop(pipeline, "x", videos[0], window, **QUICK)
    torch.testing.assert_close(same, connect(pipeline, "x", videos[0], videos[0], window, **QUICK))


@pytest.mark.parametrize(
    ("frames", "given", "sides", "expected"),
    [
        (9, None, 1, (2, 1)),
        (9, 1, 1, (1, 2)),
        (5, None, 1, (1, 1)),
        (17, None, 1, (4, 1)),
        (33, None, 1, (7, 2)),
        (9, None, 2, (1, 1)),
        (17, None, 2, (2, 1)),
        (17, 1, 2, (1, 3)),
        (33, None, 2, (2, 5)),
    ],
)
def test_windows(pipeline, frames, given, sides, expected):
    assert window_of(pipeline, frames, given, sides) == Window(*expected)
    if given is None and sides == 1:
        total = sum(expected)
        new = min(max(2, expected[1]), total - 1)
        assert window_of(pipeline, frames, given, backward=True) == Window(total - new, new)


@pytest.mark.parametrize(
    ("there", "forward", "backward"), [(17, 4, 3), (12, 3, 2), (9, 3, 2), (5, 2, 1), (1, 2, 1)]
)
def test_a_short_video_gives_what_it_has(pipeline, there, forward, backward):
    assert window_of(pipeline, 17, None, there=there).given == forward
    assert window_of(pipeline, 17, None, backward=True, there=there).given == backward
    assert window_of(pipeline, 17, None, sides=2, there=there).given == min(2, max(1, backward))
    assert window_of(pipeline, 17, 4, there=there).given == 4


def test_little_strength_changes_little(pipeline, videos):
    """In order of strength; and an edit of full strength is a sample like others."""
    source = videos[0][:, :9]
    with torch.no_grad():
        restored = pipeline.vae.decode(pipeline.vae.encode(source[None]).mean)[0].clamp(-1, 1)
    options = {"steps": 20, "seeds": [5]}
    changed = [
        (edit(pipeline, "x", source, strength, **options) - restored).square().mean().item()
        for strength in (0.02, 0.3, 0.8)
    ]
    assert changed[0] < 0.01 * changed[2]
    assert changed[0] < changed[1] < changed[2]
    full = edit(pipeline, "x", source, 1.0, **options)
    sample = pipeline(["x"], **options)[0]
    torch.testing.assert_close(full, sample, atol=2e-2, rtol=0)


def test_edits_with_guidance_that_begins_with_zeros(pipeline, videos):
    """CFG-Zero* does not move at the first noise levels of a sample; an edit begins below them."""
    source, options = videos[0][:, :9], {"steps": 10, "seeds": [5], "grid": UniformGrid()}
    usual, zero = (
        edit(pipeline, "x", source, 0.05, guidance=GuidanceConfig(scale=2, kind=kind), **options)
        for kind in ("cfg", "cfg_zero")
    )
    assert (usual - zero).abs().mean() < 0.02


def test_any_strength_goes_with_whole_training_steps(ddpm_folder, videos):
    """A DDPM stops at thousandths, and a strength may be next to one."""
    pipeline = TextToVideo.from_folder(ddpm_folder, "cpu", dtype=torch.float32)
    for strength in (0.001, 0.4996, 0.5004, 0.501, 1):
        assert edit(pipeline, "x", videos[0][:, :5], strength, steps=20, seeds=[5]).isfinite().all()


def test_an_edit_leaves_the_rest_alone(pipeline, videos):
    source = videos[0][:, :9]
    mask = torch.zeros(9, 16, 16, dtype=torch.bool)
    mask[:, :, 8:] = True
    made = edit(pipeline, "x", source, 0.8, mask, **QUICK)
    assert torch.equal(made[:, :, :, :8], source[:, :, :, :8])
    assert (made - source)[:, :, :, 12:].abs().max() > 0.05
    kept = kept_latents(mask, (4, 3, 4, 4))
    assert kept.shape == (1, 1, 3, 4, 4)
    assert kept[..., :2].all()
    assert not kept[..., 2:].any()
    mask = torch.zeros(9, 16, 16, dtype=torch.bool)
    mask[4, 0, 0] = True  # in the second latent frame
    assert kept_latents(mask, (4, 3, 4, 4)).sum() == 47
    assert not kept_latents(mask, (4, 3, 4, 4))[0, 0, 1, 0, 0]


def test_videos_are_read_whole(zoetrope, frames_of):
    video = read_video("--extend", Path("long.mp4"), 16, 16, 8.0)
    assert torch.equal(to_uint8(video).permute(1, 2, 3, 0), torch.from_numpy(frames_of("long.mp4")))
    assert torch.equal(to_uint8(to_float(to_uint8(video))), to_uint8(video))
