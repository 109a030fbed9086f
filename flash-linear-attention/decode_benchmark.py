"""Time the decode kernel on a GPU, against fla's recurrent kernels and against a copy of as many bytes.

    python flash-linear-attention/decode_benchmark.py --output decode.json
    python flash-linear-attention/decode_benchmark.py --state-dtype bfloat16 float16 int8 --value-channels 128 104 64
    python flash-linear-attention/decode_benchmark.py --search --cases gated-delta-net --key-channels 128 96
    python flash-linear-attention/decode_benchmark.py --table decode.json

First the kernel is checked against a step in float64. With ``--search`` many tilings are tried, and the best of each
size is timed; without it, those of `choose_tiling`. Each call is a node of a CUDA graph, and has a state of its own to
read and one to write, together many times what the L2 cache holds. What is compared takes turns, round after round.
Bytes are the state read and written, and query, key, value, beta, gate and output once. They are set against a copy of
the same state, which takes its turn too, and against a large copy. fla's state is always float32.

Shapes: B sequences, H key heads, W value heads, K key channels, V value channels.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import sys
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
from fla_decode.state import Int8State, dequantize, quantize
from fla_decode.step import MAX_NUMBERS, TILINGS, Tiling, choose_tiling, decode_step, part_width
from fla_torch import operators

from keyreduce.benchmarking.metrics import measure_roofline
from keyreduce.benchmarking.timing import RoundTimes, interleave, ratio

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from result_tables import search_table


class Case(NamedTuple):
    """How a rule is called: by whom, and so with what."""

    name: str
    is_gated: bool
    is_raw: bool
    normalize: bool
    state_v_first: bool


CASES = {
    "kernel": Case("ungated, the kernel alone", False, False, False, False),
    "delta-net": Case("ungated, as fla's DeltaNet calls it", False, False, True, False),
    "transformers": Case("gated, as transformers' models call it", True, False, True, False),
    "gated-delta-net": Case("gated, as fla's GatedDeltaNet calls it", True, True, True, True),
}
H = 16
KEY_CHANNELS, VALUE_CHANNELS, BATCHES = (128, 96, 64, 32), (128,), (1, 8, 64, 128, 256)
# Sizes that are checked besides those that are timed, and value heads of a key head there: K, V, group.
SIZES = [(48, 128, 2), (57, 80, 2), (103, 127, 4), (16, 256, 1)]
DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8)}
# The largest relative error of a new state that rounding explains; int8 has 127 steps to the largest of a row.
STATE_ERRORS = {torch.float32: 1e-6, torch.bfloat16: 2.5e-3, torch.float16: 4e-4, torch.int8: 1.5e-2}
# The ungated and the gated rule, by fla, and by PyTorch, which keeps float64 and takes a single token recurrently.
FLA = (fla.ops.fused_recurrent_delta_rule, fla.ops.fused_recurrent_gated_delta_rule)
PYTORCH = (operators.chunk_delta_rule, operators.chunk_gated_delta_rule)
# What the search tells the caches. Not evict_last: a model does not come back to an old state for long.
READS, WRITES = ("evict_first", "", ".cg"), ("evict_first", "")
SHAPES, FINALISTS, SEARCH_ROUNDS, FINAL_ROUNDS = 2, 3, 6, 20
START = time.perf_counter()


def say(*words: object) -> None:
    print(f"{time.perf_counter() - START:6.1f} s ", *words, flush=True)


class Size(NamedTuple):
    """What is timed: a case, the sizes of a head, and what the state is stored as."""

    case: Case
    K: int
    V: int
    dtype: torch.dtype

    @property
    def is_v_first(self) -> bool:
        return self.case.state_v_first or self.dtype == torch.int8

    def __str__(self) -> str:
        return f"{self.case.name}, K={self.K}, V={self.V}, {str(self.dtype)[6:]}"

    def tiling(self, B: int) -> Tiling:
        """Return the tiling in use at B sequences."""
        return choose_tiling(self.K, self.V, heads=B * H, state_v_first=self.is_v_first, state_dtype=self.dtype)

    def state_bytes(self, B: int) -> int:
        return B * H * self.V * (self.K * self.dtype.itemsize + 4 * (self.dtype == torch.int8))

    def moved_bytes(self, B: int) -> int:
        """Return the least that a step moves: the state read and written, and all else once."""
        gate = (2 if self.case.is_raw else 4) * self.case.is_gated
        return 2 * self.state_bytes(B) + B * H * (2 * (2 * self.K + 2 * self.V) + 2 + gate)


def stored(state: torch.Tensor, size: Size) -> torch.Tensor | Int8State:
    """Return a float32 state as that size stores it."""
    if size.dtype == torch.int8:
        return quantize(state, state_v_first=size.case.state_v_first)
    return state.to(size.dtype)


def draw(size: Size, B: int, *, W: int = H, seed: int = 0) -> dict:
    """Return random inputs of `decode_step`, all bfloat16 but the state."""
    generator = torch.Generator("cuda").manual_seed(seed)
    case, K, V, dtype = size

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    inputs = dict(query_B1HK=normal(B, 1, H, K), key_B1HK=normal(B, 1, H, K), value_B1WV=normal(B, 1, W, V))
    if not case.normalize:
        inputs["key_B1HK"] = F.normalize(inputs["key_B1HK"], dim=-1)
    beta = normal(B, 1, W)
    inputs["beta_B1W"] = beta if case.is_raw else beta.sigmoid()
    state = normal(*((B, W, V, K) if case.state_v_first else (B, W, K, V)), dtype=torch.float32)
    inputs |= dict(state=stored(state, size), state_dtype=dtype)
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


def widened(state: torch.Tensor | Int8State, case: Case) -> torch.Tensor:
    """Return a stored state in float64, laid out as the case has it."""
    if not torch.is_tensor(state):
        state = dequantize(Int8State(*(part.double() for part in state)), state_v_first=case.state_v_first)
    return state.double()


@torch.inference_mode()
def errors(size: Size, tiling: Tiling | None, *, B: int = 3, group: int = 1) -> dict[str, float]:
    """Return the largest relative errors of output (bfloat16) and state, over a new state and one in place.

    Raises:
        ValueError: they are larger than rounding.
    """
    worst, limits = {"output": 0.0, "state": 0.0}, {"output": 4e-3, "state": STATE_ERRORS[size.dtype]}
    for inplace in (False, True):
        inputs = draw(size, B, W=H * group, seed=size.K)
        wide = {name: value.double() if torch.is_tensor(value) else value for name, value in inputs.items()}
        expected = call(PYTORCH, size.case, wide | {"state": widened(inputs["state"], size.case)})
        output, state = decode_step(**inputs, tiling=tiling, inplace=inplace)
        found = output.double(), widened(state, size.case)
        for name, ours, right in zip(worst, found, expected, strict=True):
            error = ((ours - right).norm() / right.norm()).item()
            if not error < limits[name]:
                raise ValueError(f"{size}, {tiling}: {name} is off by {error:.1e}")
            worst[name] = max(worst[name], error)
    return worst


def check_size(work: tuple[Size, int]) -> dict[str, float]:
    """Return the errors at a size, at some of them with every tiling in use."""
    size, group = work
    tilings = TILINGS[size.dtype.itemsize, size.is_v_first].values() if size.K in (96, 57) else ()
    found = [errors(size, tiling, group=group if size.case.is_gated else 1) for tiling in (None, *tilings)]
    return {name: max(each[name] for each in found) for name in found[0]}


def check_tiling(work: tuple[Size, Tiling]) -> str | None:
    """Return what is wrong with a tiling, if anything: it may also not compile."""
    try:
        errors(*work)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def workers() -> ProcessPoolExecutor:
    """Return processes that compile and check; what they compile is in Triton's cache on disk for all."""
    count = max(1, min(24, (os.cpu_count() or 2) - 4))
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


