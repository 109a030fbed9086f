"""The peak performance of the device, measured with a large copy and a large matrix product."""

from typing import NamedTuple

import torch

from keyreduce.benchmarking.timing import interleave


class Roofline(NamedTuple):
    """Bytes per second that a copy reads and writes, and floating-point operations per second of a matrix product."""

    bytes_per_second: float
    flops_per_second: float


@torch.inference_mode()
def measure_roofline(device: torch.device, dtype: torch.dtype, *, rounds: int = 5) -> Roofline:
    """Return the median speed of a copy that is larger than any cache, and of a square matrix product in ``dtype``.

    A copy of n bytes moves 2n: it reads them and writes them.
    """
    on_gpu = device.type == "cuda"
    size, side = (1 << 30, 8192) if on_gpu else (128 << 20, 1024)
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    functions = {"copy": lambda: target.copy_(source), "product": lambda: left @ right}
    timings = interleave(functions, device, rounds=rounds, warmup=5)
    return Roofline(2 * size / timings["copy"].median, 2 * side**3 / timings["product"].median)
