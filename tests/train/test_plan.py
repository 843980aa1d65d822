"""`zoetrope plan`: what it says, what it refuses, and the rates it goes by."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dit.discriminator import DiscriminatorConfig, PatchDiscriminator
from train.cli import main
from train.config_file import load_config
from train.gpus import GPUS, find_gpu, peak_flops
from train.plan_layouts import GIB, SPARE, Layout, Machines, memory, model_of, own_layout
from train.plan_recipe import recipe_on_meta, write_shapes
from train.plan_report import between, flops, machines_of, money, plan_run, two

PRESETS = Path(__file__).parents[2] / "configs" / "presets"


@pytest.fixture(scope="module")
def config(room, tmp_path_factory):
    """The path of a DiT's."""
    return room.write(tmp_path_factory.mktemp("plan") / "dit", "dit", train={"batch_size": 8})


def refused(capsys, *arguments):
    """The line that a command ends with."""
    with pytest.raises(SystemExit) as stop:
        main(["plan", *map(str, arguments)])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    return err


def test_gpus_are_known_by_the_names_that_cuda_gives_them():
    rates = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100 NVL": 835e12,
        "NVIDIA H200": 989e12,
        "NVIDIA A100-SXM4-40GB": 312e12,
        "A100-SXM4-80GB": 312e12,
        "NVIDIA A100 80GB PCIe": 312e12,
        "NVIDIA B200": 2250e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA GeForce RTX 4090": 165.2e12,
        "NVIDIA RTX 6000 Ada Generation": 364.2e12,
        "NVIDIA GeForce RTX 4090 Laptop GPU": None,
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
        "NVIDIA GB300": None,
        "cpu": None,
    }
    assert {name: peak_flops(name) for name in rates} == rates
    assert peak_flops("NVIDIA H200", "float32") == 67e12
    # Tensor cores are quicker than the rest of a GPU, its memory than its links, these than networks.
    assert all(1.9 < gpu.bfloat16 / gpu.float32 < 50 for gpu in GPUS.values())
    assert all(20 * GIB < gpu.memory < 200 * GIB for gpu in GPUS.values())
    assert all(gpu.network < gpu.link < gpu.memory_rate for gpu in GPUS.values())
    assert find_gpu("RTX 4090") is find_gpu("4090")
    assert find_gpu("H100-SXM") is GPUS["h100"]


def test_rings_are_as_quick_as_their_slowest_link():
    machines = machines_of("h100", 32)
    assert (machines.nodes, machines.per_node) == (4, 8)
    share = 0.8
    assert machines.rate(8, 1) == share * 450e9  # within a node
    assert machines.rate(32, 1) == share * 400e9  # over nodes, whose eight networks it has
    assert machines.rate(4, 8) == share * 50e9  # one rank a node
    assert machines.rate(8, 4) == share * 100e9  # two ranks a node
    assert machines_of("h100", 32, network_gbps=100).rate(4, 8) == share * 12.5e9
    assert machines_of("h200", 6).nodes == 1
    assert machines_of("h200", 12, 3).per_node == 4


def test_numbers_have_no_more_digits_than_are_known():
    assert [two(x) for x in (0, 0.012345, 1.26, 99.6, 123, 12_345)] == [
        *("0", "0.012", "1.3", "100", "120", "12,000")
    ]
    assert between((2.04, 1.96)) == "2.0"
    assert between((3.0, 1.26)) == "1.3 to 3.0"
    assert money(2_340_000) == "2.3M"
    assert [flops(x) for x in (0, 1.234e15, 164e12)] == ["none", "1.23 PFLOPs", "164 TFLOPs"]


def test_the_own_layout_of_a_config(config):
    auto = load_config(config, ["train.parallel.shard=auto", "train.parallel.context=2"])
    assert own_layout(auto, 8) == Layout(8, 4, 2, "none", 1, 2)
    with pytest.raises(ValueError, match=r"shard=3 x context=1 does not divide 8 GPUs"):
        own_layout(load_config(config, ["train.parallel.shard=3"]), 8)
    with pytest.raises(ValueError, match=r"batch_size=8 does not divide into 16 groups"):
        own_layout(load_config(config), 16)


def test_what_is_not_there_is_stood_in_for():
    recipe, notes = recipe_on_meta(load_config(PRESETS / "1.3b.yaml"))
    assert notes == [
        "recipe.vae=models/wan-1.3b is not there: assumed is Wan 2.1's, 4x8x8 pixels a latent of 16 "
        "channels (--vae wan2.2)"
    ]
    counts = {k: sum(p.numel() for p in m.parameters()) for k, m in recipe.parts().items()}
    assert counts["dit"] == 1_414_671_424
    assert counts["vae (frozen)"] == 126_892_531  # docs/public-vaes.md
    recipe, _ = recipe_on_meta(load_config(PRESETS / "5b.yaml"), "wan2.2")
    assert recipe.latent_shape == (48, 31, 44, 80)
    assert sum(p.numel() for p in recipe.vae.parameters()) == 704_688_668
    for task in ("references", "keyframe", "window"):
        given = load_config(PRESETS / "1.3b.yaml", [f"recipe.tasks.{task}=0.5"])
        assert len(recipe_on_meta(given)[1]) == (1 if task == "window" else 2), task
    # A perceptual network of the right size as well, and none where none is asked for.
    recipe, notes = recipe_on_meta(load_config(PRESETS / "vae-4x8x8.yaml"))
    assert sum(p.numel() for p in recipe.perceptual.parameters()) == 14_714_688
    assert notes == []
    absent = load_config(PRESETS / "vae-4x8x8.yaml", ["recipe.perceptual.weights=null"])
    _, notes = recipe_on_meta(absent)
    assert "without the perceptual loss" in notes[0]


