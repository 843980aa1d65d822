"""Which size a step has, which rows a bucket draws from, and the samples that come of it."""

import itertools
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from data.buckets import BucketSequence, bucket_rows, image_rows, row_seconds
from data.dataset import ClipDataset, StepSampler, collate
from data.manifest import Manifest, Row, Rows, read_manifest, write_manifest
from data.randomness import permuted_index
from data.video import write_video

IMAGE, SHORT, LONG = (1, 24, 32), (3, 16, 16), (6, 8, 16)
SHARES = {IMAGE: 1.0, SHORT: 2.0, LONG: 1.0}
SIZE = {"num_frames": 3, "height": 16, "width": 16, "fps": 8}
BATCH = 4

shares_of_up_to_6 = st.lists(st.integers(1, 60), min_size=1, max_size=6).map(
    lambda shares: {(1 + k, 8, 8): float(share) for k, share in enumerate(shares)}
)


# The sequence


@given(shares=shares_of_up_to_6, seed=st.integers(0, 9))
def test_shares_hold_to_within_a_step_after_any_number_of_steps(shares, seed):
    sequence, seen, total = BucketSequence(shares, seed), Counter(), sum(shares.values())
    for step in range(150):
        size, earlier = sequence.at(step)
        assert earlier == seen[size], "the closed form is the count"
        seen[size] += 1
        for other, share in shares.items():
            assert abs(seen[other] - (step + 1) * share / total) < 1


@pytest.mark.parametrize("num_steps", [20, 100])
@pytest.mark.parametrize("start", [0, 7, 123_456])
def test_shares_hold_over_few_steps_from_anywhere(num_steps, start):
    shares = {IMAGE: 0.7, SHORT: 0.2, LONG: 0.1}
    sequence = BucketSequence(shares, 3)
    seen = Counter(sequence.at(step)[0] for step in range(start, start + num_steps))
    for size, share in shares.items():
        assert abs(seen[size] - share * num_steps) < 2


@given(shares=shares_of_up_to_6, seed=st.integers(0, 9), step=st.integers(0, 10**12))
def test_a_step_depends_on_nothing_before_it(shares, seed, step):
    backwards = dict(reversed(shares.items()))
    sequence = BucketSequence(shares, seed)
    (size, before), (_, after) = sequence.at(step), sequence.at(step + 1)
    assert BucketSequence(backwards, seed).at(step) == (size, before)
    period = sum(shares.values()) // np.gcd.reduce([int(share) for share in shares.values()])
    later, count = sequence.at(step + int(period))
    assert later == size
    assert count == before + sequence.share(size) * period
    assert after >= 0


def test_the_seed_says_which_of_equal_buckets_comes_first():
    shares = {(k, 8, 8): 1.0 for k in range(1, 7)}
    assert len({BucketSequence(shares, seed).at(0)[0] for seed in range(40)}) == 6


@pytest.mark.parametrize("shares", [[1, 1e-9], [np.pi, np.e, 1e-3], [1 / 3] * 3, [1e9, 1.0]])
def test_any_positive_shares_will_do(shares):
    by_size = {(k + 1, 8, 8): share for k, share in enumerate(shares)}
    sequence = BucketSequence(by_size, 0)
    for size, share in by_size.items():
        assert sequence.share(size) > 0
        assert sequence.share(size) == pytest.approx(share / sum(shares), abs=3e-5)


@pytest.mark.parametrize("shares", [{}, {IMAGE: 0.0}, {IMAGE: 1.0, SHORT: float("inf")}])
def test_impossible_shares_are_refused(shares):
    with pytest.raises(ValueError, match=r"at least one bucket and positive shares"):
        BucketSequence(shares, 0)


# The rows of a bucket


def manifest_of(*rows):
    checked = [Row.model_validate({"caption": "x", "path": "a.mp4"} | row) for row in rows]
    return Manifest(Path("m.jsonl"), Rows(checked), list(range(1, len(rows) + 1)))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"path": "a.PNG"}, True),
        ({"path": "a.mp4", "num_frames": 1}, True),
        ({"path": "a.mp4", "num_frames": 1.0}, True),
        ({"path": "a.mp4", "num_frames": 2}, False),
        ({"path": "a.mp4", "num_frames": True}, False),
        ({"path": "a.mp4", "num_frames": "one"}, False),
        ({"path": "a.mp4"}, False),
    ],
)
def test_images_are_known(row, expected):
    assert image_rows(manifest_of(row)).tolist() == [expected]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({}, np.inf),
        ({"duration": 2.5}, 2.5),
        ({"num_frames": 30, "fps": 10}, 3.0),
        ({"num_frames": 30, "fps": 10, "duration": 2.99}, 3.0),
        ({"num_frames": 30}, np.inf),
        ({"duration": 0, "fps": -3, "num_frames": "many"}, np.inf),
        ({"start": 2.0, "end": 3.5, "duration": 9.0}, 1.5),
        ({"start": 8.0, "duration": 9.0}, 9.0),  # perhaps the piece's own duration
        ({"end": 5.0, "duration": 4.0}, 4.0),
    ],
)
def test_seconds_by_the_manifest(row, expected):
    assert row_seconds(manifest_of(row)).tolist() == [expected]


