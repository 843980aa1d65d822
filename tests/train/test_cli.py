"""The commands as a user meets them."""

import subprocess
import sys

import pytest

from train.cli import main
from train.config_file import load_config
from train.plan import plan


def run(capsys, *arguments):
    """Exit code, stdout and stderr of `zoetrope ...` in this process."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return caught.value.code, output.out, output.err


def test_help_lists_every_room_without_loading_torch():
    code = (
        "import sys\nfrom train.cli import main\n"
        "try:\n    main(['--help'])\nfinally:\n    print('TORCH', 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "TORCH False" in result.stdout
    for command in ("train", "sample", "eval", "data"):
        assert command in result.stdout


def test_dry_run(room, tmp_path, capsys):
    config = room.write(tmp_path / "run", "dit")
    code, out, _ = run(capsys, "train", config, "train.steps=77", "--dry-run")
    assert code in (0, None)
    assert "steps: 77" in out
    for line in ("dit parameters", "text parameters", "vae (frozen) parameters", "FLOPs per step"):
        assert line in out
    tokens = next(line for line in out.splitlines() if line.startswith("tokens per batch"))
    assert tokens.split()[-1] == str(4 * 2 * 2 * 2)  # batch x latent frames x rows x columns
    assert not (tmp_path / "run").exists()


def test_dry_run_counts_the_processes(room, tmp_path, monkeypatch, capsys):
    config = room.write(tmp_path / "run", "dit")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "(2 per micro-batch and process)" in run(capsys, "train", config, "--dry-run")[1]
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "3 processes" in run(capsys, "train", config, "--dry-run")[2]


def test_flops_grow_with_the_network(room, tmp_path):
    def flops(*overrides):
        text = plan(load_config(room.write(tmp_path / "run", "dit"), overrides))
        return float(
            next(x for x in text.splitlines() if x.startswith("FLOPs per step")).split()[-1]
        )

    once, twice = flops(), flops("recipe.dit.num_blocks=2")
    assert once < twice < 2 * once
    assert flops("train.batch_size=8") == pytest.approx(2 * once, rel=1e-3)
    cached = ("data.random_start=false", f"recipe.latent_cache={tmp_path / 'latents'}")
    assert flops(*cached) < once
    assert flops("train.compile=true") == once


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.batchsize=3", "train.batchsize: unknown key; did you mean batch_size?"),
        ("data.manifest=nowhere.jsonl", "nowhere.jsonl"),
        ("recipe.vae=nowhere", "nowhere"),
        ("data.num_frames=16", "frames=16 does not fit the VAE: it needs 4*k+1; use 17 or 13"),
        ("data.fps=5", "data.fps=5 but the VAE"),
        ("recipe.dit.patch_size=[1, 3, 3]", "do not divide into patches of 1x3x3"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(room, tmp_path, capsys, override, expected):
    config = room.write(tmp_path / "run", "dit")
    code, _, err = run(capsys, "train", config, override)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert err.startswith("zoetrope: error: ")
    assert expected in err


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PermissionError(13, "Permission denied", "runs/x"), "runs/x: Permission denied"),
        (FileNotFoundError(2, "No such file", "a.yaml"), "a.yaml does not exist"),
        (OSError("no route"), "no route"),
        (
            ValueError(
                "Caught ValueError in DataLoader worker process 0.\n"
                "Original Traceback (most recent call last):\n  ...\nValueError: 32 clips bad\n\n"
            ),
            "32 clips bad",
        ),
    ],
)
def test_errors_from_below_are_one_line(monkeypatch, capsys, tmp_path, error, expected):
    def fail(*arguments):
        raise error

    monkeypatch.setattr("train.config_file.load_config", fail)
    code, _, err = run(capsys, "train", tmp_path / "none.yaml")
    assert (code, err) == (2, f"zoetrope: error: {expected}\n")


def test_out_that_is_a_file(room, tmp_path, capsys):
    (tmp_path / "file").touch()
    code, _, err = run(capsys, "train", room.write(tmp_path / "run", "vae"), f"out={tmp_path}/file")
    assert (code, len(err.splitlines())) == (2, 1)
    assert f"{tmp_path}/file: File exists" in err


def test_several_problems_are_several_lines(room, tmp_path, capsys):
    config = room.write(tmp_path / "run", "vae")
    code, _, err = run(capsys, "train", config, "train.steps=0", "train.lr=1")
    assert code == 2
    assert [line.startswith("zoetrope: error: ") for line in err.splitlines()] == [True, True]


def test_traceback_on_demand(monkeypatch, tmp_path):
    monkeypatch.setenv("ZOETROPE_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        main(["train", str(tmp_path / "none.yaml")])


def test_wrong_usage_exits_2(capsys):
    code, _, err = run(capsys, "train")
    assert code == 2
    assert "config" in err.lower()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("foo",), "No such command 'foo'"),
        (("train",), "zoetrope train --help"),
        (("sample", "m", "x", "--steps", "abc"), "--steps"),
        (("sample", "m", "x", "--stpes", "3"), "--steps"),
        (("eval", "m", "--suite", "foo"), "'world', 'vae'"),
    ],
)
def test_wrong_usage_is_one_line(capsys, arguments, expected):
    code, _, err = run(capsys, *arguments)
    assert (code, len(err.splitlines())) == (2, 1)
    assert err.startswith("zoetrope: error: ")
    assert expected in err


def test_no_arguments_show_the_help(capsys):
    code, out, err = run(capsys)
    assert (code, err) == (2, "")
    assert "sample" in out


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError("Unable to allocate 9 TiB"), "Unable to allocate 9 TiB; use smaller sizes"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: x\nmore"), "can't allocate"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "DataLoader worker"),
    ],
)
def test_what_the_machine_lacks_is_one_line(monkeypatch, capsys, tmp_path, error, expected):
    def fail(*arguments):
        raise error

    monkeypatch.setattr("train.config_file.load_config", fail)
    code, _, err = run(capsys, "train", tmp_path / "none.yaml")
    assert (code, len(err.splitlines())) == (2, 1)
    assert expected in err


def test_a_bug_keeps_its_traceback(monkeypatch, tmp_path):
    def fail(*arguments):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("train.config_file.load_config", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        main(["train", str(tmp_path / "none.yaml")])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.fps=2000", "data.fps: got 2000"),
        ("data.fps=.inf", "data.fps: got inf"),
        ("data.height=33", "data.height: got 33, expected a multiple of 2"),
        ("data.memory_gb=.inf", "data.memory_gb: got inf"),
        ("train.optimizer.lr=.nan", "lr: got nan"),
        ("logging.guidance=.nan", "logging.guidance: got nan"),
        ("recipe.objective.logit_mean=.inf", "logit_mean: got inf"),
    ],
)
def test_numbers_that_would_only_fail_later(room, tmp_path, capsys, override, expected):
    code, _, err = run(capsys, "train", room.write(tmp_path / "run", "dit"), override)
    assert (code, len(err.splitlines())) == (2, 1)
    assert expected in err


def test_too_many_rows_without_a_caption(room, tmp_path, capsys, caplog):
    rows = (room.folder / "train" / "manifest.jsonl").read_text().splitlines()
    bad = ['{"path": "x.mp4"}'] * 30
    manifest = room.folder / "train" / "half.jsonl"
    manifest.write_text("\n".join([*rows, *bad]) + "\n")
    config = room.write(tmp_path / "run", "dit")
    code, _, err = run(capsys, "train", config, f"data.manifest={manifest}")
    manifest.unlink()
    assert code == 2
    assert f"30 of the {len(rows) + 30} rows" in err
    assert "data.max_bad_share" in err
    assert len(caplog.messages) == 21  # twenty of them by line, and how many there are
