"""The search of decode_benchmark.py: which tiling is best for a layout of the state and its key channels.

First tiles, told to the caches as one or not at all, with launches that overlap and that do not; then, with the best
tiles, everything that the caches can be told. All candidates take turns, and those that come out first take turns with
fla's kernel again, for many rounds. A candidate that does not compile, or is wrong, is named and left out.

Shapes: B sequences, K key channels, V value channels.
"""

import itertools
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
from decode_cases import Case, V, call_fla, check_one, draw
from decode_timing import median, moved_bytes, rotating, say, speedup, time_in_turns
from fla_decode.step import MAX_NUMBERS, Tiling, choose_tiling, decode_step, split_channels

# Not evict_last: an old state that stays in the cache is in the way of what a model does next.
READS = ("", "evict_first", ".cg")
WRITES = ("", "evict_first")
KEPT = 3  # tilings that go on from the first part
FINALISTS = 5
ROUNDS, FINAL_ROUNDS = 6, 40


def workers() -> ProcessPoolExecutor:
    """Return processes that compile and check; what they compile is in Triton's cache on disk for all."""
    count = max(1, min(24, (os.cpu_count() or 2) - 4))
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


def step_of(sets: Sequence[dict], tiling: Tiling, index: int, **options: bool) -> object:
    return decode_step(**sets[index], tiling=tiling, **options)


def fla_of(case: Case, sets: Sequence[dict], index: int) -> object:
    return call_fla(case, sets[index])


def behind(call, sets: Sequence[dict], index: int) -> object:
    """The call where it waits for another kernel, as it does in a model."""
    sets[index]["query_B1HK"].mul_(1)
    return call(index)


def tiles(K: int) -> Iterator[Tiling]:
    """Yield tilings that leave each thread 8 to `MAX_NUMBERS` numbers."""
    for block_v, warps in itertools.product((8, 16, 32, 64, 128), (1, 2, 4, 8)):
        if 8 <= sum(split_channels(K)) * block_v / (32 * warps) <= MAX_NUMBERS:
            for hint, overlaps in itertools.product(("evict_first", ""), (True, False)):
                yield Tiling(block_v, warps, hint, hint, overlaps)


def right_ones(found: Mapping[tuple[Case, int], Sequence[Tiling]], pool: ProcessPoolExecutor) -> dict:
    """Return the candidates of each case and K that compile and are right."""
    works = [(case, K, tiling) for (case, K), tilings in found.items() for tiling in tilings]
    say(f"compiling and checking {len(works)} kernels")
    right = {key: [] for key in found}
    for (case, K, tiling), error in zip(works, pool.map(partial(check_one, B=3), works, chunksize=2), strict=True):
        if error:
            say(f"left out: {case.name}, K={K}, {tuple(tiling)}: {error}")
        else:
            right[case, K].append(tiling)
    return right


def time_tilings(case: Case, K: int, tilings: Sequence[Tiling], batches: Sequence[int]) -> dict[Tiling, float]:
    """Return for each tiling how much longer than the best one it takes, at the batch size where that is most."""
    worst = dict.fromkeys(tilings, 1.0)
    for B in batches:
        sets = rotating(case, B, K)
        calls = {tiling: partial(step_of, sets, tiling) for tiling in tilings}
        times = time_in_turns(calls, len(sets), rounds=ROUNDS)
        us = {tiling: median(values) for tiling, values in times.items()}
        best = min(us.values())
        worst = {tiling: max(worst[tiling], us[tiling] / best) for tiling in tilings}
        for tiling in sorted(us, key=us.get)[:6]:
            say(f"K={K} v_first={case.state_v_first} B={B} {us[tiling]:.2f} us {tuple(tiling)}")
    return dict(sorted(worst.items(), key=lambda item: item[1]))


def finals(case: Case, K: int, tilings: Sequence[Tiling], batches: Sequence[int], ceiling: float) -> list[dict]:
    """Time the best against fla's and against what is in use, also in place, and behind another kernel."""
    rows = []
    for B in batches:
        sets = rotating(case, B, K)
        used = choose_tiling(K, V, heads=sets[0]["state"][..., 0, 0].numel(), state_v_first=case.state_v_first)
        first, fla = partial(step_of, sets, tilings[0]), partial(fla_of, case, sets)
        calls = {tuple(tiling): partial(step_of, sets, tiling) for tiling in dict.fromkeys((*tilings, used))}
        calls |= {"fla": fla, "copy": lambda index, sets=sets: sets[index]["state"].clone()}
        calls |= {"in place": partial(first, inplace=True)}
        calls |= {"behind a kernel": partial(behind, first, sets), "behind a kernel: fla": partial(behind, fla, sets)}
        times = time_in_turns(calls, len(sets), rounds=FINAL_ROUNDS)
        floor = moved_bytes(case, B, K) / ceiling * 1e6
        for name, values in times.items():
            theirs = times["behind a kernel: fla" if "behind" in name else "fla"]
            us, faster = median(values), speedup(values, theirs)
            rows.append(dict(case=case.name, K=K, B=B, name=name, us=us, share=floor / us, speedup=faster))
            interval = f"x{faster[0]:.4f} ({faster[1]:.4f}-{faster[2]:.4f})"
            mark = "in use" if name == tuple(used) else ""
            say(f"K={K} B={B:3} {us:7.2f} us {floor / us:.1%}  {interval} {name} {mark}")
        del sets, calls, first, fla
        torch.cuda.empty_cache()
    return rows


def search(
    keys: Sequence[tuple[Case, int]], batches: Sequence[int], pool: ProcessPoolExecutor, ceiling: float
) -> tuple[dict[tuple[bool, int], Tiling], list[dict]]:
    """Return the best tiling by layout and K, and the rows of the finals."""
    found = right_ones({(case, K): list(tiles(K)) for case, K in keys}, pool)
    worst = {key: time_tilings(*key, tilings, batches) for key, tilings in found.items()}
    hinted = {}
    for key, tilings in worst.items():
        # Of a tile that comes with several hints, only the best: the rest of them is tried now.
        places = list(dict.fromkeys((tiling.block_v, tiling.warps, tiling.overlaps) for tiling in tilings))[:KEPT]
        hinted[key] = [
            Tiling(block_v, warps, reads, writes, overlaps)
            for block_v, warps, overlaps in places
            for reads, writes in itertools.product(READS, WRITES)
        ]
    best, rows = {}, []
    for (case, K), tilings in right_ones(hinted, pool).items():
        ranked = list(time_tilings(case, K, tilings, batches))
        best[case.state_v_first, K] = ranked[0]
        rows += finals(case, K, ranked[:FINALISTS], batches, ceiling)
    return best, rows
