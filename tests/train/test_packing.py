"""A DiT trained on clips of several sizes: in buckets with batches of their own, and in packed rows."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from data.manifest import read_manifest, write_manifest
from data.video import write_video
from sample.processes import Ranks
from train.config import RunConfig
from train.config_file import load_config
from train.logs import TIME_FIELDS, read_log
from train.plan import flops_per_sample, plan
from train.plan_work import count_work, mean_counts
from train.recipe import TrainData
from train.setup import build_recipe
from train.sizes import expected_counts

NATIVE = {"num_frames": [1, 5, 9], "aspects": ["3/2", "2/3"], "multiple": 8, "batch_multiple": 2}
BASE = (5, 16, 16)
# Tokens of the tests' VAE and DiT: 4 x 8 x 8 pixels each, and one for the first frame.
TOKENS = {
    (1, 16, 16): 4,
    (1, 16, 24): 6,
    (5, 16, 16): 8,
    (5, 16, 24): 12,
    (5, 24, 16): 12,
    (9, 16, 16): 12,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four clips of each size of several frames, and six images, four of them wide."""
    folder, rows, draw = tmp_path_factory.mktemp("sizes"), [], np.random.default_rng(0)
    for num_frames, height, width in [size for size in TOKENS if size[0] > 1]:
        for k in range(4):
            name = f"{num_frames}-{height}-{width}-{k}.mp4"
            frames = np.full((num_frames, height, width, 3), draw.integers(255, size=3), np.uint8)
            write_video(folder / name, frames, fps=8)
            about = {"width": width, "height": height, "duration": num_frames / 8}
            rows.append({"path": name, "caption": f"colour {k}", **about})
    for k in range(6):
        width = 30 if k < 4 else 20
        Image.new("RGB", (width, 20), (40 * k, 0, 99)).save(folder / f"{k}.png")
        rows.append({"path": f"{k}.png", "caption": "an image", "width": width, "height": 20})
    rows.append({"path": "nowhere.mp4", "caption": "not measured"})
    write_manifest(folder / "m.jsonl", rows)
    return folder


@pytest.fixture
def changes(folder):
    """What a run of either kind changes in a config."""

    def make(kind, **train):
        manifest = str(folder / "m.jsonl")
        data = {"manifest": manifest, "validation": None, "native": NATIVE}
        if kind == "packed":
            data["packing"] = {"tokens": 30}
        # Not causal: the text's padding is masked.
        return {"data": data, "train": train, "logging": {"interval": 1, "num_val_clips": 6}}

    return make


@pytest.fixture
def recipe(room, tmp_path, changes):
    def make(kind, num_ranks=1, **train):
        values = room.values(tmp_path / "run", "dit", **changes(kind, **train))
        config = RunConfig.model_validate(values)
        manifest = read_manifest(config.data.manifest)
        ranks = Ranks(0, num_ranks, torch.device("cpu"), None)
        return build_recipe(config, TrainData(manifest, manifest), ranks)

    return make


def items_of(recipe, numbers):
    dataset = recipe.dataset()
    return dataset.collate([dataset[g] for g in numbers])


def step_numbers(order, step):
    return range(order.first(step), order.first(step + 1))


# The order of a run


def test_batches_carry_about_the_tokens_of_the_base(recipe):
    order = recipe("native").order
    # 4 x 8 tokens, in a multiple of 2 clips: of 12 tokens 3 would be the nearest, and is none.
    batches = {1: [8, 6], 5: [4, 2, 2], 9: [2]}
    assert order.batches == dict(zip(TOKENS, [n for of_one in batches.values() for n in of_one]))
    rows = {size: len(rows) for size, rows in order.rows.items()}
    assert rows == {**dict.fromkeys(TOKENS, 4), (1, 16, 16): 2}


def test_a_batch_that_cannot_be_dealt_out_says_what_to_set(recipe):
    expected = "set data.native.batch_multiple to a multiple of 4"
    with pytest.raises(
        ValueError, match=rf"its batch of 6 does not divide into 4 proc.*{expected}"
    ):
        recipe("native", num_ranks=4)


