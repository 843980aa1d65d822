"""The extension part: a model that knows what comes, and one that stands still."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.video import to_float
from data.world import BACKGROUNDS, LEVELS
from data.world_render import render
from eval.tables import as_text, score_table
from eval.world_clips import draw_scenes, prompt_of
from eval.world_extension import (
    Case,
    _between,
    complete,
    deviation,
    make_cases,
    score_extension,
    score_joined,
    standing,
    velocity_change,
)
from eval.world_extension import _fits as fits
from eval.world_suite import WorldSettings, real_clips
from sample.extend import Window
from sample.pipeline import TextToVideo

SIZE = {"height": 32, "width": 32, "fps": 8.0, "split": "held-out"}
SETTINGS = WorldSettings(num=3, seed=5)


def scenes_of(case, num=SETTINGS.num):
    where = {"level": 1} if case.scenario == "shapes" else {"scenario": case.scenario}
    return draw_scenes(
        replace(SETTINGS, num=num), fits(case), num_frames=case.total, **where, **SIZE
    )


class Oracle(TextToVideo):
    """Knows the scenes of all prompts, and finds the given frames in them."""

    def __init__(self, model):
        super().__init__(model, "cpu", dtype=torch.float32)
        self.truth = {}
        for case in make_cases(self):
            for scene in scenes_of(case):
                video = torch.from_numpy(render(scene)).permute(3, 0, 1, 2)
                self.truth.setdefault(prompt_of(scene, SETTINGS), []).append(to_float(video))

    def __call__(self, prompts, *, given, frames, height, width, seeds, **options):
        (prompt,), levels = prompts, given.levels[0]
        with torch.no_grad():
            shown = self.vae.decode(given.known)[0].clamp(-1, 1)
        known = torch.cat([~levels[:1].isnan(), ~levels[1:].isnan().repeat_interleave(4)])
        assert len(known) == frames
        return self.made(prompt, shown, known)[None]

    def made(self, prompt, shown, known):
        best, frames = None, len(known)
        for video in self.truth[prompt]:
            for start in range(-frames, video.shape[1]):
                at = torch.arange(start, start + frames)
                if not (at[known].min() >= 0 and at[known].max() < video.shape[1]):
                    continue
                made = video[:, at.clamp(0, video.shape[1] - 1)]
                error = (made[:, known] - shown[:, known]).abs().mean()
                if best is None or error < best[0]:
                    best = (error, made)
        return best[1]


class Standing(Oracle):
    """Each new frame is the given one before it, or the first given one."""

    def made(self, prompt, shown, known):
        at = torch.arange(len(known))
        last = torch.cummax(torch.where(known, at, -1), 0).values
        return shown[:, torch.where(last < 0, at[known].min(), last)]


@pytest.fixture(scope="module")
def extender(tiny_model):
    info = tiny_model.info.model_copy(update={"tasks": ("text", "random")})
    return replace(tiny_model, info=info)


@pytest.fixture(scope="module")
def knowing(extender):
    return Oracle(extender)


def test_what_is_asked_for(extender, knowing):
    cases = {case.name: case for case in make_cases(knowing)}
    assert cases["forwards, straight"] == Case(
        *("forwards, straight", "shapes", 17, ((0, 9),), (9, 17), Window(2, 1))
    )
    assert cases["backwards, bounces"].kept == ((8, 17),)
    assert cases["connection"].kept == ((0, 5), (8, 13))
    assert cases["loop"].seams == [4, 8]
    # 33 frames at 16 per second last as long as straight motions do: less is given.
    info = extender.info.model_copy(update={"num_frames": 33, "fps": 16.0})
    longer = {
        case.name: case for case in make_cases(TextToVideo(replace(extender, info=info), "cpu"))
    }
    assert (longer["forwards, straight"].total, longer["forwards, straight"].new) == (33, (29, 33))
    assert longer["forwards, bounces"].total == 65


def test_a_perfect_model_of_the_latents(knowing):
    """Real frames where they are given; between them the VAE's, with its mean error there taken off."""
    case = next(case for case in make_cases(knowing) if case.name == "connection")
    clip = np.random.default_rng(0).integers(20, 230, (case.total, 8, 8, 3), dtype=np.uint8)
    noise = np.random.default_rng(1).integers(-3, 4, clip.shape)
    between = _between(clip, (clip + noise + 7).astype(np.uint8), case)
    first, last = case.new
    assert np.array_equal(between[:first], clip[:first])
    assert np.array_equal(between[last:], clip[last:])
    error = between[first:last].astype(int) - clip[first:last]
    assert abs(error.mean()) < 0.5
    assert error.std() > 1.5


def test_given_frames_stay_as_they_are(extender, knowing):
    pipeline = TextToVideo(extender, "cpu", dtype=torch.float32)
    for case in make_cases(pipeline):
        scene = scenes_of(case)[0]
        (clip,) = real_clips([scene])
        made = complete(pipeline, clip, scene, case, WorldSettings(num=1, steps=1, guidance=1))
        place = 0
        for number, (first, last) in enumerate(case.kept):
            place = case.new[1] if number or case.new[0] == 0 else 0
            assert np.array_equal(made[place : place + last - first], clip[first:last]), case.name
        assert len(made) == (case.new[1] if case.loop else case.total)
        assert np.abs(made[slice(*case.new)].astype(int) - made[place]).mean() > 10


