"""Animating, extending, connecting, looping and editing, through the real commands."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.video import to_float, to_uint8, write_video
from sample.media import read_video


@pytest.mark.parametrize(
    ("flags", "length"),
    [
        ("--image a.png", 9),
        ("--last b.png", 9),
        ("--image a.png --last b.png", 9),
        ("--reference a.png", 9),
        ("--reference a.png --reference b.png --image a.png", 9),
        ("--reference a.png --extend long.mp4 --seconds 0.5", 14 + 4),
        ("--reference a.png --connect long.mp4 other.mp4 --frames 13", 14 + 7 + 9),
        ("--reference a.png --edit other.mp4", 9),
        ("--reference a.png --loop", 9 + 3),
        ("--keyframe 0.5:a.png --keyframe 0.25:b.png --last a.png", 9),
        ("--extend long.mp4 --seconds 1", 14 + 8),
        ("--extend long.mp4 --seconds 0.5 --backward --given 1", 14 + 4),
        ("--extend long.mp4 --seconds 0.25 --both --given 1", 14 + 4),
        ("--connect long.mp4 other.mp4 --frames 13 --given 1", 14 + 7 + 9),
        ("--loop --given 1", 9 + 3),
        ("--image a.png --loop", 9 + 3),
        ("--edit long.mp4 --strength 0.5", 13),
        ("--edit other.mp4 --strength 0.9 --mask mask.mp4", 9),
        ("--edit other.mp4 --mask mask.png", 9),
        ("--minutes 0.05", 24),
        ("--minutes 0.04 --image a.png --reference b.png --given 1 --noise-level 0.1", 19),
    ],
)
def test_each_ability(zoetrope, tasks_folder, flags, length, frames_of):
    """Its length; the same again by the same seed, and another by another one."""
    made = []
    for seed in (1, 1, 2):
        code, out, errors = zoetrope(tasks_folder, *flags.split(), "--seed", seed)
        assert code == 0, errors
        assert out == "out.mp4\n"
        made.append(frames_of("out.mp4"))
    assert made[0].shape == (length, 16, 16, 3)
    assert np.array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])


def test_a_name_with_a_colon(zoetrope, folder):
    """Which ffmpeg would take for a protocol."""
    assert zoetrope(folder, "-o", "12:30.mp4")[:2] == (0, "12:30.mp4\n")


def test_what_is_given_is_in_the_file(zoetrope, tasks_folder, frames_of, monkeypatch):
    """Its own frames: to the bit in what is written, in the file but for what H.264 does to them."""
    long, other = frames_of("long.mp4"), frames_of("other.mp4")
    written = []

    def spy(path, clip, **options):
        written.append(clip)
        write_video(path, clip, **options)

    monkeypatch.setattr("data.video.write_video", spy)

    def same(place, true):
        assert np.array_equal(written[-1][place], true)
        assert np.abs(frames_of("out.mp4")[place].astype(int) - true).mean() < 3

    assert zoetrope(tasks_folder, "--extend", "long.mp4", "--both", "--seconds", 0.5)[0] == 0
    same(np.s_[4:18], long)
    assert zoetrope(tasks_folder, "--extend", "long.mp4", "--seconds", 0.5)[0] == 0
    same(np.s_[:14], long)
    assert zoetrope(tasks_folder, "--extend", "long.mp4", "--backward", "--seconds", 0.5)[0] == 0
    same(np.s_[4:], long)
    assert zoetrope(tasks_folder, "--connect", "long.mp4", "other.mp4", "--frames", 13)[0] == 0
    same(np.s_[:14], long)
    same(np.s_[-9:], other)
    assert zoetrope(tasks_folder, "--edit", "other.mp4", "--mask", "mask.png")[0] == 0
    same(np.s_[:, :, :8], other[:, :, :8])
    assert np.abs(written[-1][:, :, 11:].astype(int) - other[:, :, 11:]).mean() > 5


def test_one_frame_is_a_picture(zoetrope, tasks_folder):
    code, out, errors = zoetrope(tasks_folder, "--frames", 1, "--num", 2)
    assert (code, out) == (0, "out-000.png\nout-001.png\n"), errors
    assert Image.open("out-000.png").size == (16, 16)
    assert "warning" not in errors
    code, _, errors = zoetrope(tasks_folder, "--frames", 1, "-o", "x.mp4")
    assert code != 0
    assert "single frames are written as .png; use x.png" in errors


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--frames 33", "33 frames (trained on 1 to 17)"),
        ("--size 32", "32x32 = 1024 pixels (trained on 256 to 256)"),
        ("--size 16x24", "width / height = 1.50 (trained on 1.00 to 1.00)"),
        ("--image wide.png", "--image wide.png is 16x48, of another aspect than 16x16: 67%"),
        ("--edit long.mp4", "the VAE takes 4*k+1 frames, so the last 1 of 14 are left out"),
        ("--edit long.mp4 --size 24", "24x24 = 576 pixels (trained on 256 to 256)"),
        ("--extend wide.mp4", "--extend wide.mp4 is 16x48, of another aspect than 16x16: 67%"),
        ("--image moves.webp", "moves.webp has 3 pictures; the first is used"),
        ("--extend wide.mp4", "wide.mp4 has 16 frames a second, and the model's clips have 8"),
        ("--minutes 0.02 --noise-level 0.3", "given frames carried 0.1 at most"),
        (
            "--image a.png --keyframe 0.5:b.png",
            "pictures of 2 frames are given, and the model was not",
        ),
        (
            "--keyframe 0.5:b.png --last a.png",
            "pictures of 2 frames are given, and the model was not",
        ),
    ],
)
def test_what_is_done_all_the_same_is_said(zoetrope, tasks_folder, flags, said):
    code, _, errors = zoetrope(tasks_folder, *flags.split())
    assert code == 0, errors
    assert said in errors
    assert "warning" not in zoetrope(tasks_folder, "--frames", 17)[2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--extend short.mp4 --given 2", "the given video has 2 frames, and 5 are needed"),
        ("--extend none.mp4", "--extend none.mp4: no such file"),
        ("--extend text.mp4", "--extend text.mp4: "),
        ("--connect long.mp4 short.mp4", "the given video has 2 frames"),
        ("--extend long.mp4 --given 3", "given=3 of a clip of 3 latent frames; use 1 to 2"),
        ("--connect long.mp4 other.mp4 --frames 5", "too short"),
        ("--extend long.mp4 --given 2 --backward", "leaves nothing to make in front"),
        ("--edit long.mp4 --strength 0", "--strength 0: use 0.001 (nothing changes) to 1"),
        ("--edit long.mp4 --strength 1.5", "--strength 1.5: use 0.001"),
        ("--edit long.mp4 --strength nan", "--strength nan: use 0.001"),
        ("--edit long.mp4 --mask black.png", "the mask is black everywhere"),
        ("--edit long.mp4 --frames 9", "--frames: an edited video has its own length"),
        ("--edit long.mp4 --extend long.mp4", "--extend and --edit: use one at a time"),
        ("--loop --connect long.mp4 other.mp4", "--connect and --loop: use one at a time"),
        ("--seconds 2", "--seconds goes with --extend, which is not there"),
        ("--strength 0.5", "--strength goes with --edit"),
        ("--extend long.mp4 --seconds -1", "--seconds -1: use a number above 0"),
        ("--extend long.mp4 --both --backward", "--backward and --both: use one of them"),
        ("--extend long.mp4 --image a.png", "--image does not go with a given video"),
        ("--given 1", "--given goes with --extend, --connect, --loop or --minutes"),
        ("--noise-level 0.1", "--noise-level goes with --minutes"),
        ("--minutes 0", "--minutes 0: use a number above 0, at most 60"),
        ("--minutes 1 --loop", "a given video or --loop does not go with --minutes"),
        ("--minutes 1 --context 2", "--context 2 does not go with --minutes"),
        ("--minutes 1 --batch-size 2", "--batch-size does not go with --minutes"),
        ("--loop --batch-size 2", "--batch-size: such videos are made one at a time"),
        ("--image a.png --keyframe 0:b.png", "two pictures are given for frame 0"),
        ("--image a.png --last b.png --frames 1", "two pictures are given for frame 0"),
        ("--edit long.mp4 --mask wide.png", "--mask wide.png is 16x48, and long.mp4 is 16x16"),
        ("--edit long.mp4 -o long.mp4", "long.mp4 is one of the files that are given"),
        ("--image a.png --sheet a.png", "a.png is one of the files that are given"),
        ("--frames 1 -o c.png --sheet c.png", "--sheet c.png: is what -o writes too"),
        ("--frames 1 -o " + "n" * 230 + ".png", "the name has more than 220 bytes"),
        ("--image .", "--image .: is no file"),
        ("--keyframe -0.01:a.png", "--keyframe -0.01:a.png: the clip's frames are at 0 to 1"),
        ("--edit moves.webp", "--edit moves.webp: an animated picture of 3 frames; make a video"),
        ("--keyframe 0:a.png --frames 1 -o a.png", "a.png is one of the files that are given"),
        ("--image a.png --frames 1 -o a.png", "a.png is one of the files that are given"),
        ("--minutes 1 --last b.png", "--last does not go with --minutes"),
        ("--minutes 1 --given 2", "given=2 of windows of 2 latent frames; use 1 to 1"),
        ("--minutes 1 --noise-level 1", "noise level 1 of given frames"),
        ("--keyframe a.png", "--keyframe a.png: expected SECONDS:PATH"),
        ("--keyframe 2:a.png", "--keyframe 2:a.png: the clip's frames are at 0 to 1 seconds"),
        ("--keyframe 1:a.png --last b.png", "a --keyframe is at the last frame too"),
        ("--keyframe 0.5:a.png --keyframe 0.51:b.png", "there is another picture for that frame"),
        ("--keyframe 0.5:none.png", "--keyframe none.png: no such file"),
        ("--reference none.png", "--reference none.png: no such file"),
        ("--minutes 1 --temperature 0", "temperature=0; use a number above 0, up to 1"),
        ("--temperature nan", "temperature=nan; use a number above 0, up to 1"),
        ("--edit long.mp4 --temperature 0.5", "--temperature does not go with --edit"),
        ("--guidance-references 2", "--guidance-references goes with --reference"),
        ("--reference a.png --guidance-references -1", "references=-1.0; expected greater than"),
        ("--reference text.mp4", "--reference text.mp4: not a picture that can be read"),
        (
            "--reference a.png --reference b.png --reference a.png",
            "3 reference picture(s), and the model was trained with at most 2",
        ),
    ],
)
def test_mistakes_are_one_line(zoetrope, tasks_folder, tmp_path, flags, message):
    before = set(tmp_path.iterdir())
    code, _, errors = zoetrope(tasks_folder, *flags.split())
    assert code not in (0, None)
    said = ("warning", "sampling: ", "windows: ")  # and bars
    (line,) = [line for line in errors.splitlines() if line and not line.startswith(said)]
    assert message in line
    assert "Traceback" not in errors
    assert {path for path in tmp_path.iterdir() if path.suffix == ".mp4"} <= before


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ("--image a.png", "a given first frame"),
        ("--last a.png", "a given last frame"),
        ("--keyframe 0.25:a.png", "a given frame in the middle"),
        ("--extend long.mp4", "extending a video"),
        ("--extend long.mp4 --backward", "extending a video backwards"),
        ("--connect long.mp4 other.mp4 --frames 13", "connecting videos"),
        ("--loop --frames 9", "connecting videos"),
        ("--minutes 1", "a video in windows"),
    ],
)
def test_a_model_of_text_alone_says_what_it_would_need(zoetrope, folder, flags, what):
    code, _, errors = zoetrope(folder, *flags.split())
    assert code != 0
    assert f"{what} needs a model that was trained for it (recipe.tasks: " in errors
    assert errors.splitlines()[-1].endswith("trained with text alone")


def test_a_model_without_references_says_so(zoetrope, folder):
    code, _, errors = zoetrope(folder, "--reference", "a.png")
    assert code != 0
    assert "1 reference picture(s), and the model was trained with none" in errors


def test_videos_are_read_whole(zoetrope, frames_of):
    video = read_video("--extend", Path("long.mp4"), 16, 16, 8.0)
    assert torch.equal(to_uint8(video).permute(1, 2, 3, 0), torch.from_numpy(frames_of("long.mp4")))
    assert torch.equal(to_uint8(to_float(to_uint8(video))), to_uint8(video))
