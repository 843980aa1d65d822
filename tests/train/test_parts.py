"""The small parts of the loop: schedule, optimizer groups, EMA, strata of t, the log window."""

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from data.dataset import BadFiles
from dit.objective import FlowMatching
from sample.processes import micro_batch_size
from train.config import AdamWConfig, EMAConfig, ScheduleConfig
from train.ema import EMA
from train.logs import Window, clock, describe, describe_unread
from train.optim import build_optimizer, clip_gradients, schedule_factor, step_optimizer
from train.recipe import TrainedGroup, counted_noise, counted_uniform
from train.recipe_dit import strata


def test_schedule_shape():
    config = ScheduleConfig(kind="linear", warmup_steps=10, decay_fraction=0.2)
    factors = [schedule_factor(config, step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:80] == [1.0] * 71
    assert factors[80] == pytest.approx(20 / 21)
    assert factors[99] == pytest.approx(1 / 21)
    cosine = config.model_copy(update={"kind": "cosine"})
    assert schedule_factor(cosine, 90, 100) == pytest.approx(0.5 - 0.5 * 0.2225, abs=0.2)
    constant = config.model_copy(update={"kind": "constant"})
    assert schedule_factor(constant, 99, 100) == 1.0


@given(
    st.sampled_from(["constant", "linear", "cosine"]),
    st.integers(0, 30),
    st.floats(0, 1),
    st.integers(1, 50),
)
def test_schedule_rises_then_falls_and_is_never_zero(kind, warmup, fraction, steps):
    config = ScheduleConfig(kind=kind, warmup_steps=warmup, decay_fraction=fraction)
    factors = [schedule_factor(config, step, steps) for step in range(steps)]
    assert all(0 < f <= 1 for f in factors)
    plain = config.model_copy(update={"warmup_steps": 0})
    decay = [schedule_factor(plain, step, steps) for step in range(steps)]
    assert all(a >= b for a, b in itertools.pairwise(decay))


def test_only_matrices_decay():
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Conv3d(1, 1, 1))
    config = AdamWConfig(lr=1e-3, weight_decay=0.5)
    optimizer = build_optimizer([TrainedGroup("", dict(net.named_parameters()))], config)
    decaying, others = optimizer.param_groups
    assert [p.ndim for p in decaying["params"]] == [2, 5]
    assert decaying["weight_decay"] == 0.5
    assert others["weight_decay"] == 0
    assert all(p.ndim == 1 for p in others["params"])


def test_clipping_returns_the_norm_before():
    weight = nn.Parameter(torch.zeros(4))
    weight.grad = torch.full((4,), 3.0)
    assert clip_gradients([weight], 2.0).item() == pytest.approx(6.0)
    assert weight.grad.norm().item() == pytest.approx(2.0, rel=1e-4)


def test_ema_follows_its_definition_and_gives_the_weights_back():
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    trained = dict(net.named_parameters())
    ema = EMA(trained, EMAConfig(decay=0.9, warmup=True))
    expected = net.weight.detach().clone()
    for step in range(5):
        with torch.no_grad():
            net.weight.add_(1.0)
        decay = min(0.9, (1 + step) / (10 + step))
        assert ema.decay(step) == decay
        expected = decay * expected + (1 - decay) * net.weight.detach()
        ema.update(step)
    torch.testing.assert_close(ema.weights["weight"], expected)
    before = net.weight.detach().clone()
    with ema.applied():
        assert torch.equal(net.weight, ema.weights["weight"])
    assert torch.equal(net.weight, before)


def test_strata_cover_every_part_of_t():
    """One draw in each of B equal parts of the distribution of t, whichever rank it falls to."""
    g = list(range(24, 32))
    order = strata(0, 3, 8)
    uniform = (order[torch.tensor(g) - 24] + counted_uniform(0, "t", g)) / 8
    assert sorted((uniform * 8).long().tolist()) == list(range(8))
    t = FlowMatching(shift=3.0).sample_t(uniform)
    assert ((t > 0) & (t < 1)).all()
    assert not torch.equal(strata(0, 3, 8), strata(0, 4, 8))


