"""The minute: a model that knows the scene, videos that fade, stop or lose their object, and noise."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.world import COLOURS, LEVELS
from data.world_render import render
from eval.tables import as_text, score_table
from eval.world_clips import draw_scenes, encoded, prompt_of
from eval.world_minute import Course, follow, measure, real_video, score_minute
from eval.world_suite import WorldSettings
from sample.pipeline import TextToVideo

SETTINGS = WorldSettings(num=2, seed=4)
SIZE = {"height": 32, "width": 32, "fps": 8.0, "scenario": "bounces", "split": "held-out"}


@pytest.fixture(scope="module")
def roller(tiny_model):
    info = tiny_model.info.model_copy(update={"tasks": ("text", "window")})
    return replace(tiny_model, info=info)


class Oracle(TextToVideo):
    """Makes the latents of a scene, window by window."""

    def __init__(self, model, frames, spoil=lambda video: video):
        super().__init__(model, "cpu", dtype=torch.float32)
        self.latents, self.at = {}, {}
        for scene in draw_scenes(SETTINGS, num_frames=frames, **SIZE):
            self.latents[prompt_of(scene, SETTINGS)] = encoded(self, [spoil(render(scene))])

    def __call__(self, prompts, *, frames, given, output, **options):
        assert output == "latents"
        (prompt,), length = prompts, 1 + (frames - 1) // 4
        held = 0 if given is None else int((~given.levels.isnan()).sum())
        begin = self.at.get(prompt, 0) - held
        latents = self.latents[prompt][:, :, begin : begin + length]
        if given is not None:
            torch.testing.assert_close(given.known[:, :, :held], latents[:, :, :held])
        self.at[prompt] = begin + length
        return latents


def fading(video):
    """Colours that go towards gray, all the way to half of it."""
    share = np.linspace(0, 0.5, len(video))[:, None, None, None]
    return np.round(video + share * (128 - video.astype(float))).astype(np.uint8)


def test_a_model_that_knows_the_scene_and_one_that_fades(roller):
    results = score_minute(Oracle(roller, 65), SETTINGS, seconds=6, every=2)
    json.dumps(results, allow_nan=False)
    for column in ("generated", "vae", "real"):
        figures = results["scores"][column]
        assert figures["permanence"] == {**figures["permanence"], "value": 1.0, "num": 2}
        for name in ("0 to 2 s", "2 to 4 s", "4 to 6 s"):
            assert figures[f"{name}: permanence"]["value"] == 1
            assert figures[f"{name}: colour_drift"]["value"] < 12
        assert figures["4 to 6 s: speed_ratio"]["value"] == pytest.approx(1, abs=0.15)
        assert figures["2 to 4 s: speed_drift"]["value"] < 0.15
        assert "0 to 2 s: speed_drift" not in figures
    assert (results["frames"], results["num"]) == (48, 2)
    text = as_text(score_table(results))
    assert "world suite, minute: 2 videos of 6 s, seed 4" in text
    assert "4 to 6 s: drift of the speed, as a share" in text
    assert "one object, of any colour and speed" in text
    chance = results["chance"]
    assert chance["permanence"] == chance["2 to 4 s: permanence"] == pytest.approx(1 / 6)
    colours = [np.array(COLOURS[name], float) for name in LEVELS[1].colours]
    distances = [np.linalg.norm(a - b) for a in colours for b in colours]
    assert chance["0 to 2 s: colour_drift"] == pytest.approx(np.mean(distances))
    # Of speeds u and v, even between 0.275 and 0.475: the mean of v, times that of 1 / u.
    ratio = 0.375 * np.log(0.475 / 0.275) / 0.2
    assert chance["4 to 6 s: speed_ratio"] == pytest.approx(ratio, rel=1e-3)
    assert 0.1 < chance["2 to 4 s: speed_drift"] < 0.25

    faded = score_minute(Oracle(roller, 65, fading), SETTINGS, seconds=6, every=2)["scores"]
    drifts = [faded["generated"][f"{name}: colour_drift"]["value"]
              for name in ("0 to 2 s", "2 to 4 s", "4 to 6 s")]  # fmt: skip
    assert drifts[0] + 10 < drifts[1] < drifts[2] - 10
    assert faded["real"]["4 to 6 s: colour_drift"]["value"] < 12


def course(frames, **changes):
    """An object that moves by 2 pixels a frame and is red."""
    step = np.arange(frames, dtype=float)
    values = {
        "right": np.ones(frames, bool),
        "colours": np.tile(np.array(COLOURS["red"], float), (frames, 1)),
        "position": np.stack([2 * step, 0 * step], axis=1),
    }
    return Course(**{**values, **changes})


def test_speeds_and_what_is_gone():
    figures = measure(course(40), 8.0, 2.0)
    assert figures["permanence"] == 1
    assert figures["2 to 4 s: speed_ratio"] == 1
    assert figures["2 to 4 s: speed_drift"] == figures["4 to 5 s: colour_drift"] == 0
    assert len(figures) == 1 + 3 * 2 + 2 * 2  # of the first stretch there is no drift of the speed

    slow = course(48).position
    slow[16:] = slow[16] + 0.5 * (slow[16:] - slow[16])
    slow[20] = slow[19]  # a bounce
    figures = measure(course(48, position=slow), 8.0, 2.0)
    assert figures["2 to 4 s: speed_ratio"] == pytest.approx(0.5)
    assert figures["4 to 6 s: speed_drift"] == pytest.approx(0.5)

    gone = course(48)
    for values in (gone.colours, gone.position):
        values[24:] = np.nan
    gone.right[24:] = False
    figures = measure(gone, 8.0, 2.0)
    assert figures["permanence"] == 0.5
    assert figures["2 to 4 s: permanence"] == 0.5
    assert "4 to 6 s: speed_drift" not in figures
    assert "4 to 6 s: colour_drift" not in figures
    still = measure(course(48, position=np.zeros((48, 2))), 8.0, 2.0)
    assert "2 to 4 s: speed_drift" not in still  # there is no speed to compare with


def test_a_second_object_and_another_colour_are_not_right():
    (scene,) = draw_scenes(replace(SETTINGS, num=1), num_frames=9, **SIZE)
    (item,) = scene.objects
    video = render(scene)
    assert follow([video[:4], video[4:]], item.colour).right.all()
    other = {"red": "green"}.get(item.colour, "red")
    assert not follow([video], other).right.any()
    corner = {"position": 32 - item.position, "colour": other}
    two = render(replace(scene, objects=(item, replace(item, **corner))))
    seen = follow([two], item.colour)
    apart = np.abs(item.position - 16).max(axis=1) > 8
    assert apart.any()
    assert not seen.right[apart].any()
    assert np.isnan(seen.colours[apart]).all()
    assert np.isnan(seen.position[apart]).all()
    assert not follow([0 * video], item.colour).right.any()


def test_long_real_videos_are_rendered_in_pieces():
    (scene,) = draw_scenes(replace(SETTINGS, num=1), num_frames=97, **SIZE)
    video = real_video(scene)
    assert video.shape == (97, 32, 32, 3)
    assert np.abs(video.astype(int) - render(scene)).mean() < 3


def test_a_model_that_knows_nothing(roller):
    """The real pipeline and its windows."""
    pipeline, seen = TextToVideo(roller, "cpu", dtype=torch.float32), []
    settings = WorldSettings(num=1, steps=1, guidance=1)
    results = score_minute(
        pipeline, settings, lambda column, n: seen.append((column, n)), seconds=3, every=1
    )
    assert results["scores"]["generated"]["permanence"]["value"] < 0.5
    assert results["scores"]["real"]["permanence"]["value"] == 1
    assert [row for row in seen if row[1]] == [("real", 1), ("vae", 1), ("generated", 1)]
    assert len(seen) == 3 + results["windows"]


def test_models_that_do_not_suit_are_one_line(tiny_model):
    with pytest.raises(
        ValueError, match="a video in windows needs a model that was trained for it"
    ):
        score_minute(TextToVideo(tiny_model, "cpu"), SETTINGS)
