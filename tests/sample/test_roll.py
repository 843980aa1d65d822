"""A video in windows: `zoetrope sample --minutes`."""

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data.video import to_uint8
from sample import roll as roll_module
from sample.roll import Plan, decoded, plan_windows, roll
from sample.schedule import Schedule
from train.cli import main


def test_schedules():
    schedule = Schedule.parse("0s: a red circle | 2.5s: a blue square |10s: x")
    at = [schedule.at(time) for time in (0, 2.4, 2.5, 9, 100)]
    assert at == ["a red circle"] * 2 + ["a blue square"] * 2 + ["x"]
    assert Schedule.parse("just one: a prompt").prompts == ("just one: a prompt",)
    lines = Schedule.parse("0s: a red circle\n2.5s: a blue square\n\n10s: x\n")
    assert lines == schedule
    assert Schedule.parse("0s: a\nb | 2s: c").prompts == ("a\nb", "c")
    assert Schedule.parse("0s: a |\n  2s: b").prompts == ("a", "b")
    for text in (
        *("1s: a", "0s: a | 0s: b", "0s: a | b", "0s: a | 2s:", "0s: a | xs: b"),
        *("0s: a | nans: b", "0s: a | infs: b", "a | b", "0s: a | -1s: b"),
    ):
        with pytest.raises(ValueError, match="prompt schedule: got"):
            Schedule.parse(text)
    assert Schedule.parse("0s: a | 2s: b", 2.1).starts == (0, 2)
    with pytest.raises(ValueError, match="got times 0s, 2s, and the video ends at 2s"):
        Schedule.parse("0s: a | 2s: b", 2)


def test_windows_are_decoded_as_one_clip(pipeline, tmp_path):
    """Latents of all windows in one piece give the same frames."""
    plan = plan_windows(pipeline, 22)
    assert plan == Plan(first=3, length=2, given=1, num_windows=5)
    schedule = Schedule.parse("0s: a circle | 1.5s: a square")
    assert list(roll(pipeline, schedule, plan, tmp_path, steps=2)) == [1, 2, 3, 4, 5]
    files = sorted(tmp_path.glob("*.safetensors"))
    latents = torch.cat([load_file(file)["latents"] for file in files], dim=2)
    assert latents.shape[2] == 3 + 4
    frames = np.concatenate(list(decoded(pipeline, plan, tmp_path, 22)))
    with torch.no_grad():
        whole = to_uint8(pipeline.vae.decode(latents)[0].clamp(-1, 1)).permute(1, 2, 3, 0).numpy()
    assert frames.shape == (22, 16, 16, 3)
    assert np.abs(frames.astype(int) - whole[:22]).max() <= 1


def held_bytes():
    """Of all tensors that something refers to, but those without memory that compiling leaves."""
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)
    tensors = [each for each in gc.get_objects() if type(each) in kinds]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def test_memory_does_not_grow_with_length(pipeline, tmp_path):
    plan = Plan(first=3, length=2, given=1, num_windows=12)
    schedule = Schedule.parse("a circle")
    made = [held_bytes() for _ in roll(pipeline, schedule, plan, tmp_path / "windows", steps=1)]
    assert len(made) == 12
    assert set(made[2:]) == {made[2]}
    frames = 1 + (plan.first + 11 - 1) * pipeline.vae.temporal_factor
    shown, held = 0, []
    for part in decoded(pipeline, plan, tmp_path / "windows", frames):
        shown += len(part)
        held.append(held_bytes())
    assert shown == frames
    assert set(held[2:]) == {held[2]}


def test_each_window_begins_with_the_end_of_the_one_before(pipeline, tmp_path):
    seen = []
    whole = pipeline.dit.forward
    pipeline.dit.forward = lambda x, t, *a, **k: seen.append((x.clone(), t)) or whole(x, t, *a, **k)
    try:
        plan = plan_windows(pipeline, 17)
        list(roll(pipeline, Schedule.parse("x"), plan, tmp_path, steps=1, noise_level=0.25))
    finally:
        pipeline.dit.forward = whole
    first = load_file(tmp_path / "window-00000.safetensors")["latents"]
    x, t = seen[1]
    assert x.shape[2] == 2
    assert t[0].tolist() == [0.25, 1.0]
    # The known frame is there with a quarter of noise.
    share = (x[0, :, 0] * first[0, :, 2]).sum() / first[0, :, 2].square().sum()
    assert 0.5 < share < 1.0


