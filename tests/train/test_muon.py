"""Muon: the orthogonal factor, which parameters it takes, and its step."""

import copy

import pytest
import torch

from train.config import MuonConfig
from train.muon import orthogonalise
from train.optim import build_optimizer, step_optimizer
from train.recipe import TrainedGroup


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 32), (2, 32, 8)])
def test_orthogonalise_keeps_directions_and_levels_singular_values(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalise(matrices)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    values = (u.mT @ result @ vh.mT).diagonal(dim1=-2, dim2=-1)
    large = s > 0.1 * s.amax(-1, keepdim=True)
    assert values[large].min() > 0.6
    assert values[large].max() < 1.3
    assert orthogonalise(torch.zeros(1, 4, 4)).abs().max() == 0


def build(lr=1e-2, muon_lr=0.1, weight_decay=0.0):
    torch.manual_seed(0)
    net = torch.nn.ModuleDict(
        {
            "block": torch.nn.Linear(6, 6),
            "wide": torch.nn.Linear(6, 12),
            "head": torch.nn.Linear(6, 2),
        }
    )
    config = MuonConfig(lr=lr, muon_lr=muon_lr, weight_decay=weight_decay)
    optimizer = build_optimizer(
        [TrainedGroup("", dict(net.named_parameters()))], config, [net["block"], net["wide"]]
    )
    return net, optimizer


def test_block_matrices_take_muons_step_and_the_rest_adams():
    net, optimizer = build()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    moved = {name: p.detach() - before[name] for name, p in net.named_parameters()}
    for name, ratio in (("block.weight", 1.0), ("wide.weight", 2**0.5)):
        assert 0.1 * ratio * 0.5 < torch.linalg.matrix_norm(moved[name], 2) < 0.1 * ratio * 1.4
    for name in ("block.bias", "head.weight", "head.bias"):
        torch.testing.assert_close(moved[name].abs(), torch.full_like(moved[name], 1e-2))


def test_learning_rates_keep_their_ratio():
    _, optimizer = build()
    step_optimizer(optimizer, 5e-3, step=0)
    assert {round(group["lr"], 9) for group in optimizer.param_groups} == {5e-3, 5e-2}


def test_state_survives_a_round_trip():
    net, optimizer = build(weight_decay=0.1)
    other, restored = build(weight_decay=0.1)

    def step(net, optimizer, seed):
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        optimizer.step()

    step(net, optimizer, 1)
    other.load_state_dict(net.state_dict())
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in (2, 3):
        step(net, optimizer, seed)
        step(other, restored, seed)
    for a, b in zip(net.parameters(), other.parameters()):
        assert torch.equal(a, b)
