"""The metrics of one timing as JSON, the same for every kind of measurement.

An entry has ``label``, ``head_k_dim``, ``batch_size``, ``seq_len``, and:
``tokens_per_second``, at the median latency; ``latency_seconds``, the median and its 95% interval;
``warmup_seconds``, the time of the calls before, in which kernels are tuned; ``peak_memory_bytes`` and
``peak_reserved_bytes``, beyond weights and input; ``gigabytes_per_second`` and ``teraflops``, by the formulas of
:mod:`keyreduce.benchmarking.work`, and ``bandwidth_share`` and ``compute_share``, their shares of the roofline. Each
model after the first also has ``speedup``, the first one's time divided by its own, round by round, and
``memory_ratio``, the first one's peak memory divided by its own.
"""

from collections.abc import Sequence

from keyreduce.benchmarking.roofline import Roofline
from keyreduce.benchmarking.timing import PeakMemory, RoundTimes, ratio
from keyreduce.benchmarking.work import Work


def summary(median: float, interval: tuple[float, float]) -> dict[str, float]:
    """Return a median and its interval as JSON."""
    low, high = interval
    return {"median": median, "low": low, "high": high}


def metrics(
    timing: RoundTimes, work: Work, roofline: Roofline, *, tokens: int, memory: PeakMemory | None = None
) -> dict:
    """Return the metrics of one timing.

    Args:
        timing: the latencies of the call.
        work: its operations and bytes.
        roofline: the peak performance of the device.
        tokens: how many tokens the call processes.
        memory: its peak memory, where that was measured.
    """
    bytes_per_second, flops_per_second = work.bytes / timing.median, work.flops / timing.median
    entry = {
        "tokens_per_second": tokens / timing.median,
        "latency_seconds": summary(timing.median, timing.interval),
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
        entry["speedup"] = summary(*ratio(timings[0], timing))
        if entry.get("peak_memory_bytes"):
            entry["memory_ratio"] = entries[0]["peak_memory_bytes"] / entry["peak_memory_bytes"]
