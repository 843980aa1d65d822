"""Attention among processes equals attention in one; and the commands that share work out."""

SCRIPT = """
import torch, torch.distributed as dist
from dit.attention import attention
from dit.transformer import DiT, DiTConfig
from sample.context import ContextGroup
from sample.processes import start, stop

ranks = start("cpu", 1, context=3)
group = ranks.mesh["context"].get_group()
config = DiTConfig(in_channels=4, context_dim=8, dim=36, num_blocks=2, num_heads=3, mlp_dim=40)

def network():
    torch.manual_seed(0)
    dit = DiT(config).double()
    for p in dit.parameters():  # a fresh DiT predicts zero
        p.data += 0.05 * torch.randn_like(p)
    return dit

cases = [
    ("auto", 3, (4, 6, 6), 1), ("auto", 3, (5, 6, 10), None),  # ulysses; as many levels as frames
    ("gather", 3, (4, 6, 6), 1), ("gather", 3, (7, 2, 2), None),
    ("auto", 3, (1, 2, 8), 1), ("auto", 2, (5, 2, 10), None),  # two heads do not divide
]
for method, heads, (f, h, w), levels in cases:
    config = config.model_copy(update={"num_heads": heads})
    whole, part = network(), network()
    spread = ContextGroup(group, method)
    spread.apply(part)
    torch.manual_seed(1)
    x = torch.randn(2, 4, f, h, w, dtype=torch.float64)
    t = torch.rand(2, dtype=torch.float64) if levels else torch.rand(2, f, dtype=torch.float64)
    context = torch.randn(2, 5, 8, dtype=torch.float64)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    expected, found = (net(x, t, context, mask) for net in (whole, part))
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    assert expected.std() > 0.01
    assert len(spread.lengths) == 3 and max(spread.lengths) < f * h * w / 4
    weight = torch.randn_like(expected)
    for out in (expected, found):
        (out * weight).sum().backward()
    for (name, p), q in zip(whole.named_parameters(), part.parameters()):
        grad = q.grad.clone()
        dist.all_reduce(grad, group=group)
        # Each process's loss is the whole one, so gradients come up three times.
        torch.testing.assert_close(grad / 3, p.grad, atol=1e-7, rtol=1e-6, msg=lambda m: f"{name}: {m}")
    with spread.paused(), torch.no_grad():
        torch.testing.assert_close(part(x, t, context, mask), expected, atol=1e-12, rtol=0)
try:
    ContextGroup(group, "ulysses").apply(network())
except ValueError as error:
    assert "2 heads do not divide among 3 processes" in str(error), error
else:
    raise AssertionError("two heads among three")

# Muon on shards is Muon on whole matrices; of four rows the last of three ranks has none.
from torch.distributed.tensor import Shard, distribute_tensor
from train.muon import MuonAdamW

def steps(spread):
    torch.manual_seed(2)
    weights = [torch.nn.Parameter(spread(torch.randn(n, 5))) for n in (4, 4, 8)]
    group = {"params": weights, "muon": True, "weight_decay": 0.1, "lr": 0.02}
    optimizer = MuonAdamW([group], momentum=0.9, lr=0.02)
    for _ in range(3):
        for weight in weights:
            weight.grad = spread(torch.randn(weight.shape))
        optimizer.step()
    return weights

mesh = ranks.mesh["context"]
spread = steps(lambda x: distribute_tensor(x, mesh, [Shard(0)]))
for whole, part in zip(steps(lambda x: x), spread):
    assert torch.equal(part.full_tensor(), whole)
if ranks.is_main:
    print("all equal")
stop()
"""


def test_three_processes_share_a_sequence(torchrun, tmp_path):
    """Outputs, gradients of all weights; heads and tokens that do not divide; noise levels by frame.
    And shares in matrices take Muon's step."""
    script = tmp_path / "share.py"
    script.write_text(SCRIPT)
    code, output = torchrun(script, processes=3)
    assert code == 0, output
    assert "all equal" in output
