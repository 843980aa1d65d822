"""Every way to spread a run over processes trains as one process does."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from data.manifest import read_manifest, write_manifest
from train.logs import read_log

ADAM = {"kind": "adamw", "lr": 2e-3}
# Adam divides by a gradient's usual size; next to zero, as a discriminator's are at first, that makes
# rounding errors as large as steps. A larger eps keeps them small.
LARGE_EPS = {"gan": {**ADAM, "eps": 3e-2}}

# By world size: the recipe, and what is changed in its train section.
LAYOUTS = {
    2: {
        "replicas": ("dit", {}),
        "replicas, cached": ("dit", {}),
        "replicas vae": ("vae", {}),
        "replicas gan": ("gan", {}),
        "fsdp": ("dit", {"parallel": {"shard": 2}}),
        "fsdp vae": ("vae", {"parallel": {"shard": "auto"}}),
        "fsdp gan": ("gan", {"parallel": {"shard": 2}}),
        "ulysses": ("dit", {"parallel": {"context": 2}}),
        "gather": ("dit", {"parallel": {"context": 2, "context_method": "gather"}}),
        "accumulated": (
            "dit",
            {"grad_accum": 2, "ema": {"offload": True}, "parallel": {"shard": 2}},
        ),
        "accumulated in shards": (
            "dit",
            {"grad_accum": 2, "parallel": {"shard": 2, "accumulate": "sharded"}},
        ),
        "bfloat16": ("dit", {"dtype": "bfloat16", "parallel": {"shard": 2}}),
        "accumulated gan": ("gan", {"grad_accum": 2}),
        "anew vae": (
            "vae",
            {"activation_checkpointing": "selective", "parallel": {"shard": 2}},
        ),
        "blocks anew": (
            "dit",
            {"activation_checkpointing": "block", "parallel": {"shard": 2, "context": 1}},
        ),
        "selected anew": (
            "dit",
            {"activation_checkpointing": "selective", "parallel": {"context": 2}},
        ),
        "compiled": ("dit", {"compile": True, "parallel": {"shard": 2}}),
        "muon": ("dit", {"optimizer": {"kind": "muon", "lr": 2e-3}, "parallel": {"shard": 2}}),
        "native": ("dit", {}),
        "packed": ("dit", {"parallel": {"shard": 2}}),
    },
    4: {
        "hsdp": ("dit", {"parallel": {"shard": 2}}),
        "hsdp gan, accumulated in shards": (
            "gan",
            {
                "batch_size": 8,
                "grad_accum": 2,
                "parallel": {"shard": 2, "accumulate": "sharded"},
            },
        ),
        "ulysses x fsdp": ("dit", {"parallel": {"shard": 2, "context": 2}}),
        "replicas x ulysses": ("dit", {"parallel": {"context": 2}}),
    },
}
CASES = [(world_size, name) for world_size, layouts in LAYOUTS.items() for name in layouts]


# Of the clips' own sizes: those that are cut short have one frame, and others.
NATIVE = {"num_frames": [1, 5], "aspects": ["3/2"], "multiple": 8, "batch_multiple": 2}
DATA = {"native": {"native": NATIVE}, "packed": {"native": NATIVE, "packing": {"tokens": 20}}}


# Something given: latent frames, pictures beside the clips, another number of frames.
TASKED = ("replicas, cached", "blocks anew", "gather", "hsdp")
TASKS = {
    "text": 1,
    "image": 1,
    "first": 1,
    "ends": 1,
    "keyframe": 1,
    "independent": 1,
    "noise": 0.2,
}


def write_mixed(room):
    """The manifest of the room's clips, some of them cut short, and some cropped."""
    path = room.folder / "train" / "mixed.jsonl"
    rows = [
        row.model_dump(exclude_none=True)
        for row in read_manifest(path.with_name("manifest.jsonl")).rows
    ]
    for number, row in enumerate(rows):
        if number % 3 == 1:
            row["end"] = 0.4
        if number % 4 == 2:
            row["crop"] = [0, 4, 12, 8]
    write_manifest(path, rows)
    return path


def changes(kind, train, latents=None, tasked=False):
    """What a run's config says; latents is the folder of a latent cache."""
    optimizer = LARGE_EPS.get(kind, ADAM)
    steps = {"steps": 20, "checkpoint_interval": 10, "optimizer": optimizer}
    values = {"train": {**steps, **train}, "logging": {"interval": 1}}
    if kind == "dit":
        values["recipe"] = {"dit": {"num_blocks": 2}, "tasks": TASKS if tasked else {}}
        if latents is not None:
            values["recipe"] |= {"latent_cache": str(latents), "cache_dtype": "float32"}
            values["data"] = {"random_start": False}
    return values


