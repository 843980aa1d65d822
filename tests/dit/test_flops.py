"""num_flops against torch's own count."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dit.transformer import DiT, DiTConfig

WIDE = dict(in_channels=16, context_dim=64, dim=192, num_blocks=3, num_heads=6, mlp_dim=768)
LONG = dict(in_channels=4, context_dim=512, dim=96, num_blocks=2, num_heads=4, mlp_dim=160)


@pytest.mark.parametrize("sizes", [WIDE, LONG])
@pytest.mark.parametrize(("f", "h", "w", "m"), [(1, 4, 4, 77), (3, 8, 8, 24), (5, 32, 24, 512)])
@pytest.mark.parametrize("per_frame", [False, True])
def test_forward_of_one_clip(sizes, f, h, w, m, per_frame):
    config = DiTConfig(**sizes)
    with torch.device("meta"):
        dit, x = DiT(config), torch.empty(1, config.in_channels, f, h, w)
        t, context = (
            torch.empty(1, f) if per_frame else torch.empty(1),
            torch.empty(1, m, config.context_dim),
        )
    with FlopCounterMode(display=False) as counter:
        dit(x, t, context)
    counted = counter.get_total_flops()
    computed = config.num_flops(f * h * w // 4, m, f if per_frame else 1)
    assert abs(computed / counted - 1) < 0.01


def test_a_training_step_takes_three_times_as_many():
    config = DiTConfig(**WIDE)
    with torch.device("meta"):
        dit, x = DiT(config), torch.empty(1, 16, 3, 16, 16)
        t, context = torch.empty(1), torch.empty(1, 77, 64)
    with FlopCounterMode(display=False) as counter:
        dit(x, t, context).sum().backward()
    assert abs(3 * config.num_flops(192, 77) / counter.get_total_flops() - 1) < 0.03


def test_kernels_of_the_cpu_do_the_same_work():
    config = DiTConfig(**WIDE)
    dit, x = DiT(config), torch.randn(1, 16, 3, 8, 8)
    for backend in ("plain", "sdpa"):
        dit.use_attention(backend)
        with FlopCounterMode(display=False) as counter:
            dit(x, torch.rand(1), torch.randn(1, 24, 64))
        assert abs(config.num_flops(48, 24) / counter.get_total_flops() - 1) < 0.01