@pytest.mark.parametrize("kind", ["native", "packed"])
def test_t_and_noise_are_of_each_clip(recipe, kind):
    recipe = recipe(kind)
    asked = []
    inner = recipe.sample_t
    recipe.sample_t = lambda u, n: (asked.append((n, len(u))), inner(u, n))[1]
    sizes = set()
    for step in range(12):
        asked.clear()
        numbers = step_numbers(recipe.order, step)
        batch = recipe.make_batch(items_of(recipe, numbers), step)
        counts = recipe.order.counts(step)
        sizes |= counts.keys()
        found = {n: sum(c for m, c in asked if m == n) for n, _ in asked}
        expected = {}
        for size, count in counts.items():
            expected[TOKENS[size]] = expected.get(TOKENS[size], 0) + count
        assert found == expected, "each clip's t is drawn for its own number of tokens"
        cells = sum(
            recipe.vae.latent_shape(*size)[0] * 4 * TOKENS[size] * n for size, n in counts.items()
        )
        assert batch["noise"].numel() == cells
        assert len(batch["t"]) == len(numbers)
    assert len(sizes) > 4


@pytest.mark.parametrize("kind", ["native", "packed"])
def test_the_strata_of_a_step_are_those_of_its_own_clips(recipe, kind):
    recipe, drawn = recipe(kind), []
    recipe.sample_t = lambda u, num_tokens: (drawn.append(u), u)[1]
    for step in range(6):
        drawn.clear()
        numbers = step_numbers(recipe.order, step)
        recipe.make_batch(items_of(recipe, numbers), step)
        strata = (torch.cat(drawn) * len(numbers)).floor().int().tolist()
        assert sorted(strata) == list(range(len(numbers)))


# Packed rows against separate clips


def gradients(recipe):
    found = {k: p.grad.clone() for k, p in recipe.trained().items() if p.grad is not None}
    recipe.zero_grad()
    return found


def test_a_packed_row_gives_the_losses_and_gradients_of_its_clips_alone(recipe):
    recipe = recipe("packed")
    with torch.no_grad():  # a fresh DiT predicts zero, whatever it attends to
        for name, p in recipe.dit.named_parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    num_sizes = 0
    for step in range(4):
        numbers = list(step_numbers(recipe.order, step))
        batch = recipe.make_batch(items_of(recipe, numbers), step)
        num_sizes = max(num_sizes, len({tuple(s) for s in batch["sizes"].tolist()}))
        packed, _ = recipe(batch)
        packed.sum().backward()
        together = gradients(recipe)
        alone = []
        for k, (size, t, ids) in enumerate(zip(batch["sizes"].tolist(), batch["t"], batch["ids"])):
            video = items_of(recipe, [numbers[k]])["video"].view(1, 3, *size)
            shape = recipe.vae.latent_shape(*size)
            mine = recipe.make_batch(items_of(recipe, [numbers[k]]), step)
            noise, posterior = (mine[n].view(1, *shape) for n in ("noise", "posterior_noise"))
            one = {"video": video, "t": t[None], "ids": ids[None], "noise": noise}
            loss, _ = recipe({**one, "posterior_noise": posterior})
            loss.sum().backward()
            alone.append(loss.detach())
        torch.testing.assert_close(packed.detach(), torch.cat(alone), atol=1e-5, rtol=1e-5)
        for name, grad in gradients(recipe).items():
            torch.testing.assert_close(together[name], grad, atol=1e-4, rtol=1e-3)
    assert num_sizes > 2


def test_the_latents_of_a_cache_are_packed_as_well(recipe, tmp_path):
    recipe = recipe("packed")
    items = items_of(recipe, step_numbers(recipe.order, 0))
    from_video = recipe.make_batch(items, 0)
    sizes = [tuple(size) for size in items["sizes"].tolist()]
    videos = torch.split(items["video"], [3 * np.prod(size) for size in sizes])
    with torch.no_grad():
        posteriors = [
            recipe.vae.encode(video.view(1, 3, *size) / 127.5 - 1)
            for video, size in zip(videos, sizes)
        ]
        cached = {k: v for k, v in items.items() if k != "video"}
        cached["mean"] = torch.cat([p.mean.flatten() for p in posteriors])
        cached["std"] = torch.cat([p.std.flatten() for p in posteriors])
        losses = [recipe(batch)[0] for batch in (from_video, recipe.make_batch(cached, 0))]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)


# Runs


def rows_of(out):
    """log.jsonl without what depends on the clock."""
    log = read_log(out / "log.jsonl")
    return [{k: v for k, v in row.items() if k not in TIME_FIELDS} for row in log]