def test_a_model_that_knows_what_comes_and_one_that_stands_still(extender, knowing):
    results = score_extension(knowing, SETTINGS)
    json.dumps(results, allow_nan=False)
    made, real, chance = (
        results["scores"]["generated"],
        results["scores"]["real"],
        results["chance"],
    )
    for name, figure in made.items():
        group, what = name.split(": ")
        if group == "loop":
            continue  # nobody knows the way back
        if what in ("colour_kept", "shape_kept", "found", "permanence"):
            assert figure["value"] == real[name]["value"] == 1, name
        elif "background" in what:
            assert figure["value"] < 3, name
        else:
            limit = {"object_jump": 20}.get(what, 0.6)
            assert figure["value"] < limit, (name, figure)
            assert real[name]["value"] < limit, (name, real[name])
        assert figure["num"] == 3
    still = score_extension(Standing(extender), SETTINGS)["scores"]["generated"]
    for name, guess in chance.items():
        group, what = name.split(": ")
        if what in ("jump", "velocity_change", "position_error") and group != "loop":
            if group.startswith("backwards"):
                # What it is shown begins with the second given frame: one step further away.
                speed = chance["backwards, straight: jump"]
                guess += {"jump": guess, "position_error": speed}.get(what, 0)
            assert still[name]["value"] == pytest.approx(guess, rel=0.25, abs=0.3), name
            assert guess > 2 * made[name]["value"], name
        if what in ("object_jump", "background_jump"):
            assert guess > 2 * made[name]["value"], name
    assert chance["connection: colour_kept"] == pytest.approx(1 / 6)
    shades = [BACKGROUNDS[name] for name in LEVELS[1].backgrounds]
    expected = np.mean([[abs(x - y) for x, y in zip(a, b)] for a in shades for b in shades])
    assert chance["loop: background_jump"] == pytest.approx(expected)
    text = as_text(score_table(results))
    assert "world suite, extension: 3 scenes of each kind, seed 5" in text
    assert "forwards, straight: change of velocity, px/frame" in text
    assert "loop: jump in position, px" in text


def test_a_jump_is_measured_at_its_seam_alone():
    case = Case("forwards, straight", "shapes", 17, ((0, 9),), (9, 17), Window(2, 1))
    scene = scenes_of(case)[0]
    (item,) = scene.objects
    moved = item.position.copy()
    moved[9:] += [0.0, 3.0] if abs(item.velocity[0, 0]) > 0 else [3.0, 0.0]
    jumped = render(replace(scene, objects=(replace(item, position=moved),)))
    figures = score_joined(jumped, scene, case, inner=False)
    assert figures["jump"] == pytest.approx(3.0, abs=0.2)
    assert figures["velocity_change"] < 0.15
    assert figures["position_error"] == pytest.approx(3.0, abs=0.15)
    assert figures["object_jump"] < 2
    other = {"red": "green"}.get(item.colour, "red")
    painted = render(scene)
    painted[9:] = render(replace(scene, objects=(replace(item, colour=other),), background="navy"))[
        9:
    ]
    figures = score_joined(painted, scene, case, inner=False)
    assert figures["object_jump"] > 30
    assert figures["background_jump"] > 15 or scene.background == "navy"
    assert not figures["colour_kept"]
    assert figures["shape_kept"]
    gone = render(scene)
    gone[9:] = gone[0, 0, 0]
    figures = score_joined(gone, scene, case, inner=False)
    assert (figures["found"], figures["jump"], figures["position_error"]) == (0, None, None)
    assert not figures["permanence"]


def test_velocities_change_at_seams_and_not_where_something_bounces():
    """Of a true path nothing does; where the made part is slower, by as much, on either side of it."""
    case = Case("connection", "bounces", 27, ((0, 9), (17, 27)), (9, 17), Window(1, 2))
    bounced = 0
    for scene in scenes_of(case, 40):
        (item,) = scene.objects
        times = [time * scene.fps for time in item.bounce_times]
        found = velocity_change(item.position, scene, case)
        if found is None:  # a bounce is two frames from a seam
            assert any(7 <= time <= 18 for time in times)
            continue
        bounced += any(0 < time < 26 for time in times)
        assert found == pytest.approx(0, abs=1e-6)
        slower = item.position.copy()
        slower[9:17] = slower[9] + 0.5 * (slower[9:17] - slower[9])
        if not any(8 < time < 17 for time in times):
            speed = np.hypot(*np.diff(item.position, axis=0)[10])
            assert velocity_change(slower, scene, case) == pytest.approx(speed / 2)
        assert velocity_change(item.position * np.nan, scene, case) is None
    assert bounced > 5


def test_deviations():
    path = np.array([[0.0, 0], [1, 0], [2, 0], [2, 4], [np.nan, np.nan]])
    assert [deviation(path, k) for k in (1, 2, 3)] == [0, pytest.approx(np.hypot(1, 4)), None]


def test_what_stands_still_stands_where_it_is_known():
    for case in (
        Case("forwards", "bounces", 17, ((0, 9),), (9, 17), Window(2, 1)),
        Case("backwards", "bounces", 17, ((8, 17),), (0, 8), Window(1, 2)),
    ):
        scene = scenes_of(case)[0]
        path, true = standing(scene, case), scene.objects[0].position
        first, last = case.new
        assert np.array_equal(path[first:last], np.repeat(true[[8]], 8, axis=0))
        kept = slice(*case.kept[0])
        assert np.array_equal(path[kept], true[kept])


def test_models_that_do_not_suit_are_one_line(tiny_model, extender):
    def with_info(**changes):
        info = extender.info.model_copy(update=changes)
        return TextToVideo(replace(extender, info=info), "cpu")

    with pytest.raises(ValueError, match="extending a video needs a model that was trained for it"):
        score_extension(TextToVideo(tiny_model, "cpu"), SETTINGS)
    with pytest.raises(ValueError, match="extending a video backwards needs a model"):
        score_extension(with_info(tasks=("leading",)), SETTINGS)
    with pytest.raises(ValueError, match="5 frames, 2 latent ones, are too short to be extended"):
        score_extension(with_info(num_frames=5), SETTINGS)
