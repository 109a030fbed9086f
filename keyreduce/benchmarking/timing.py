"""One harness for every benchmark: contenders take turns, so that whatever slows the machine slows all of them."""

import ctypes
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from scipy.stats import binom

_STEADY_CALLS = 3
_STEADY_WITHIN = 0.05
_CONFIDENCE = 0.95
_MEMORY_CALLS = 3

_Mark = float | torch.cuda.Event


@dataclass(frozen=True)
class Timing:
    """The seconds of each round of one contender."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median round, in seconds."""
        return statistics.median(self.seconds)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the median, in seconds, by order statistics.

        Nothing is assumed of how the times are distributed: a round is as likely to fall below the true median as
        above it, so the binomial distribution says between which rounds, in order of time, the median lies. Fewer
        than 6 rounds cannot give 95%; the interval is then all of their range.
        """
        return _median_interval(self.seconds)


def ratio(a: Timing, b: Timing) -> tuple[float, tuple[float, float]]:
    """Return the median of ``a / b``, round by round, and its 95% interval (see `Timing.interval`).

    What slows one round of ``a`` mostly slows the round of ``b`` beside it too, so this is steadier than the ratio of
    the medians. Both must have the same number of rounds, from one `interleave`.
    """
    ratios = [ours / theirs for ours, theirs in zip(a.seconds, b.seconds, strict=True)]
    return statistics.median(ratios), _median_interval(ratios)


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    warmup: int = 20,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Timing]:
    """Time functions in turns: A B A B ...

    Each is first called untimed until its time has stopped falling: until the fastest call has not become 5% faster in
    3 calls. On CUDA the time is that of the device, between events, and nothing waits for it before the last round.

    Args:
        contenders: name -> function.
        device: where the functions compute.
        rounds: timed calls of each function, at least 1.
        warmup: untimed calls of each function, at most.
        progress: called with 1 after each round; on CUDA when the round is queued.

    Returns:
        Name -> times, in the order given.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; there is at least one")
    for function in contenders.values():
        _warm_up(function, device, warmup)
    marks = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, function in contenders.items():
            marks[name].append(_marks_around(function, device))
        if progress is not None:
            progress(1)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {name: Timing(tuple(_seconds(*pair) for pair in pairs)) for name, pairs in marks.items()}


def peak_memory(function: Callable[[], object], device: torch.device) -> int | None:
    """Call a function and return the most memory it held, in bytes above what was held before.

    On CUDA that is counted by PyTorch's allocator. On a CPU it is the resident memory of the process, the smallest
    figure of 3 calls: what the C library's allocator leaves in fragments counts too, which for tensors of a few MB is
    as much as the tensors themselves. None where it cannot be measured; on a CPU it takes Linux.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not _reset_resident_peak():
        return None
    peaks = []
    for _ in range(_MEMORY_CALLS):
        _reset_resident_peak()
        before = _resident_peak()
        function()
        peaks.append(_resident_peak() - before)
    return min(peaks)


def _warm_up(function: Callable[[], object], device: torch.device, at_most: int) -> None:
    fastest, steady = float("inf"), 0
    for _ in range(at_most):
        pair = _marks_around(function, device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = _seconds(*pair)
        steady = 0 if seconds < fastest * (1 - _STEADY_WITHIN) else steady + 1
        fastest = min(fastest, seconds)
        if steady == _STEADY_CALLS:
            return


def _marks_around(function: Callable[[], object], device: torch.device) -> tuple[_Mark, _Mark]:
    start = _mark(device)
    function()
    return start, _mark(device)


def _mark(device: torch.device) -> _Mark:
    if device.type != "cuda":
        return perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds(start: _Mark, end: _Mark) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


def _median_interval(values: Sequence[float]) -> tuple[float, float]:
    ordered = sorted(values)
    place = max(int(binom.ppf((1 - _CONFIDENCE) / 2, len(ordered), 0.5)) - 1, 0)
    return ordered[place], ordered[-1 - place]


def _reset_resident_peak() -> bool:
    """Set the process's peak of resident memory to what is resident now; return whether that can be done."""
    if sys.platform != "linux":
        return False
    # Freed memory that glibc keeps would be used again without a rise. Other C libraries keep little.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): 5 resets the peak
    except OSError:
        return False
    return True


def _resident_peak() -> int:
    """Return the process's peak of resident memory, in bytes."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