def test_rows_are_left_out_and_said():
    manifest = manifest_of(
        {"path": "0.png"},
        {"path": "1.mp4", "duration": 0.25},  # room for 2 frames at 8 fps
        {"path": "2.mp4", "duration": 0.26},
        {"path": "3.mp4"},
        {"path": "4.mp4", "num_frames": 1, "fps": 8},
    )
    image, two, three = bucket_rows(manifest, [(1, 8, 8), (2, 8, 8), (3, 8, 8)], fps=8)
    assert (image.rows.tolist(), image.left_out()) == ([0, 1, 2, 3, 4], "")
    assert two.rows.tolist() == [1, 2, 3]
    assert two.left_out() == "bucket 2x8x8: 2 of 5 rows are images"
    assert three.rows.tolist() == [2, 3]
    assert three.left_out() == "bucket 3x8x8: 1 of 5 rows are too short, 2 are images"


def test_a_thousand_rows_are_counted_with_commas():
    manifest = manifest_of(*[{"duration": 0.5 if k < 120 else 9.0} for k in range(1000)])
    (bucket,) = bucket_rows(manifest, [(17, 64, 64)], fps=8)
    assert bucket.left_out() == "bucket 17x64x64: 120 of 1,000 rows are too short"


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([{"path": "a.png"}, {"path": "b.jpg"}], "2 of 2 rows are images"),
        ([{"duration": 0.1}, {"path": "b.jpg"}], "1 of 2 rows are too short, 1 are images"),
    ],
)
def test_a_bucket_without_rows_is_refused(rows, why):
    with pytest.raises(ValueError, match=rf"^m\.jsonl at 8 fps has nothing for .*{why}") as caught:
        ClipDataset(manifest_of(*rows), **SIZE, seed=0, buckets=SHARES, batch_size=BATCH)
    assert "\n" not in str(caught.value)


def test_buckets_need_the_batch_size():
    with pytest.raises(ValueError, match=r"buckets need the run's batch_size"):
        ClipDataset(manifest_of({}), **SIZE, seed=0, buckets=SHARES)


