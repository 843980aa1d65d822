"""What is given in training: how often, at which noise levels, and that the rest alone is asked for."""

import itertools
import math
import warnings
from collections import Counter

import pytest
import torch

from data.manifest import read_manifest
from sample.generate import generate
from sample.model import load_model
from sample.options import OutsideTraining
from sample.pipeline import TextToVideo
from sample.processes import Ranks
from train.config_file import load_config
from train.config_recipes import BESIDE, FAMILIES, TasksConfig
from train.logs import read_log
from train.recipe import TrainData
from train.setup import build_recipe
from train.stills import cut_stills, num_stills, still_frames
from train.tasks import draw_family, draw_given, family_of

EVERY = dict.fromkeys((task for tasks in FAMILIES.values() for task in tasks), 1.0)


@pytest.fixture(scope="module")
def long(room):
    """The room, with clips of 9 frames."""
    from data.world_files import WorldSpec, write_world

    for split, clips in (("train", 8), ("held-out", 4)):
        spec = WorldSpec(clips, 1, split, 1, height=16, width=16, num_frames=9, fps=8.0)
        write_world(room.folder / "long" / split, spec, workers=1)
    return {
        "num_frames": 9,
        "random_start": False,
        "manifest": str(room.folder / "long" / "train" / "manifest.jsonl"),
        "validation": str(room.folder / "long" / "held-out" / "manifest.jsonl"),
    }


def recipe_of(room, folder, data, tasks, **changes):
    folder.mkdir(exist_ok=True)
    config = load_config(
        room.write(folder / "run", "dit", data=data, recipe={"tasks": tasks, **changes})
    )
    clips = read_manifest(config.data.manifest)
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    torch.manual_seed(0)
    recipe = build_recipe(config, TrainData(clips, clips), ranks)
    for parameter in recipe.dit.parameters():  # a fresh one says nothing, whatever it sees
        torch.nn.init.normal_(parameter, std=0.2)
    return recipe


def items_of(recipe, step):
    dataset = recipe.dataset()
    batch = recipe.order.batch(step)
    g = range(step * batch, (step + 1) * batch)
    return dataset.collate([dataset[k] for k in g])


def test_each_task_is_as_frequent_as_it_was_asked_to_be():
    weights = {task: 1.0 + number for number, task in enumerate(EVERY)}
    config = TasksConfig(**weights)
    found = Counter()
    for step in range(3000):
        family = draw_family(config, 0, step)
        found.update(draw_given(config, 0, range(4 * step, 4 * step + 4), 5, family).tasks)
    total = sum(weights.values())
    for task, weight in weights.items():
        share = weight / total
        error = math.sqrt(share * (1 - share) / 3000)  # steps of one family vary together
        assert found[task] / 12000 == pytest.approx(share, abs=4 * error)


def test_what_each_task_gives():
    asked = {task: set() for task in EVERY}
    for task in EVERY:
        config = TasksConfig(**{"text": 0.0, task: 1.0})
        given = draw_given(config, 0, range(200), 4, draw_family(config, 0, 0))
        assert given.tasks == (task,) * 200
        assert given.levels.isnan().any(dim=1).all()  # something is always left to ask for
        asked[task] = {tuple(row) for row in given.levels.isnan().long().tolist()}
        assert (given.still is None) == (family_of(task) not in BESIDE)
        if task == "keyframes":  # the last frame and another, or two others
            assert {tuple(row) for row in given.still.tolist()} == {(0, 2), (1, 2)}
    nothing = {(1, 1, 1, 1)}
    assert asked["text"] == asked["independent"] == asked["last"] == asked["keyframe"] == nothing
    assert asked["image"] == {(1,)}
    assert asked["keyframes"] == {(1, 1, 1, 1), (0, 1, 1, 1)}
    assert asked["first"] == asked["ends"] == {(0, 1, 1, 1)}
    assert asked["leading"] == {(0, 1, 1, 1), (0, 0, 1, 1), (0, 0, 0, 1)}
    assert asked["trailing"] == {row[::-1] for row in asked["leading"]}
    assert asked["window"] == {(0, 1, 1), (0, 0, 1)}
    assert {(0, 1, 1, 0), (0, 0, 1, 0), (0, 1, 0, 0)} < asked["sides"]
    every = set(itertools.product((0, 1), repeat=4))
    assert asked["random"] == every - {(0, 0, 0, 0), (1, 1, 1, 1)}


