"""Edits scored: an oracle, models that ignore the clip or the prompt, and the real pipeline."""

import json
import re
from dataclasses import replace
from unittest.mock import ANY

import numpy as np
import pytest
import torch
import typer
from scipy.ndimage import binary_dilation
from typer.testing import CliRunner

from data.randomness import numpy_generator, stream_seed
from data.video import to_float
from data.world import BACKGROUNDS as COLOURS_BEHIND
from data.world import UNSEEN_PAIRS
from data.world_render import render
from eval.cli import evaluate
from eval.tables import score_table
from eval.world_edit import (
    CHANGES,
    COLUMNS,
    FIGURES,
    MASKED_STRENGTH,
    STRENGTHS,
    another_clip_error,
    edited_scene,
    object_box,
    score_edit,
    score_edited,
)
from eval.world_suite import WorldSettings, eval_scenes, real_clips
from sample.edit import edit, edit_batch
from sample.model import save_model
from sample.pipeline import TextToVideo

SIZE = {"height": 32, "width": 32, "num_frames": 9, "fps": 8.0}
MADE = ("strength_0.4", "strength_0.6", "strength_0.8", "masked")
BACKGROUNDS = {"gray": "gray", "grey": "gray", "black": "black", "navy": "navy", "blue": "navy"}


class Oracle(TextToVideo):
    """Knows the scene of every seed and draws it as its prompt has it, or as `spoil` has it."""

    def __init__(self, model, settings, spoil=lambda source, target: target):
        super().__init__(model, "cpu", dtype=torch.float32)
        scenes = eval_scenes(settings, **SIZE)[0]
        seeds = [stream_seed(settings.seed, "eval", k) for k in range(settings.num)]
        self.scenes, self.spoil, self.calls = dict(zip(seeds, scenes)), spoil, []

    def __call__(self, prompts, *, seeds, given, **options):
        assert len(prompts) == len(seeds) == len(given.source)
        self.calls.append((len(prompts), given.strength, given.kept is not None, options))
        clips = []
        for seed, prompt in zip(seeds, prompts):
            scene = self.scenes[seed]
            colour = re.search(r"(\w+) (circle|square|triangle)", prompt)[1]
            background = BACKGROUNDS[re.search(r"(\w+) background", prompt)[1]]
            item = replace(scene.objects[0], colour=colour)
            target = replace(scene, objects=(item,), background=background)
            clips.append(render(self.spoil(scene, target)))
        return to_float(torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3))


def value(results, column, name):
    return results["scores"][column][name]["value"]


def named(change, *names):
    return [f"new {change}: {name}" for name in names]


WORDS = ("colour", "shape", "motion", "background", "joint", "object_found")


def test_a_perfect_model_scores_at_the_ceiling(tiny_model):
    settings = WorldSettings(num=9, batch_size=6, steps=3, guidance=1.5)
    oracle, seen = Oracle(tiny_model, settings), []
    results = score_edit(oracle, settings, lambda *done: seen.append(done))
    totals = {column: sum(n for name, n in seen if name == column) for column, _ in seen}
    assert totals == {"generated": 7 * 9, "real": 3 * 9, "vae": 2 * 9}
    for column in (*MADE, "vae", "real"):
        for change in CHANGES if column != "masked" else CHANGES[:1]:
            for name in named(change, *WORDS):
                assert value(results, column, name) == 1.0, (column, name)
                assert results["scores"][column][name]["num"] == 9
            assert value(results, column, f"new {change}: position_error") < 0.1
    assert "new background: background" not in results["scores"]["masked"]
    assert value(results, "masked", "new colour: outside") == 0
    assert value(results, "unchanged", "new colour: outside") == 0
    assert value(results, "real", "new colour: outside") > 0  # what H.264 makes of another colour
    for change, other in (CHANGES, CHANGES[::-1]):
        for name in named(change, change, "joint"):
            assert value(results, "unchanged", name) == 0
        for name in named(change, other, "shape", "motion", "object_found"):
            assert value(results, "unchanged", name) == 1.0
    figures = {name for row in results["scores"].values() for name in row}
    every = {name for change in CHANGES for name in named(change, *FIGURES)}
    assert figures == every - {"new background: outside"}
    assert results["scores"].keys() == {*COLUMNS, "vae", "real"}
    assert results["chance"].keys() <= figures
    assert results["chance"]["new colour: colour"] == pytest.approx(1 / 6)
    assert results["chance"]["new background: background"] == pytest.approx(1 / 3)
    asked = [(strength, masked) for _, strength, masked, _ in oracle.calls[::2]]
    plain = [(strength, False) for strength in STRENGTHS]
    assert asked == [*plain, (MASKED_STRENGTH, True), *plain]
    assert {count for count, *_ in oracle.calls} == {6, 3}
    assert all(o["steps"] == 3 and o["guidance"] == 1.5 for *_, o in oracle.calls)
    json.dumps(results, allow_nan=False)
    table = score_table(results)
    assert table.header[2:] == [*COLUMNS.values(), "VAE reconstructions", ANY]
    assert len(table.rows) == len(figures)
    assert not any("_" in row[0] for row in table.rows)


