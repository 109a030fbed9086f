"""One timing harness for every benchmark: functions take turns, so that disturbances slow all of them alike."""

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


@dataclass(frozen=True)
class RoundTimes:
    """The latency of each round, and of all calls before them together, in which kernels are compiled and tuned."""

    seconds: tuple[float, ...]
    warmup_seconds: float = field(default=0.0, compare=False)

    @property
    def median(self) -> float:
        """The median round, in seconds."""
        return statistics.median(self.seconds)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the median, in seconds, by order statistics.

        Nothing is assumed about the distribution of the times: a round is as likely to fall below the true median as
        above it, so the binomial distribution gives the two rounds, in order of time, between which the median lies.
        Fewer than 6 rounds cannot give 95%; the interval is then their whole range.
        """
        ordered = sorted(self.seconds)
        place = max(int(binom.ppf((1 - _CONFIDENCE) / 2, len(ordered), 0.5)) - 1, 0)
        return ordered[place], ordered[-1 - place]

    def divided(self, steps: int) -> "RoundTimes":
        """Return the times of one step, where each round ran ``steps`` of them."""
        return RoundTimes(tuple(seconds / steps for seconds in self.seconds), self.warmup_seconds)


class PeakMemory(NamedTuple):
    """The most bytes that a call held, beyond those before it: of tensors, and of blocks that the allocator took.

    ``reserved`` is None on a CPU, where it is not counted.
    """

    allocated: int
    reserved: int | None


def rotated(function: Callable[..., object], inputs: Sequence[object]) -> Callable[[], object]:
    """Return a function without arguments that calls ``function`` with the next input each time, cyclically."""
    turns = itertools.cycle(inputs)
    return lambda: function(next(turns))


def copies_past_cache(size: float, device: torch.device, at_most: int = 64) -> int:
    """Return the number of inputs of ``size`` bytes at which none is in the device's cache when its turn comes.

    Together they are twice as large as the L2 cache of a GPU, or 64 MiB on a CPU.
    """
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else _CPU_CACHE
    return max(1, min(at_most, math.ceil(2 * cache / max(size, 1))))


def ratio(a: RoundTimes, b: RoundTimes) -> tuple[float, tuple[float, float]]:
    """Return the median of ``a / b``, round by round, and its 95% interval (see `RoundTimes.interval`).

    Disturbances usually hit a round of ``a`` and the round of ``b`` beside it alike, so this varies less than the
    ratio of the medians. Both must have the same number of rounds, from one :func:`interleave`.
    """
    ratios = RoundTimes(tuple(ours / theirs for ours, theirs in zip(a.seconds, b.seconds, strict=True)))
    return ratios.median, ratios.interval


def interleave(
    functions: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    warmup: int = 20,
    progress: Callable[[int], None] | None = None,
) -> dict[str, RoundTimes]:
    """Time functions in turns: A B A B ...

    Each is first warmed up: it is called until 3 calls in a row are not 5% faster than the fastest before. On CUDA the
    device's time between events is taken, and the host waits for the device only after the last round.

    Args:
        functions: name -> function, which runs on ``device``.
        rounds: timed calls of each function, at least 1.
        warmup: the most calls of each function to warm it up.
        progress: called with 1 after each round; on CUDA once the round is queued.
    """
    warmup_seconds = {name: _warm_up(function, device, warmup) for name, function in functions.items()}
    clocks: dict[str, list[Callable[[], float]]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            clocks[name].append(_timed(function, device))
        if progress is not None:
            progress(1)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {name: RoundTimes(tuple(clock() for clock in clocks[name]), warmup_seconds[name]) for name in functions}


def peak_memory(function: Callable[[], object], device: torch.device) -> PeakMemory:
    """Call a function once and return its peak memory, beyond what was held before.

    On CUDA it is read from the statistics of PyTorch's allocator. On a CPU the tensors that operators return are
    counted while they live: that is exact and repeatable, while the resident memory of the process depends on how its
    heap is fragmented. It does not include what an operator allocates and frees within one call.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()  # otherwise the reserve of earlier calls would serve this one
        allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        allocated = torch.cuda.max_memory_allocated(device) - allocated
        # A part fits into gaps of blocks that are held already, and needs no block of its own.
        return PeakMemory(allocated, max(allocated, torch.cuda.max_memory_reserved(device) - reserved))
    with _LiveTensors() as live:
        function()
    return PeakMemory(live.peak, None)


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of the storages that operators make while it is active, and that are not yet freed."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # An input that no operator made was there before, so a view of it is not new memory.
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


def _warm_up(function: Callable[[], object], device: torch.device, at_most: int) -> float:
    """Return how many seconds it took."""
    start, fastest, steady = perf_counter(), float("inf"), 0
    for _ in range(at_most):
        clock = _timed(function, device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = clock()
        steady = 0 if seconds < fastest * (1 - _STEADY_WITHIN) else steady + 1
        fastest = min(fastest, seconds)
        if steady == _STEADY_CALLS:
            break
    return perf_counter() - start


def _timed(function: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """Call a function, and return one that says how many seconds it took, on CUDA once the device has done it."""
    if device.type != "cuda":
        before = perf_counter()
        function()
        seconds = perf_counter() - before
        return lambda: seconds
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(torch.cuda.current_stream(device))
    function()
    end.record(torch.cuda.current_stream(device))
    return lambda: start.elapsed_time(end) / 1000
