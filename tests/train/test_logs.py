"""What a row says of speed and of the ranks, what wandb calls it, spikes, and traces."""

import gzip
import json
import math
import shutil
import signal
from dataclasses import dataclass, field

import pytest
import torch
import wandb

from sample.processes import Ranks
from train import performance
from train.anomalies import NonFiniteError, Spikes
from train.checkpoint import list_checkpoints, read_state
from train.cli import main
from train.config import SpikeConfig
from train.config_file import load_config
from train.logs import TIME_FIELDS, describe, panel, read_log
from train.performance import Costs, Meter, peak_tflops
from train.plan import flops_per_sample
from train.profiling import parse_steps
from train.recipe_vae import VAERecipe
from train.setup import build_recipe, open_data

SIZE = (5, 16, 16)
CPU = torch.device("cpu")


@dataclass
class Three:
    """Rank 0 of three, with what the others have to say."""

    others: list = field(default_factory=list)
    rank, world_size, device = 0, 3, CPU

    def gather(self, value):
        return [value, *self.others]


def test_a_row_compares_the_ranks(monkeypatch):
    monkeypatch.setattr(performance, "peak_memory_gb", lambda device: 2.0)
    costs = Costs({SIZE: 100}, {SIZE: 6e12}, peak_tflops=10.0)
    meter = Meter(Three([(0.5, 3.0), (0.1, 1.0)]), costs, meets=False)
    meter.add({SIZE: 6}, busy=1.0, wait=0.2)
    meter.add({SIZE: 6}, busy=3.0, wait=0.4)
    meter.add_checkpoint(0.25)
    row = meter.take(write_seconds=1.5)
    assert row["samples_per_second_per_process"] == 1.0  # 12 in 4 s by 3
    assert row["tokens_per_second_per_process"] == 100.0
    assert (row["mfu"], row["peak_tflops"]) == (0.6, 10.0)
    assert (row["slowest_rank"], row["slowest_rank_seconds"]) == (1, 0.5)
    assert (row["fastest_rank"], row["fastest_rank_seconds"]) == (2, 0.1)
    assert row["peak_memory_gb"] == 3.0
    assert (row["checkpoint_seconds"], row["checkpoint_write_seconds"]) == (0.25, 1.5)
    assert row.keys() <= {*TIME_FIELDS, "peak_tflops"}

    more = {"lr": 1e-3, "samples_per_second": 3.0, "data_wait_share": 0.15}
    line = describe(3, 12, {**row, **more, "loss": 0.5})
    assert "100 tokens/s per process  MFU 60.0% of 10 TFLOP/s  data wait 15%  memory 3 GB" in line
    assert "checkpoint 0.25 s (written in 1.5 s)  own work 0.1 s (rank 2) to 0.5 s (rank 1)" in line

    meter.add({SIZE: 3}, busy=1.0, wait=0.9)
    again = meter.take(0.0)
    assert again["samples_per_second_per_process"] == 1.0
    assert again["checkpoint_seconds"] == 0
    assert again["slowest_rank_seconds"] == 0.9


def test_own_work_ends_before_others_are_waited_for(monkeypatch):
    """With the last gradient, whatever runs after it in the same backward pass."""
    now = [0.0]
    monkeypatch.setattr(performance.time, "perf_counter", lambda: now[0])
    engine = torch.autograd.Variable._execution_engine

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            now[0] += 2.0  # own work
            engine.queue_callback(lambda: now.__setitem__(0, now[0] + 50.0))  # as DDP waits
            return grad

    for meets, own in ((False, 3.0), (True, 0.0)):
        meter = Meter(Ranks(0, 1, CPU, None), Costs({}, {}, None), meets=meets)
        x = torch.ones(2, requires_grad=True)
        meter.begin()
        now[0] += 1.0
        loss = Slow.apply(x).sum()
        meter.end_with(loss)
        loss.backward()
        meter.add({SIZE: 1}, busy=60.0, wait=0.5)
        assert meter.take(0.0)["slowest_rank_seconds"] == own + 0.5


def test_peak_rates(room, tmp_path, monkeypatch):
    config = load_config(room.write(tmp_path / "run", "vae"))
    assert peak_tflops(config, CPU) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    cuda = torch.device("cuda", 0)
    assert peak_tflops(config, cuda) == 67  # the config trains in float32
    half = config.model_copy(
        update={"train": config.train.model_copy(update={"dtype": "bfloat16"})}
    )
    assert peak_tflops(half, cuda) == 989
    given = config.logging.model_copy(update={"peak_tflops": 3.0})
    assert peak_tflops(config.model_copy(update={"logging": given}), cuda) == 3.0


def test_mfu_of_a_run_is_its_flops(room, tmp_path):
    out = room.train(tmp_path / "run", "dit", logging={"peak_tflops": 0.5, "interval": 12})
    row = read_log(out / "log.jsonl")[-1]
    config = load_config(room.write(tmp_path / "run", "dit"))
    data = open_data(config)
    recipe = build_recipe(config, data, Ranks(0, 1, CPU, None), on_meta=True)
    flops = flops_per_sample(recipe, SIZE)
    assert row["peak_tflops"] == 0.5
    assert row["mfu"] == pytest.approx(flops * row["samples_per_second"] / 0.5e12, rel=1e-3)
    tokens = recipe.num_tokens(SIZE)
    assert row["tokens_per_second_per_process"] == pytest.approx(
        tokens * row["samples_per_second"], rel=1e-4
    )