@pytest.mark.parametrize("kind", ["native", "packed"])
def test_a_run_resumes_bit_exactly_within_an_epoch(room, tmp_path, changes, kind, capsys):
    steps = {"steps": 9, "checkpoint_interval": 4, "keep_checkpoints": 9}
    options = changes(kind, **steps)
    whole = room.train(tmp_path / "whole", "dit", **options)
    said = capsys.readouterr().out
    assert ("bucket 5x16x24" if kind == "native" else "size 5x16x24") in said
    assert "left out" in said
    again = shutil.copytree(whole, tmp_path / "again")
    shutil.rmtree(again / "model")
    for step in (8, 9):
        shutil.rmtree(again / "checkpoints" / f"step-{step:08d}")
    room.train(again, "dit", **options)
    assert "resumed, steps 4 to 9" in capsys.readouterr().out
    assert rows_of(again) == rows_of(whole)
    left, right = (load_file(out / "model" / "dit.safetensors") for out in (whole, again))
    assert all(torch.equal(left[name], right[name]) for name in left)
    losses = [row["loss"] for row in rows_of(whole)]
    assert len(losses) == 9
    assert all(np.isfinite(losses))


def test_accumulation_changes_nothing(room, tmp_path, changes):
    for kind in ("native", "packed"):
        runs = [
            room.train(tmp_path / f"{kind}-{n}", "dit", **changes(kind, steps=5, grad_accum=n))
            for n in (1, 2)
        ]
        one, two = ([row["loss"] for row in rows_of(out)] for out in runs)
        assert two == pytest.approx(one, rel=1e-5)


