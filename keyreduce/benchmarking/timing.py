"""One harness for every benchmark: contenders take turns, so that whatever slows the machine slows all of them."""

import itertools
import math
import statistics
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple

import torch
from scipy.stats import binom
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_STEADY_CALLS = 3
_STEADY_WITHIN = 0.05
_CONFIDENCE = 0.95
_CPU_CACHE = 32 << 20

_Mark = float | torch.cuda.Event


@dataclass(frozen=True)
class Timing:
    """The seconds of each round of one contender.

    Attributes:
        seconds: of each round.
        warmup_seconds: what the calls before them took; the autotuning and compiling of kernels is in there.
    """

    seconds: tuple[float, ...]
    warmup_seconds: float = field(default=0.0, compare=False)

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

    def divided(self, steps: int) -> "Timing":
        """Return the times of one step where each round held ``steps`` of them."""
        return Timing(tuple(seconds / steps for seconds in self.seconds), self.warmup_seconds)


class PeakMemory(NamedTuple):
    """Bytes that a call held at most, above what was held before it.

    Attributes:
        allocated: in tensors.
        reserved: what PyTorch's allocator took from the device for them; None on a CPU, where nobody counts it.
    """

    allocated: int
    reserved: int | None


def rotated(function: Callable[..., object], inputs: Sequence[object]) -> Callable[[], object]:
    """Return a function without arguments that gives ``function`` the next of the inputs at each call, in a circle."""
    turns = itertools.cycle(inputs)
    return lambda: function(next(turns))


def copies_past_cache(size: int, device: torch.device, at_most: int = 64) -> int:
    """Return how many inputs of ``size`` bytes to rotate, so that none is in the device's cache when its turn comes.

    Together they are twice the L2 of a GPU, or 64 MiB on a CPU.
    """
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else _CPU_CACHE
    return max(1, min(at_most, math.ceil(2 * cache / max(size, 1))))


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
    warmup_seconds = {}
    for name, function in contenders.items():
        start = perf_counter()
        _warm_up(function, device, warmup)
        warmup_seconds[name] = perf_counter() - start
    marks = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, function in contenders.items():
            marks[name].append(_marks_around(function, device))
        if progress is not None:
            progress(1)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {
        name: Timing(tuple(_seconds(*pair) for pair in pairs), warmup_seconds[name]) for name, pairs in marks.items()
    }


def peak_memory(function: Callable[[], object], device: torch.device) -> PeakMemory:
    """Call a function once and return the most memory it held, in bytes above what was held before.

    On CUDA by the statistics of PyTorch's allocator. On a CPU it is the tensors that operators returned and that were
    alive at once: exact and repeatable, where the resident memory of the process hangs on how its heap is split up.
    What an operator takes and gives back within one call is not seen there.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()  # else what earlier calls left in reserve would serve this one
        allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        allocated = torch.cuda.max_memory_allocated(device) - allocated
        # Gaps in blocks that are held already serve a part, and need no block of their own.
        return PeakMemory(allocated, max(allocated, torch.cuda.max_memory_reserved(device) - reserved))
    with _LiveTensors() as live:
        function()
    return PeakMemory(live.peak, None)


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of the storages that operators make while it is active, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # What an operator is given without one having made it was there before: a view of it is nothing new.
        for storage in _storages((args, kwargs)):
            self._add(storage, 0)
        outputs = func(*args, **(kwargs or {}))
        for storage in _storages(outputs):
            self._add(storage, storage.nbytes())
        return outputs

    def _add(self, storage: torch.UntypedStorage, size: int) -> None:
        address = storage._cdata
        if address not in self._known:
            self._known.add(address)
            weakref.finalize(storage, self._drop, address, size)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)

    def _drop(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.bytes -= size


def _storages(values: object) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


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