def test_counted_draws_do_not_depend_on_the_batch():
    device = torch.device("cpu")
    whole = counted_noise(1, "noise", range(6), (2, 3), device)
    part = counted_noise(1, "noise", [4, 1], (2, 3), device)
    assert torch.equal(part, whole[[4, 1]])
    assert not torch.equal(counted_noise(1, "other", [4], (2, 3), device), part[:1])
    assert not torch.equal(counted_noise(2, "noise", [4], (2, 3), device), part[:1])
    uniform = counted_uniform(1, "t", range(4000))
    assert ((uniform >= 0) & (uniform < 1)).all()
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.03)
    assert whole.std().item() == pytest.approx(1, abs=0.4)


def test_micro_batches_must_fit():
    assert micro_batch_size(12, 2, 3) == 2
    with pytest.raises(ValueError, match=r"3 processes x train.grad_accum=2; use 18 or 12"):
        micro_batch_size(13, 2, 3)
    with pytest.raises(ValueError, match=r"use 4$"):
        micro_batch_size(2, 2, 2)


def test_window_averages_and_survives():
    window = Window()
    window.add({"loss": 1.0}, samples=4, busy=2.0, wait=0.5)
    revived = Window(json.loads(json.dumps(window.values)), window.seconds)
    for w in (window, revived):
        w.add({"loss": 2.0}, samples=4, busy=2.0, wait=0.5)
    row, again = window.take(), revived.take()
    assert row["loss"] == again["loss"] == 1.5
    assert row["samples_per_second"] == 2.0
    assert row["data_wait_share"] == 0.25
    assert row["seconds"] == again["seconds"] == 4.0
    window.add({"loss": 7.0}, samples=4, busy=1.0, wait=0.0)
    assert window.take()["loss"] == 7.0


def test_clock():
    assert [clock(s) for s in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]
    assert clock(30 * 3600 + 61) == "30:01:01"


def test_slow_runs_have_a_speed():
    window = Window()
    window.add({"loss": 1.0, "lr": 1.0}, samples=1, busy=900.0, wait=0.0)
    row = window.take()
    assert row["samples_per_second"] == pytest.approx(1 / 900, rel=1e-4)
    assert "0.0011 samples/s" in describe(1, 2, row)


def test_unread_clips_are_told_by_reason():
    reasons = {"a": "too short", "b": "empty", "c": "too short"}
    assert describe_unread(reasons) == "3 clips could not be read: too short (2); empty (1)"
    many = describe_unread({str(k): f"reason {k}" for k in range(9)})
    assert many.endswith("reason 4 (1); 4 other reasons")


def test_share_of_bad_files_is_of_this_process():
    alone, one_of_four = (BadFiles(40, 0.1, world_size=n) for n in (1, 4))
    bad = [("a.mp4", "empty"), ("b.mp4", "empty")]
    alone.add(bad)
    assert alone.reasons == dict(bad)
    with pytest.raises(ValueError, match=r"a share of 0\.200"):
        one_of_four.add(bad)


def test_a_group_that_starts_later_waits_as_if_the_run_began_then():
    """Its weights do not decay meanwhile, and its first update is Adam's first, not a later one."""

    def run(start, steps):
        torch.manual_seed(0)
        late = nn.Linear(3, 4)
        group = TrainedGroup("late", dict(late.named_parameters()), start_step=start)
        config = AdamWConfig(lr=1e-2, weight_decay=0.5, betas=(0.5, 0.999))
        optimizer = build_optimizer([group], config)
        for step in range(steps):
            for parameter in late.parameters():
                parameter.grad = torch.full_like(parameter, float(step >= start))
            step_optimizer(optimizer, 1e-2, step)
        return [p.detach() for p in late.parameters()]

    fresh = run(0, 0)
    assert all(torch.equal(a, b) for a, b in zip(run(50, 50), fresh))
    assert all(torch.equal(a, b) for a, b in zip(run(50, 53), run(0, 3)))
