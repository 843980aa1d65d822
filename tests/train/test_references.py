"""Pictures of subjects in training: which clip has which, beside it in their own places, and that
clips of a step have equally many."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from data.manifest import read_manifest
from data.world_files import WorldSpec, write_world
from dit.conditions import reference_position
from sample.model import load_model
from sample.pipeline import TextToVideo
from tests.train.test_tasks import items_of, recipe_of
from train import dit_validation
from train.cli import app
from train.config_file import load_config
from train.logs import read_log
from train.tasks import references_alone, shows_references


@pytest.fixture(scope="module")
def subjects(room):
    """The room, with clips of one and of two subjects, and some without."""
    size = {"height": 16, "width": 16, "num_frames": 9, "fps": 8.0}
    for split, clips in (("train", 12), ("held-out", 6)):
        folder = room.folder / "subjects" / split
        write_world(folder, WorldSpec(clips, 3, split, None, scenario="subjects", **size), 1)
        write_world(folder / "plain", WorldSpec(4, 1, split, 1, **size), workers=1)
        rows = (folder / "manifest.jsonl").read_text().splitlines()
        for line in (folder / "plain" / "manifest.jsonl").read_text().splitlines():
            row = json.loads(line)
            rows.append(json.dumps({**row, "path": f"plain/{row['path']}"}))
        (folder / "both.jsonl").write_text("\n".join(rows) + "\n")
    return {
        "num_frames": 9,
        "random_start": False,
        "manifest": str(room.folder / "subjects" / "train" / "both.jsonl"),
        "validation": str(room.folder / "subjects" / "held-out" / "both.jsonl"),
    }


def test_clips_of_a_step_have_equally_many_and_each_its_own(room, subjects, tmp_path):
    recipe = recipe_of(room, tmp_path, subjects, {"references": 1.0})
    manifest, seen = recipe.data.train, Counter()
    folder = Path(subjects["manifest"]).parent
    for step in range(60):
        items = items_of(recipe, step)
        rows = [manifest.rows[row] for row in items["rows"]]
        assert len({len(row.references or ()) for row in rows}) == 1
        seen.update(items["rows"])
        if rows[0].references is None:
            assert "references" not in items
            continue
        for row, pictures in zip(rows, items["references"].unbind()):
            for path, picture in zip(row.references, pictures.unbind(1)):
                shown = torch.from_numpy(np.asarray(Image.open(folder / path)).copy())
                assert torch.equal(picture.permute(1, 2, 0), shown)
    counts = manifest.num_references
    assert {0, 1, 2} == set(counts.tolist())
    assert len(seen) == len(manifest.rows)  # nobody is left out, and nobody has it more often
    assert max(seen.values()) - min(seen.values()) <= recipe.order.batch(0)


def test_how_often_they_are_shown(room, tmp_path):
    config = load_config(room.write(tmp_path / "run", "dit", recipe={"tasks": {"references": 0.7}}))
    shown = [shows_references(config.recipe.tasks, 0, step) for step in range(2000)]
    assert sum(shown) / 2000 == pytest.approx(0.7, abs=0.04)
    assert not any(
        shows_references(config.recipe.tasks.model_copy(update={"references": 0.0}), 0, step)
        for step in range(100)
    )


def seen_by(recipe, step):
    """What stands beside the clips of a step, and the step's batch."""
    items, seen = items_of(recipe, step), {}
    batch = recipe.make_batch(items, step)
    forward = recipe.dit.forward

    def spy(*arguments, beside=None):
        seen["beside"] = beside
        return forward(*arguments, beside=beside)

    recipe.dit.forward = spy
    recipe(batch)
    recipe.dit.forward = forward
    return items, seen["beside"], batch