def test_wandb_groups_by_prefix(room, tmp_path, monkeypatch):
    shown = {}

    class Fake:
        def log(self, values, step):
            shown.update(values)

        def finish(self, exit_code):
            pass

    monkeypatch.setattr(wandb, "init", lambda **_: Fake())
    monkeypatch.setattr(wandb, "Video", lambda path, format: path)
    monkeypatch.setattr(wandb, "Histogram", lambda values: values)
    out = room.train(
        tmp_path / "run",
        "vae",
        train={"steps": 6},
        logging={"wandb": "offline", "sample_interval": 6},
    )
    assert {name.split("/")[0] for name in shown} == {"train", "val", "perf", "samples"}
    row = read_log(out / "log.jsonl")[-1]
    assert {panel(name) for name in row.keys() - {"step"}} <= shown.keys()
    assert {"train/loss", "train/grad_norm", "train/lr", "perf/data_wait_share"} <= shown.keys()


def test_spikes_are_found_once_there_is_a_past():
    spikes = Spikes(SpikeConfig(factor=3, window=4, max_skips=2))
    assert spikes.judge({"grad_norm": 100.0}) is None
    for norm in (1.0, 1.0, 2.0):
        assert spikes.judge({"grad_norm": norm}) is None
    # The median of 100, 1, 1, 2.
    assert spikes.judge({"grad_norm": 4.5}) is None
    found = spikes.judge({"grad_norm": 4.6})  # of 1, 1, 2, 4.5
    assert found == {"figure": "grad_norm", "norm": 4.6, "median": 1.5}
    revived = Spikes(spikes.config, json.loads(json.dumps(spikes.state())))
    for one in (spikes, revived):
        assert one.judge({"grad_norm": 4.6}) is not None  # a spike is not part of the past
        with pytest.raises(ValueError, match=r"^2 steps in a row were left out, and the next"):
            one.judge({"grad_norm": 4.6})
        assert one.judge({"grad_norm": 1.5}) is None
        assert one.judge({"grad_norm": 30.0}) is not None
    assert Spikes(None).judge({"grad_norm": 1e9}) is None


def test_any_group_may_have_a_spike():
    spikes = Spikes(SpikeConfig(factor=3, window=2))
    for norm in (1.0, 1.0):
        spikes.judge({"grad_norm": norm, "grad_norm_discriminator": 0.0})
    # Nothing is usual for one that has not begun.
    assert spikes.judge({"grad_norm": 1.0, "grad_norm_discriminator": 5.0}) is None
    spikes.judge({"grad_norm": 1.0, "grad_norm_discriminator": 5.0})
    found = spikes.judge({"grad_norm": 1.0, "grad_norm_discriminator": 16.0})
    assert found["figure"] == "grad_norm_discriminator"


def without_clock(out):
    return [
        {k: v for k, v in row.items() if k not in TIME_FIELDS}
        for row in read_log(out / "log.jsonl")
    ]


SPIKES = {
    "train": {"skip_spikes": {"factor": 3, "window": 3}, "checkpoint_interval": 6, "steps": 9},
    "logging": {"interval": 2},
}


def test_a_spike_is_left_out_and_told(room, tmp_path, monkeypatch, capsys):
    """A resumed run finds the spikes that an uninterrupted one does."""
    forward = VAERecipe.forward

    def spiked(self, batch):
        losses, values = forward(self, batch)
        return losses * (1e4 if int(batch["step"]) in (4, 7) else 1.0), values

    monkeypatch.setattr(VAERecipe, "forward", spiked)
    out = room.train(tmp_path / "run", "vae", **SPIKES)
    output = capsys.readouterr().out
    assert "step 5 is left out: its grad_norm of " in output
    skipped = read_log(out / "skipped.jsonl")
    assert [row["step"] for row in skipped] == [5, 8]
    assert skipped[0]["norm"] > 1000 * skipped[0]["median"]
    (share,) = skipped[0]["samples"]
    (batch,) = share["micro_batches"]
    assert (share["rank"], batch["g"]) == (0, [16, 17, 18, 19])
    assert len(batch["rows"]) == len(batch["captions"]) == 4
    rows, weights = without_clock(out), (out / "model" / "vae.safetensors").read_bytes()
    assert [row["skipped_share"] for row in rows] == [0.0, 0.0, 0.5, 0.5, 0.0]

    (step, kept), (_, last) = list_checkpoints(out / "checkpoints")
    assert (step, len(read_state(kept)["spikes"]["norms"]["grad_norm"])) == (6, 3)
    shutil.rmtree(last)
    room.train(out, "vae", **SPIKES)
    assert "step 8 is left out" in capsys.readouterr().out
    assert read_log(out / "skipped.jsonl") == skipped
    assert without_clock(out) == rows
    assert (out / "model" / "vae.safetensors").read_bytes() == weights