def test_a_model_that_ignores_the_clip_is_as_far_off_as_another_clip(tiny_model):
    """It makes what the prompt says: a shape and a motion that are right, somewhere else."""
    settings = WorldSettings(num=24)
    paths = {}
    for scene in eval_scenes(WorldSettings(num=40, seed=9), **SIZE)[0]:
        paths.setdefault(scene.objects[0].motion, scene.objects[0].position)

    def elsewhere(_, target):
        item = target.objects[0]
        return replace(target, objects=(replace(item, position=paths[item.motion]),))

    results = score_edit(Oracle(tiny_model, settings, elsewhere), settings)
    for change in CHANGES:
        made = value(results, "strength_0.8", f"new {change}: position_error")
        guess = results["chance"][f"new {change}: position_error"]
        assert 0.6 * guess < made < 1.6 * guess
        assert guess > 20 * value(results, "real", f"new {change}: position_error")
        for name in named(change, "colour", "background", "motion"):
            assert value(results, "strength_0.8", name) > 0.9


def test_a_model_that_ignores_the_prompt_changes_nothing(tiny_model):
    settings = WorldSettings(num=8)
    results = score_edit(Oracle(tiny_model, settings, lambda source, _: source), settings)
    for column in MADE:
        for name, figure in results["scores"][column].items():
            expected = results["scores"]["unchanged"][name]["value"]
            if name.endswith("outside"):  # of a drawing; the given clip was compressed
                assert figure["value"] == 0 if column == "masked" else 0 < figure["value"] < 30
            elif not name.endswith("position_error"):
                assert figure["value"] == expected, (column, name)
        changed = [n for c in CHANGES for n in named(c, c) if n in results["scores"][column]]
        assert changed
        assert [value(results, column, name) for name in changed] == [0] * len(changed)


def test_what_should_have_stayed_is_missed():
    """Another shape, another motion, another background, an object gone."""
    scene = eval_scenes(WorldSettings(num=1), **SIZE)[0][0]
    target = edited_scene(scene, "colour", numpy_generator(0, "x"))
    (source,), box = real_clips([scene]), object_box(scene)
    item = target.objects[0]
    shape = "circle" if item.shape != "circle" else "square"
    wrong = {
        "shape": replace(target, objects=(replace(item, shape=shape),)),
        "motion": replace(target, objects=(replace(item, position=item.position[::-1]),)),
        "background": edited_scene(target, "background", numpy_generator(0, "y")),
    }
    assert score_edited(render(target), target, "colour", source, box).joint
    for name, shown in wrong.items():
        score = score_edited(render(shown), target, "colour", source, box)
        assert not getattr(score, name)
        assert not score.joint
        assert all(getattr(score, other) for other in {*wrong, "colour"} - {name})
    gone = score_edited(render(replace(target, objects=())), target, "colour", source, box)
    assert (gone.object_found, gone.position_error, gone.colour) == (False, None, False)
    assert gone.background
    down = 2.0 if item.position[:, 1].mean() < 16 else -2.0
    shifted = replace(item, position=item.position + np.array([0, down]))
    moved = score_edited(render(replace(target, objects=(shifted,))), target, "colour", source, box)
    assert moved.position_error == pytest.approx(2, abs=0.1)
    spot = render(target)
    spot[3][~box[3]] += np.uint8(40)
    assert 35 < score_edited(spot, target, "colour", source, box).outside < 60


