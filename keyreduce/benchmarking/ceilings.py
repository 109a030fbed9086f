"""What the device can do at best, measured: large copies and a large matrix product. Figures are shares of these."""

from typing import NamedTuple

import torch

from keyreduce.benchmarking.timing import interleave

# On an H100 a copy of 1 GiB is slower than one of 256 MiB, which its cache does not hold either.
_GPU_COPIES, _GPU_SIDE = (1 << 28, 1 << 29, 1 << 30), 8192
_CPU_COPIES, _CPU_SIDE = (128 << 20,), 1024


class Ceilings(NamedTuple):
    """Bytes a second read and written by a copy, and floating-point operations a second of a matrix product."""

    bytes_per_second: float
    flops_per_second: float


@torch.inference_mode()
def measure_ceilings(device: torch.device, dtype: torch.dtype, *, rounds: int = 10) -> Ceilings:
    """Time copies that no cache holds, of which the fastest counts, and a square matrix product in ``dtype``.

    Each by the median of its rounds. A copy of n bytes moves 2n: it reads them and writes them.
    """
    sizes, side = (_GPU_COPIES, _GPU_SIDE) if device.type == "cuda" else (_CPU_COPIES, _CPU_SIDE)
    source, target = (torch.ones(max(sizes), dtype=torch.uint8, device=device) for _ in range(2))
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    contenders = {size: lambda size=size: target[:size].copy_(source[:size]) for size in sizes}
    timings = interleave(contenders | {"product": lambda: left @ right}, device, rounds=rounds, warmup=5)
    copied = max(2 * size / timings[size].median for size in sizes)
    return Ceilings(copied, 2 * side**3 / timings["product"].median)
