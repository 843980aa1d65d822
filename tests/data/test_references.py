"""Reference pictures of real clips: another time of the same piece, which training never reads."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.manifest import read_manifest
from data.references import add_references
from data.video import read_clip, write_video


@pytest.fixture
def clips(tmp_path):
    """Clips in which each frame has a brightness of its own, at 10 frames per second."""
    for name, frames in (("long", 30), ("short", 12)):
        ramp = np.linspace(20, 230, frames).astype(np.uint8)
        clip = np.broadcast_to(ramp[:, None, None, None], (frames, 32, 48, 3)).copy()
        write_video(tmp_path / f"{name}.mp4", clip, fps=10)
    Image.new("RGB", (32, 32)).save(tmp_path / "still.png")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    rows = [
        {"path": "long.mp4"},
        {"path": "long.mp4", "start": 0.5, "end": 2.0, "crop": [8, 4, 20, 16]},
        {"path": "short.mp4"},
        {"path": "still.png"},
        {"path": "broken.mp4"},
        {"path": "long.mp4", "references": ["still.png"]},
    ]
    text = "".join(json.dumps({"caption": "a", **row}) + "\n" for row in rows)
    (tmp_path / "manifest.jsonl").write_text(text)
    return tmp_path / "manifest.jsonl"


def brightness(path):
    return float(np.asarray(Image.open(path)).mean())


def test_the_picture_is_of_a_time_that_no_clip_shows(clips, tmp_path):
    out = tmp_path / "far" / "out"
    done = add_references(read_manifest(clips), out, keep=0.8, apart=0.5, workers=1)
    assert (done.made, done.had) == (2, 1)
    assert done.without["an image"] == done.without["too short"] == 1
    assert len(done.without) == 3
    found = read_manifest(out / "manifest.jsonl")
    assert len(found.rows) == 6
    assert found.num_references.tolist() == [1, 1, 0, 0, 0, 1]
    whole, piece, short, *_, had = found.rows
    assert whole.end == pytest.approx(2.5)
    assert (piece.start, piece.end) == (0.5, pytest.approx(1.5))
    assert short.end is None
    assert had.end is None
    for row, last, shape in ((whole, 29, (32, 48)), (piece, 19, (16, 20))):
        (picture,) = found.locate_references(row)
        assert np.asarray(Image.open(picture)).shape == (*shape, 3)
        expected = 20 + 210 * last / 29
        assert brightness(picture) == pytest.approx(expected, abs=4)
        clip = read_clip(
            *(found.locate(row),),
            num_frames=8,
            fps=10,
            height=16,
            width=16,
            start=row.start or 0.0,
            end=row.end,
            position=1.0,
        )
        assert clip.float().mean(dim=(0, 2, 3)).max() < expected - 0.5 * 70 + 4  # half a second
    assert Path(found.locate_references(had)[0]).samefile(tmp_path / "still.png")


def test_repeated_it_makes_no_picture_twice(clips, tmp_path):
    out = tmp_path / "out"
    add_references(read_manifest(clips), out, workers=1)
    before = {path: path.stat().st_mtime_ns for path in (out / "references").rglob("*.png")}
    manifest = (out / "manifest.jsonl").read_bytes()
    next(iter(before)).unlink()
    add_references(read_manifest(clips), out, workers=2)
    after = {path: path.stat().st_mtime_ns for path in (out / "references").rglob("*.png")}
    assert after.keys() == before.keys()
    assert sum(after[path] != before[path] for path in after) == 1
    assert (out / "manifest.jsonl").read_bytes() == manifest


def test_a_folder_has_the_pictures_of_one_manifest(clips, tmp_path, monkeypatch):
    """Whatever the manifest is called from where one stands; and a changed clip has another picture."""
    out = tmp_path / "out"
    add_references(read_manifest(clips), out, workers=1)
    before = set((out / "references").rglob("*.png"))
    monkeypatch.chdir(clips.parent)
    add_references(read_manifest(clips.name), out, workers=1)
    assert set((out / "references").rglob("*.png")) == before
    other = tmp_path / "other" / clips.name
    other.parent.mkdir()
    other.write_bytes(clips.read_bytes())
    with pytest.raises(ValueError, match=r"has the pictures of .*; use another folder for"):
        add_references(read_manifest(other), out, workers=1)
    frames = np.full((30, 32, 48, 3), 90, np.uint8)
    write_video(tmp_path / "long.mp4", frames, fps=10)
    add_references(read_manifest(clips), out, workers=1)
    found = read_manifest(out / "manifest.jsonl")
    (picture,) = found.locate_references(found.rows[0])
    assert brightness(picture) == pytest.approx(90, abs=4)


def test_the_command(clips, tmp_path):
    zoetrope = str(Path(sys.executable).with_name("zoetrope"))
    out = tmp_path / "out"
    command = [zoetrope, "data", "references", str(clips), str(out), "--keep", "0.8"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 rows got a picture, 1 had some" in done.stdout
    assert "1 rows without: too short" in done.stdout
    wrong = subprocess.run([*command[:4], str(tmp_path)], capture_output=True, text=True)
    assert wrong.returncode != 0
    assert "would be overwritten; use another folder" in wrong.stderr
    assert "Traceback" not in wrong.stderr


@pytest.mark.parametrize("changes", [{"keep": 0}, {"apart": float("nan")}, {"workers": 0}])
def test_mistakes(clips, tmp_path, changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"{name}="):
        add_references(read_manifest(clips), tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_training_reads_them(clips, tmp_path):
    from data.buckets import bucket_rows
    from data.dataset import ClipDataset
    from data.order import BucketOrder

    add_references(read_manifest(clips), tmp_path / "out", keep=0.8, workers=1)
    manifest = read_manifest(tmp_path / "out" / "manifest.jsonl")
    size = (5, 16, 16)
    (bucket,) = bucket_rows(manifest, [size], 8.0)
    order = BucketOrder({size: bucket.rows}, {size: 2}, 0, references=manifest.num_references)
    dataset = ClipDataset(
        manifest, num_frames=5, height=16, width=16, fps=8.0, seed=0, order=order, references=True
    )
    batches = [dataset.collate([dataset[g] for g in range(2 * k, 2 * k + 2)]) for k in range(8)]
    shown = [batch["references"].shape for batch in batches if "references" in batch]
    assert shown
    assert set(shown) == {torch.Size([2, 3, 1, 16, 16])}
