"""What the device can do at best, measured: a large copy and a large matrix product. Figures are shares of these."""

from typing import NamedTuple

import torch

from keyreduce.benchmarking.timing import interleave


class Ceilings(NamedTuple):
    """Bytes a second read and written by a copy, and floating-point operations a second of a matrix product."""

    bytes_per_second: float
    flops_per_second: float


@torch.inference_mode()
def measure_ceilings(device: torch.device, dtype: torch.dtype, *, rounds: int = 5) -> Ceilings:
    """Time a copy that no cache holds, and a square matrix product in ``dtype``, and take the median of each.

    A copy of n bytes moves 2n: it reads them and writes them.
    """
    on_gpu = device.type == "cuda"
    size, side = (1 << 30, 8192) if on_gpu else (128 << 20, 1024)
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    contenders = {"copy": lambda: target.copy_(source), "product": lambda: left @ right}
    timings = interleave(contenders, device, rounds=rounds, warmup=5)
    return Ceilings(2 * size / timings["copy"].median, 2 * side**3 / timings["product"].median)