def test_what_a_model_cannot_leaves_no_windows(zoetrope, tasks_folder, tmp_path):
    three = [
        "--reference",
        "a.png",
        "--reference",
        "b.png",
        "--reference",
        "a.png",
        "--minutes",
        "0.05",
    ]
    code, _, errors = zoetrope(tasks_folder, *three)
    assert code != 0
    assert "3 reference picture(s)" in errors
    assert not os.path.exists("out.windows")
    assert zoetrope(tasks_folder, *three[2:])[0] == 0


def test_killed_in_the_middle_it_goes_on(zoetrope, tasks_folder, monkeypatch, frames_of):
    """With the same command, to the same video; with another one it says what differs."""
    flags = ("--minutes", "0.05", "--seed", "7")
    assert zoetrope(tasks_folder, *flags, "-o", "whole.mp4")[0] == 0
    child = os.fork()
    if child == 0:
        from sample import roll as module

        preview = module.write_preview
        module.write_preview = lambda pipeline, folder, window: (
            preview(pipeline, folder, window)
            if window < 2
            else os.kill(os.getpid(), signal.SIGKILL)
        )
        main(["sample", str(tasks_folder), "a circle", "--steps", "2", *flags])
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert len(list(os.scandir("out.windows"))) == 1 + 3 + 1
    assert os.path.exists("out.windows/preview.mp4")
    assert not os.path.exists("out.mp4")
    code, _, errors = zoetrope(tasks_folder, "--minutes", "0.05", "--seed", "8")
    assert code != 0
    assert "out.windows holds windows made with seed=7, not 8; give the same, or remove" in errors
    assert zoetrope(tasks_folder, *flags)[0] == 0
    assert np.array_equal(frames_of("out.mp4"), frames_of("whole.mp4"))
    assert not os.path.exists("out.windows")
    assert not os.path.exists(".out.windows.lock")


