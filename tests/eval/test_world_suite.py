import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.manifest import read_manifest
from data.video import to_float
from data.world_files import WorldSpec, write_world
from data.world_render import render
from dit.objective import FlowMatching
from eval.tables import as_text, score_table
from eval.vae_suite import read_clips, reconstruct, run_vae_suite
from eval.world_suite import (
    WorldSettings,
    eval_scenes,
    generate,
    real_clips,
    run_world_suite,
    score_manifest,
)
from sample.pipeline import TextToVideo

SIZE = {"height": 32, "width": 32, "num_frames": 9, "fps": 8.0}


class Oracle:
    """A pipeline that knows the scene of every prompt and draws it, or another one."""

    def __init__(self, model, settings, spoil=lambda scene: scene):
        scenes, prompts = eval_scenes(settings, **SIZE)
        self.scenes, self.spoil = dict(zip(prompts, scenes)), spoil
        self.info, self.vae, self.objective = model.info, model.vae, FlowMatching()
        self.sampling = model.sampling
        self.calls = []

    def __call__(self, prompts, *, seeds, **options):
        self.calls.append((prompts, seeds, options))
        clips = [render(self.spoil(self.scenes[prompt])) for prompt in prompts]
        return to_float(torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3))


def test_a_perfect_model_scores_one_in_every_column(tiny_model):
    settings = WorldSettings(num=24, batch_size=10, steps=3, guidance=1.5)
    oracle = Oracle(tiny_model, settings)
    seen = []
    run = run_world_suite(oracle, settings, progress=lambda column, n: seen.append((column, n)))
    for column in ("generated", "vae", "real"):
        assert sum(n for name, n in seen if name == column) == 24
        for name in ("colour", "shape", "motion", "background", "joint", "permanence"):
            figure = run.results["scores"][column][name]
            assert figure["value"] == 1.0, (column, name)
            assert figure["num"] == 24
            assert 0.8 < figure["low"] < 1.0
    assert run.results["scores"]["vae"]["psnr"]["value"] > 60  # this VAE only rearranges pixels
    assert run.results["vae_joint_drop"]["value"] == 0
    assert [options for *_, options in oracle.calls] == [{"steps": 3, "guidance": 1.5}] * 3
    assert run.results["sampling"] == {"steps": 3, "guidance": 1.5, "sampler": "euler"}
    assert len(run.videos) == len(run.prompts) == len(run.scores) == 24
    assert [clip["prompt"] for clip in run.results["clips"]] == run.prompts
    json.dumps(run.results, allow_nan=False)


def test_a_model_that_ignores_motion_is_found_out(tiny_model):
    settings = WorldSettings(num=24)
    one = eval_scenes(settings, **SIZE)[0][0]
    path, motion = one.objects[0].position, one.objects[0].motion

    def spoil(scene):
        return replace(scene, objects=(replace(scene.objects[0], position=path),))

    run = run_world_suite(Oracle(tiny_model, settings, spoil), settings)
    scores = run.results["scores"]["generated"]
    assert scores["colour"]["value"] == scores["background"]["value"] == 1.0
    share = np.mean([scene.objects[0].motion == motion for scene in run.scenes])
    assert scores["motion"]["value"] == pytest.approx(share)
    assert scores["joint"]["value"] == pytest.approx(share)
    assert run.results["scores"]["real"]["motion"]["value"] == 1.0


def test_an_untrained_model_scores_about_nothing_whatever_the_batch(tiny_model):
    pipeline = TextToVideo(tiny_model, "cpu")
    settings = WorldSettings(num=6, batch_size=6, steps=2)
    run = run_world_suite(pipeline, settings)
    assert run.results["scores"]["generated"]["joint"]["value"] == 0
    assert run.results["scores"]["real"]["joint"]["value"] == 1
    again = generate(pipeline, run.prompts, WorldSettings(num=6, batch_size=4, steps=2))
    # Sums in another order may move a pixel by one level.
    difference = np.abs(np.stack(again).astype(int) - np.stack(run.videos))
    assert difference.mean() < 1


def test_scenes_and_prompts_are_a_function_of_the_seed():
    settings = WorldSettings(num=12)
    scenes, prompts = eval_scenes(settings, **SIZE)
    again, prompts_again = eval_scenes(settings, **SIZE)
    assert prompts == prompts_again
    assert [s.to_state() for s in scenes] == [s.to_state() for s in again]
    # More clips are the same ones and more.
    assert eval_scenes(WorldSettings(num=20), **SIZE)[1][:12] == prompts
    other, _ = eval_scenes(WorldSettings(num=12, seed=1), **SIZE)
    assert [s.to_state() for s in other] != [s.to_state() for s in scenes]


def test_prompts_say_everything_at_every_level():
    for level in (1, 2, 3, 4):
        scenes, prompts = eval_scenes(WorldSettings(num=30, level=level), **SIZE)
        for scene, prompt in zip(scenes, prompts):
            for item in scene.objects:
                words = {"red": ("red", "crimson"), "purple": ("purple", "violet")}
                words["cyan"] = ("cyan", "turquoise")
                assert any(w in prompt for w in words.get(item.colour, (item.colour,)))


