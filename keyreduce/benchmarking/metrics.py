"""The metrics of one timing as JSON, the same for every kind of measurement, and the roofline they are measured by.

An entry has ``label``, ``head_k_dim``, ``head_v_dim``, ``batch_size``, ``seq_len``, and:
``tokens_per_second``, at the median latency; ``latency_seconds``, the median and its 95% interval;
``warmup_seconds``, the time of the calls before, in which kernels are tuned; ``peak_memory_bytes`` and
``peak_reserved_bytes``, beyond weights and input; ``gigabytes_per_second`` and ``teraflops``, by the formulas of
:mod:`keyreduce.benchmarking.work`, and ``bandwidth_share`` and ``compute_share``, their shares of the roofline. Each
model after the first also has ``speedup``, the first one's time divided by its own, round by round, and
``memory_ratio``, the first one's peak memory divided by its own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from keyreduce.benchmarking.timing import PeakMemory, RoundTimes, interleave, ratio
from keyreduce.benchmarking.work import Work


class Roofline(NamedTuple):
    """Bytes per second that a copy reads and writes, and floating-point operations per second of a matrix product."""

    bytes_per_second: float
    flops_per_second: float


@torch.inference_mode()
def measure_roofline(device: torch.device, dtype: torch.dtype, *, rounds: int = 5) -> Roofline:
    """Return the median speed of a copy that is larger than any cache, and of a square matrix product in ``dtype``.

    A copy of n bytes moves 2n: it reads them and writes them.
    """
    size, side = (1 << 30, 8192) if device.type == "cuda" else (128 << 20, 1024)
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    functions = {"copy": lambda: target.copy_(source), "product": lambda: left @ right}
    timings = interleave(functions, device, rounds=rounds, warmup=5)
    return Roofline(2 * size / timings["copy"].median, 2 * side**3 / timings["product"].median)


def metrics(
    timing: RoundTimes, work: Work, roofline: Roofline, *, tokens: int, memory: PeakMemory | None = None
) -> dict:
    """Return the metrics of a call that processes so many tokens, with its peak memory where that was measured."""
    bytes_per_second, flops_per_second = work.bytes / timing.median, work.flops / timing.median
    entry = {
        "tokens_per_second": tokens / timing.median,
        "latency_seconds": _summary(timing.median, timing.interval),
        "warmup_seconds": timing.warmup_seconds,
        "gigabytes_per_second": bytes_per_second / 1e9,
        "bandwidth_share": bytes_per_second / roofline.bytes_per_second,
        "teraflops": flops_per_second / 1e12,
        "compute_share": flops_per_second / roofline.flops_per_second,
    }
    if memory is not None:
        entry |= {"peak_memory_bytes": memory.allocated, "peak_reserved_bytes": memory.reserved}
    return entry


def compare(entries: Sequence[dict], timings: Sequence[RoundTimes]) -> None:
    """Add to each entry but the first its ratios to the first; ``timings`` are in the order of the entries."""
    for entry, timing in zip(entries[1:], timings[1:], strict=True):
        entry["speedup"] = _summary(*ratio(timings[0], timing))
        if entry.get("peak_memory_bytes"):
            entry["memory_ratio"] = entries[0]["peak_memory_bytes"] / entry["peak_memory_bytes"]


def _summary(median: float, interval: tuple[float, float]) -> dict[str, float]:
    return {"median": median, "low": interval[0], "high": interval[1]}
