"""Interrupted runs end as if nothing had happened."""

import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from train.checkpoint import list_checkpoints, read_state
from train.cli import main
from train.logs import TIME_FIELDS, read_log

HARD = {
    "train": {"steps": 48, "grad_accum": 2, "checkpoint_interval": 8, "keep_checkpoints": 2},
    "data": {"num_workers": 1},
    "logging": {
        "interval": 7,
        "val_interval": 20,
    },  # never at a checkpoint: the window must survive
}


def rows(out):
    """log.jsonl without what depends on the clock."""
    return [
        {k: v for k, v in r.items() if k not in TIME_FIELDS} for r in read_log(out / "log.jsonl")
    ]


def tensors(checkpoint, folder):
    """All of a checkpoint's tensors and values, flat."""
    path = folder / f"{checkpoint.parents[1].name}.pt"
    dcp_to_torch_save(checkpoint, path)
    return dict(flat(torch.load(path, weights_only=False)))


def flat(value, prefix=""):
    if isinstance(value, dict):
        for key, nested in value.items():
            yield from flat(nested, f"{prefix}/{key}")
    elif isinstance(value, (list, tuple)):
        for key, nested in enumerate(value):
            yield from flat(nested, f"{prefix}/{key}")
    else:
        yield prefix, value


def assert_same_run(a, b, folder):
    assert rows(a) == rows(b)
    parts = sorted(path.name for path in (a / "model").glob("*.safetensors"))
    for part in parts:
        left, right = load_file(a / "model" / part), load_file(b / "model" / part)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
    (step_a, last_a), (step_b, last_b) = (
        list_checkpoints(out / "checkpoints")[-1] for out in (a, b)
    )
    assert step_a == step_b
    left, right = tensors(last_a, folder), tensors(last_b, folder)
    assert left.keys() == right.keys()
    assert any("exp_avg" in name for name in left)
    assert any("momentum_buffer" in name for name in left) == ("dit.safetensors" in parts)
    assert any(name.startswith("/ema/") for name in left)
    for name, value in left.items():
        same = torch.equal(value, right[name]) if torch.is_tensor(value) else value == right[name]
        assert same, name


@pytest.mark.parametrize("kind", ["vae", "gan", "dit"])
def test_kill_and_resume_is_bit_exact(room, nursery, tmp_path, kind, capsys):
    """Killed once; tests/distributed/test_chaos.py is less merciful."""
    optimizer = {"kind": "muon" if kind == "dit" else "adamw", "lr": 2e-3}
    changes = {**HARD, "train": {**HARD["train"], "optimizer": optimizer}}
    whole = room.train(tmp_path / "whole", kind, **changes)

    config = room.write(tmp_path / "killed", kind, **changes)
    process = nursery.start("-m", "train", config)
    room.wait_for(tmp_path / "killed" / "checkpoints" / "step-00000008", process)
    process.kill()
    process.communicate()
    interrupted_at = list_checkpoints(tmp_path / "killed" / "checkpoints")[-1][0]
    assert 8 <= interrupted_at < 48

    code, output = nursery.run("-m", "train", config)
    assert code == 0, output
    assert f"steps {interrupted_at} to 48" in output
    assert_same_run(whole, tmp_path / "killed", tmp_path)

    capsys.readouterr()
    room.train(tmp_path / "killed", kind, **changes)
    assert "done already" in capsys.readouterr().out


def test_sigterm_writes_a_checkpoint(room, tmp_path):
    config = room.write(tmp_path / "run", "vae", train={"steps": 5000}, data={"num_workers": 1})
    process = room.start(config)
    room.wait_for(tmp_path / "run" / "log.jsonl", process)
    while not read_log(tmp_path / "run" / "log.jsonl"):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0]
    assert process.returncode == 75, output
    (step, path) = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert f"stopped after step {step}" in output
    assert read_state(path)["step"] == step
    assert step % 100  # written because of the signal


def test_resume_refuses_another_config(room, tmp_path, capsys):
    out = room.train(tmp_path / "run", "vae")
    (out / "model" / "model.yaml").unlink()
    shutil.rmtree(out / "model")
    with pytest.raises(ValueError, match=r"step-00000012 was made with another train\.steps"):
        room.train(out, "vae", train={"steps": 13})
    with pytest.raises(ValueError, match=r"another train\.optimizer\.lr"):
        room.train(out, "vae", train={"optimizer": {"lr": 1e-3}})
    with pytest.raises(ValueError, match=r"another recipe\.vae\.widths"):
        room.train(out, "vae", recipe={"vae": {"widths": [8, 16]}})
    # A change that is meant is named.
    command = ["train", str(room.write(out, "vae", train={"steps": 13})), "--allow-change"]
    with pytest.raises(SystemExit) as stop:
        main([*command, "train.stepss"])
    assert stop.value.code == 2
    assert "--allow-change train.stepss: the config has no such key; there are" in (
        capsys.readouterr().err
    )
    with pytest.raises(SystemExit) as stop:
        main([*command, "train.steps"])
    assert stop.value.code == 0
    assert "resumed, steps 12 to 13" in capsys.readouterr().out
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "step-00000013")
    # What changes nothing in the training may change, and a lost model folder comes back.
    room.train(out, "vae", data={"num_workers": 1}, train={"keep_checkpoints": 7})
    assert (out / "model" / "vae.safetensors").is_file()