def test_the_loss_is_the_mean_over_the_clips_of_a_step(room, recipe, tmp_path, changes):
    """The first step's, as logged, against its clips by hand; a fresh DiT predicts zero."""
    for kind in ("native", "packed"):
        out = room.train(tmp_path / kind, "dit", **changes(kind, steps=1))
        made = recipe(kind)
        numbers = step_numbers(made.order, 0)
        losses, _ = made(made.make_batch(items_of(made, numbers), 0))
        assert len(losses) == len(numbers) == made.order.batch(0) != made.config.train.batch_size
        losses.mean().backward()
        norm = torch.stack([grad.norm() for grad in gradients(made).values()]).norm()
        row = rows_of(out)[0]
        assert row["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["native", "packed"])
def test_a_cache_holds_each_row_in_its_own_size(room, tmp_path, changes, kind):
    options = changes(kind, steps=5)
    options["data"]["random_start"] = False
    from_video = room.train(tmp_path / "video", "dit", **options)
    cache = {"latent_cache": str(tmp_path / "latents"), "cache_dtype": "float32"}
    cached = room.train(tmp_path / "cached", "dit", **options, recipe=cache)
    left, right = ([row["loss"] for row in rows_of(out)] for out in (from_video, cached))
    assert right == pytest.approx(left, rel=1e-4)


# Plans and refusals


def squeezed(text):
    return [" ".join(line.split()) for line in text.splitlines()]


def test_a_dry_run_says_what_the_buckets_are(room, tmp_path, changes):
    config = load_config(room.write(tmp_path / "run", "dit", **changes("native", steps=30)))
    lines = squeezed(plan(config))
    # An epoch of 22 clips takes 2/8 + 4/6 + 4/4 + 3 * 4/2 = 7.92 steps.
    assert "bucket 1x16x16 3.2% (of steps; 8 clips, 32 tokens; 2 rows, 3.8 epochs)" in lines
    assert "bucket 9x16x16 25.3% (of steps; 2 clips, 24 tokens; 4 rows, 3.8 epochs)" in lines
    assert "cut off 0.0% (of pictures)" in lines
    assert (
        "left out 1 of 23 rows are in no bucket: 1 have no width and height in the manifest"
        in lines
    )
    assert "samples per batch 2.78 (in the mean)" in lines
    assert f"tokens per batch {round(208 / 7.9167)}" in lines


def test_a_dry_run_says_what_packing_leaves_unused(room, tmp_path, changes):
    config = load_config(room.write(tmp_path / "run", "dit", **changes("packed", steps=30)))
    lines = squeezed(plan(config))
    (packing,) = [line for line in lines if line.startswith("packing ")]
    # 22 clips of 208 tokens in all: 6 rows of two of 12 tokens and perhaps one of 6, one of three of
    # 8, and the rest.
    assert packing == (
        "packing 86.7% (of a row's 30 tokens are used, 13.3% are not; 11.0 clips a step, 22 in 8 rows "
        "an epoch)"
    )
    assert "size 1x16x16 9.1% (of clips; 4 tokens; 2 rows, 15.0 epochs)" in lines
    dealt = "4 packed rows, 4 per micro-batch and process"
    assert f"samples per batch 11 (in the mean, in {dealt})" in lines
    assert "tokens per batch 104" in lines


def test_flops_are_those_of_the_mean_step(recipe):
    made = recipe("native")
    on_meta = build_recipe(made.config, made.data, made.ranks, on_meta=True)
    work = count_work(on_meta)
    counts = mean_counts(on_meta)
    by_hand = sum(n * flops_per_sample(on_meta, size) for size, n in counts.items())
    assert (work.forward + work.backward) * 4 == pytest.approx(by_hand)
    assert work.tokens * 4 == pytest.approx(sum(n * TOKENS[size] for size, n in counts.items()))


@pytest.mark.parametrize("kind", ["native", "packed"])
def test_what_a_plan_expects_without_the_manifest(recipe, kind):
    made = recipe(kind)
    counts = expected_counts(made.config, made.num_tokens)
    tokens = sum(n * made.num_tokens(size) for size, n in counts.items())
    assert tokens == pytest.approx(4 * 30 if kind == "packed" else 4 * 8, rel=0.25)


def test_a_packed_row_costs_what_its_clips_cost(recipe):
    """So that FLOPs may be added up clip by clip."""
    made = recipe("packed")
    on_meta = build_recipe(made.config, made.data, made.ranks, on_meta=True)
    batch = made.make_batch(items_of(made, step_numbers(made.order, 0)), 0)
    with FlopCounterMode(display=False) as counter:
        losses, _ = made(batch)
        losses.sum().backward()
    expected = sum(n * flops_per_sample(on_meta, size) for size, n in made.order.counts(0).items())
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("kind", "overrides", "expected"),
    [
        ("vae", ["data.packing={tokens: 9}"], "data.packing is for the tokens of a DiT"),
        ("dit", ["data.packing={tokens: 9}", "data.native=null"], "set data.native too"),
        (
            "dit",
            ["data.packing={tokens: 9}", "train.parallel.context=2"],
            "does not go with train.par",
        ),
        (
            "dit",
            ["data.packing={tokens: 9}", "train.compile=auto"],
            "does not go with train.compile",
        ),
        (
            "dit",
            ["data.native.multiple=32"],
            "data.native.multiple=32 is more than the smaller side",
        ),
        (
            "dit",
            ["data.native.aspects=[16:9]"],
            "data.native.aspects.0: expected width/height from",
        ),
        ("dit", ["data.native.aspects=[wide]"], "expected width/height, such as 16/9, got 'wide'"),
        ("dit", ["data.native.num_frames=[]"], "data.native.num_frames: got []"),
        ("dit", ["data.native.frames=[1]"], "data.native.frames: unknown key"),
        (
            "dit",
            ["data.buckets=[{num_frames: 1, height: 8, width: 8}]"],
            "data.buckets and data.native are two ways to choose sizes",
        ),
        (
            "dit",
            [
                f"data.buckets={[dict(zip(('num_frames', 'height', 'width'), s)) for s in TOKENS]}",
                *("data.native=null", "recipe.latent_cache=x", "data.random_start=false"),
            ],
            "recipe.latent_cache holds one size per row",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(room, tmp_path, kind, overrides, expected):
    path = room.write(tmp_path / "run", kind, data={"native": {"multiple": 8}})
    with pytest.raises(ValueError, match=re.escape(expected)) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("native", "expected"),
    [
        (
            {"multiple": 2},
            r"^bucket 1x18x14: height=18 does not fit the VAE: it needs a multiple of 4",
        ),
        (
            {"multiple": 4},
            r"^bucket \w+: latents of \w+ do not divide into patches of 1x2x2; change",
        ),
        ({"multiple": 8, "num_frames": [4]}, r"^bucket 4x16x16: frames=4 does not fit the VAE"),
    ],
)
def test_a_size_that_does_not_fit_the_networks_is_named(
    recipe, changes, room, tmp_path, native, expected
):
    options = changes("native")
    values = room.values(tmp_path / "run", "dit", **options)
    values["data"]["native"] = {"aspects": ["3/4"], **native}
    config = RunConfig.model_validate(values)
    manifest = read_manifest(config.data.manifest)
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    with pytest.raises(ValueError, match=expected):
        build_recipe(config, TrainData(manifest, manifest), ranks)


def test_native_is_one_line(room, tmp_path):
    path = room.write(tmp_path / "run", "dit", data={"height": 32, "width": 32, "num_frames": 9})
    config = load_config(path, ["data.native=true"])
    assert {size[0] for size in config.data.sizes} == {1, 9}
    assert (9, 32, 32) in config.data.sizes
    assert load_config(path, ["data.native=false"]) == load_config(path)
    dumped = json.loads(config.model_dump_json())
    assert RunConfig.model_validate(dumped) == config
