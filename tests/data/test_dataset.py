import itertools
import logging
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from data.dataset import BadFiles, ClipDataset, StepSampler, collate
from data.manifest import read_manifest, write_manifest
from data.video import write_video

SIZE = {"num_frames": 3, "height": 16, "width": 16, "fps": 8}


@pytest.fixture
def manifest(tmp_path, counting):
    """Eight clips of 3 to 10 frames, three wordings each."""
    rows = []
    for k in range(8):
        write_video(tmp_path / f"{k}.mp4", counting(3 + k, 16, 32), fps=8)
        rows.append({"path": f"{k}.mp4", "caption": [f"clip {k} {word}" for word in "abc"]})
    write_manifest(tmp_path / "m.jsonl", rows)
    return read_manifest(tmp_path / "m.jsonl")


def same(a, b):
    return torch.equal(a["video"], b["video"]) and all(
        a[key] == b[key] for key in a if key != "video"
    )


def test_a_sample_is_a_clip_with_one_of_its_captions(manifest):
    dataset = ClipDataset(manifest, **SIZE, seed=0)
    for g in range(16):
        sample = dataset[g]
        assert sample["video"].shape == (3, 3, 16, 16)
        assert sample["video"].dtype == torch.uint8
        assert sample["caption"] in manifest.rows[sample["row"]].captions
        assert (sample["g"], sample["bad"]) == (g, [])


def test_epochs_visit_every_row_in_another_order(manifest):
    dataset = ClipDataset(manifest, **SIZE, seed=0)
    epochs = [[dataset[8 * epoch + k]["row"] for k in range(8)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_wordings_and_starts_vary(manifest):
    dataset = ClipDataset(manifest, **SIZE, seed=0)
    samples = [sample for sample in map(dataset.__getitem__, range(96)) if sample["row"] == 7]
    assert len({sample["caption"] for sample in samples}) == 3
    assert len({int(sample["video"].sum()) for sample in samples}) > 1
    fixed = ClipDataset(manifest, **SIZE, seed=0, random_start=False)
    sums = {int(s["video"].sum()) for s in map(fixed.__getitem__, range(96)) if s["row"] == 7}
    assert len(sums) == 1


def test_the_backend_changes_no_sample(manifest):
    auto = ClipDataset(manifest, **SIZE, seed=0)
    pyav = ClipDataset(manifest, **SIZE, seed=0, backend="pyav")
    for g in range(8):
        difference = auto[g]["video"].int() - pyav[g]["video"].int()
        assert difference.abs().max() <= 2


def test_a_sample_depends_on_the_seed_and_its_counter_only(manifest):
    a, b = (ClipDataset(manifest, **SIZE, seed=5) for _ in range(2))
    for g in (3, 100, 7):
        b[g + 1]
        assert same(a[g], b[g])
    other = ClipDataset(manifest, **SIZE, seed=6)
    assert not all(same(a[g], other[g]) for g in range(8))


def batches(dataset, num_workers, num_batches, **sampler):
    loader = DataLoader(
        dataset,
        batch_sampler=StepSampler(**({"grad_accum": 1, "rank": 0, "world_size": 1} | sampler)),
        num_workers=num_workers,
        collate_fn=collate,
    )
    return list(itertools.islice(loader, num_batches))


def test_workers_change_nothing(manifest):
    (manifest.root / "3.mp4").write_bytes(b"")
    dataset = ClipDataset(manifest, **SIZE, seed=0)
    alone = batches(dataset, 0, 5, batch_size=4)
    helped = batches(dataset, 2, 5, batch_size=4)
    assert alone[0]["video"].shape == (4, 3, 3, 16, 16)
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))
    assert any(batch["bad"] for batch in alone)


def test_resuming_gives_the_same_stream(manifest):
    dataset = ClipDataset(manifest, **SIZE, seed=0)
    whole = batches(dataset, 0, 8, batch_size=4, grad_accum=2)
    resumed = batches(dataset, 2, 4, batch_size=4, grad_accum=2, start_step=2)
    assert all(same(a, b) for a, b in zip(whole[4:], resumed, strict=True))


def test_ranks_share_a_step(manifest):
    dataset = ClipDataset(manifest, **SIZE, seed=0)
    (one,) = batches(dataset, 0, 1, batch_size=4)
    ranks = [batches(dataset, 0, 1, batch_size=4, rank=r, world_size=2)[0] for r in range(2)]
    assert torch.equal(torch.cat([rank["video"] for rank in ranks]), one["video"])
    assert [*ranks[0]["captions"], *ranks[1]["captions"]] == one["captions"]


def test_a_dataset_travels_to_workers(manifest):
    dataset = ClipDataset(manifest, **SIZE, seed=0)
    dataset[0]
    assert same(pickle.loads(pickle.dumps(dataset))[0], dataset[0])


# Bad files


def test_a_bad_file_is_replaced_and_reported(manifest):
    (manifest.root / "3.mp4").unlink()
    (manifest.root / "5.mp4").write_bytes(b"not a video")
    dataset = ClipDataset(manifest, **SIZE, seed=0)
    samples = [dataset[g] for g in range(8)]
    reported = {clip.rsplit("/", 1)[1]: reason for s in samples for clip, reason in s["bad"]}
    assert reported["3.mp4"] == "no such file"
    assert reported["5.mp4"].startswith("not a video")
    assert not {3, 5} & {sample["row"] for sample in samples}
    substitutes = [dataset[g]["row"] for g in range(80) if dataset[g]["bad"]]
    assert len(set(substitutes)) > 3, "not always the same one"
    again = ClipDataset(manifest, **SIZE, seed=0)
    assert all(same(sample, again[sample["g"]]) for sample in samples)
    for sample in samples:
        assert sample["caption"].startswith(f"clip {sample['row']} "), "the substitute's caption"