@pytest.fixture(scope="module")
def straight(room, tmp_path_factory):
    """The folder of a run in one process, by what else changes the training."""
    made = {}

    def run(kind, train, cached=False, sizes=None, tasked=False):
        kept = {key: train[key] for key in ("optimizer", "dtype", "batch_size") if key in train}
        key = (kind, cached, sizes, tasked, *kept)
        if key not in made:
            folder = tmp_path_factory.mktemp("straight")
            latents = folder / "latents" if cached else None
            values = changes(kind, kept, latents, tasked)
            if sizes is not None:
                values["data"] = {"manifest": str(write_mixed(room)), **DATA[sizes]}
            made[key] = room.train(folder / "run", kind, **values)
        return made[key]

    return run


@pytest.fixture(scope="module")
def spread(room, several, tmp_path_factory):
    """The folder of a run in several processes, by world size and layout."""
    folder = tmp_path_factory.mktemp("spread")
    ended = {}

    def run(world_size, name):
        if world_size not in ended:
            configs = []
            for layout, (kind, train) in LAYOUTS[world_size].items():
                latents = folder / "latents" if "cached" in layout else None
                values = changes(kind, train, latents, layout in TASKED)
                if layout in DATA:
                    values["data"] = {"manifest": str(write_mixed(room)), **DATA[layout]}
                configs.append(room.write(folder / f"{world_size} {layout}", kind, **values))
            ended[world_size] = None, "it did not end"
            ended[world_size] = several([("train", c) for c in configs], world_size)
        out = folder / f"{world_size} {name}"
        assert (out / "model" / "model.yaml").is_file(), ended[world_size][1]
        return out

    return run


@pytest.mark.parametrize(("world_size", "name"), CASES)
def test_trains_as_one_process_does(straight, spread, world_size, name):
    kind, train = LAYOUTS[world_size][name]
    sizes = name if name in DATA else None
    tasked = name in TASKED
    out, one = spread(world_size, name), straight(kind, train, "cached" in name, sizes, tasked)
    rows, expected = (read_log(folder / "log.jsonl") for folder in (out, one))
    assert len(rows) == len(expected) == 20
    adversary = ["grad_norm_discriminator"] if kind == "gan" else []
    figures = [f"val/task/{task}" for task in TASKS if tasked and task != "noise"]
    figures += ["loss", "grad_norm", "val/loss" if kind == "dit" else "val/psnr", *adversary]
    for key in figures:
        found, wanted = ([row[key] for row in log if key in row] for log in (rows, expected))
        assert len(found) >= 2
        # Muon orthogonalises in bfloat16, where a rounding error may tip a value to the next one;
        # test_context compares its step on the same gradients.
        loose = {"val/psnr": 1e-3, "grad_norm": 1e-4 if name == "muon" else 1e-5}
        tolerance = 1e-2 if name == "bfloat16" else loose.get(key, 1e-5)
        assert found == pytest.approx(wanted, abs=tolerance)
    part = "dit.safetensors" if kind == "dit" else "vae.safetensors"
    weights, others = (load_file(folder / "model" / part) for folder in (one, out))
    assert weights.keys() == others.keys()
    for key, value in weights.items():
        tolerance = {"bfloat16": 1e-2, "muon": 2e-2}.get(name, 1e-4)
        torch.testing.assert_close(others[key], value, atol=tolerance, rtol=0)
    made, wanted = ({path.name for path in folder.glob("samples/*/*.mp4")} for folder in (out, one))
    assert made == wanted != set()


@pytest.mark.parametrize("kind", ["vae", "gan", "dit"])
def test_one_process_goes_on_from_what_two_have_written(room, straight, spread, tmp_path, kind):
    name = {"dit": "fsdp"}.get(kind, f"replicas {kind}")
    out = shutil.copytree(spread(2, name), tmp_path / "run")
    shutil.rmtree(out / "checkpoints" / "step-00000020")
    room.train(out, kind, **changes(kind, {}))
    losses, expected = (
        [row["loss"] for row in read_log(folder / "log.jsonl")]
        for folder in (out, straight(kind, {}))
    )
    assert losses == pytest.approx(expected, abs=1e-5)
