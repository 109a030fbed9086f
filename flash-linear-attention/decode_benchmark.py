"""Time the decode kernel on a GPU, against fla's recurrent kernels and against a copy of as many bytes.

    python flash-linear-attention/decode_benchmark.py --search --output decode.json

First it checks the kernel against a float64 step. With ``--search`` it tries tilings, and times the best of each
size; without, those of `choose_tiling`. Each call is a node of a CUDA graph, and has its own state to read and its own
to write: together several times what the L2 cache holds. What is compared takes turns, round after round. Bytes are
the state read and written, and query, key, value, beta, gate and output once; the ceiling is a large copy.

Shapes: B sequences, H key heads, W value heads, K key channels, V value channels.
"""

import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import fla_decode
import torch
import triton
from decode_cases import CASES, Case, H, V, call_fla, check, draw
from fla_decode.step import MAX_NUMBERS, Tiling, choose_tiling, decode_step, split_channels

START = time.perf_counter()
KEY_CHANNELS, BATCHES, SEARCH_BATCHES = (128, 96, 64, 32), (1, 8, 64, 128, 256), (64, 256, 8)
# One of each layout of the state: what is best for one of a layout is taken for the others.
SEARCHED = (CASES[0], CASES[3])


def say(*words: object) -> None:
    print(f"{time.perf_counter() - START:6.1f} s ", *words, flush=True)


