"""Time the decode kernel on a GPU, against fla's recurrent kernels and against a copy of as many bytes.

    python flash-linear-attention/decode_benchmark.py --output decode.json
    python flash-linear-attention/decode_benchmark.py --search --layouts v-first --key-channels 128 96
    python flash-linear-attention/decode_benchmark.py --table decode.json

First it checks the kernel against a float64 step. With ``--search`` it tries tilings, and times the best of each
size; without, those of `choose_tiling`. How is in decode_timing.py. Bytes are the state read and written, and query,
key, value, beta, gate and output once; the ceiling is a large copy.

Shapes: B sequences, H key heads, W value heads, K key channels, V value channels.
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import fla_decode
import torch
import triton
from decode_cases import CASES, SIZES, H, V, call_fla, check_sizes, draw
from decode_search import fla_of, search, step_of, workers
from decode_timing import copy_speed, median, moved_bytes, rotating, say, speedup, time_in_turns
from fla_decode.step import Tiling, choose_tiling

KEY_CHANNELS, BATCHES = (128, 96, 64, 32), (1, 8, 64, 128, 256)
# One case of each layout of the state: what is best for one of a layout is taken for the others.
LAYOUTS = {"v-first": CASES[3], "k-first": CASES[0]}


def compare(tilings: dict[tuple[bool, int], Tiling], ceiling: float, rounds: int) -> list[dict]:
    """Time ours, fla's and a copy of the state in turns, for each case, K and batch size; return a row for each."""
    rows = []
    for B, K, case in itertools.product(sorted(BATCHES, key=lambda B: B < 64), KEY_CHANNELS, CASES):
        tiling = tilings.get((case.state_v_first, K)) if B >= 64 else None
        tiling = tiling or choose_tiling(K, V, heads=B * H, state_v_first=case.state_v_first)
        sets = rotating(case, B, K)
        calls = {"ours": partial(step_of, sets, tiling), "fla": partial(fla_of, case, sets)}
        calls["copy"] = lambda index, sets=sets: sets[index]["state"].clone()
        times = time_in_turns(calls, len(sets), rounds=rounds)
        us = {name: median(values) for name, values in times.items()}
        floor = moved_bytes(case, B, K) / ceiling * 1e6
        row = dict(case=case.name, K=K, B=B, tiling=tiling, us=us["ours"], fla_us=us["fla"], copy_us=us["copy"])
        row |= dict(share=floor / us["ours"], fla_share=floor / us["fla"])
        row |= dict(zip(("speedup", "speedup_low", "speedup_high"), speedup(times["ours"], times["fla"]), strict=True))
        rows.append(row)
        say(
            f"{case.name:40} B={B:3} K={K:3} ours {us['ours']:7.1f} us {row['share']:6.1%}  fla {us['fla']:7.1f} us "
            f"{row['fla_share']:6.1%}  x{row['speedup']:.3f} ({row['speedup_low']:.3f}-{row['speedup_high']:.3f})  "
            f"copy {us['copy']:7.1f} us  {tuple(tiling)}"
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
        ceiling = copy_speed()
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