def test_files_of_shapes_read_as_zeros(tmp_path):
    with torch.device("meta"):
        network = PatchDiscriminator(DiscriminatorConfig(width=4, num_layers=2))
    write_shapes(tmp_path / "x.safetensors", network.state_dict())
    found = load_file(tmp_path / "x.safetensors")
    assert {k: v.shape for k, v in found.items()} == {
        k: v.shape for k, v in network.state_dict().items()
    }
    assert all(not value.any() for value in found.values())


def test_a_report(config, capsys):
    options = "--gpus=4 --gpu=4090 --price=2 --samples=10000000 --network-gbps=100"
    with pytest.raises(SystemExit) as stop:
        main(["plan", str(config), "train.steps=1000", *options.split()])
    assert stop.value.code == 0
    text, err = capsys.readouterr()
    assert not err
    lines = text.splitlines()
    assert all(len(line) <= 105 for line in lines)
    assert lines[0] == f"{config} on 4 4090 in 1 node"
    assert "The config's own layout:" in lines
    assert "  weights whole on 4 GPUs; micro-batches of 2 samples" in lines
    # 10 M samples at 8 a step, four GPUs at $2: days and dollars of the same steps.
    seconds, days, dollars = (
        re.search(pattern, text)
        for pattern in (
            r"A step: ([\d.]+)[^,]* s, MFU",
            r"1,250,000 steps: ([\d.]+)",
            r"days, \$([\d.]+)",
        )
    )
    assert float(days[1]) == pytest.approx(float(seconds[1]) * 1_250_000 / 86400, rel=0.1)
    assert float(dollars[1]) == pytest.approx(float(days[1]) * 24 * 4 * 2, rel=0.1)
    table = lines[
        lines.index(
            "Layouts that fit, the best first: quick, then of few exchanges, then little sharded"
        )
        + 2 :
    ]
    assert [line.split()[:3] for line in table[:3]] == [
        [shard, "1", "none"] for shard in ("1", "2", "4")
    ]
    assert "12.5 to others (--network-gbps)" in text
    assert "$2.00 an hour and GPU" in lines[-1]


def test_a_layout_that_cannot_be_is_named_with_one_that_can(config):
    bad = load_config(config, ["train.parallel.shard=3"])
    text = plan_run(bad, machines_of("h100", 4))
    assert (
        "The config's own layout cannot be: train.parallel.shard=3 x context=1 does not divide 4 GPUs"
    ) in text
    assert "To use the first one: train.parallel.shard=1\n" in text


def test_memory_that_is_missing_is_said(config):
    """On a GPU with just so much memory that a batch in two parts fits, and not in one."""
    run = load_config(config, ["train.batch_size=2048"])
    model = model_of(recipe_on_meta(run)[0])
    one, two_parts = (
        memory(model, Layout(1, 1, 1, "none", accum, 2048 // accum)).peak for accum in (1, 2)
    )
    assert two_parts < 0.9 * one
    reserve = SPARE[0] / (1 - SPARE[1])
    small = replace(GPUS["h100"], memory=(one + two_parts) / 2 / (1 - SPARE[1]) + reserve)
    text = plan_run(run, Machines(small, "toy", 1, 1, 1e9))
    said = r"cannot be: it needs (0\.\d+) GiB of each GPU's (0\.\d+), (0\.\d+) too many"
    needed, usable, missing = map(float, re.search(said, text).groups())
    assert needed - usable == pytest.approx(missing, abs=0.01)
    tiny = replace(small, memory=two_parts / 4 + reserve)
    with pytest.raises(ValueError, match=r"no layout fits 1 toy: the leanest needs 0\.\d+ GiB of"):
        plan_run(run, Machines(tiny, "toy", 1, 1, 1e9))


def test_mistakes_are_one_line(config, capsys):
    assert "--gpu=k80 is not known; there are a100-40, a100, h100" in refused(
        capsys, config, "--gpu", "k80"
    )
    assert "--gpus=0 is not possible" in refused(capsys, config, "--gpus", 0)
    assert "--gpus=8 does not divide into --nodes=3" in refused(
        capsys, config, "--gpus", 8, "--nodes", 3
    )
    assert "--nodes=0 is not possible" in refused(capsys, config, "--nodes", 0)
    assert "--gpus=12 does not fill nodes of 8 GPUs; say with --nodes" in refused(
        capsys, config, "--gpus", 12
    )
    assert "--samples=-1 is not possible" in refused(capsys, config, "--samples", -1)
    assert "--price=0.0 is not possible" in refused(capsys, config, "--price", 0)
    assert "--network-gbps=0.0 is not possible" in refused(capsys, config, "--network-gbps", 0)
    assert "--vae=wan3 is not known; there are wan2.1, wan2.2" in refused(
        capsys, config, "--vae", "wan3"
    )
    odd = refused(capsys, config, "train.batch_size=7", "recipe.dit.num_heads=2", "--gpus", 16)
    assert "train.batch_size=7 does not divide among 16 GPUs" in odd
    assert "does not exist" in refused(capsys, "none.yaml")
    assert "unknown key" in refused(capsys, config, "train.parallel.shards=2")