def test_prompts_to_avoid_are_avoided():
    settings = WorldSettings(num=30)
    _, prompts = eval_scenes(settings, **SIZE)
    avoid = set(prompts)
    scenes, others = eval_scenes(settings, avoid=avoid, **SIZE)
    assert len(others) == len(scenes) == 30
    assert not avoid & set(others)


def test_no_prompt_is_asked_twice():
    _, prompts = eval_scenes(WorldSettings(num=300), **SIZE)
    assert len(set(prompts)) == 300


def test_too_many_prompts_to_avoid_is_one_clear_line():
    class Everything(set):
        def __contains__(self, _):
            return True

    with pytest.raises(ValueError, match="found 0 of 2 different prompts"):
        eval_scenes(WorldSettings(num=2), avoid=Everything(), **SIZE)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"level": 9}, "level=9"),
        ({"split": "hold-out"}, "split=hold-out"),
    ],
)
def test_settings_that_make_no_sense(wrong, message):
    with pytest.raises(ValueError, match=message):
        eval_scenes(WorldSettings(**{"num": 2, **wrong}), **SIZE)


def test_unseen_combinations_are_scored_too():
    scenes, prompts = eval_scenes(WorldSettings(num=5, split="combinations"), **SIZE)
    pairs = {(s.objects[0].colour, s.objects[0].shape) for s in scenes}
    assert pairs <= {("yellow", "triangle"), ("purple", "circle"), ("green", "square")}
    assert all(s.objects[0].colour in p for s, p in zip(scenes, prompts))


def world_manifest(folder, clips=6):
    spec = WorldSpec(clips, 1, "held-out", level=1, **SIZE)
    return write_world(folder, spec, workers=0)


def test_clips_on_disk_are_scored_against_their_states(tmp_path):
    manifest = read_manifest(world_manifest(tmp_path / "world"))
    results = score_manifest(manifest)
    assert results["scores"]["clips"]["joint"] == {
        "value": 1.0,
        "low": pytest.approx(0.025 ** (1 / 6)),
        "high": 1.0,
        "num": 6,
    }
    assert score_manifest(manifest, num=2)["num"] == 2
    plain = tmp_path / "world" / "plain.jsonl"
    plain.write_text('{"path": "clips/000/000000.mp4", "caption": "a red circle"}\n')
    with pytest.raises(ValueError, match="line 1: no `state`"):
        score_manifest(read_manifest(plain))


def test_reconstructions_do_not_depend_on_the_batch_size(tiny_model):
    scenes, _ = eval_scenes(WorldSettings(num=5), **SIZE)
    clips = real_clips(scenes)
    a = np.stack(reconstruct(tiny_model.vae, clips, batch_size=2))
    b = np.stack(reconstruct(tiny_model.vae, clips, batch_size=5))
    assert np.abs(a.astype(int) - b).max() <= 1
    assert np.abs(a.astype(int) - np.stack(clips)).max() <= 1


def test_a_lossy_vae_scores_lower(tiny_model):
    clips = real_clips(eval_scenes(WorldSettings(num=4), **SIZE)[0])
    exact = run_vae_suite(tiny_model, clips)["scores"]["vae"]
    weight = tiny_model.vae.decoder.stem.weight
    kept = weight.data.clone()
    try:
        weight.data[24:] = 0  # half of the channels are lost
        lossy = run_vae_suite(tiny_model, clips)["scores"]["vae"]
    finally:
        weight.data.copy_(kept)
    assert lossy["psnr"]["value"] < exact["psnr"]["value"] - 10
    assert lossy["ssim"]["value"] < exact["ssim"]["value"]
    assert exact["psnr"]["num"] == 4


def test_unreadable_clips_are_named_and_left_out(tmp_path, caplog):
    path = world_manifest(tmp_path / "world", clips=3)
    (tmp_path / "world" / "clips" / "000" / "000001.mp4").write_bytes(b"no video")
    clips = read_clips(read_manifest(path), num=10, **SIZE)
    assert len(clips) == 2
    assert "000001.mp4" in caplog.text
    for k in (0, 2):
        (tmp_path / "world" / "clips" / "000" / f"00000{k}.mp4").unlink()
    with pytest.raises(ValueError, match="no clip to measure can be read"):
        read_clips(read_manifest(path), num=10, **SIZE)


def test_the_table_shows_every_figure_with_its_interval(tiny_model):
    settings = WorldSettings(num=8)
    results = run_world_suite(Oracle(tiny_model, settings), settings).results
    table = score_table(results)
    assert all(len(row) == len(table.header) for row in table.rows)
    text = as_text(table)
    assert "8 clips, level 1, split held-out, seed 0, 9 frames of 32x32" in text
    row = next(line for line in text.splitlines() if line.startswith("colour"))
    assert row.split()[1:4] == ["0.167", "1.000", "[0.631,"]
    assert row.count("N=8") == 3
    assert "real clips minus VAE" in text
    assert "gravity" not in text  # nothing falls at level 1
    vae = score_table(run_vae_suite(tiny_model, real_clips(eval_scenes(settings, **SIZE)[0])))
    assert [row[0] for row in vae.rows] == ["PSNR, dB", "SSIM"]


def test_a_size_that_the_vae_cannot_make_is_refused(tiny_model):
    with pytest.raises(ValueError, match="frames=16 does not fit"):
        reconstruct(tiny_model.vae, [np.zeros((16, 32, 32, 3), np.uint8)])