def rotating(size: Size, B: int) -> list[dict]:
    """Return inputs of `decode_step` that differ in their state, for steps of about 2 ms: enough for a graph.

    At 64 sequences and more the states are up to 3 GB, sixty times the cache of an H100. A model comes back to a state
    when it has gone through all its layers; if few states took turns, a policy that holds on to some would win here.
    """
    inputs = draw(size, B)
    at_once = 3e12  # bytes a second, about
    count = math.ceil(2e-3 * at_once / max(size.moved_bytes(B), 5e-6 * at_once))
    shape = (B, H, size.V, size.K) if size.case.state_v_first else (B, H, size.K, size.V)
    return [inputs | {"state": stored(torch.randn(shape, device="cuda"), size)} for _ in range(count)]


class Call(NamedTuple):
    """What is timed: a function, and the inputs that it is called with in turn."""

    function: Callable[[dict], object]
    sets: Sequence[dict]


def time_in_turns(calls: Mapping[str, Call], *, rounds: int) -> dict[str, RoundTimes]:
    """Return the times of one call of each function, each recorded as a CUDA graph over all its inputs."""
    pool = torch.cuda.graph_pool_handle()

    def record(function: Callable[[dict], object], sets: Sequence[dict]) -> Callable[[], None]:
        for inputs in (sets[0], sets[0], sets[-1]):
            function(inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            # All results stay alive meanwhile: each call writes to memory of its own. Other graphs write there too.
            kept = [function(inputs) for inputs in sets]
        del kept
        return graph.replay

    graphs = {name: record(*each) for name, each in calls.items()}
    times = interleave(graphs, torch.device("cuda"), rounds=rounds)
    del graphs
    torch.cuda.empty_cache()
    return {name: found.divided(len(calls[name].sets)) for name, found in times.items()}


def step(tiling: Tiling, inputs: dict, *, inplace: bool = False) -> object:
    return decode_step(**inputs, tiling=tiling, inplace=inplace)


def copying(size: Size, B: int, count: int) -> Call:
    """Return copies of as many bytes as the state of that size has, between memory of their own."""
    buffers = torch.randint(256, (count, size.state_bytes(B)), dtype=torch.uint8, device="cuda")
    return Call(lambda inputs: inputs["state"].clone(), [{"state": buffer} for buffer in buffers])


def behind(function: Callable[[dict], object], inputs: dict) -> object:
    """The call where it waits for another kernel, as it does in a model."""
    inputs["query_B1HK"].mul_(1)
    return function(inputs)


def figures(size: Size, B: int, times: RoundTimes, theirs: RoundTimes, ceiling: float) -> dict:
    """Return the microseconds of a call, its share of the ceiling, and the speedup over fla's, with its interval."""
    faster, (low, high) = ratio(theirs, times)
    share = size.moved_bytes(B) / ceiling / times.median
    return dict(us=1e6 * times.median, share=share, speedup=faster, speedup_low=low, speedup_high=high)


def timing(row: dict) -> str:
    interval = f"{row['speedup_low']:.4f}-{row['speedup_high']:.4f}"
    return f"{row['us']:7.2f} us {row['share']:6.1%}  x{row['speedup']:.4f} ({interval})"


def shapes_of(size: Size) -> Iterator[Tiling]:
    """Yield tilings that leave each thread 16 to `MAX_NUMBERS` numbers, with parts and runs of all kinds."""
    widths = {part_width(size.K), min(16, size.K)} if size.is_v_first else {part_width(size.K)}
    runs = (16, 8, 4) if size.is_v_first else (16,)  # bytes
    for block_v, warps, width, run in itertools.product((8, 16, 32, 64, 128), (1, 2, 4, 8), widths, runs):
        numbers = width * math.ceil(size.K / width) * block_v / (32 * warps)
        # More keys and queries than this do not stay in registers either.
        held = 2 * size.K * min(1, run / size.dtype.itemsize / width)
        if 16 <= numbers <= MAX_NUMBERS and block_v < 2 * size.V and held <= 96:
            yield Tiling(block_v, warps, width=width, run=min(run // size.dtype.itemsize, width))


def policies_of(tiling: Tiling) -> Iterator[Tiling]:
    """Yield a tiling with each pair of cache policies for reads and writes, and one without overlapping launches."""
    for reads, writes in itertools.product(READS, WRITES):
        yield tiling._replace(reads=reads, writes=writes)
    yield tiling._replace(overlaps=False)


def search(
    sizes: Sequence[Size], batches: Sequence[int], pool: ProcessPoolExecutor, ceiling: float
) -> tuple[dict[Size, Tiling], list[dict]]:
    """Return the best tiling of each size, and the rows of the finals.

    First all shapes of tiles take turns, then the best of them with all cache policies, and the
    fastest takes turns with fla's kernel.
    """
    slower: dict[Size, dict[Tiling, float]] = {size: {} for size in sizes}
    for candidates in (shapes_of, lambda size: itertools.chain(*map(policies_of, ranked(slower[size])[:SHAPES]))):
        works = [(size, tiling) for size in sizes for tiling in candidates(size) if tiling not in slower[size]]
        say(f"compiling and checking {len(works)} kernels")
        right: dict[Size, list[Tiling]] = {size: [] for size in sizes}
        for (size, tiling), error in zip(works, pool.map(check_tiling, works, chunksize=2), strict=True):
            if error:
                say(f"left out: {size}, {tuple(tiling)}: {error}")
            else:
                right[size].append(tiling)
        say("timing them")
        for size, tilings in right.items():
            # Those that came out first before take part again, and all are compared within these turns.
            tilings += ranked(slower[size])[:SHAPES]
            slower[size] = times_of_best(size, tilings, batches)
    rows = [
        row for size in sizes for B in batches for row in finals(size, B, ranked(slower[size])[:FINALISTS], ceiling)
    ]
    return {size: ranked(found)[0] for size, found in slower.items()}, rows


def ranked(slower: Mapping[Tiling, float]) -> list[Tiling]:
    return sorted(slower, key=lambda tiling: slower[tiling])


def times_of_best(size: Size, tilings: Sequence[Tiling], batches: Sequence[int]) -> dict[Tiling, float]:
    """Return how much longer than the best each tiling takes, at the batch size where that is most."""
    slower = dict.fromkeys(tilings, 1.0)
    for B in batches:
        sets = rotating(size, B)
        times = time_in_turns({tiling: Call(partial(step, tiling), sets) for tiling in tilings}, rounds=SEARCH_ROUNDS)
        least = min(found.median for found in times.values())
        slower = {tiling: max(slower[tiling], found.median / least) for tiling, found in times.items()}
    return slower


def finals(size: Size, B: int, tilings: Sequence[Tiling], ceiling: float) -> list[dict]:
    """Time the best against fla's and against what is in use, also in place, and behind another kernel."""
    used, sets, wide = size.tiling(B), rotating(size, B), rotating(size._replace(dtype=torch.float32), B)
    first, theirs = partial(step, tilings[0]), partial(call, FLA, size.case)
    calls = {str(tuple(tiling)): Call(partial(step, tiling), sets) for tiling in (*tilings, used)}
    calls |= {"fla": Call(theirs, wide), "behind a kernel: fla": Call(partial(behind, theirs), wide)}
    calls |= {"in place": Call(partial(first, inplace=True), sets)}
    calls |= {"behind a kernel": Call(partial(behind, first), sets)}
    calls["copy"] = copying(size, B, len(sets))
    times = time_in_turns(calls, rounds=FINAL_ROUNDS)
    rows = []
    for name, found in times.items():
        against = times["behind a kernel: fla" if "behind" in name else "fla"]
        moved = size._replace(dtype=torch.float32) if "fla" in name else size
        row = dict(size=str(size), B=B, name=name, **figures(moved, B, found, against, ceiling))
        say(f"{size} B={B:3} {timing(row)} {name} {'in use' if name == str(tuple(used)) else ''}")
        rows.append(row)
    return rows


def compare(sizes: Sequence[Size], batches: Sequence[int], best: Mapping[Size, Tiling], ceiling: float, rounds: int):
    """Time ours, fla's and a copy of the state in turns, for each size and batch size; yield a row for each.

    Sizes that differ in what the state is stored as alone take turns together.
    """
    groups: dict[Size, list[Size]] = {}
    for size in sizes:
        groups.setdefault(size._replace(dtype=torch.float32), []).append(size)
    for B, (wide, group) in itertools.product(sorted(batches, key=lambda B: B < 64), groups.items()):
        calls = {"fla": Call(partial(call, FLA, wide.case), rotating(wide, B))}
        tilings = {size: (best.get(size) if B >= 64 else None) or size.tiling(B) for size in group}
        for size, tiling in tilings.items():
            sets = calls["fla"].sets if size == wide else rotating(size, B)
            calls[f"ours {size.dtype}"] = Call(partial(step, tiling), sets)
            calls.setdefault(f"copy {size.dtype.itemsize}", copying(size, B, len(sets)))
        times = time_in_turns(calls, rounds=rounds)
        fla = figures(wide, B, times["fla"], times["fla"], ceiling)
        for size, tiling in tilings.items():
            ours, copied = times[f"ours {size.dtype}"], times[f"copy {size.dtype.itemsize}"]
            row = dict(case=size.case.name, K=size.K, V=size.V, B=B, state_dtype=str(size.dtype)[6:], tiling=tiling)
            row |= figures(size, B, ours, times["fla"], ceiling)
            # The copy moves the state alone.
            of_copy, (low, high) = ratio(copied, ours)
            row |= dict(copy_us=1e6 * copied.median, of_copy=of_copy, of_copy_low=low, of_copy_high=high)
            row |= dict(fla_us=fla["us"], fla_share=fla["share"])
            say(
                f"{size!s:60} B={B:3} ours {timing(row)}  of its copy {row['of_copy']:6.1%} ({row['copy_us']:.1f} us)  "
                f"fla {row['fla_us']:7.1f} us {row['fla_share']:6.1%}  {tuple(tiling)}"
            )
            yield row


def time_from_python(K: int = 64, calls: int = 500) -> list[dict]:
    """Return the microseconds of a call of fla's function at one sequence, ours on and off, Python's share included."""
    rows = []
    for case in list(CASES.values())[1:]:
        inputs, row = draw(Size(case, K, 128, torch.float32), 1), {"case": case.name, "K": K, "B": 1}
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


def table(rows: Sequence[dict], dtypes: Sequence[str]) -> Iterator[str]:
    """Yield the comparison as Markdown, for 64 and 256 sequences, and how far the 95% intervals reach."""
    shown = [row for row in rows if row["state_dtype"] in dtypes and row["B"] in (64, 256)]
    if not shown:
        return
    head = "µs | of the bandwidth | of its copy | fla: µs | faster |"
    yield f"| rule | state | K | V | B=64: {head} B=256: {head}"
    yield "|" + "---|" * 14
    lines: dict[tuple, dict[int, dict]] = {}
    for row in shown:
        lines.setdefault((row["case"], row["state_dtype"], row["K"], row["V"]), {})[row["B"]] = row
    for line in sorted(lines, key=lambda line: ([case.name for case in CASES.values()].index(line[0]), line[1])):
        cells = [str(name) for name in line]
        for row in (lines[line][B] for B in (64, 256)):
            cells += [f"{row['us']:.1f}", f"{row['share']:.0%}", f"{row['of_copy']:.0%}", f"{row['fla_us']:.1f}"]
            cells += [f"{row['speedup']:.2f}"]
        yield f"| {' | '.join(cells)} |"
    for name in ("speedup", "of_copy"):
        reach = max(max(row[name + "_high"] - row[name], row[name] - row[name + "_low"]) for row in shown)
        yield f"95% intervals of {name} reach at most {reach:.3f} to either side."


def falls_short(row: dict) -> bool:
    """Return whether a row misses what is asked of its format: of the speed of a copy, and of fla's float32 kernel."""
    of_copy, faster = {"float32": (0.75, 1.0), "int8": (0.85, 2.8)}.get(row["state_dtype"], (0.85, 1.7))
    is_slow = row["speedup"] <= faster and (row["B"] == 256 or row["state_dtype"] == "float32")
    return row["B"] >= 64 and (is_slow or row["of_copy"] < of_copy)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES), help="how the rule is called")
    parser.add_argument("--state-dtype", nargs="*", choices=DTYPES, default=["float32"], help="what states are kept as")
    parser.add_argument("--key-channels", nargs="*", type=int, default=KEY_CHANNELS)
    parser.add_argument("--value-channels", nargs="*", type=int, default=VALUE_CHANNELS)
    parser.add_argument("--batches", nargs="*", type=int, default=BATCHES, help="sequences of the comparison")
    parser.add_argument("--search", action="store_true", help="try tilings, and compare with the best")
    parser.add_argument("--search-batches", nargs="*", type=int, default=(64, 256), help="sequences of the search")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of the comparison (default: 15)")
    parser.add_argument("--output", type=Path, help="write everything here as JSON")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of an output, and do nothing else")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.table:
        found = json.loads(options.table.read_text())
        print(*search_table(found.get("search", [])), sep="\n")
        print(*table(found.get("comparison", []), options.state_dtype), sep="\n")
        return
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}

    def save(**entries: object) -> None:
        result.update(entries)
        if options.output:
            options.output.write_text(json.dumps(result, indent=1))

    cases, dtypes = [CASES[name] for name in options.cases], [DTYPES[name] for name in options.state_dtype]
    product = itertools.product(cases, options.key_channels, options.value_channels, dtypes)
    sizes, best = [Size(*each) for each in product], {}
    with torch.inference_mode(), workers() as pool:
        checked = [(size, 1) for size in sizes]
        checked += [(Size(case, K, V, dtype), g) for case in cases for K, V, g in SIZES for dtype in dtypes]
        worst: dict[str, dict[str, float]] = {}
        for (size, _), found in zip(checked, pool.map(check_size, checked), strict=True):
            before = worst.get(str(size.dtype)[6:], found)
            worst[str(size.dtype)[6:]] = {name: max(before[name], found[name]) for name in found}
        save(worst_relative_error=worst)
        say("correct: worst relative error", worst)
        ceiling = measure_roofline(torch.device("cuda"), torch.bfloat16).bytes_per_second
        save(copy_bytes_per_second=ceiling)
        say(f"{result['device']}: a copy moves {ceiling / 1e12:.3f} TB/s")
        if options.search:
            best, rows = search(sizes, options.search_batches, pool, ceiling)
            save(search=rows)
            for size, tiling in best.items():
                say(f"best: {size!s:60} {tuple(tiling)}")
        rows: list[dict] = []
        for row in compare(sizes, options.batches, best, ceiling, options.rounds):
            rows.append(row)
            save(comparison=rows)
        if "float32" in options.state_dtype:
            save(from_python=time_from_python())
    bad = [row for row in rows if falls_short(row)]
    say(f"{len(bad)} of {len(rows)} rows fall short of the speed that is asked of them")
    for row in bad:
        say({name: row[name] for name in ("case", "K", "V", "B", "state_dtype", "us", "of_copy", "share", "speedup")})


if __name__ == "__main__":
    main()
