"""The script that times the decode kernel, with made-up times: what it compares, chooses and prints."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from keyreduce.benchmarking.timing import RoundTimes

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "flash-linear-attention/decode_benchmark.py"
SPEC = importlib.util.spec_from_file_location("decode_benchmark", SCRIPT)
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)

GATED = bench.CASES["gated-delta-net"]
CEILING = 3e12


def size(dtype, case=GATED, K=80, V=104):
    return bench.Size(case, K, V, dtype)


@pytest.fixture
def made_up(monkeypatch):
    """No GPU: no tensors are drawn, and a call takes as many microseconds as ``seconds`` says of its name."""
    us = {"fla": 100.0, "copy 2": 45.0, "copy 1": 24.0, "ours torch.bfloat16": 50.0, "ours torch.int8": 30.0}

    def time_in_turns(calls, *, rounds):
        def of(name):
            # A tiling: the fewer letters its policies have, the faster, and one kind is faster than all others.
            return us.get(name) or (60.0 + len(str(tuple(name)))) / (2 if "True, 16, 4" in str(tuple(name)) else 1)

        return {name: RoundTimes((1e-6 * of(name),) * rounds) for name in calls}

    monkeypatch.setattr(bench, "time_in_turns", time_in_turns)
    monkeypatch.setattr(bench, "rotating", lambda *_: [{}])
    monkeypatch.setattr(bench, "copying", lambda size, B, count: bench.Call(None, [{}] * count))
    return us


def test_bytes_of_a_state_count_the_scales_of_int8():
    numbers = 64 * 16 * 80 * 104
    assert size(torch.float32).state_bytes(64) == 4 * numbers
    assert size(torch.bfloat16).state_bytes(64) == 2 * numbers
    assert size(torch.int8).state_bytes(64) == numbers + 64 * 16 * 104 * 4
    # Besides the state, read and written: query, key, value and output, beta and the gate, in bfloat16.
    assert size(torch.int8).moved_bytes(1) == 2 * 16 * 104 * 84 + 16 * 2 * (2 * 80 + 2 * 104 + 2)


def test_each_format_is_set_against_a_copy_of_its_own_bytes(made_up):
    sizes = [size(dtype) for dtype in (torch.bfloat16, torch.int8)]
    rows = list(bench.compare(sizes, (64, 256), {}, CEILING, rounds=7))
    assert [(row["B"], row["state_dtype"]) for row in rows] == [
        (B, name) for B in (64, 256) for name in ("bfloat16", "int8")
    ]
    half, byte = rows[:2]
    assert (half["us"], half["speedup"], half["of_copy"]) == pytest.approx((50, 2, 0.9))
    assert (byte["us"], byte["speedup"], byte["of_copy"]) == pytest.approx((30, 100 / 30, 0.8))
    assert byte["share"] == pytest.approx(size(torch.int8).moved_bytes(64) / CEILING / 30e-6)
    assert half["tiling"] == size(torch.bfloat16).tiling(64)
    assert [bench.falls_short(row) for row in rows] == [False, True, False, True]
    lines = list(bench.table(rows, ["bfloat16", "int8"]))
    assert lines[2].startswith(f"| {GATED.name} | bfloat16 | 80 | 104 | 50.0 |")
    assert len(lines) == 2 + 2 + 2


def test_the_best_tiling_is_used_where_there_was_a_search(made_up):
    best = bench.Tiling(8, 1)
    rows = list(bench.compare([size(torch.bfloat16)], (1, 64), {size(torch.bfloat16): best}, CEILING, rounds=6))
    # Small batches have tilings of their own.
    assert [row["tiling"] == best for row in rows] == [True, False]
    assert [row["B"] for row in rows] == [64, 1]


@pytest.mark.parametrize("dtype", bench.DTYPES.values())
@pytest.mark.parametrize("name", bench.CASES)
@pytest.mark.parametrize("K", [32, 57, 80, 96, 128])
def test_the_search_tries_tilings_that_fit(dtype, name, K):
    shapes = list(bench.shapes_of(size(dtype, bench.CASES[name], K)))
    assert shapes and len(set(shapes)) <= len(shapes) < 100
    for tiling in shapes:
        assert 16 <= tiling.width * -(-K // tiling.width) * tiling.block_v / (32 * tiling.warps) <= bench.MAX_NUMBERS
        assert tiling.width % tiling.run == 0


def test_a_search_goes_on_with_the_fastest(made_up, monkeypatch):
    class Here:
        map = staticmethod(lambda function, works, **_: map(function, works))

    monkeypatch.setattr(bench, "check_tiling", lambda work: "wrong" if work[1].warps == 2 else None)
    monkeypatch.setattr(bench, "finals", lambda size, B, tilings, ceiling: [tilings[0]])
    best, rows = bench.search([size(torch.int8)], (64, 256), Here, CEILING)
    tiling = best[size(torch.int8)]
    assert rows == [tiling, tiling]
    # These are the ones that were made fast; of all cache policies the shortest name is the fastest.
    assert (tiling.width, tiling.run, tiling.overlaps) == (16, 4, True)
    assert tiling.warps != 2 and (tiling.reads, tiling.writes) == ("", "")


SEARCHES = sorted((REPOSITORY / "benchmarks/decode").glob("search*.json"))


@pytest.mark.parametrize("path", SEARCHES, ids=lambda path: path.stem)
def test_the_page_of_results_has_the_tables_of_the_committed_ones(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--table", str(path)])
    bench.main()
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 2 + len({(row["size"], row["B"]) for row in json.loads(path.read_text())["search"]})
    assert "\n".join(lines) in (REPOSITORY / "docs/results.md").read_text()


def test_the_page_of_results_has_every_row_of_the_formats():
    page = (REPOSITORY / "docs/results.md").read_text()
    rows = json.loads((REPOSITORY / "benchmarks/decode/formats.json").read_text())["comparison"]
    for row in rows:
        size = f"| {row['case']} | {row['state_dtype']} | {row['K']} x {row['V']} | {row['B']} | {row['us']:.1f} |"
        assert f"{size} {row['of_copy']:.0%} | {row['fla_us']:.1f} | {row['speedup']:.2f} |" in page