def test_two_processes_do_not_make_one_video(zoetrope, tasks_folder):
    code = (
        "import sys\nfrom pathlib import Path\nfrom data.files import locked\n"
        "with locked(Path('.out.windows.lock'), 'busy'): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        status, _, errors = zoetrope(tasks_folder, "--minutes", "0.02")
        other.communicate()
    assert status != 0
    assert "out.mp4: another process is making it; wait for it, or choose another" in errors
    assert not os.path.exists("out.windows")
    assert zoetrope(tasks_folder, "--minutes", "0.02")[0] == 0
    assert not os.path.exists(".out.windows.lock")


def test_each_window_has_the_prompt_of_its_time(pipeline, tmp_path, monkeypatch):
    prompts, states = [], pipeline.text_states
    monkeypatch.setattr(pipeline, "text_states", lambda p: prompts.extend(p) or states(p))
    schedule = Schedule.parse("0s: a circle | 1.5s: a square")
    list(roll(pipeline, schedule, plan_windows(pipeline, 22), tmp_path, steps=1, guidance=1.0))
    # New from second 0, 9/8, 13/8, 17/8 and 21/8 on.
    assert prompts == ["a circle", "a circle", "a square", "a square", "a square"]


def test_a_schedule_through_the_command(zoetrope, tasks_folder, frames_of):
    made = []
    for prompt in ("a circle", "0s: a circle | 2s: a large blue square"):
        code, _, errors = zoetrope(tasks_folder, "--minutes", "0.05", prompt=prompt)
        assert (code, "windows:" in errors) == (0, True), errors  # the bar
        made.append(frames_of("out.mp4").astype(int))
    assert np.abs(made[0][:15] - made[1][:15]).max() <= 4  # but for what H.264 does
    assert np.abs(made[0][17:] - made[1][17:]).max() > 8
    for prompt, message in (
        ("0s: a | 4s: b", "got times 0s, 4s, and the video ends at 3s"),
        ("0s: a | 1s:", "got '1s:'"),
        (
            "0s: a | 2.8s: b",
            "no window begins while 'b' holds, from 2.8s; the last one before that",
        ),
        ("1e400s: a", "got '1e400s: a'"),
        ("0s: a | 1.2s: b | 1.4s: c", "no window begins while 'b' holds, from 1.2s"),
    ):
        code, _, errors = zoetrope(tasks_folder, "--minutes", "0.05", prompt=prompt)
        assert code != 0
        assert message in errors
    code, _, errors = zoetrope(tasks_folder, prompt="0s: a | 1s: b")
    assert (code, "schedules go with --minutes" in errors) == (0, True)


def test_windows_of_another_model_are_refused(pipeline, tmp_path, monkeypatch):
    plan, schedule = plan_windows(pipeline, 13), Schedule.parse("x")
    lora = tmp_path / "lora.safetensors"
    lora.write_bytes(b"one")
    monkeypatch.setattr(pipeline, "loras", [(lora, 0.5)])
    next(roll(pipeline, schedule, plan, tmp_path / "windows", steps=1))
    assert list(roll(pipeline, schedule, plan, tmp_path / "windows", steps=1)) == [1, 2]
    lora.write_bytes(b"two")
    with pytest.raises(ValueError, match="windows made with loras="):
        next(roll(pipeline, schedule, plan, tmp_path / "windows", steps=1))
    monkeypatch.setattr(pipeline, "loras", [])
    monkeypatch.setattr(pipeline, "dtype", torch.bfloat16)
    with pytest.raises(ValueError, match=r"windows made with dtype=torch\.float32"):
        next(roll(pipeline, schedule, plan, tmp_path / "windows", steps=1))


def test_what_is_not_finite_is_not_kept(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.dit, "forward", lambda x, *a, **k: x * torch.nan)
    with pytest.raises(ValueError, match="values that are not finite"):
        list(roll(pipeline, Schedule.parse("x"), plan_windows(pipeline, 9), tmp_path, steps=1))
    assert not list(tmp_path.glob("window-*"))


def test_other_files_stay(zoetrope, tasks_folder, tmp_path):
    """A folder that has the name of the windows' and is somebody's; and one that gets another file."""
    folder = tmp_path / "out.windows"
    folder.mkdir()
    (folder / "precious.txt").write_text("mine")
    code, _, errors = zoetrope(tasks_folder, "--minutes", "0.05")
    assert code != 0
    assert "out.windows is to hold windows, and is there with something else" in errors
    (folder / "precious.txt").rename(tmp_path / "precious.txt")
    (folder / ".roll.json.7.partial").write_text("{")  # of a run that was killed just then
    assert zoetrope(tasks_folder, "--minutes", "0.05")[0] == 0
    assert [path.name for path in folder.iterdir()] == [".roll.json.7.partial"]


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.full((1, 4, 1, 4, 4), torch.nan), "finite float32"),
        (torch.zeros(1, 4, 1, 4, 4, dtype=torch.int32), "finite float32"),
        (torch.zeros(1, 4, 2, 4, 4), r"its shape is \(1, 4, 2, 4, 4\)"),
        (torch.zeros(1, 4, 1, 2, 2), "latents of 2x2"),
    ],
)
def test_windows_that_cannot_be_are_named(pipeline, tmp_path, latents, message):
    plan, schedule = plan_windows(pipeline, 17), Schedule.parse("x")
    for done in roll(pipeline, schedule, plan, tmp_path, steps=1):
        if done == 2:
            break
    save_file({"latents": latents}, tmp_path / "window-00001.safetensors")
    with pytest.raises(ValueError, match=f"window-00001.safetensors: damaged .*{message}"):
        list(roll(pipeline, schedule, plan, tmp_path, steps=1))
    for text in ("", "[1]", "{"):
        (tmp_path / "roll.json").write_text(text)
        with pytest.raises(
            ValueError, match=r"roll.json: damaged; remove .*, and it is begun anew"
        ):
            list(roll(pipeline, schedule, plan, tmp_path, steps=1))


def test_a_full_disk_takes_one_line(pipeline, tmp_path, monkeypatch):
    def fail(tensors, path):
        raise SafetensorError("I/O error: No space left")

    monkeypatch.setattr(roll_module, "save_file", fail)
    with pytest.raises(OSError, match=r"window-00000.safetensors: cannot be written \(I/O"):
        list(roll(pipeline, Schedule.parse("x"), plan_windows(pipeline, 9), tmp_path, steps=1))


def test_a_schedule_for_a_single_window(pipeline, tmp_path):
    with pytest.raises(ValueError, match="no window begins while 'b' holds"):
        next(roll(pipeline, Schedule.parse("0s: a | 0.5s: b"), plan_windows(pipeline, 9), tmp_path))
