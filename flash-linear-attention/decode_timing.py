"""How decode_benchmark.py times decoding steps, and how many bytes they move.

Each call is a node of a CUDA graph, and has its own state to read and its own to write, together many times what the
L2 cache holds. What is compared takes turns, round after round.

Shapes: B sequences, H key heads, W value heads, K key channels, V value channels.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from decode_cases import Case, H, V, draw

from keyreduce.benchmarking.timing import RoundTimes, ratio

START = time.perf_counter()
FASTEST = 3e12  # bytes a second, about; says how many steps that is


def say(*words: object) -> None:
    print(f"{time.perf_counter() - START:6.1f} s ", *words, flush=True)


def moved_bytes(case: Case, B: int, K: int) -> int:
    """Return the least that a step moves: the state read and written, and all else once."""
    gate = (2 if case.is_raw else 4) * case.is_gated
    return B * H * (2 * 4 * K * V + 2 * (2 * K + 2 * V) + 2 + gate)


def rotating(case: Case, B: int, K: int) -> list[dict]:
    """Return inputs of `decode_step` that differ in their state, for steps of about 2 ms: enough for a graph.

    At 64 sequences and more the states are 3 GB, sixty times the cache of an H100. A model comes back to a state when
    it has gone through all its layers; if few states took turns, a policy that holds on to some of them would win here.
    """
    inputs = draw(case, B, K)
    count = math.ceil(2e-3 * FASTEST / max(moved_bytes(case, B, K), 5e-6 * FASTEST))
    return [inputs | {"state": torch.randn_like(inputs["state"])} for _ in range(count)]


def record(call: Callable[[int], object], count: int, pool: object) -> torch.cuda.CUDAGraph:
    """Record ``call(0)`` to ``call(count - 1)`` as a CUDA graph."""
    for index in (0, 0, count - 1):
        call(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        # All results stay alive meanwhile: each call writes to memory of its own. Other graphs write there too.
        kept = [call(index) for index in range(count)]
    del kept
    return graph


def time_in_turns(calls: Mapping[str, Callable[[int], object]], count: int, *, rounds: int) -> dict[str, list[float]]:
    """Return the microseconds of one call of each in each round; ``count`` of them are a graph."""
    pool = torch.cuda.graph_pool_handle()
    graphs = {name: record(call, count, pool) for name, call in calls.items()}
    marks = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            graph.replay()  # so that what it finds in the cache is its own
            start.record()
            graph.replay()
            graph.replay()
            end.record()
            if turn:
                marks[name].append((start, end))
        torch.cuda.synchronize()
    del graphs
    torch.cuda.empty_cache()
    return {
        name: [1e3 * start.elapsed_time(end) / (2 * count) for start, end in pairs] for name, pairs in marks.items()
    }


def median(times: Sequence[float]) -> float:
    return statistics.median(times)


def speedup(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Return their time over ours, round by round: the median, and its 95% interval."""
    value, (low, high) = ratio(RoundTimes(tuple(theirs)), RoundTimes(tuple(ours)))
    return value, low, high


def copy_speed() -> float:
    """Return the bytes a second, read and written, of a copy: the best of 1 GiB and 256 MiB, once the clocks are up."""
    source, target = (torch.randn(1 << 28, device="cuda") for _ in range(2))
    start = time.perf_counter()
    while time.perf_counter() - start < 1:
        target.copy_(source)
        torch.cuda.synchronize()
    speeds = []
    for size in (1 << 28, 1 << 26):
        pairs = list(zip(target.split(size), source.split(size), strict=True))
        call = {"copy": lambda index, pairs=pairs: pairs[index % len(pairs)][0].copy_(pairs[index % len(pairs)][1])}
        speeds.append(2 * 4e6 * size / median(time_in_turns(call, 4, rounds=15)["copy"]))
    return max(speeds)
