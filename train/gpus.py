"""What GPUs can do: the rates that planned costs and the log's MFU refer to.

Rates are the vendors' own, for dense matrices: data sheets print twice as much, "with sparsity", which
training has no use for. From these:

- A100: nvidia.com, "NVIDIA A100 Tensor Core GPU" data sheet (June 2021), and "DGX A100" (8 x 200 Gb/s).
- H100, H100 NVL: nvidia.com, "NVIDIA H100 Tensor Core GPU" data sheet; "DGX H100/H200" (8 x 400 Gb/s).
- H200, H200 NVL: nvidia.com, "NVIDIA H200 Tensor Core GPU" data sheet.
- GH200, B200, GB200: nvidia.com, "GH200 Grace Hopper Superchip", "DGX B200" and "GB200 NVL72" data
  sheets, the last two divided by their 8 and 72 GPUs.
- A10G: aws.amazon.com, "NVIDIA A10G Tensor Core GPU" data sheet. L4, L40S, RTX A6000, RTX 6000 Ada:
  nvidia.com, the data sheets of those names.
- RTX 3090, 4090, 5090: NVIDIA's "Ampere GA102", "Ada" and "RTX Blackwell GPU architecture" white
  papers; BF16 tensor rates, which accumulate in FP32. Their links are PCIe's.

Networks of GPUs that no maker sells in boxes of their own (L4, L40S, A10G) are those of AWS's g6, g6e
and g5, eight to a machine; of gaming cards, 10 Gb/s each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

PRICE_DATE = "May 2026"  # of `GPU.price`


@dataclass(frozen=True)
class GPU:
    """One kind of GPU, and what is usually around it; rates per second."""

    device: str  # a pattern of torch.cuda.get_device_name(), less the maker
    bfloat16: float  # FLOPs, dense, in tensor cores
    float32: float  # FLOPs outside tensor cores, which is how torch multiplies float32 by default
    memory: float  # bytes, as torch reports them
    memory_rate: float  # bytes
    link: float  # bytes to other GPUs of the node, in one direction
    network: float  # bytes to other nodes, in one direction
    price: float  # US dollars an hour: about the middle of specialised clouds' lists on demand


def _gpu(
    device: str,
    tera_flops: tuple[float, float],
    gib: float,
    gb_per_s: tuple[float, float],
    network_gbps: float,
    price: float,
) -> GPU:
    """From the units that data sheets use."""
    (bfloat16, float32), (memory_rate, link) = tera_flops, gb_per_s
    network = network_gbps * 1e9 / 8
    return GPU(
        device,
        bfloat16 * 1e12,
        float32 * 1e12,
        gib * 2**30,
        memory_rate * 1e9,
        link * 1e9,
        network,
        price,
    )


# name: device name, (bf16, fp32) TFLOP/s, GiB, (memory, link) GB/s, network in Gb/s, $/hour
GPUS = {
    "a100-40": _gpu(r"A100-(SXM4|PCIE)-40GB", (312, 19.5), 39.4, (1555, 300), 200, 1.2),
    "a100": _gpu(r"A[18]00(-SXM4-80GB| 80GB PCIe)", (312, 19.5), 79.2, (2039, 300), 200, 1.5),
    "h100": _gpu(r"H[18]00( 80GB HBM3)?", (989, 67), 79.1, (3350, 450), 400, 3.0),
    "h100-pcie": _gpu(r"H100 PCIe", (756, 51), 79.1, (2000, 64), 200, 2.5),
    "h100-nvl": _gpu(r"H100 NVL", (835, 60), 93.1, (3900, 300), 200, 2.8),
    "h200": _gpu(r"H200", (989, 67), 139.8, (4800, 450), 400, 3.8),
    "h200-nvl": _gpu(r"H200 NVL", (835, 60), 139.8, (4800, 450), 200, 3.4),
    "gh200": _gpu(r"GH200 (120|480)GB", (989, 67), 94.5, (4000, 450), 400, 2.3),
    "b200": _gpu(r"B200", (2250, 75), 178.4, (8000, 900), 400, 6.0),
    "gb200": _gpu(r"GB200", (2500, 80), 184.0, (8000, 900), 400, 7.0),
    "l4": _gpu(r"L4", (121, 30.3), 22.0, (300, 32), 12.5, 0.8),
    "l40s": _gpu(r"L40S", (362, 91.6), 44.4, (864, 32), 50, 1.4),
    "a10g": _gpu(r"A10G", (70, 31.5), 22.0, (600, 32), 12.5, 1.0),
    "a6000": _gpu(r"RTX A6000", (154.8, 38.7), 47.4, (768, 56), 25, 0.6),
    "6000-ada": _gpu(r"RTX 6000 Ada Generation", (364.2, 91.1), 47.4, (960, 32), 25, 0.9),
    "3090": _gpu(r"GeForce RTX 3090", (71, 35.6), 23.6, (936, 32), 10, 0.4),
    "4090": _gpu(r"GeForce RTX 4090", (165.2, 82.6), 23.6, (1008, 32), 10, 0.6),
    "5090": _gpu(r"GeForce RTX 5090", (209.5, 104.8), 31.4, (1792, 64), 10, 0.9),
}
_ALIASES = {"a100-80": "a100", "h100-sxm": "h100", "h200-sxm": "h200", "rtx6000-ada": "6000-ada"}


def find_gpu(name: str) -> GPU:
    """The GPU called `name` in `GPUS`; capitals and a leading "rtx" do not matter.

    Raises:
        ValueError: there is none; lists them.
    """
    key = name.strip().lower().replace(" ", "-").replace("_", "-")
    key = _ALIASES.get(key, key)
    gpu = GPUS.get(key) or GPUS.get(re.sub(r"^rtx-?", "", key))
    if gpu is None:
        raise ValueError(f"--gpu={name} is not known; there are {', '.join(GPUS)}")
    return gpu


def peak_flops(device_name: str, dtype: str = "bfloat16") -> float | None:
    """Dense matrix FLOPs per second of a GPU by the name that torch.cuda.get_device_name() gives it.

    Args:
        dtype: bfloat16 or float32, of the products.
    Returns:
        None for a device whose rate is not known: another one, or a part of one (MIG).
    """
    name = re.sub(r"^(NVIDIA|Tesla) ", "", device_name.strip())
    for gpu in GPUS.values():
        if re.fullmatch(gpu.device, name):
            return gpu.bfloat16 if dtype == "bfloat16" else gpu.float32
    return None
