import math

import numpy as np
import pytest
import torch

from dit.vae import VAE
from dit.vae_parts import blend_psnr
from eval.frechet import Extractor, frechet_distance
from eval.metrics import psnr
from eval.vae_compare import (
    Judges,
    as_json,
    differences,
    estimates,
    lpips,
    measure,
    motion,
    motion_groups,
)
from eval.vae_suite import MAX_PSNR, as_video, batch_for, full_precision, reconstruct, round_trip


class Wrong(VAE):
    """Keeps the pixels, and adds an error of so many levels in even and in odd frames."""

    latent_channels, temporal_factor, spatial_factor = 3, 1, 1

    def __init__(self, even: float, odd: float) -> None:
        super().__init__()
        self.error = torch.nn.Parameter(torch.tensor([even, odd]) / 127.5, requires_grad=False)
        self.latent_mean, self.latent_std = torch.zeros(3), torch.ones(3)

    def moments(self, video, stream=None):
        return video, torch.zeros_like(video)

    def decode_raw(self, latents, stream=None):
        odd = torch.arange(latents.shape[2]) % 2
        return latents + self.error[odd].view(-1, 1, 1)


def clip(seed=0, frames=5, step=0, size=24):
    """A textured picture that moves by `step` columns a frame; far from black and white."""
    rng = np.random.default_rng(seed)
    picture = rng.integers(60, 190, size=(size, size, 3)).astype(np.uint8)
    return np.stack([np.roll(picture, k * step, axis=1) for k in range(frames)])


def clips(count, **options):
    return [(f"clip {k}", clip(k, **options)) for k in range(count)]


def test_known_errors_have_known_figures():
    vaes = {"exact": Wrong(0, 0), "offset": Wrong(5, 5), "flicker": Wrong(6, 0)}
    found = estimates(measure(vaes, clips(3, step=1), batch_size=2))
    exact, offset, flicker = (found[name] for name in vaes)
    assert exact["psnr"].value == exact["temporal_psnr"].value == MAX_PSNR
    assert exact["ssim"].value == pytest.approx(1)
    assert offset["psnr"].value == pytest.approx(20 * math.log10(255 / 5))
    assert offset["temporal_psnr"].value == MAX_PSNR
    assert flicker["psnr"].value == pytest.approx(10 * math.log10(255**2 / (36 * 3 / 5)))
    assert flicker["temporal_psnr"].value == pytest.approx(20 * math.log10(255 / 6))
    assert all(e.num == 3 for figures in found.values() for e in figures.values())


def test_single_frames_have_no_temporal_figures():
    measured = measure({"a": Wrong(2, 2)}, clips(4, frames=1), batch_size=3)
    results = as_json(measured)
    assert set(results["scores"]["a"]) == {"psnr", "ssim"}
    assert results["motion"] is None
    assert math.isnan(motion(clip(frames=1)))


def test_pairs_are_taken_clip_by_clip():
    measured = measure({"a": Wrong(0, 0), "b": Wrong(5, 5)}, clips(6), batch_size=4)
    gain = differences(measured)["b"]["psnr"]
    assert gain.value == pytest.approx(MAX_PSNR - 20 * math.log10(255 / 5))
    assert gain.low == pytest.approx(gain.high)


def test_clips_are_grouped_by_how_much_they_move():
    flat = np.full((4, 16, 16, 3), 100, np.uint8)
    speeds = [0, 9, 3, 6, 0, 8, 4, 5, 1]
    made = [
        flat + np.uint8(speed) * np.arange(4, dtype=np.uint8)[:, None, None, None]
        for speed in speeds
    ]
    assert [motion(each) for each in made] == speeds
    boundaries, groups = motion_groups(speeds)
    assert {name: sorted(speeds[k] for k in kept) for name, kept in groups.items()} == {
        "still": [0, 0, 1],
        "middle": [3, 4, 5],
        "fast": [6, 8, 9],
    }
    assert 1 < boundaries[0] < 3
    assert 5 < boundaries[1] < 6
    results = as_json(measure({"a": Wrong(3, 3)}, enumerate_clips(made), batch_size=4))
    assert [results["motion"]["scores"][g]["a"]["psnr"]["num"] for g in groups] == [3, 3, 3]
    assert [row["motion"] for row in results["clips"]] == speeds


def enumerate_clips(made):
    return [(str(k), each) for k, each in enumerate(made)]


def test_two_clips_are_no_three_groups():
    results = as_json(measure({"a": Wrong(3, 3)}, clips(2), batch_size=4))
    assert results["motion"] is None
    assert "motion" in results["clips"][0]


def test_clips_that_move_alike_stay_together():
    _, groups = motion_groups([2.0] * 5)
    assert [len(kept) for kept in groups.values()] == [5, 0, 0]
    alike = [("a clip", clip(0))] * 3
    results = as_json(measure({"a": Wrong(3, 3)}, alike, batch_size=4))
    assert results["motion"]["scores"]["fast"]["a"]["psnr"] == {
        "value": None,
        "low": None,
        "high": None,
        "num": 0,
    }


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_the_batch_size_changes_nothing_and_clips_come_when_they_are_needed(batch_size):
    taken, ahead = [], []

    def source():
        for name, each in clips(5, step=2):
            taken.append(name)
            yield name, each

    def progress(name, done):
        ahead.append(len(taken))

    vaes = {"a": Wrong(1, 4)}
    found = measure(vaes, source(), batch_size=batch_size, progress=progress)
    assert ahead[0] == min(batch_size, 5)
    assert found.columns["a"] == measure(vaes, clips(5, step=2), batch_size=2).columns["a"]