def test_targets_change_one_thing():
    for split in ("held-out", "combinations"):
        scenes, _ = eval_scenes(WorldSettings(num=40, split=split), **SIZE)
        for k, scene in enumerate(scenes):
            (old,) = scene.objects
            for change in CHANGES:
                target = edited_scene(scene, change, numpy_generator(1, k))
                (new,) = target.objects
                assert (new.colour != old.colour) == (change == "colour")
                assert (target.background != scene.background) == (change == "background")
                assert new.position is old.position
                assert new.shape == old.shape
                if change == "colour":
                    assert (new.colour, new.shape) not in UNSEEN_PAIRS


@pytest.mark.parametrize("size", [(32, 32), (36, 64)])
def test_boxes_hold_the_object_with_room_to_blend(size):
    scenes, _ = eval_scenes(WorldSettings(num=20), **{**SIZE, "height": size[0], "width": size[1]})
    for scene in scenes:
        box, clip = object_box(scene), render(scene)
        drawn = (clip != np.uint8(COLOURS_BEHIND[scene.background])).any(axis=-1)
        assert box.shape == drawn.shape
        assert drawn.any(axis=(1, 2)).all()
        # Two pixels of the mask's border are blended, and one more is for rounding.
        assert not (binary_dilation(drawn, np.ones((1, 5, 5))) & ~box).any()
        assert box.mean() < 0.5


def test_the_trivial_baseline_needs_two_clips_of_a_motion():
    scenes, _ = eval_scenes(WorldSettings(num=30), **SIZE)
    assert 2 < another_clip_error(scenes) < 16
    assert another_clip_error(scenes[:1]) is None
    left = [scene for scene in scenes if scene.objects[0].motion == "left"][:2]
    expected = np.linalg.norm(left[0].objects[0].position - left[1].objects[0].position, axis=1)
    assert another_clip_error(left) == pytest.approx(expected.mean())


def test_an_untrained_model_edits_nothing_but_keeps_what_is_outside_the_mask(tiny_model):
    pipeline = TextToVideo(tiny_model, "cpu", dtype=torch.float32)
    settings = WorldSettings(num=4, batch_size=3, steps=2, guidance=1)
    results = score_edit(pipeline, settings)
    assert value(results, "strength_0.8", "new colour: joint") == 0
    assert value(results, "strength_0.8", "new colour: outside") > 20
    assert value(results, "masked", "new colour: outside") == 0
    assert value(results, "real", "new colour: joint") == 1
    assert results["sampling"] == {"steps": 2, "guidance": 1, "sampler": "euler"}


def test_the_command_shows_every_strength(tiny_model, tmp_path):
    app = typer.Typer()
    app.command()(evaluate)
    save_model(tmp_path / "model", tiny_model)
    arguments = [tmp_path / "model", "--part", "edit", "--num", 2, "--steps", 2, "--guidance", 1]
    output = tmp_path / "edit.json"
    result = CliRunner().invoke(app, [*map(str, arguments), "-o", str(output)])
    assert result.exit_code == 0, result.output
    for words in ("strength 0.4", "strength 0.8, mask", "new background: colour", "the given clip"):
        assert words in result.stdout
    assert json.loads(output.read_text())["part"] == "edit"


def test_a_batch_of_edits_is_each_by_itself(tiny_model):
    pipeline = TextToVideo(tiny_model, "cpu", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    videos = torch.rand(2, 3, 9, 32, 32, generator=generator) * 2 - 1
    masks = torch.zeros(2, 9, 32, 32, dtype=torch.bool)
    masks[0, :, :12], masks[1, :, :, 20:] = True, True
    options = {"steps": 2, "guidance": 1}
    for each in (None, masks):
        made = edit_batch(pipeline, ["a", "b"], videos, 0.7, each, seeds=[3, 4], **options)
        for k, prompt in enumerate("ab"):
            mask = None if each is None else each[k]
            alone = edit(pipeline, prompt, videos[k], 0.7, mask, seeds=[3 + k], **options)
            torch.testing.assert_close(made[k], alone, atol=1e-3, rtol=0)
    assert torch.equal(made[0][:, :, 12:], videos[0][:, :, 12:])
    masks[1] = False
    with pytest.raises(ValueError, match="the mask is black everywhere"):
        edit_batch(pipeline, ["a", "b"], videos, 0.7, masks, **options)


def test_a_sampler_that_does_not_suit_is_one_line(tiny_model):
    settings = WorldSettings(num=1, steps=1, sampler="ddim")
    with pytest.raises(ValueError, match="does not suit") as error:
        score_edit(TextToVideo(tiny_model, "cpu"), settings)
    assert "\n" not in str(error.value)
