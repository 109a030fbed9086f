"""Time the decode kernel on a GPU, against fla's recurrent kernels and against a copy of as many bytes.

    python flash-linear-attention/decode_benchmark.py --output decode.json
    python flash-linear-attention/decode_benchmark.py --search --layouts v-first --key-channels 128 96
    python flash-linear-attention/decode_benchmark.py --table decode.json

First the kernel is checked against a step in float64. With ``--search`` all tilings are tried, and the best of each
size is timed; without it, those of `choose_tiling`. Each call is a node of a CUDA graph, and has a state of its own to
read and one to write, together many times what the L2 cache holds. What is compared takes turns, round after round.
Bytes are the state read and written, and query, key, value, beta, gate and output once; the ceiling is a large copy.

Shapes: B sequences, H key heads, W value heads, K key channels, V value channels.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import fla.ops
import fla_decode
import torch
import torch.nn.functional as F
import triton
from fla_decode.step import MAX_NUMBERS, TILINGS, Tiling, choose_tiling, decode_step, split_channels
from fla_torch import operators
from keyreduce.benchmarking.roofline import measure_roofline

from keyreduce.benchmarking.timing import RoundTimes, interleave, ratio


class Case(NamedTuple):
    """How a rule is called: by whom, and so with what."""

    name: str
    is_gated: bool
    is_raw: bool
    normalize: bool
    state_v_first: bool


CASES = (
    Case("ungated, the kernel alone", False, False, False, False),
    Case("ungated, as fla's DeltaNet calls it", False, False, True, False),
    Case("gated, as transformers' models call it", True, False, True, False),
    Case("gated, as fla's GatedDeltaNet calls it", True, True, True, True),
)
# One case of each layout of the state: what is best for one of a layout is taken for the others.
LAYOUTS = {"v-first": CASES[3], "k-first": CASES[0]}
H, V = 16, 128
KEY_CHANNELS, BATCHES = (128, 96, 64, 32), (1, 8, 64, 128, 256)
# The sizes that are checked: K, V, value heads of a key head.
SIZES = [(K, 128, 1) for K in KEY_CHANNELS] + [(48, 128, 2), (57, 80, 2), (103, 127, 4), (16, 256, 1)]
# The ungated and the gated rule, by fla, and by PyTorch, which keeps float64 and takes a single token recurrently.
FLA = (fla.ops.fused_recurrent_delta_rule, fla.ops.fused_recurrent_gated_delta_rule)
PYTORCH = (operators.chunk_delta_rule, operators.chunk_gated_delta_rule)
# What the search tells the caches. Not evict_last: a model does not come back to an old state for long.
READS, WRITES = ("evict_first", "", ".cg"), ("evict_first", "")
FINALISTS, SEARCH_ROUNDS, FINAL_ROUNDS = 5, 6, 40
START = time.perf_counter()


def say(*words: object) -> None:
    print(f"{time.perf_counter() - START:6.1f} s ", *words, flush=True)


def draw(case: Case, B: int, K: int, *, W: int = H, V: int = V, seed: int = 0) -> dict:
    """Return random inputs of `decode_step`, bfloat16 with a float32 state."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    inputs = dict(query_B1HK=normal(B, 1, H, K), key_B1HK=normal(B, 1, H, K), value_B1WV=normal(B, 1, W, V))
    if not case.normalize:
        inputs["key_B1HK"] = F.normalize(inputs["key_B1HK"], dim=-1)
    beta = normal(B, 1, W)
    inputs["beta_B1W"] = beta if case.is_raw else beta.sigmoid()
    inputs["state"] = normal(*((B, W, V, K) if case.state_v_first else (B, W, K, V)), dtype=torch.float32)
    if case.is_raw:
        inputs |= dict(gate_B1W=normal(B, 1, W), A_log_W=torch.linspace(-1, 1, W, device="cuda"))
        inputs |= dict(dt_bias_W=torch.linspace(-2, 0, W, device="cuda"))
    elif case.is_gated:
        inputs["gate_B1W"] = F.logsigmoid(normal(B, 1, W, dtype=torch.float32) + 2)
    return inputs | dict(normalize=case.normalize, state_v_first=case.state_v_first, beta_is_logit=case.is_raw)


