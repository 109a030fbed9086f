"""Timings and memory as JSON, the same for every kind of measurement.

An entry has ``label``, ``head_k_dim``, ``batch_size``, ``seq_len``, and:
``tokens_per_second``, of the median round; ``latency_seconds``, the median round and its 95% interval;
``warmup_seconds``, what the calls before took, the tuning of kernels included; ``peak_memory_bytes`` and
``peak_reserved_bytes``, above weights and input; ``gigabytes_per_second`` and ``teraflops``, of the bytes and
operations that the formulas of :mod:`keyreduce.benchmarking.work` count, and as shares of what the device can do
``bandwidth_share`` and ``compute_share``. For each model after the first also ``speedup``, the first one's time into
its time, round by round, and ``memory_ratio``: 2 means half of it.
"""

from collections.abc import Sequence

from keyreduce.benchmarking.ceilings import Ceilings
from keyreduce.benchmarking.timing import PeakMemory, Timing, ratio
from keyreduce.benchmarking.work import Work


def summary(median: float, interval: tuple[float, float]) -> dict[str, float]:
    """Return a median and its interval as JSON."""
    low, high = interval
    return {"median": median, "low": low, "high": high}


def figures(timing: Timing, work: Work, ceilings: Ceilings, *, tokens: int, memory: PeakMemory | None = None) -> dict:
    """Return what one timing says.

    Args:
        timing: of the call.
        work: of the call.
        ceilings: of the device.
        tokens: that the call takes.
        memory: that it holds at most, where that was measured.
    """
    bytes_per_second, flops_per_second = work.bytes / timing.median, work.flops / timing.median
    entry = {
        "tokens_per_second": tokens / timing.median,
        "latency_seconds": summary(timing.median, timing.interval),
        "warmup_seconds": timing.warmup_seconds,
        "gigabytes_per_second": bytes_per_second / 1e9,
        "bandwidth_share": bytes_per_second / ceilings.bytes_per_second,
        "teraflops": flops_per_second / 1e12,
        "compute_share": flops_per_second / ceilings.flops_per_second,
    }
    if memory is not None:
        entry |= {"peak_memory_bytes": memory.allocated, "peak_reserved_bytes": memory.reserved}
    return entry


def compare(entries: Sequence[dict], timings: Sequence[Timing]) -> None:
    """Add to each entry but the first what it gains over the first; timings are in the order of the entries."""
    for entry, timing in zip(entries[1:], timings[1:], strict=True):
        entry["speedup"] = summary(*ratio(timings[0], timing))
        if entry.get("peak_memory_bytes"):
            entry["memory_ratio"] = entries[0]["peak_memory_bytes"] / entry["peak_memory_bytes"]