def test_checkpoint_from_before_a_key_existed(room, tmp_path):
    out = room.train(tmp_path / "run", "vae")
    shutil.rmtree(out / "model")
    (_, path) = list_checkpoints(out / "checkpoints")[-1]
    state = read_state(path)
    del state["config"]["data"]["random_start"]
    (path / "state.json").write_text(json.dumps(state))
    room.train(out, "vae")
    assert (out / "model" / "model.yaml").is_file()
    with pytest.raises(ValueError, match=r"another data\.random_start"):
        room.train(out, "vae", data={"random_start": False})


def test_resume_refuses_other_data(room, tmp_path):
    clips = tmp_path / "clips"
    shutil.copytree(room.folder / "train", clips)
    manifest = clips / "manifest.jsonl"
    out = room.train(tmp_path / "run", "vae", data={"manifest": str(manifest)})
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match="other rows"):
        room.train(out, "vae", data={"manifest": str(manifest)})


def test_resume_refuses_another_vae(room, tmp_path):
    vae = tmp_path / "vae"
    shutil.copytree(room.vae, vae)
    out = room.train(tmp_path / "run", "dit", recipe={"vae": str(vae)}, train={"steps": 3})
    shutil.rmtree(out / "model")
    weights = load_file(vae / "vae.safetensors")
    changed = {name: value * 1.01 for name, value in weights.items()}
    save_file(changed, vae / "vae.safetensors")
    again = {"recipe": {"vae": str(vae)}, "train": {"steps": 3}}
    with pytest.raises(ValueError, match=r"step-00000003 was made with another VAE: .*restore"):
        room.train(out, "dit", **again)
    (_, path) = list_checkpoints(out / "checkpoints")[-1]
    state = read_state(path)
    assert list(state.pop("frozen")) == [
        "VAE",
        "model.yaml",
    ]  # as a checkpoint of an earlier version
    (path / "state.json").write_text(json.dumps(state))
    room.train(out, "dit", **again)
    assert (out / "model" / "model.yaml").is_file()


def test_one_run_at_a_time(room, tmp_path):
    changes = {"train": {"steps": 1}}
    expected = pytest.raises(ValueError, match="run: another process is training into this folder")
    with room.occupied(tmp_path / "run"), expected:
        room.train(tmp_path / "run", "vae", **changes)
    room.train(tmp_path / "run", "vae", **changes)


def test_only_the_last_checkpoints_stay(room, tmp_path):
    changes = {"train": {"checkpoint_interval": 3, "keep_checkpoints": 2}}
    out = room.train(tmp_path / "run", "vae", **changes)
    assert [step for step, _ in list_checkpoints(out / "checkpoints")] == [9, 12]
    assert not list((out / "checkpoints").glob(".*"))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("state.json", b"", "state.json is cut short or overwritten"),
        ("state.json", b"[]", "state.json holds something else"),
        ("state.json", b'{"step": 12, "config": 3}', "state.json holds something else"),
        ("state.json", b'{"step": 11, "config": {}}', "state.json is of step 11"),
        ("state.json", None, "state.json is missing"),
        (".metadata", b"", r".metadata cannot be read \(Ran out of input\)"),
        (".metadata", b"\x80\x04]\x94.", ".metadata holds something else"),  # a pickled list
        (".metadata", None, ".metadata is missing"),
        (
            "__0_0.distcp",
            b"cut",
            r"__0_0.distcp \(the shard of rank 0\) is cut short at 3 of \d+ bytes",
        ),
        (
            "__0_0.distcp",
            bytes(10**6),
            r"__0_0.distcp \(the shard of rank 0\) cannot be read \(.+\)",
        ),
        ("__0_0.distcp", None, r"__0_0.distcp \(the shard of rank 0\) is missing"),
    ],
)
def test_damaged_checkpoint_is_named(room, tmp_path, name, content, problem):
    steps = {"train": {"checkpoint_interval": 6}}
    out = room.train(tmp_path / "run", "vae", **steps)
    last = out / "checkpoints" / "step-00000012"
    assert (last / name).exists()
    (last / name).unlink()
    if content is not None:
        (last / name).write_bytes(content)
    remedy = "delete that folder, and the same command goes on from step-00000006$"
    with pytest.raises(
        ValueError, match=f"step-00000012 is damaged: {problem}; {remedy}"
    ) as caught:
        room.train(out, "vae", **steps)
    assert "\n" not in str(caught.value)
    shutil.rmtree(last)
    room.train(out, "vae", **steps)
    assert list_checkpoints(out / "checkpoints")[-1][0] == 12


def test_half_written_checkpoint_and_log_line_are_ignored(room, tmp_path):
    whole = room.train(tmp_path / "whole", "vae", train={"checkpoint_interval": 6})
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "step-00000012")
    (out / "checkpoints" / ".step-00000009.partial").mkdir()
    log = (out / "log.jsonl").read_text()
    (out / "log.jsonl").write_text('[1]\n{"loss": 1}\n' + log + '{"step": 15, "loss": 0.')
    room.train(out, "vae", train={"checkpoint_interval": 6})
    assert rows(out) == rows(whole)
    assert not (out / "checkpoints" / ".step-00000009.partial").exists()