def record(call: Callable[[int], object], count: int) -> Callable[[], None]:
    """Record ``call(0)`` to ``call(count - 1)`` as a CUDA graph, and return a function that plays it."""
    for index in (0, 0, count - 1):
        call(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # All results stay alive: each call writes to memory of its own.
        kept = [call(index) for index in range(count)]

    def play(kept=kept) -> None:
        graph.replay()

    return play


def time_in_turns(calls: dict, count: int, *, rounds: int) -> dict[str, float]:
    """Return the median microseconds of one call of each, ``count`` of them a graph."""
    plays = {name: record(call, count) for name, call in calls.items()}
    times = {name: [] for name in calls}
    for name in list(plays) + list(plays) * rounds:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        repeats = 2 if not times[name] else max(2, math.ceil(2000 / (times[name][0] * count)))
        plays[name]()
        start.record()
        for _ in range(repeats):
            plays[name]()
        end.record()
        end.synchronize()
        times[name].append(1e3 * start.elapsed_time(end) / (repeats * count))
    del plays
    torch.cuda.empty_cache()
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def sets_past_cache(B: int, K: int) -> int:
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(3, min(100, math.ceil(8 * cache / (2 * 4 * B * H * K * V))))


def moved_bytes(case: Case, B: int, K: int) -> int:
    gate = (2 if case.is_raw else 4) * case.is_gated
    return B * H * (2 * 4 * K * V + 2 * (2 * K + 2 * V) + 2 + gate)


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
        calls = {"copy": lambda index, pairs=pairs: pairs[index][0].copy_(pairs[index][1])}
        us = time_in_turns(calls, len(pairs), rounds=15)
        speeds.append(2 * 4e6 * size / us["copy"])
    return max(speeds)


def rotating(case: Case, B: int, K: int) -> list[dict]:
    inputs = draw(case, B, K)
    return [inputs | {"state": torch.randn_like(inputs["state"])} for _ in range(sets_past_cache(B, K))]


def step_set(sets: Sequence[dict], tiling: Tiling | None, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    return decode_step(**sets[index], tiling=tiling)


def candidates(K: int) -> list[Tiling]:
    """Return the tilings to try: those that leave each thread 8 to `MAX_NUMBERS` numbers."""
    found = []
    for block_v, warps, streams in itertools.product((8, 16, 32, 64, 128), (1, 2, 4, 8), (True, False)):
        if 8 <= sum(split_channels(K)) * block_v / (32 * warps) <= MAX_NUMBERS:
            found.append(Tiling(block_v, warps, streams))
    return found


def compile_one(work: tuple[Case, int, Tiling]) -> None:
    case, K, tiling = work
    with contextlib.suppress(Exception):  # what does not compile is named where it is timed
        decode_step(**draw(case, 1, K), tiling=tiling)


def compile_all(works: Sequence[tuple[Case, int, Tiling]]) -> None:
    """Compile in several processes, which leave the kernels in Triton's cache on disk. The GPU is shared meanwhile."""
    workers = max(1, min(12, (os.cpu_count() or 2) - 2))
    try:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            list(pool.map(compile_one, works, chunksize=4))
    except Exception as error:  # then each is compiled where it is timed
        say(f"could not compile in parallel: {error}")


def search(ceiling: float, seconds: float) -> list[dict]:
    """Time candidates for each layout, K and batch size until the time is up; return a row for each."""
    works = [(case, K, tiling) for case in SEARCHED for K in KEY_CHANNELS for tiling in candidates(K)]
    say(f"compiling {len(works)} kernels")
    compile_all(works)
    rows = []
    for B, K, case in itertools.product(SEARCH_BATCHES, KEY_CHANNELS, SEARCHED):
        sets = rotating(case, B, K)
        for tiling in candidates(K):
            if time.perf_counter() - START > seconds:
                say("time is up: the rest is not searched")
                return rows
            try:
                call = partial(step_set, sets, tiling)
                us = time_in_turns({"ours": call}, len(sets), rounds=3)["ours"]
            except Exception as error:  # too much shared memory, say
                say(f"K={K} {tiling}: {error}")
                continue
            share = moved_bytes(case, B, K) / (us * 1e-6 * ceiling)
            rows.append(dict(state_v_first=case.state_v_first, K=K, B=B, tiling=tiling, us=us, share=share))
        best = sorted((row for row in rows if (row["K"], row["B"]) == (K, B)), key=lambda row: -row["share"])
        best = [row for row in best if row["state_v_first"] == case.state_v_first][:3]
        for row in best:
            say(
                f"B={B} K={K} v_first={case.state_v_first} {row['us']:.1f} us {row['share']:.3f} {tuple(row['tiling'])}"
            )
        del sets
        torch.cuda.empty_cache()
    return rows


def best_tilings(rows: Sequence[dict]) -> dict[tuple[bool, int], Tiling]:
    """Return by layout and K the tiling whose worst share over the batch sizes of 64 and more is largest."""
    shares = {}
    for row in rows:
        if row["B"] >= 64:
            shares.setdefault((row["state_v_first"], row["K"]), {}).setdefault(row["tiling"], []).append(row["share"])
    return {
        key: max(found, key=lambda tiling: (len(found[tiling]), min(found[tiling]))) for key, found in shares.items()
    }


def compare(tilings: dict[tuple[bool, int], Tiling], ceiling: float, rounds: int) -> list[dict]:
    """Time ours, fla's and a copy of the state in turns, for each case, K and batch size; return a row for each."""
    rows = []
    for B, K, case in itertools.product(sorted(BATCHES, key=lambda B: B < 64), KEY_CHANNELS, CASES):
        tiling = tilings.get((case.state_v_first, K)) if B >= 64 else None
        tiling = tiling or choose_tiling(K, V, heads=B * H, state_v_first=case.state_v_first)
        sets = rotating(case, B, K)
        calls = {
            "ours": partial(step_set, sets, tiling),
            "fla": lambda index, sets=sets, case=case: call_fla(case, sets[index]),
            "copy": lambda index, sets=sets: sets[index]["state"].clone(),
        }
        us = time_in_turns(calls, len(sets), rounds=rounds)
        floor = moved_bytes(case, B, K) / ceiling * 1e6
        row = dict(case=case.name, K=K, B=B, tiling=tiling, us=us["ours"], fla_us=us["fla"], copy_us=us["copy"])
        row |= dict(
            share=floor / us["ours"], fla_share=floor / us["fla"], share_of_same_size_copy=us["copy"] / us["ours"]
        )
        row["speedup"] = us["fla"] / us["ours"]
        rows.append(row)
        say(
            f"{case.name:40} B={B:3} K={K:3} ours {us['ours']:7.1f} us {row['share']:6.1%}  fla {us['fla']:7.1f} us "
            f"{row['fla_share']:6.1%}  x{row['speedup']:.2f}  copy {us['copy']:7.1f} us  {tuple(tiling)}"
        )
        del sets, calls
        torch.cuda.empty_cache()
    return rows


def time_from_python(K: int = 64, calls: int = 500) -> list[dict]:
    """Return the microseconds of a call of fla's function at one sequence, ours on and off, Python's share included."""
    rows = []
    for case in CASES[1:]:
        inputs, row = draw(case, 1, K), {"case": case.name, "K": K, "B": 1}
        for name, switch in (("fla_us", fla_decode.disable), ("us", fla_decode.enable)) * 2:
            switch()
            for count in (20, calls):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(count):
                    call_fla(case, inputs)
                torch.cuda.synchronize()
                row[name] = 1e6 * (time.perf_counter() - start) / count
        fla_decode.disable()
        rows.append(row)
        say(f"launched by Python: {case.name:40} ours {row['us']:6.1f} us  fla {row['fla_us']:6.1f} us")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--search", action="store_true", help="try tilings, and compare with the best")
    parser.add_argument("--seconds", type=float, default=200, help="when the search ends at the latest (default: 200)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of the comparison (default: 7)")
    parser.add_argument("--output", type=Path, help="write everything here as JSON")
    options = parser.parse_args()
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}

    def save(**entries: object) -> None:
        result.update(entries)
        if options.output:
            options.output.write_text(json.dumps(result, indent=1))

    with torch.inference_mode():
        save(worst_relative_error=check())
        say("correct: worst relative error", result["worst_relative_error"])
        ceiling = copy_speed()
        save(copy_bytes_per_second=ceiling)
        say(f"{result['device']}: a copy moves {ceiling / 1e12:.3f} TB/s")
        searched = search(ceiling, options.seconds) if options.search else []
        save(search=searched)
        save(comparison=compare(best_tilings(searched), ceiling, options.rounds))
        save(from_python=time_from_python())
    bad = [row for row in result["comparison"] if row["B"] >= 64 and (row["share"] < 0.75 or row["speedup"] <= 1)]
    say(f"{len(bad)} of the rows at 64 sequences and more miss 75% of a copy, or do not beat fla")
    for row in bad:
        say(row)


if __name__ == "__main__":
    main()
