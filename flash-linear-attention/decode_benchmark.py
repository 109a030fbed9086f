"""Time the decode kernel on a GPU, against fla's recurrent kernels and against a copy of as many bytes.

    python flash-linear-attention/decode_benchmark.py --search --output decode.json

First it checks the kernel against a float64 step. With ``--search`` it tries tilings, and times the best of each
size; without, those of `choose_tiling`. Each call is a node of a CUDA graph, and has its own state to read and its own
to write: together several times what the L2 cache holds. What is compared takes turns, round after round. Bytes are
the state read and written, and query, key, value, beta, gate and output once; the ceiling is a copy of 1 GiB.

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
from typing import NamedTuple

import torch
import triton
from fla.ops.delta_rule import fused_recurrent_delta_rule
from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

import fla_decode
from fla_decode.step import Tiling, choose_tiling, decode_step, split_channels

START = time.perf_counter()
H, V = 16, 128
KEY_CHANNELS, BATCHES, SEARCH_BATCHES = (128, 96, 64, 32), (1, 8, 64, 128, 256), (64, 256, 8)


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
# One of each layout of the state: what is best for one of a layout is taken for the others.
SEARCHED = (CASES[0], CASES[3])


def say(*words: object) -> None:
    print(f"{time.perf_counter() - START:6.1f} s ", *words, flush=True)


def draw(case: Case, B: int, K: int, *, W: int = H, V: int = V, seed: int = 0) -> dict:
    """Return random inputs of `decode_step`, bfloat16 with a float32 state."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape, dtype=torch.bfloat16):
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    inputs = dict(query_B1HK=normal(B, 1, H, K), key_B1HK=normal(B, 1, H, K), value_B1WV=normal(B, 1, W, V))
    if not case.normalize:
        inputs["key_B1HK"] = torch.nn.functional.normalize(inputs["key_B1HK"], dim=-1)
    beta = normal(B, 1, W)
    inputs["beta_B1W"] = beta if case.is_raw else beta.sigmoid()
    inputs["state"] = normal(*((B, W, V, K) if case.state_v_first else (B, W, K, V)), dtype=torch.float32)
    inputs |= dict(normalize=case.normalize, state_v_first=case.state_v_first, beta_is_logit=case.is_raw)
    if case.is_raw:
        inputs |= dict(gate_B1W=normal(B, 1, W), A_log_W=torch.linspace(-1, 1, W, device="cuda"))
        inputs |= dict(dt_bias_W=torch.linspace(-2, 0, W, device="cuda"))
    elif case.is_gated:
        inputs["gate_B1W"] = torch.nn.functional.logsigmoid(normal(B, 1, W, dtype=torch.float32) + 2)
    return inputs


def call_fla(case: Case, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """What `decode_step` computes, by fla."""
    arguments = [inputs[name] for name in ("query_B1HK", "key_B1HK", "value_B1WV")]
    options = dict(initial_state=inputs["state"], output_final_state=True, beta=inputs["beta_B1W"])
    options["use_qk_l2norm_in_kernel"] = case.normalize
    if not case.is_gated:
        return fused_recurrent_delta_rule(*arguments, **options)
    options |= dict(g=inputs["gate_B1W"], state_v_first=case.state_v_first)
    if case.is_raw:
        options |= dict(use_gate_in_kernel=True, A_log=inputs["A_log_W"], dt_bias=inputs["dt_bias_W"])
        options |= dict(use_beta_sigmoid_in_kernel=True)
    return fused_recurrent_gated_delta_rule(*arguments, **options)


def reference(case: Case, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The step as its definition reads, in float64."""
    query, key, value, beta, state = (
        inputs[name].double() for name in ("query_B1HK", "key_B1HK", "value_B1WV", "beta_B1W", "state")
    )
    query, key = (tensor[:, 0].repeat_interleave(value.shape[2] // H, dim=1) for tensor in (query, key))
    value, beta = value[:, 0], beta[:, 0]
    state = state.mT if case.state_v_first else state
    if case.normalize:
        query, key = (tensor / (tensor.square().sum(-1, keepdim=True) + 1e-6).sqrt() for tensor in (query, key))
    beta = beta.sigmoid() if case.is_raw else beta
    if case.is_gated:
        gate = inputs["gate_B1W"].double()[:, 0]
        if case.is_raw:
            rate = inputs["A_log_W"].double().exp()
            gate = -rate * torch.nn.functional.softplus(gate + inputs["dt_bias_W"].double())
        state = state * gate.exp()[..., None, None]
    update = beta[..., None] * (value - torch.einsum("bwkv,bwk->bwv", state, key))
    state = state + key[..., None] * update[..., None, :]
    output = torch.einsum("bwkv,bwk->bwv", state, query) * query.shape[-1] ** -0.5
    return output[:, None], state.mT if case.state_v_first else state


def check() -> dict[str, float]:
    """Return the largest relative error of output (bfloat16) and state, over cases and odd sizes. Too large raises."""
    worst = {"output": 0.0, "state": 0.0}
    sizes = [(K, 128, 1) for K in (128, 96, 64, 32)] + [(48, 128, 2), (57, 80, 2), (103, 127, 4), (16, 256, 1)]
    for case, (K, V, group) in itertools.product(CASES, sizes):
        if group > 1 and not case.is_gated:
            group = 1
        tilings = [None, Tiling(16, 2, False, 2, 4)] if K in (96, 57) else [None]
        for tiling, inplace in itertools.product(tilings, (False, True)):
            inputs = draw(case, 3, K, W=H * group, V=V, seed=K)
            expected = reference(case, inputs)
            found = decode_step(**inputs, tiling=tiling, inplace=inplace)
            for name, ours, right in zip(worst, found, expected, strict=True):
                error = ((ours.double() - right).norm() / right.norm()).item()
                limit = {"output": 4e-3, "state": 1e-6}[name]
                if not error < limit:
                    raise SystemExit(f"{case.name}, K={K}, V={V}, {tiling}: {name} is off by {error:.1e}")
                worst[name] = max(worst[name], error)
    return worst


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
    """Return the bytes a second, read and written, of a copy of 1 GiB."""
    source, target = (torch.randn(1 << 28, device="cuda") for _ in range(2))
    return 2e6 * (1 << 30) / time_in_turns({"copy": lambda _: target.copy_(source)}, 2, rounds=15)["copy"]


def rotating(case: Case, B: int, K: int) -> list[dict]:
    inputs = draw(case, B, K)
    return [inputs | {"state": torch.randn_like(inputs["state"])} for _ in range(sets_past_cache(B, K))]


def step_set(sets: Sequence[dict], tiling: Tiling | None, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    return decode_step(**sets[index], tiling=tiling)


def candidates(K: int) -> list[Tiling]:
    """Return the tilings to try: those that leave each thread 8 to 64 numbers, some with several on their way."""
    found, processor_bytes = [], 200 << 10
    for block_v, warps in itertools.product((8, 16, 32, 64, 128), (1, 2, 4, 8)):
        numbers = sum(split_channels(K)) * block_v
        if not 8 <= numbers / (32 * warps) <= 64:
            continue
        found += [Tiling(block_v, warps, True)]
        if numbers / (32 * warps) in (16, 24, 32):
            found += [Tiling(block_v, warps, False)]
            for stages in (2, 3):
                programs = min(16, processor_bytes // (4 * numbers * stages), 64 // warps)
                found += [Tiling(block_v, warps, True, stages, programs)] * (programs > 1)
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
