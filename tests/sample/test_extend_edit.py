"""What stands under `zoetrope sample`'s flags: references, extensions, connections, loops and edits."""

from itertools import pairwise

import pytest
import torch

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
from sample.given import known_frames
from sample.pipeline import TextToVideo


@pytest.fixture(scope="module")
def videos(smooth_videos):
    return smooth_videos(16, 16)


QUICK = {"steps": 2, "seeds": [5]}


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


def test_the_temperature_is_that_of_the_noise_to_start_from(pipeline, videos):
    """But for what is given: it is shown with all the noise that the network is told of."""
    shape = pipeline.latent_shape(9, 16, 16)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    known = known_frames(torch.randn(1, shape[0], 1, *shape[2:]), shape[1], slice(0, 1), level=0.5)
    seen, whole = [], pipeline.dit.forward
    pipeline.dit.forward = lambda *a, **k: seen.append(a[0]) or whole(*a, **k)
    try:
        for temperature in (1.0, 0.5):
            options = {"noise": noise, "given": known, "temperature": temperature}
            pipeline(["a"], frames=9, steps=1, guidance=1.0, **options)
    finally:
        pipeline.dit.forward = whole
    torch.testing.assert_close(seen[0][:, :, 1:], noise[:, :, 1:])
    torch.testing.assert_close(seen[1][:, :, 1:], 0.5 * noise[:, :, 1:])
    assert torch.equal(seen[0][:, :, :1], seen[1][:, :, :1])
    for value in (0.0, 1.5, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"temperature=\S+; use a number above 0, up to 1"):
            pipeline(["a"], steps=1, temperature=value)
    with pytest.raises(
        ValueError, match=r"temperature=0\.5 is of noise to start from, and an edit"
    ):
        edit(pipeline, "a", videos[0][:, :9], 0.5, steps=1, temperature=0.5)


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


@pytest.mark.parametrize("way", ["forward", "backward", "connected"])
def test_colours_do_not_jump(pipeline, videos, monkeypatch, way):
    """A decoder that is off by a constant is brought back."""

    def make():
        if way == "forward":
            return extend_forward(pipeline, "x", videos[0], Window(2, 1), **QUICK)
        if way == "backward":
            return extend_backward(pipeline, "x", videos[0], Window(1, 2), **QUICK)
        return connect(pipeline, "x", *videos, Window(1, 2), **QUICK)

    straight = make()
    decode = pipeline.vae.decode
    monkeypatch.setattr(pipeline.vae, "decode", lambda *a, **k: decode(*a, **k) + 0.05)
    shifted = make()
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
