"""From a folder of raw video to a trained model, by the commands that a person would type."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from data.video import write_video
from train.cli import main
from train.logs import read_log

NATIVE = {"native": {"num_frames": [1, 5], "multiple": 8}, "random_start": False}


def command(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, arguments)])
    said = capsys.readouterr()
    return stopped.value.code or 0, said.out + said.err


@pytest.fixture
def raw(tmp_path):
    """Videos of three aspects, one of them letterboxed; an image; and what is none of these."""
    folder = tmp_path / "raw videos"
    folder.mkdir()
    grid = np.mgrid[:96, :96].sum(0)
    shapes = {"wide é.mp4": (54, 96), "tall\n.mp4": (96, 54), "square.mp4": (96, 96)}
    for k, (name, (height, width)) in enumerate(shapes.items()):
        frames = [127 + 90 * np.sin((grid[:height, :width] + 5 * f) / (4 + k)) for f in range(24)]
        video = np.stack([np.stack(frames)] * 3, -1).astype(np.uint8)
        if name == "square.mp4":
            video[:, :20], video[:, -20:] = 0, 0
        write_video(folder / name, video, fps=8)
        (folder / name).with_suffix(".txt").write_text(f"waves, number {k}\n")
    Image.fromarray(video[0]).save(folder / "still.png")
    (folder / "still.txt").write_text("a still\n")
    (folder / "broken.mp4").write_bytes(b"not a video")
    (folder / "notes.docx").write_bytes(b"x")
    return folder


def test_raw_videos_to_a_trained_model(room, raw, tmp_path, capsys):
    out = tmp_path / "dataset"
    small = ("filters.min_width=32", "filters.min_height=32", "filters.min_sharpness=1")
    code, said = command(capsys, "data", "ingest", raw, out, *small)
    assert code == 0, said
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    kept = [row for row in rows if row["keep"]]
    assert len(kept) == 4, rows
    (dropped,) = [row for row in rows if not row["keep"]]
    assert dropped["path"].endswith("broken.mp4")
    assert [row["crop"] for row in kept if row["path"].endswith("square.mp4")] == [[0, 20, 96, 56]]

    data = {**NATIVE, "manifest": str(out / "manifest.jsonl"), "validation": None}
    cached = {"latent_cache": str(tmp_path / "latents"), "cache_dtype": "float32"}
    config = room.write(tmp_path / "run", "dit", data=data, recipe=cached)
    code, said = command(capsys, "data", "check", config)
    assert code == 0, said
    assert "4 of 4 clips kept, 0 dropped" in said
    assert "beside them, left out by the manifest itself: 1 rows" in said
    # About 256 pixels each, and none is forced into a square.
    sizes = [line.split()[1] for line in said.splitlines() if line.startswith("bucket")]
    assert sizes == ["1x16x24", "5x16x24", "5x24x16"]
    assert r"tall\n.mp4 [0, 3]: 54x96" in said
    code, said = command(capsys, "data", "show", config, tmp_path / "page.html", "--batches", "1")
    assert code == 0, said
    code, said = command(
        capsys,
        *("data", "latents", out / "manifest.jsonl", room.vae, tmp_path / "latents"),
        *("--dtype", "float32", "--config", config),
    )
    assert code == 0, said
    assert "latents of 4 clips" in said

    code, said = command(capsys, "train", config)
    assert code == 0, said
    losses = [row["loss"] for row in read_log(tmp_path / "run" / "log.jsonl")]
    assert losses
    assert all(map(math.isfinite, losses))
    plain = room.write(tmp_path / "plain", "dit", data=data)
    assert command(capsys, "train", plain)[0] == 0
    others = [row["loss"] for row in read_log(tmp_path / "plain" / "log.jsonl")]
    assert losses == pytest.approx(others, abs=1e-5)