def call(rules: tuple[Callable, Callable], case: Case, inputs: Mapping) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `decode_step` computes, by functions with fla's arguments: the ungated and the gated rule."""
    arguments = [inputs[name] for name in ("query_B1HK", "key_B1HK", "value_B1WV")]
    options = dict(initial_state=inputs["state"], output_final_state=True, beta=inputs["beta_B1W"])
    options["use_qk_l2norm_in_kernel"] = case.normalize
    if not case.is_gated:
        return rules[0](*arguments, **options)
    options |= dict(g=inputs["gate_B1W"], state_v_first=case.state_v_first)
    if case.is_raw:
        options |= dict(use_gate_in_kernel=True, A_log=inputs["A_log_W"], dt_bias=inputs["dt_bias_W"])
        options |= dict(use_beta_sigmoid_in_kernel=True)
    return rules[1](*arguments, **options)


@torch.inference_mode()
def errors(case: Case, K: int, V: int, tiling: Tiling | None, *, B: int = 3, group: int = 1) -> dict[str, float]:
    """Return the largest relative errors of output (bfloat16) and state, over a new state and one in place.

    Raises:
        ValueError: they are larger than rounding.
    """
    worst = {"output": 0.0, "state": 0.0}
    for inplace in (False, True):
        inputs = draw(case, B, K, W=H * group, V=V, seed=K)
        wide = {name: value.double() if torch.is_tensor(value) else value for name, value in inputs.items()}
        expected = call(PYTORCH, case, wide)
        found = decode_step(**inputs, tiling=tiling, inplace=inplace)
        for name, ours, right in zip(worst, found, expected, strict=True):
            error = ((ours.double() - right).norm() / right.norm()).item()
            if not error < {"output": 4e-3, "state": 1e-6}[name]:
                raise ValueError(f"{case.name}, K={K}, V={V}, {tiling}: {name} is off by {error:.1e}")
            worst[name] = max(worst[name], error)
    return worst


def check_sizes(work: tuple[Case, tuple[int, int, int]]) -> dict[str, float]:
    """Return the errors of a case at one of `SIZES`, at two of them with every tiling in use."""
    case, (K, V, group) = work
    tilings = [None, *TILINGS[case.state_v_first].values()] if K in (96, 57) else [None]
    found = [errors(case, K, V, tiling, group=group if case.is_gated else 1) for tiling in tilings]
    return {name: max(each[name] for each in found) for name in found[0]}


def check_tiling(work: tuple[Case, int, Tiling]) -> str | None:
    """Return what is wrong with a tiling, if anything: it may also not compile."""
    case, K, tiling = work
    try:
        errors(case, K, V, tiling)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def workers() -> ProcessPoolExecutor:
    """Return processes that compile and check; what they compile is in Triton's cache on disk for all."""
    count = max(1, min(24, (os.cpu_count() or 2) - 4))
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


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
    at_once = 3e12  # bytes a second, about
    count = math.ceil(2e-3 * at_once / max(moved_bytes(case, B, K), 5e-6 * at_once))
    return [inputs | {"state": torch.randn_like(inputs["state"])} for _ in range(count)]