def test_noise_on_what_is_given():
    config = TasksConfig(text=0, first=1, noise=0.2)
    levels = draw_given(config, 0, range(2000), 3, "clip").levels[:, 0]
    assert (levels == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert 0.19 < levels.max() < 0.2
    clean = draw_given(TasksConfig(text=0, first=1), 0, range(100), 3, "clip").levels[:, 0]
    assert (clean == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_of_a_single_frame_nothing_can_be_given(family):
    given = draw_given(TasksConfig(**EVERY), 0, range(50), 1, family)
    assert set(given.tasks) <= {"text", "image"}
    assert given.levels.isnan().all()
    assert given.still is None


def test_a_sample_does_not_depend_on_its_batch():
    config = TasksConfig(**EVERY)
    whole = draw_given(config, 3, range(8), 4, "clip")
    parts = [draw_given(config, 3, range(k, k + 2), 4, "clip") for k in (0, 2, 4, 6)]
    assert whole.tasks == sum((part.tasks for part in parts), ())
    together = torch.cat([part.levels for part in parts])
    torch.testing.assert_close(whole.levels, together, rtol=0, atol=0, equal_nan=True)


def test_stills():
    shown = ("last", "ends", "keyframe", "keyframes")
    assert [num_stills(TasksConfig(**{t: 1})) for t in shown] == [1, 1, 2, 3]
    assert num_stills(TasksConfig(first=1)) == 0
    assert all(still_frames(row, 9, 2)[0] == 8 for row in range(50))
    assert {still_frames(row, 9, 2)[1] for row in range(200)} == set(range(8))
    assert {still_frames(row, 9, 3)[2] for row in range(200)} == set(range(8))
    assert all(len(set(still_frames(row, n, 3))) == 3 for n in (3, 5, 9) for row in range(200))
    assert still_frames(7, 1, 3) == [0, 0, 0]
    assert still_frames(7, 2, 3) == [1, 0, 0]
    video = torch.arange(9).view(1, 1, 9, 1, 1).expand(2, 3, 9, 2, 2)
    last, other = cut_stills(video, [0, 5], 2)
    assert last.shape == (2, 3, 1, 2, 2)
    assert (last == 8).all()
    assert [other[k, 0, 0, 0, 0].item() for k in (0, 1)] == [
        still_frames(r, 9, 2)[1] for r in (0, 5)
    ]


@pytest.mark.parametrize("task", [task for task in EVERY if task != "text"])
def test_only_what_is_asked_for_has_a_loss(room, long, tmp_path, task):
    """And gradients come of that alone; what is given, the network sees as it is told."""
    recipe = recipe_of(room, tmp_path, long, {"text": 0.0, task: 1.0, "noise": 0.3})
    batch = recipe.make_batch(items_of(recipe, 0), 0)
    seen = {}
    forward = recipe.dit.forward

    def spy(x_t, t, *context, beside=None):
        x_t = x_t.detach().requires_grad_()
        seen.update(x_t=x_t, t=t, beside=beside, pred=forward(x_t, t, *context, beside=beside))
        seen["pred"].retain_grad()
        return seen["pred"]

    recipe.dit.forward = spy
    losses, _ = recipe(batch)
    losses.sum().backward()
    b, frames = len(losses), {"image": 1, "window": 2}.get(task, 3)
    assert seen["x_t"].shape[:3] == (b, seen["x_t"].shape[1], frames)
    asked = batch["asked"]
    error = seen["pred"].grad.abs().sum(dim=(1, 3, 4))
    assert ((error > 0) == asked).all()
    assert (seen["t"][~asked] <= 0.3).all()
    if task == "independent":
        assert (seen["t"].std(dim=1) > 0).all()
    else:
        told = torch.where(asked, seen["t"], torch.nan)
        assert (told.nan_to_num(0).amax(1) == told.nan_to_num(2).amin(1)).all()
    if family_of(task) in BESIDE:
        assert seen["beside"].latents.shape[2] == (2 if task == "keyframes" else 1)
        assert (seen["beside"].positions > 0).all() or "keyframe" in task
        if task == "keyframes":
            assert (seen["beside"].positions[:, 0] != seen["beside"].positions[:, 1]).all()
    else:
        assert seen["beside"] is None


@pytest.mark.parametrize("task", ["ends", "keyframe", "keyframes", "window", "image"])
def test_cached_is_as_from_video(room, long, tmp_path, task):
    """The stills' latents too, which the cache holds behind the clips'."""
    tasks = {"text": 1.0, task: 2.0, "noise": 0.1}
    one = recipe_of(room, tmp_path / "a", long, tasks)
    cache = {"latent_cache": str(tmp_path / "cache"), "cache_dtype": "float32"}
    other = recipe_of(room, tmp_path / "b", long, tasks, **cache)
    for step in range(4):
        losses = [r(r.make_batch(items_of(r, step), step))[0] for r in (one, other)]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)


def test_a_cache_without_stills_is_refused(room, long, tmp_path):
    cache = {"latent_cache": str(tmp_path / "cache")}
    recipe_of(room, tmp_path / "a", long, {"text": 1.0}, **cache).dataset()
    with pytest.raises(ValueError, match="transform"):
        recipe_of(room, tmp_path / "b", long, {"last": 1.0}, **cache).dataset()


def test_packed_clips_have_the_losses_of_single_ones(room, long, tmp_path):
    native = {"native": {"num_frames": [9, 5], "aspects": ["1/1"], "multiple": 16}}
    tasks = {"text": 1.0, "leading": 1.0, "independent": 1.0, "noise": 0.2}
    data = {**long, **native, "packing": {"tokens": 40}}
    recipe = recipe_of(room, tmp_path, data, tasks)
    batch = recipe.make_batch(items_of(recipe, 0), 0)
    losses, _ = recipe(batch)
    sizes = batch["sizes"].tolist()
    shapes = [recipe.vae.latent_shape(*size) for size in sizes]
    numbers = [math.prod(shape) for shape in shapes]
    frames = [shape[1] for shape in shapes]
    videos = batch["video"].split([3 * math.prod(size) for size in sizes])
    parts = [batch[key].split(numbers) for key in ("noise", "posterior_noise")]
    levels, asked = batch["t"].split(frames), batch["asked"].split(frames)
    assert len(set(frames)) > 0
    for k, size in enumerate(sizes):
        alone = {
            "video": videos[k].view(1, 3, *size),
            "noise": parts[0][k].view(1, *shapes[k]),
            "posterior_noise": parts[1][k].view(1, *shapes[k]),
            "t": levels[k][None],
            "asked": asked[k][None],
            "ids": batch["ids"][k : k + 1],
        }
        torch.testing.assert_close(recipe(alone)[0][0], losses[k], rtol=1e-4, atol=1e-4)


def test_a_run_with_every_task(room, long, tmp_path):
    """Figures by task, and what the model says it knows; interrupted, it goes on as it would have."""
    options = {"data": long, "recipe": {"tasks": {**EVERY, "noise": 0.1}}}
    train = {"steps": 12, "checkpoint_interval": 6}
    whole = room.train(tmp_path / "whole", "dit", **options, train=train)
    rows = read_log(whole / "log.jsonl")
    figures = [row for row in rows if "val/task/text" in row][-1]
    assert all(math.isfinite(figures[f"val/task/{task}"]) for task in EVERY)
    info = load_model(whole / "model").info
    assert set(info.tasks) == set(EVERY)
    assert info.sizes == ((9, 16, 16),)
    assert info.given_noise == 0.1
    assert any((whole / "checkpoints").iterdir())


def test_a_run_of_several_sizes(room, long, tmp_path):
    """Each of its sizes can then be asked for without a word, with all that is given."""
    sizes = ((1, 16, 16), (5, 16, 24), (9, 16, 16))
    buckets = [dict(zip(("num_frames", "height", "width"), size)) for size in sizes]
    options = {"data": {**long, "buckets": buckets}, "recipe": {"tasks": {**EVERY, "noise": 0.1}}}
    out = room.train(tmp_path / "run", "dit", **options, train={"steps": 12})
    losses = [row["loss"] for row in read_log(out / "log.jsonl") if "loss" in row]
    assert losses
    assert all(map(math.isfinite, losses))
    pipeline = TextToVideo.from_folder(out / "model", "cpu", dtype=torch.float32)
    assert set(pipeline.info.sizes) == set(sizes)
    with warnings.catch_warnings(action="error", category=OutsideTraining):
        for frames, height, width in sizes:
            picture = torch.zeros(3, height, width)
            given = {"image": picture} if frames > 1 else {}
            given |= {"keyframes": {2: picture, -1: picture}} if frames > 1 else {}
            asked = {"frames": frames, "height": height, "width": width, "steps": 1}
            made = generate(pipeline, "x", **given, **asked)
            assert made.shape == (3, frames, height, width)
    with pytest.warns(OutsideTraining, match=r"13 frames \(trained on 1 to 9\)"):
        generate(pipeline, "x", frames=13, steps=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": {"tasks": {"text": 0}}}, "all tasks are 0; give at least one"),
        ({"recipe": {"tasks": {"first": -1}}}, "recipe.tasks.first"),
        ({"recipe": {"tasks": {"noise": 2}}}, "recipe.tasks.noise"),
        ({"recipe": {"tasks": {"middle": 1}}}, "recipe.tasks.middle"),
        (
            {
                "recipe": {"tasks": {"last": 1}},
                "data": {"native": {"multiple": 16}, "packing": {"tokens": 40}},
            },
            "does not go with the tasks image, last, ends, keyframe, keyframes and window",
        ),
    ],
)
def test_mistakes(room, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_config(room.write(tmp_path / "run", "dit", **changes))


def test_text_alone_is_as_it_was(room, tmp_path):
    """The same batches, to the bit, as without the section."""
    recipes = [
        recipe_of(room, tmp_path, {}, {"text": weight, "noise": 0.5}) for weight in (1.0, 3.0)
    ]
    one, other = (recipe.make_batch(items_of(recipe, 2), 2) for recipe in recipes)
    assert one.keys() == other.keys() == {"ids", "t", "noise", "video", "posterior_noise"}
    assert all(torch.equal(one[key], other[key]) for key in one)
