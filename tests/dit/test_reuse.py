"""Feature reuse: off it changes nothing, on it leaves blocks out and stays near."""

import math

import pytest
import torch

from dit.objective import FlowMatching
from dit.reuse import FeatureReuse
from dit.transformer import DiT, DiTConfig


@pytest.fixture
def dit() -> DiT:
    torch.manual_seed(0)
    config = DiTConfig(
        in_channels=4, context_dim=12, dim=48, num_blocks=4, num_heads=4, mlp_dim=96, freq_dim=32
    )
    dit = DiT(config)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    # As in a trained network, features change slowly with t: only its slow sinusoids are heard.
    weight = dit.time_embedding[0].weight.data
    weight *= 5
    weight.unflatten(1, (2, -1))[:, :, :10] = 0
    return dit.eval()


def trajectory(dit, reuse, num_steps=20, b=2, seed=0):
    """Latents after Euler steps from t = 1 to 0."""
    g = torch.Generator().manual_seed(seed)
    x, context = torch.randn(b, 4, 3, 4, 4, generator=g), torch.randn(b, 5, 12, generator=g)
    grid = FlowMatching().grid(num_steps)
    for t, t_next in zip(grid[:-1], grid[1:]):
        x = x + (t_next - t) * dit(x, t.expand(b), context, reuse=reuse)
    return x


@pytest.fixture
def runs(dit):
    """How many clips the last block was given, at every call."""
    sizes = []
    dit.blocks[-1].register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    return sizes


@torch.no_grad()
def test_a_threshold_of_zero_is_exactly_no_reuse(dit, runs):
    reuse = FeatureReuse(0.0)
    assert torch.equal(trajectory(dit, reuse), trajectory(dit, None))
    assert (reuse.num_evaluated, reuse.num_skipped) == (40, 0)
    assert runs == [2] * 40


@torch.no_grad()
def test_error_and_savings_grow_with_the_threshold(dit):
    full = trajectory(dit, None)
    errors, skipped = [], []
    for threshold in (0.01, 0.1, 0.4, 10.0):
        reuse = FeatureReuse(threshold)
        error = (trajectory(dit, reuse) - full).square().mean().sqrt() / full.std()
        errors.append(error.item())
        skipped.append(reuse.num_skipped)
        assert reuse.num_evaluated + reuse.num_skipped == 40
    assert skipped == sorted(skipped)
    assert 0 < skipped[1] < skipped[3] == 38  # of every clip the first step alone
    assert errors == sorted(errors)
    assert errors[1] < 0.05 < errors[3]


@torch.no_grad()
def test_skipped_clips_do_not_run(dit, runs):
    reuse = FeatureReuse(0.2)
    trajectory(dit, reuse)
    assert sum(runs) == reuse.num_evaluated < 40


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(dit, runs):
    """Clips decide for themselves, also where one of two is evaluated."""
    x, context = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 5, 12)

    def run(rows):
        reuse, y = FeatureReuse(0.1), []
        prepared = dit.prepare_context(context[rows])
        for level in (0.9, 0.89, 0.1):
            t = torch.tensor([level, 0.9])  # the second clip stays where it is
            y.append(dit(x[rows], t[rows], prepared, reuse=reuse))
        return torch.stack(y), reuse

    together, reuse = run(slice(0, 2))
    assert runs == [2, 1]  # both, none, the first
    assert (reuse.num_evaluated, reuse.num_skipped) == (3, 3)
    for i in range(2):
        alone, _ = run(slice(i, i + 1))
        torch.testing.assert_close(together[:, i : i + 1], alone, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_rows_may_be_left_out_and_come_back(dit, runs):
    x, t, context = torch.randn(2, 4, 1, 4, 4), torch.full((2,), 0.5), torch.randn(2, 5, 12)
    reuse = FeatureReuse(0.1)
    expected = dit(x, t, context)
    runs.clear()
    for count in (1, 2, 1, 2):
        y = dit(x[:count], t[:count], context[:count], reuse=reuse)
        torch.testing.assert_close(y, expected[:count], atol=1e-5, rtol=1e-5)
    assert runs == [1, 1]  # each clip once


@torch.no_grad()
def test_masks_and_noise_levels_per_frame(dit, runs):
    x, context = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 5, 12)
    mask = torch.arange(5).expand(2, 5) < torch.tensor([[2], [4]])
    t = torch.tensor([[0.0, 0.5, 0.5], [0.0, 0.9, 0.9]])
    reuse = FeatureReuse(0.05)
    dit(x, t, context, mask, reuse=reuse)
    t[0, 1:] = 0.1
    expected = dit(x, t, context, mask)
    runs.clear()
    torch.testing.assert_close(
        dit(x, t, context, mask, reuse=reuse), expected, atol=1e-5, rtol=1e-5
    )
    assert runs == [1]


@torch.no_grad()
def test_a_network_that_adds_nothing_is_never_left_out():
    """0 / 0 is not below the threshold."""
    x = torch.ones(1, 4, 8)
    reuse = FeatureReuse(0.5)
    for _ in range(2):
        reuse(x, x, lambda rows: x)
    assert reuse.num_skipped == 0


@pytest.mark.parametrize("threshold", [-0.1, math.nan, math.inf])
def test_thresholds_that_are_none(threshold):
    with pytest.raises(ValueError, match=f"reuse threshold={threshold}; use a finite number"):
        FeatureReuse(threshold)


@torch.no_grad()
def test_another_size_needs_a_new_one(dit):
    reuse, context = FeatureReuse(0.1), torch.randn(1, 5, 12)
    dit(torch.randn(1, 4, 1, 4, 4), torch.rand(1), context, reuse=reuse)
    with pytest.raises(ValueError, match=r"begun with tokens \(4, 48\) and is now given \(8, 48\)"):
        dit(torch.randn(1, 4, 2, 4, 4), torch.rand(1), context, reuse=reuse)