# Samples


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Five clips of 3 to 11 frames, three images."""
    folder = tmp_path_factory.mktemp("mixed")
    rows = []
    for k in range(5):
        frames = np.full((3 + 2 * k, 16, 32, 3), 20 * k, np.uint8)
        frames += np.arange(len(frames), dtype=np.uint8)[:, None, None, None] * 4
        write_video(folder / f"{k}.mp4", frames, fps=8)
        rows.append({"path": f"{k}.mp4", "caption": f"clip {k}", "num_frames": len(frames)})
        rows[-1]["fps"] = 8
    for k, name in enumerate(("5.png", "6.JPG", "7.webp")):
        Image.new("RGB", (40, 30), (0, 0, 80 * k)).save(folder / name)
        rows.append({"path": name, "caption": f"image {k}"})
    write_manifest(folder / "m.jsonl", rows)
    return read_manifest(folder / "m.jsonl")


def mixed(manifest, seed=0, **how):
    return ClipDataset(manifest, **SIZE, seed=seed, buckets=SHARES, batch_size=BATCH, **how)


def same(a, b):
    return torch.equal(a["video"], b["video"]) and all(a[k] == b[k] for k in a if k != "video")


def batches(dataset, num_batches, num_workers=0, **sampler):
    how = {"batch_size": BATCH, "grad_accum": 1, "rank": 0, "world_size": 1} | sampler
    loader = DataLoader(
        dataset, batch_sampler=StepSampler(**how), num_workers=num_workers, collate_fn=collate
    )
    return list(itertools.islice(loader, num_batches))


def test_a_step_has_one_size_and_the_next_perhaps_another(manifest):
    dataset, sequence = mixed(manifest), BucketSequence(SHARES, 0)
    for step, batch in enumerate(batches(dataset, 16)):
        num_frames, height, width = sequence.at(step)[0]
        assert batch["video"].shape == (BATCH, 3, num_frames, height, width)
        assert batch["video"].dtype == torch.uint8
        assert not batch["bad"]
        if num_frames > 1:
            assert all(row < 5 for row in batch["rows"]), "images do not move"


def test_every_row_of_a_bucket_is_seen_once_in_each_of_its_epochs(manifest):
    dataset, seen = mixed(manifest), {size: [] for size in SHARES}
    for step in range(4 * 20):
        size = dataset.order.sequence.at(step)[0]
        seen[size] += [dataset[step * BATCH + k]["row"] for k in range(BATCH)]
    for size, rows in ((IMAGE, range(8)), (SHORT, range(5)), (LONG, range(2, 5))):
        n = len(rows)
        epochs = [seen[size][e * n : (e + 1) * n] for e in range(len(seen[size]) // n)]
        assert len(epochs) >= 10
        assert all(sorted(epoch) == list(rows) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 3), g=st.integers(0, 10**9))
def test_a_sample_is_a_function_of_seed_and_counter(manifest, seed, g):
    used, fresh = mixed(manifest, seed), mixed(manifest, seed)
    _ = used[g + 1], used[g // 2]
    assert same(used[g], fresh[g])
    assert same(pickle.loads(pickle.dumps(used))[g], fresh[g])


def test_workers_ranks_and_accumulation_change_nothing(manifest):
    dataset = mixed(manifest)
    whole = batches(dataset, 9)
    assert all(same(a, b) for a, b in zip(whole, batches(dataset, 9, num_workers=2), strict=True))
    for grad_accum, world_size in ((2, 1), (1, 2), (2, 2)):
        how = {"grad_accum": grad_accum, "world_size": world_size}
        ranks = [batches(dataset, 9 * grad_accum, rank=r, **how) for r in range(world_size)]
        for step, batch in enumerate(whole):
            parts = [
                rank[step * grad_accum + micro] for micro in range(grad_accum) for rank in ranks
            ]
            assert torch.equal(torch.cat([part["video"] for part in parts]), batch["video"])
            assert [row for part in parts for row in part["rows"]] == batch["rows"]


@pytest.mark.parametrize("start_step", [1, 5, 8])
def test_a_run_resumes_from_any_step(manifest, start_step):
    whole = batches(mixed(manifest), 12)
    rest = batches(mixed(manifest), 12 - start_step, num_workers=2, start_step=start_step)
    assert all(same(a, b) for a, b in zip(whole[start_step:], rest, strict=True))


def test_a_bucket_of_one_frame_takes_any_frame_of_a_video(manifest):
    shades = {True: set(), False: set()}
    for random_start in shades:
        dataset = mixed(manifest, random_start=random_start)
        steps = [step for step in range(240) if dataset.order.sequence.at(step)[0] == IMAGE]
        samples = [dataset[step * BATCH + k] for step in steps for k in range(BATCH)]
        shades[random_start] = {
            round(float(s["video"].float().mean())) // 4 for s in samples if s["row"] == 4
        }
    assert len(shades[False]) == 1
    assert len(shades[True]) >= 6, "of 11 frames"


def test_a_bad_clip_is_replaced_from_its_bucket(tmp_path, manifest):
    for path in manifest.root.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for name in ("3.mp4", "6.JPG"):
        (tmp_path / name).write_bytes(b"not a picture")
    dataset = mixed(read_manifest(tmp_path / "m.jsonl"))
    found = batches(dataset, 24)
    reasons = {Path(clip).name: reason for batch in found for clip, reason in batch["bad"]}
    assert set(reasons) == {"3.mp4", "6.JPG"}
    assert reasons["6.JPG"].startswith("not an image")
    for batch in found:
        num_frames = batch["video"].shape[2]
        assert not {3, 6} & set(batch["rows"])
        assert num_frames == 1 or all(row < 5 for row in batch["rows"])


def test_a_clip_that_turns_out_too_short_counts_as_bad(tmp_path):
    for k, num_frames in enumerate((3, 9)):
        write_video(tmp_path / f"{k}.mp4", np.zeros((num_frames, 16, 16, 3), np.uint8), fps=8)
    rows = [{"path": f"{k}.mp4", "caption": "x"} for k in range(2)]
    write_manifest(tmp_path / "m.jsonl", rows)
    dataset = mixed(read_manifest(tmp_path / "m.jsonl"))
    assert all(list(rows) == [0, 1] for rows in dataset.order.rows.values()), "nothing is measured"
    found = batches(dataset, 12)
    reasons = {reason for batch in found for _, reason in batch["bad"]}
    assert all("6 frames at 8 fps need more than 0.625 s" in reason for reason in reasons)
    assert reasons


def test_without_buckets_nothing_has_changed(manifest):
    """The draws of a dataset of one size, spelled out."""
    videos = Manifest(manifest.path, manifest.rows[:5], manifest.lines[:5])
    for how in ({}, {"buckets": {}, "batch_size": 7}):
        dataset = ClipDataset(videos, **SIZE, seed=9, **how)
        for g in range(12):
            sample = dataset[g]
            assert sample["row"] == permuted_index(9, g, 5)
            assert sample["video"].shape == (3, 3, 16, 16)