@pytest.mark.parametrize("task", ["text", "first", "keyframe", "image"])
def test_they_stand_beside_the_clip_in_their_own_places(room, subjects, tmp_path, task):
    tasks = {"text": 0.0, task: 1.0, "references": 1.0, "noise": 0.5}
    recipe = recipe_of(room, tmp_path, subjects, tasks)
    found = set()
    for step in range(16):
        items, beside, batch = seen_by(recipe, step)
        pictures = items.get("references")
        own = int(task == "keyframe")
        count = 0 if pictures is None else pictures.shape[2]
        found.add(count)
        if count and references_alone(recipe.config.seed, step):  # nothing else is given
            assert batch["asked"].all()
            assert batch["asked"].shape[1] == 3
            own = 0
        if count + own == 0:
            assert beside is None
            continue
        assert beside.latents.shape[2] == count + own
        places = beside.positions[:, own:]
        expected = torch.tensor([float(reference_position(k)) for k in range(count)])
        assert torch.equal(places, expected.expand_as(places))
        assert (beside.t[:, own:] == 0).all()  # clean, whatever else is noised
        # Each as the VAE has it by itself.
        for k in range(count):
            by_itself = recipe.encode(
                pictures[:, :, k, None], batch["beside_posterior_noise"][:, :, own + k, None]
            )
            torch.testing.assert_close(
                beside.latents[:, :, own + k, None], by_itself, rtol=1e-5, atol=1e-5
            )
    assert found == {0, 1, 2}


def test_cached_is_as_from_video(room, subjects, tmp_path):
    tasks = {"text": 1.0, "ends": 1.0, "window": 1.0, "references": 0.8}
    one = recipe_of(room, tmp_path / "a", subjects, tasks)
    cache = {"latent_cache": str(tmp_path / "cache"), "cache_dtype": "float32"}
    other = recipe_of(room, tmp_path / "b", subjects, tasks, **cache)
    for step in range(8):
        losses = [r(r.make_batch(items_of(r, step), step))[0] for r in (one, other)]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)


def test_a_cache_without_them_is_refused(room, subjects, tmp_path):
    cache = {"latent_cache": str(tmp_path / "cache")}
    recipe_of(room, tmp_path / "a", subjects, {"text": 1.0}, **cache).dataset()
    with pytest.raises(ValueError, match="another list of clips"):
        recipe_of(room, tmp_path / "b", subjects, {"references": 1.0}, **cache).dataset()


@pytest.mark.parametrize("cached", [False, True])
def test_a_clip_whose_picture_cannot_be_read_is_replaced_and_named(
    room, subjects, tmp_path, cached, caplog
):
    manifest = Path(subjects["manifest"])
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    bad = next(row for row in rows if len(row.get("references", ())) == 1)
    bad["references"] = [str(broken)]
    for row in rows:
        row["path"] = str(manifest.parent / row["path"])
        if row is not bad and "references" in row:
            row["references"] = [str(manifest.parent / path) for path in row["references"]]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {**subjects, "manifest": str(tmp_path / "manifest.jsonl"), "max_bad_share": 0.5}
    cache = {"latent_cache": str(tmp_path / "cache")} if cached else {}
    recipe = recipe_of(room, tmp_path / "run", data, {"references": 1.0}, **cache)
    named, number = [], rows.index(bad)
    for step in range(40):
        items = items_of(recipe, step)
        named += items["bad"]
        assert number not in items["rows"]
    clips = {clip for clip, _ in named}
    assert clips == {bad["path"]}
    assert all("broken.png" in reason for _, reason in named)


def test_a_run_with_references(room, subjects, tmp_path):
    """What the model says it knows, and figures with the right pictures and with other clips'."""
    options = {"data": subjects, "recipe": {"tasks": {"first": 1.0, "references": 0.8}}}
    whole = room.train(tmp_path / "whole", "dit", **options)
    figures = [row for row in read_log(whole / "log.jsonl") if "val/task/text" in row][-1]
    assert {"val/task/references", "val/task/references_shuffled"} <= figures.keys()
    assert load_model(whole / "model").info.references == 2
    plain = room.train(tmp_path / "plain", "dit", data=subjects)
    assert load_model(plain / "model").info.references == 0
    # What goes on from it with less keeps what it knew.
    init = {"vae": None, "dit": None, "text": None, "objective": None, "init": str(whole / "model")}
    more = room.train(tmp_path / "more", "dit", data=subjects, recipe=init, train={"steps": 1})
    info, before = load_model(more / "model").info, load_model(whole / "model").info
    assert (info.tasks, info.references, info.sizes) == (before.tasks, 2, before.sizes)
    assert (before.given_noise, info.given_noise) == (0, 0)