def time_in_turns(
    calls: Mapping[str, Callable[[dict], object]], sets: Sequence[dict], *, rounds: int
) -> dict[str, RoundTimes]:
    """Return the times of one call of each function, each recorded as a CUDA graph over all inputs."""
    pool = torch.cuda.graph_pool_handle()

    def record(function: Callable[[dict], object]) -> Callable[[], None]:
        for inputs in (sets[0], sets[0], sets[-1]):
            function(inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            # All results stay alive meanwhile: each call writes to memory of its own. Other graphs write there too.
            kept = [function(inputs) for inputs in sets]
        del kept
        return graph.replay

    graphs = {name: record(function) for name, function in calls.items()}
    times = interleave(graphs, torch.device("cuda"), rounds=rounds)
    del graphs
    torch.cuda.empty_cache()
    return {name: found.divided(len(sets)) for name, found in times.items()}


def step(tiling: Tiling, inputs: dict, *, inplace: bool = False) -> object:
    return decode_step(**inputs, tiling=tiling, inplace=inplace)


def copy(inputs: dict) -> object:
    return inputs["state"].clone()


def behind(function: Callable[[dict], object], inputs: dict) -> object:
    """The call where it waits for another kernel, as it does in a model."""
    inputs["query_B1HK"].mul_(1)
    return function(inputs)


def figures(case: Case, K: int, B: int, times: RoundTimes, theirs: RoundTimes, ceiling: float) -> dict:
    """Return the microseconds of a call, its share of the ceiling, and the speedup over fla's, with its interval."""
    faster, (low, high) = ratio(theirs, times)
    share = moved_bytes(case, B, K) / ceiling / times.median
    return dict(us=1e6 * times.median, share=share, speedup=faster, speedup_low=low, speedup_high=high)


def told(row: dict) -> str:
    interval = f"{row['speedup_low']:.4f}-{row['speedup_high']:.4f}"
    return f"{row['us']:7.2f} us {row['share']:6.1%}  x{row['speedup']:.4f} ({interval})"


def tilings_of(K: int) -> Iterator[Tiling]:
    """Yield tilings that leave each thread 8 to `MAX_NUMBERS` numbers, with all that the caches can be told."""
    for block_v, warps in itertools.product((8, 16, 32, 64, 128), (1, 2, 4, 8)):
        if 8 <= sum(split_channels(K)) * block_v / (32 * warps) <= MAX_NUMBERS:
            for reads, writes, overlaps in itertools.product(READS, WRITES, (True, False)):
                yield Tiling(block_v, warps, reads, writes, overlaps)


def search(
    keys: Sequence[tuple[Case, int]], batches: Sequence[int], pool: ProcessPoolExecutor, ceiling: float
) -> tuple[dict[tuple[bool, int], Tiling], list[dict]]:
    """Return the best tiling by layout and K, and the rows of the finals.

    All candidates that compile and are right take turns; those that come out first take turns with fla's kernel again.
    """
    works = [(case, K, tiling) for case, K in keys for tiling in tilings_of(K)]
    say(f"compiling and checking {len(works)} kernels")
    worst: dict[tuple[Case, int], dict[Tiling, float]] = {key: {} for key in keys}
    for (case, K, tiling), error in zip(works, pool.map(check_tiling, works, chunksize=2), strict=True):
        if error:
            say(f"left out: {case.name}, K={K}, {tuple(tiling)}: {error}")
        else:
            worst[case, K][tiling] = 1.0  # how much longer than the best, at the batch size where that is most
    best, rows = {}, []
    for (case, K), slower in worst.items():
        for B in batches:
            sets = rotating(case, B, K)
            times = time_in_turns({tiling: partial(step, tiling) for tiling in slower}, sets, rounds=SEARCH_ROUNDS)
            least = min(found.median for found in times.values())
            slower.update({tiling: max(slower[tiling], found.median / least) for tiling, found in times.items()})
        ranked = sorted(slower, key=lambda tiling: slower[tiling])
        best[case.state_v_first, K] = ranked[0]
        for B in batches:
            rows += finals(case, K, B, ranked[:FINALISTS], ceiling)
    return best, rows


def finals(case: Case, K: int, B: int, tilings: Sequence[Tiling], ceiling: float) -> list[dict]:
    """Time the best against fla's and against what is in use, also in place, and behind another kernel."""
    used = choose_tiling(K, V, heads=B * H, state_v_first=case.state_v_first)
    first, theirs = partial(step, tilings[0]), partial(call, FLA, case)
    calls = {str(tuple(tiling)): partial(step, tiling) for tiling in (*tilings, used)}
    calls |= {"fla": theirs, "copy": copy, "in place": partial(first, inplace=True)}
    calls |= {"behind a kernel": partial(behind, first), "behind a kernel: fla": partial(behind, theirs)}
    times = time_in_turns(calls, rotating(case, B, K), rounds=FINAL_ROUNDS)
    rows = []
    for name, found in times.items():
        against = times["behind a kernel: fla" if "behind" in name else "fla"]
        row = dict(case=case.name, K=K, B=B, name=name, **figures(case, K, B, found, against, ceiling))
        say(f"K={K} B={B:3} {told(row)} {name} {'in use' if name == str(tuple(used)) else ''}")
        rows.append(row)
    return rows


def compare(best: Mapping[tuple[bool, int], Tiling], ceiling: float, rounds: int) -> list[dict]:
    """Time ours, fla's and a copy of the state in turns, for each case, K and batch size; return a row for each."""
    rows = []
    for B, K, case in itertools.product(sorted(BATCHES, key=lambda B: B < 64), KEY_CHANNELS, CASES):
        tiling = best.get((case.state_v_first, K)) if B >= 64 else None
        tiling = tiling or choose_tiling(K, V, heads=B * H, state_v_first=case.state_v_first)
        calls = {"ours": partial(step, tiling), "fla": partial(call, FLA, case), "copy": copy}
        times = time_in_turns(calls, rotating(case, B, K), rounds=rounds)
        row = dict(case=case.name, K=K, B=B, tiling=tiling, copy_us=1e6 * times["copy"].median)
        row |= figures(case, K, B, times["ours"], times["fla"], ceiling)
        fla = figures(case, K, B, times["fla"], times["fla"], ceiling)
        row |= dict(fla_us=fla["us"], fla_share=fla["share"])
        rows.append(row)
        say(
            f"{case.name:40} B={B:3} K={K:3} ours {told(row)}  fla {row['fla_us']:7.1f} us {row['fla_share']:6.1%}  "
            f"copy {row['copy_us']:7.1f} us  {tuple(tiling)}"
        )
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
                    call(FLA, case, inputs)
                torch.cuda.synchronize()
                row[name] = 1e6 * (time.perf_counter() - start) / count
        fla_decode.disable()
        rows.append(row)
        say(f"launched by Python: {case.name:40} ours {row['us']:6.1f} us  fla {row['fla_us']:6.1f} us")
    return rows


def table(rows: list[dict]) -> Iterator[str]:
    """Yield the comparison as Markdown, for 64 and 256 sequences, and how far the 95% intervals reach."""
    head = "µs | of a copy | fla: µs | of a copy | faster |"
    yield f"| rule | K | B=64: {head} B=256: {head}"
    yield "|" + "---|" * 12
    by_size = {(row["case"], row["K"], row["B"]): row for row in rows}
    for case, K in itertools.product((case.name for case in CASES), KEY_CHANNELS):
        cells = [case, str(K)]
        for row in (by_size[case, K, B] for B in (64, 256)):
            cells += [f"{row['us']:.1f}", f"{row['share']:.0%}", f"{row['fla_us']:.1f}", f"{row['fla_share']:.0%}"]
            cells += [f"{row['speedup']:.3f}"]
        yield f"| {' | '.join(cells)} |"
    most = [row for row in rows if row["B"] in (64, 256)]
    reach = max(max(row["speedup_high"] - row["speedup"], row["speedup"] - row["speedup_low"]) for row in most)
    yield f"95% intervals of the ratios reach at most {reach:.3f} to either side."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--search", action="store_true", help="try tilings, and compare with the best")
    parser.add_argument("--layouts", nargs="*", choices=LAYOUTS, default=list(LAYOUTS), help="of the search")
    parser.add_argument("--key-channels", nargs="*", type=int, default=KEY_CHANNELS, help="of the search")
    parser.add_argument("--batches", nargs="*", type=int, default=(64, 256), help="of the search")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of the comparison (default: 15)")
    parser.add_argument("--output", type=Path, help="write everything here as JSON")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of an output, and do nothing else")
    options = parser.parse_args()
    if options.table:
        print(*table(json.loads(options.table.read_text())["comparison"]), sep="\n")
        return
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}

    def save(**entries: object) -> None:
        result.update(entries)
        if options.output:
            options.output.write_text(json.dumps(result, indent=1))

    best = {}
    with torch.inference_mode(), workers() as pool:
        found = list(pool.map(check_sizes, itertools.product(CASES, SIZES)))
        save(worst_relative_error={name: max(errors[name] for errors in found) for name in found[0]})
        say("correct: worst relative error", result["worst_relative_error"])
        ceiling = measure_roofline(torch.device("cuda"), torch.bfloat16).bytes_per_second
        save(copy_bytes_per_second=ceiling)
        say(f"{result['device']}: a copy moves {ceiling / 1e12:.3f} TB/s")
        if options.search:
            keys = [(LAYOUTS[layout], K) for layout in options.layouts for K in options.key_channels]
            best, rows = search(keys, options.batches, pool, ceiling)
            save(search=rows)
        save(comparison=compare(best, ceiling, options.rounds))
        save(from_python=time_from_python())
    bad = [row for row in result["comparison"] if row["B"] >= 64 and (row["share"] < 0.75 or row["speedup_low"] <= 1)]
    say(f"{len(bad)} of the rows at 64 sequences and more miss 75% of a copy, or do not beat fla")
    for row in bad:
        say(row)


if __name__ == "__main__":
    main()