def test_a_skipped_step_changes_nothing(room, tmp_path, monkeypatch):
    """Neither weights nor averages nor the optimizer's."""
    forward, states = VAERecipe.forward, []

    def spiked(self, batch):
        losses, values = forward(self, batch)
        states.append({name: p.detach().clone() for name, p in self.named_parameters()})
        return losses * (1e4 if int(batch["step"]) == 4 else 1.0), values

    monkeypatch.setattr(VAERecipe, "forward", spiked)
    updates = []
    monkeypatch.setattr("train.ema.EMA.update", lambda self, step: updates.append(step))
    room.train(tmp_path / "run", "vae", **SPIKES)
    assert updates == [0, 1, 2, 3, 5, 6, 7, 8]
    before, after = states[4], states[5]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not all(torch.equal(states[5][name], states[6][name]) for name in before)


def test_a_full_disk_does_not_hide_what_diverged(room, tmp_path, monkeypatch):
    forward = VAERecipe.forward

    def diverge(self, batch):
        losses, values = forward(self, batch)
        return losses * math.nan, values

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(VAERecipe, "forward", diverge)
    monkeypatch.setattr("train.anomalies.save_file", full)
    expected = (
        r"^step 0: loss nan.* batch is not in .*rank-0, which cannot be written .*No space left"
    )
    with pytest.raises(NonFiniteError, match=expected):
        room.train(tmp_path / "run", "vae")
    # What did go onto the disk says which rows of the manifest it was.
    report = json.loads((tmp_path / "run" / "nonfinite-step-0-rank-0" / "batch.json").read_text())
    assert len(report["micro_batches"][0]["rows"]) == 4


@pytest.mark.parametrize("text", ["", "a:b", "3:2", "0:4", "1:2:3", "-1:2"])
def test_steps_to_profile_are_refused_in_one_line(text):
    with pytest.raises(ValueError, match=rf"^--profile={text}: [^\n]+$"):
        parse_steps(text)


def test_profile_writes_a_trace(room, tmp_path, capsys):
    assert parse_steps("2:3") == (2, 3)
    assert parse_steps("4") == (4, 4)
    config = room.write(tmp_path / "run", "vae", train={"steps": 4})
    with pytest.raises(SystemExit) as exit:
        main(["train", str(config), "--profile", "2:3"])
    assert exit.value.code == 0
    assert f"{tmp_path / 'run' / 'profile'}: traces of steps 2 to 3" in capsys.readouterr().out
    (path,) = (tmp_path / "run" / "profile").iterdir()
    assert path.name == "steps-2-3-rank-0.json.gz"
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    names = {str(event.get("name")) for event in events}
    assert {"step 2", "step 3", "aten::conv3d"} <= names
    assert not {"step 1", "step 4"} & names

    with pytest.raises(SystemExit) as exit:
        main(["train", str(config), "train.steps=8", f"out={tmp_path / 'b'}", "--profile", "2:9"])
    assert exit.value.code == 2
    said = "--profile=2:9: this run has 8 steps; choose some of them"
    assert capsys.readouterr().err == f"zoetrope: error: {said}\n"


def test_a_run_that_is_started_again_has_no_trace_of_what_is_done(room, tmp_path, capsys):
    room.train(tmp_path / "run", "vae", train={"steps": 8, "checkpoint_interval": 4})
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    with pytest.raises(SystemExit) as exit:
        main(["train", str(tmp_path / "run.yaml"), "train.steps=8", "--profile", "3:5"])
    assert exit.value.code == 0
    assert "--profile=3:5: 4 steps are done already" in capsys.readouterr().out
    (path,) = (tmp_path / "run" / "profile").iterdir()
    with gzip.open(path) as file:
        names = {str(event.get("name")) for event in json.load(file)["traceEvents"]}
    assert "step 5" in names
    assert not {"step 3", "step 4", "step 6"} & names


def test_samples_are_given_up_for_a_signal(room, tmp_path, monkeypatch, capsys):
    """Also where the next step would have shown that there is one."""
    monkeypatch.setattr(
        VAERecipe, "reconstruct", lambda self, video: signal.raise_signal(signal.SIGTERM) or video
    )
    with pytest.raises(SystemExit) as exit:
        room.train(tmp_path / "run", "vae", logging={"sample_interval": 2, "num_samples": 2})
    assert exit.value.code == 75
    out = capsys.readouterr().out
    assert "no samples after step 2: the run is to stop" in out
    assert "stopped after step 3" in out


def test_weights_that_are_not_finite_are_not_exported(room, tmp_path):
    """As after a last step that was too large, which no loss will tell of."""
    optimizer = {"kind": "adamw", "lr": 1e38}
    with pytest.raises(NonFiniteError, match=r"after step 1 there are weights that are not finite"):
        room.train(
            *(tmp_path / "run", "vae"),
            train={"steps": 1, "optimizer": optimizer, "schedule": {"warmup_steps": 0}},
        )
    assert not (tmp_path / "run" / "model").exists()
