"""Buckets from a config to the loader: mistakes, sizes, memory, and what a run says of them."""

import itertools
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from data.dataset import ClipRequest
from data.manifest import read_manifest, write_manifest
from data.video import write_video
from sample.processes import Ranks
from train.clips import TrainingClips, make_loader, rows_of_one_size
from train.config import RunConfig, differing_key
from train.config_file import ConfigError, dump_config, load_config
from train.logs import read_log
from train.sizes import describe_sizes, expected_counts, sample_order

IMAGE = {"num_frames": 1, "height": 24, "width": 32}
VIDEO = {"num_frames": 5, "height": 16, "width": 16, "share": 3.0}
SIZES = [(1, 24, 32), (5, 16, 16)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six clips, two of them too short for 5 frames at 8 fps, and two images."""
    folder, rows = tmp_path_factory.mktemp("mixed"), []
    for k in range(6):
        num_frames = 3 if k < 2 else 6
        write_video(folder / f"{k}.mp4", np.full((num_frames, 16, 16, 3), 40 * k, np.uint8), fps=8)
        rows.append({"path": f"{k}.mp4", "caption": "x", "duration": num_frames / 8})
    for name in ("6.png", "7.jpg"):
        Image.new("RGB", (32, 24)).save(folder / name)
        rows.append({"path": name, "caption": "x"})
    write_manifest(folder / "m.jsonl", rows)
    return folder


@pytest.fixture
def config(folder, room, tmp_path):
    def make(**data):
        manifest = {"manifest": str(folder / "m.jsonl"), "validation": None}
        values = room.values(tmp_path / "run", "vae")
        values["data"] = {**values["data"], **manifest, "buckets": [IMAGE, VIDEO], **data}
        return RunConfig.model_validate(values)

    return make


def num_tokens(size):
    """Latents of the tests' VAE."""
    num_frames, height, width = size
    return (1 + (num_frames - 1) // 4) * (height // 4) * (width // 4)


def clips(config):
    manifest = read_manifest(config.data.manifest)
    return TrainingClips(manifest, config, sample_order(manifest, config, num_tokens))


def loader(config, ranks, start_step=0):
    dataset = clips(config)
    return make_loader(dataset, config, ranks, start_step, order=dataset.order)


def ranks(rank=0, world_size=1):
    return Ranks(rank, world_size, torch.device("cpu"), None)


# Configs


def problem(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1, lines
    return lines[0].removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("buckets", "expected"),
    [
        ("[]", "data.buckets: is empty; give at least one bucket, or leave data.buckets out"),
        (
            "[{num_frames: 1, height: 8, width: 8, share: 0}]",
            "data.buckets.0.share: got 0, expected greater than 0",
        ),
        (
            "[{num_frames: 1, height: 15, width: 8}]",
            "data.buckets.0.height: got 15, expected a multiple of 2",
        ),
        ("[{num_frames: 1, height: 8}]", "data.buckets.0.width: missing; it has no default"),
        ("[{num_frames: 0, height: 8, width: 8}]", "data.buckets.0.num_frames: got 0, expected"),
        ("[{num_frames: 1, height: 8, width: 8, part: 2}]", "data.buckets.0.part: unknown key"),
        (
            "[{num_frames: 1, height: 8, width: 8}, {num_frames: 1, height: 8, width: 8}]",
            "data.buckets: 1x8x8 is there twice; add the shares up in one",
        ),
        ("[{num_frames: 1, height: 8, width: 8, share: .inf}]", "data.buckets.0.share: got inf"),
        ("17x64x64", "data.buckets: got '17x64x64', expected a valid tuple"),
    ],
)
def test_mistakes_are_one_line(room, tmp_path, buckets, expected):
    path = room.write(tmp_path / "run", "vae")
    assert problem(path, f"data.buckets={buckets}").startswith(expected)


def test_buckets_are_read_and_written(room, tmp_path):
    path = room.write(tmp_path / "run", "vae")
    plain = load_config(path)
    assert plain.data.sizes == [(5, 16, 16)]
    assert plain.data.shares == {}
    assert yaml.safe_load(dump_config(plain))["data"]["buckets"] is None
    assert load_config(path, ["data.buckets=null"]) == plain
    config = load_config(path, [f"data.buckets={[IMAGE, VIDEO]}"])
    assert config.data.sizes == SIZES
    assert config.data.shares == dict(zip(SIZES, (1.0, 3.0)))
    for run in (plain, config):
        resolved = tmp_path / "resolved.yaml"
        resolved.write_text(dump_config(run))
        assert load_config(resolved) == run
    dumps = [run.model_dump(mode="json") for run in (plain, config)]
    assert differing_key(*dumps) == "data.buckets", "a resumed run must not change them"


# Clips


def test_a_loader_gives_each_step_its_size(config):
    run = config()
    found = list(itertools.islice(loader(run, ranks()), 16))
    shapes = [tuple(batch["video"].shape) for batch in found]
    assert set(shapes) == {(4, 3, *size) for size in SIZES}
    assert shapes.count((4, 3, 5, 16, 16)) == 12
    assert not any(batch["bad"] for batch in found), "short rows were left out before"


def test_a_bucket_may_have_a_batch_of_its_own(config):
    run = config(buckets=[IMAGE | {"batch_size": 10}, VIDEO])
    found = list(itertools.islice(loader(run, ranks()), 16))
    shapes = [tuple(batch["video"].shape) for batch in found]
    assert set(shapes) == {(10, 3, 1, 24, 32), (4, 3, 5, 16, 16)}
    assert [g for batch in found for g in batch["g"]] == list(range(4 * 10 + 12 * 4))
    later = next(iter(loader(run, ranks(), 13)))
    assert later["g"] == found[13]["g"]
    assert torch.equal(later["video"], found[13]["video"])
    lines = describe(read_manifest(run.data.manifest), run)
    assert lines[0] == "bucket 1x24x32 25.0% (of steps; 10 clips, 480 tokens; 8 rows, 3.8 epochs)"
    assert expected_counts(run, num_tokens) == {SIZES[0]: 2.5, SIZES[1]: 3.0}
    expected = (
        r"batch of 10 does not divide into 4 processes .*set train\.batch_size, or that of data"
    )
    with pytest.raises(ValueError, match=expected):
        loader(run, ranks(0, 4))


@pytest.mark.parametrize("sizes", ["buckets", "native"])
def test_a_vae_trains_on_batches_of_several_sizes(room, folder, tmp_path, sizes):
    native = {"num_frames": [1, 5], "multiple": 8}
    buckets = [IMAGE | {"batch_size": 10}, VIDEO]
    manifest = folder / "m.jsonl"
    rows = [row.model_dump(exclude_none=True) for row in read_manifest(manifest).rows]
    measured = [row | {"width": 16, "height": 16 + 8 * (k % 2)} for k, row in enumerate(rows)]
    write_manifest(folder / "measured.jsonl", measured)
    data = {"manifest": str(folder / "measured.jsonl"), "validation": None}
    data[sizes] = native if sizes == "native" else buckets
    out = room.train(tmp_path / "run", "vae", data=data, train={"steps": 6})
    losses = [row["loss"] for row in read_log(out / "log.jsonl") if "loss" in row]
    assert len(losses) == 2
    assert np.isfinite(losses).all()


def test_an_error_does_not_leave_a_process_waiting_for_its_workers(config, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(config(num_workers=2)))
    code = (
        "import sys, torch\n"
        "from data.manifest import read_manifest\n"
        "from train.clips import TrainingClips, make_loader\n"
        "from train.config_file import load_config\n"
        "from train.sizes import sample_order\n"
        "from sample.processes import Ranks\n"
        "run = load_config(sys.argv[1])\n"
        "manifest = read_manifest(run.data.manifest)\n"
        "clips = TrainingClips(manifest, run, sample_order(manifest, run, None))\n"
        "loader = iter(make_loader(clips, run, Ranks(0, 1, torch.device('cpu'), None), 0))\n"
        "next(loader)\n"
        "raise RuntimeError('out of memory')\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert "RuntimeError: out of memory" in result.stderr


def test_ranks_and_resumed_loaders_see_the_same_steps(config):
    run = config(num_workers=1)
    whole = list(itertools.islice(loader(run, ranks()), 6))
    pair = [loader(run, ranks(rank, 2), 2) for rank in range(2)]
    for batch, *parts in zip(whole[2:], *pair):
        assert torch.equal(torch.cat([part["video"] for part in parts]), batch["video"])
        assert [g for part in parts for g in part["g"]] == batch["g"]


def test_rows_left_out_are_said_once_by_the_main_rank(config, caplog):
    run = config()
    with caplog.at_level(logging.WARNING):
        loader(run, ranks(0, 2))
        loader(run, ranks(1, 2))
    expected = "bucket 5x16x16: 2 of 8 rows are too short, 2 are images"
    assert [record.getMessage() for record in caplog.records] == [expected]


def test_only_images_and_a_bucket_of_several_frames(config, folder):
    images = [{"path": name, "caption": "x"} for name in ("6.png", "7.jpg")]
    write_manifest(folder / "images.jsonl", images)
    run = config(manifest=str(folder / "images.jsonl"))
    with pytest.raises(ValueError, match=r"nothing for bucket 5x16x16: 2 of 2 rows are images"):
        clips(run)
    run = config(manifest=str(folder / "images.jsonl"), buckets=[IMAGE])
    assert clips(run)[0]["video"].shape == (3, 1, 24, 32)


def test_rows_of_the_one_size(config, folder):
    manifest = read_manifest(folder / "m.jsonl")
    assert list(rows_of_one_size(manifest, config().data)) == [2, 3, 4, 5]
    assert list(rows_of_one_size(manifest, config(num_frames=1).data)) == list(range(8))
    assert list(rows_of_one_size(manifest, config(buckets=None).data)) == [2, 3, 4, 5]
    with pytest.raises(ValueError, match=r"nothing for bucket 99x16x16: 6 of 8 rows are too short"):
        rows_of_one_size(manifest, config(num_frames=99).data)


def describe(manifest, run):
    order = sample_order(manifest, run, num_tokens)
    lines = describe_sizes(manifest, run, order, num_tokens)
    return [" ".join(line.split()) for line in lines]


def test_buckets_are_described_for_a_dry_run(config):
    run = config()
    manifest = read_manifest(run.data.manifest)
    assert describe(manifest, run) == [
        "bucket 1x24x32 25.0% (of steps; 4 clips, 192 tokens; 8 rows, 1.5 epochs)",
        "bucket 5x16x16 75.0% (of steps; 4 clips, 128 tokens; 4 rows, 9.0 epochs)",
        "cut off 28.9% (of videos' seconds, outside one clip)",
        "left out bucket 5x16x16: 2 of 8 rows are too short, 2 are images",
    ]
    short = "left out bucket 5x16x16: 2 of 8 rows are too short, 2 are images"
    assert describe(manifest, config(buckets=None)) == [short]
    order = sample_order(manifest, config(buckets=None), num_tokens)
    drawn = [order.rows[5, 16, 16][order.draw(g)[2]] for g in range(8)]
    assert sorted(drawn) == [2, 2, 3, 3, 4, 4, 5, 5], "an epoch of the rows that will do"


def test_memory_is_kept_by_size_and_bounded_in_bytes(config, monkeypatch):
    read = []
    inner = ClipRequest.read

    def spy(self):
        read.append((self.path, self.size))
        return inner(self)

    monkeypatch.setattr(ClipRequest, "read", spy)
    run = config(random_start=False)
    dataset, fresh = clips(run), clips(run)
    for g in range(200):
        assert torch.equal(dataset[g]["video"], fresh[g]["video"])
    assert len(read) == 2 * len(set(read)), "each clip once a size and dataset"
    assert {size for _, size in read} == set(SIZES)

    limit = 3 * 24 * 32 + 2 * 3 * 5 * 16 * 16
    small = clips(config(random_start=False, memory_gb=limit / 1e9))
    for g in range(200):
        assert torch.equal(small[g]["video"], fresh[g]["video"])
    assert 0 < sum(video.nbytes for video in small._kept.values()) <= limit
    assert len({key[4] for key in small._kept}) == 2  # sizes
    moving = clips(config(random_start=True))
    moving[0]
    assert not moving._kept