def test_fvd_is_of_clips_against_reconstructions(extractor_file):
    made = clips(6)
    vaes = {"exact": Wrong(0, 0), "offset": Wrong(4, 4)}
    judges = Judges(extractor=Extractor(extractor_file))
    found = estimates(measure(vaes, made, batch_size=4, judges=judges))
    assert found["exact"]["fvd"].value == pytest.approx(0, abs=1e-6)
    assert found["offset"]["fvd"].value == pytest.approx(3 * 16, rel=1e-4)  # 3 colours, 4 levels
    features = Extractor(extractor_file)([each for _, each in made])
    assert found["offset"]["fvd"].value == pytest.approx(frechet_distance(features, features + 4))


def test_lpips_is_the_mean_over_frames_in_any_pieces(monkeypatch):
    class FirstPixel(torch.nn.Module):
        def forward(self, a, b):
            return (a - b).abs()[:, 0, :, 0, 0].mean(1)

    a, b = torch.rand(2, 3, 5, 16, 16), torch.rand(2, 3, 5, 16, 16)
    expected = (a - b).abs()[:, 0, :, 0, 0].mean(1).tolist()
    for pixels in (1, 3 * 256, 2**20):
        monkeypatch.setattr("eval.vae_compare._FRAMES_PIXELS", pixels)
        assert lpips(FirstPixel(), a, b) == pytest.approx(expected)


def test_blended_tiles_are_compared_with_the_whole(other_model):
    vae = other_model.vae
    made = clips(2, size=48)
    found = measure({"a": vae}, made, batch_size=2, judges=Judges(tile=8, overlap=2))
    figures = found.columns["a"].figures["blend_psnr"]
    with full_precision():
        latents = vae.encode(as_video([each for _, each in made], torch.device("cpu"))).mean
        expected = blend_psnr(vae, latents, tile=8, overlap=2)
    assert figures == pytest.approx(expected.tolist(), abs=1e-3)
    assert all(value < MAX_PSNR for value in figures)
    whole = measure({"a": vae}, made, batch_size=2, judges=Judges(tile=16, overlap=2))
    assert whole.columns["a"].figures["blend_psnr"] == [MAX_PSNR, MAX_PSNR]


def test_nan_from_a_vae_names_it_and_the_clip():
    class Diverged(Wrong):
        def decode_raw(self, latents, stream=None):
            video = super().decode_raw(latents, stream).clone()
            video[latents.mean(dim=(1, 2, 3, 4)) > 0.9] = torch.nan
            return video

    made = [*clips(3), ("white", np.full((5, 24, 24, 3), 255, np.uint8))]
    for batch_size in (1, 3, 4):
        with pytest.raises(ValueError, match=r"vae/b gives NaN or infinite pixels for clip 4;"):
            measure({"a": Wrong(0, 0), "vae/b": Diverged(0, 0)}, made, batch_size=batch_size)
    with pytest.raises(ValueError, match=r"the VAE gives NaN or infinite pixels for clip 4;"):
        reconstruct(Diverged(0, 0), [each for _, each in made], batch_size=2)


@pytest.mark.parametrize("pixels", [24 * 24 * 3, 24 * 12, 10])
def test_large_clips_go_through_in_parts_with_the_same_result(other_model, pixels, monkeypatch):
    video = as_video([clip(frames=7, step=1)], torch.device("cpu"))
    with full_precision():
        whole = round_trip(other_model.vae, video)
        seen = []
        encode = other_model.vae.encode
        monkeypatch.setattr(
            other_model.vae, "encode", lambda v, s=None: seen.append(v.numel()) or encode(v, s)
        )
        monkeypatch.setattr("eval.vae_suite.PART_PIXELS", pixels)
        parts = round_trip(other_model.vae, video)
    assert max(seen) < video.numel()
    for a, b in zip(whole, parts):
        assert torch.allclose(a, b, atol=1e-5)


def test_vaes_that_know_no_parts_get_the_whole(monkeypatch):
    monkeypatch.setattr("eval.vae_suite.PART_PIXELS", 10)
    measured = measure({"a": Wrong(5, 5)}, clips(2), batch_size=1)
    assert measured.columns["a"].figures["psnr"] == pytest.approx([20 * math.log10(255 / 5)] * 2)


def test_batches_shrink_with_the_clips():
    assert batch_for(9, 32, 32) == 32
    assert 1 <= batch_for(17, 256, 256) < 32
    assert batch_for(81, 720, 1280) == 1


def test_figures_are_those_of_rounded_clips(lossy_model):
    made = [each for _, each in clips(2, frames=9, size=32)]
    restored = reconstruct(lossy_model.vae, made)
    found = measure({"a": lossy_model.vae}, enumerate_clips(made), batch_size=2)
    expected = [psnr(a, b) for a, b in zip(made, restored)]
    assert found.columns["a"].figures["psnr"] == pytest.approx(expected)
