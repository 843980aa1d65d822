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


def test_flops_grow_with_the_network(room, tmp_path):
    def flops(*overrides):
        text = plan(load_config(room.write(tmp_path / "run", "dit"), overrides))
        return float(
            next(x for x in text.splitlines() if x.startswith("FLOPs per step")).split()[-1]
        )

    once, twice = flops(), flops("recipe.dit.num_blocks=2")
    assert once < twice < 2 * once
    assert flops("train.batch_size=8") == pytest.approx(2 * once)


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