def test_a_clip_that_is_too_short_is_bad(manifest):
    dataset = ClipDataset(manifest, **(SIZE | {"num_frames": 6}), seed=0)
    samples = [dataset[g] for g in range(8)]
    assert {sample["row"] for sample in samples} <= {3, 4, 5, 6, 7}
    reasons = [reason for sample in samples for _, reason in sample["bad"]]
    assert any("6 frames at 8 fps need more than 0.625 s" in reason for reason in reasons)


def test_pieces_of_a_file_are_used_and_named(tmp_path, counting):
    write_video(tmp_path / "a.mp4", counting(20, 16, 16), fps=8)
    rows = [
        {"path": "a.mp4", "caption": "late", "start": 1.0, "end": 1.5},
        {"path": "a.mp4", "caption": "short", "start": 2.0, "end": 2.1},
    ]
    write_manifest(tmp_path / "m.jsonl", rows)
    dataset = ClipDataset(read_manifest(tmp_path / "m.jsonl"), **SIZE, seed=0)
    samples = [dataset[0], dataset[1]]
    assert {sample["caption"] for sample in samples} == {"late"}
    for sample in samples:
        gray = sample["video"][1, :, 12, 12].float()
        first = round((float(gray[0]) - 16) / 6)
        assert first in (8, 9)
    bad = {clip for sample in samples for clip, _ in sample["bad"]}
    assert bad == {f"{tmp_path}/a.mp4 [2, 2.1]"}


def test_only_bad_files_stop_the_run(manifest):
    for k in range(8):
        (manifest.root / f"{k}.mp4").unlink()
    dataset = ClipDataset(manifest, **SIZE, seed=0)
    with pytest.raises(ValueError, match=r"32 clips in a row cannot be read.*no such file"):
        dataset[0]


def test_bad_files_are_counted_and_logged_once(caplog):
    bad = BadFiles(num_files=10, max_bad_share=0.2)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            bad.add([("a.mp4", "empty")], rows=[1, 2])
        bad.add([("b.mp4", "cut off")])
    assert [record.getMessage() for record in caplog.records] == [
        "skipping a.mp4: empty",
        "skipping b.mp4: cut off",
    ]
    assert bad.counts == {"a.mp4": 3, "b.mp4": 1}
    assert bad.share == pytest.approx(0.2)
    with pytest.raises(
        ValueError, match=r"3 of the clips .* 0.300, more than data.max_bad_share=0.2"
    ):
        bad.add([("c.mp4", "cut off")])


def test_a_share_is_judged_over_enough_files():
    large = BadFiles(num_files=10**6, max_bad_share=0.05)
    large.add([(f"{k}", "x") for k in range(50)])
    with pytest.raises(ValueError, match="51 of the clips"):
        large.add([("more", "x")])
    seen = BadFiles(num_files=10**6, max_bad_share=0.05)
    seen.add([(f"{k}", "x") for k in range(90)], rows=range(2000))
    assert seen.share == pytest.approx(90 / 2090)


def test_no_bad_file_at_all():
    with pytest.raises(ValueError, match=r"more than data\.max_bad_share=0"):
        BadFiles(num_files=5, max_bad_share=0).add([("a.mp4", "x")])
    BadFiles(num_files=5, max_bad_share=1).add([(f"{k}", "x") for k in range(5)])
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        BadFiles(num_files=5, max_bad_share=1.5)


# The sampler


@given(
    micro=st.integers(1, 4),
    grad_accum=st.integers(1, 4),
    world_size=st.integers(1, 5),
    start=st.integers(0, 10**6),
)
def test_ranks_and_micro_batches_make_up_the_step(micro, grad_accum, world_size, start):
    batch_size = micro * grad_accum * world_size
    ranks = [
        iter(StepSampler(batch_size, grad_accum, rank, world_size, start))
        for rank in range(world_size)
    ]
    for step in (start, start + 1):
        dealt = [next(rank) for rank in ranks for _ in range(grad_accum)]
        assert all(len(batch) == micro for batch in dealt)
        union = sorted(g for batch in dealt for g in batch)
        assert union == list(range(step * batch_size, (step + 1) * batch_size))


@given(grad_accum=st.integers(1, 3), rank=st.integers(0, 1), skipped=st.integers(0, 20))
def test_a_resumed_sampler_goes_on(grad_accum, rank, skipped):
    batch_size = 12
    whole = iter(StepSampler(batch_size, grad_accum, rank, 2))
    resumed = iter(StepSampler(batch_size, grad_accum, rank, 2, start_step=skipped))
    rest = itertools.islice(whole, skipped * grad_accum, skipped * grad_accum + 7)
    assert list(rest) == list(itertools.islice(resumed, 7))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 2, 0, 2), "use a multiple of 4"),
        ((0, 1, 0, 1), "batch_size >= 1"),
        ((-8, 1, 0, 1), "batch_size >= 1"),
        ((4, 0, 0, 1), "grad_accum >= 1"),
        ((4, 1, 1, 1), "rank"),
        ((4, 1, 0, 1, -1), "start_step >= 0"),
    ],
)
def test_impossible_samplers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        StepSampler(*arguments)