def test_a_lora_says_what_it_taught(room, subjects, tmp_path):
    plain = room.train(tmp_path / "plain", "dit", data=subjects)
    init = {"vae": None, "dit": None, "text": None, "objective": None, "init": str(plain / "model")}
    taught = {"lora": {"rank": 2}, "tasks": {"first": 1.0, "references": 1.0, "noise": 0.2}}
    more = room.train(
        tmp_path / "more", "dit", data=subjects, recipe={**init, **taught}, train={"steps": 1}
    )
    assert TextToVideo.from_folder(plain / "model", "cpu").info.references == 0
    info = TextToVideo.from_folder(plain / "model", "cpu", lora=more / "lora").info
    assert (info.tasks, info.references, info.given_noise) == (("text", "first"), 2, 0.2)
    (more / "lora" / "lora.yaml").write_text("trained: 3")  # not ours
    known = TextToVideo.from_folder(plain / "model", "cpu", lora=more / "lora").info
    assert known == TextToVideo.from_folder(plain / "model", "cpu").info


def test_the_command_makes_the_cache_that_a_run_takes(room, subjects, tmp_path):
    folder = tmp_path / "cache"
    recipe = {"tasks": {"ends": 1.0, "references": 0.5}, "latent_cache": str(folder)}
    path = room.write(tmp_path / "run", "dit", data=subjects, recipe=recipe)
    model = load_config(path).recipe.vae
    command = ["data", "latents", subjects["manifest"], str(model), str(folder), "--config", path]
    assert CliRunner().invoke(app, list(map(str, command))).exit_code == 0
    before = {file: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}
    assert before
    recipe_of(room, tmp_path / "b", subjects, recipe["tasks"], latent_cache=str(folder)).dataset()
    assert {file: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")} == before


def test_every_clip_is_validated_with_its_own_pictures_and_with_others(
    room, subjects, tmp_path, monkeypatch
):
    recipe = recipe_of(room, tmp_path, subjects, {"references": 1.0})
    recipe.chunk = 1  # however few are worked on at once
    clips = dit_validation.read_validation(recipe)
    losses, shown = dit_validation._task_losses, []

    def spy(recipe, part, task, levels, beside=None):
        if beside is not None:
            shown.extend(zip(part.rows, beside.latents))
        return losses(recipe, part, task, levels, beside)

    monkeypatch.setattr(dit_validation, "_task_losses", spy)
    dit_validation.validate_tasks(recipe, clips)
    own = dict(zip(clips.rows, clips.references))
    right = Counter(row for row, latents in shown if torch.equal(latents, own[row]))
    wrong = Counter(row for row, latents in shown if not torch.equal(latents, own[row]))
    assert right == wrong
    assert set(right) == {row for row, pictures in own.items() if pictures.shape[1]}


def test_references_that_are_nowhere_are_missed(room, subjects, tmp_path):
    plain = Path(subjects["manifest"]).parent / "plain" / "manifest.jsonl"
    with pytest.raises(ValueError, match=r"no row of .* has reference pictures; add them"):
        recipe_of(room, tmp_path, {**subjects, "manifest": str(plain)}, {"references": 0.5})


def test_mistakes(room, tmp_path):
    for changes, message in (
        ({"recipe": {"tasks": {"references": 2}}}, "recipe.tasks.references"),
        (
            {
                "recipe": {"tasks": {"references": 1}},
                "data": {"native": {"multiple": 16}, "packing": {"tokens": 40}},
            },
            "does not go with recipe.tasks.references",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            load_config(room.write(tmp_path / "run", "dit", **changes))


def test_the_manifest_lists_them(tmp_path):
    row = {"path": "a.mp4", "caption": "a"}
    plain = tmp_path / "plain.jsonl"
    plain.write_text(json.dumps(row) + "\n")
    listed = tmp_path / "listed.csv"
    listed.write_text('path,caption,references\na.mp4,a,"[""x.png"", ""/y.png""]"\n')
    manifest = read_manifest(listed)
    assert manifest.num_references.tolist() == [2]
    assert manifest.locate_references(manifest.rows[0]) == (str(tmp_path / "x.png"), "/y.png")
    assert manifest.fingerprint() != read_manifest(plain).fingerprint()
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text(json.dumps({**row, "references": "x.png"}) + "\n")
    with pytest.raises(ValueError, match=r"line 1: references: .*, got 'x.png'"):
        read_manifest(wrong)
