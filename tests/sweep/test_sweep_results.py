"""Figures of a sweep against numpy, and the Pareto front against its definition."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_sweep import DENSE, factor, make_up, speedup

from keyreduce.errors import KeyreduceError
from keyreduce.sweep.results import pareto_front, read_results


def test_figures_are_means_and_spreads_over_seeds(tmp_path):
    results = read_results(make_up(tmp_path))
    assert results.dense == {model: (cost, cost / 4) for model, cost in DENSE.items()}
    assert len(results.rows) == 2 * 3 * 3 * 2
    methods = list(dict.fromkeys(row.label for row in results.rows))
    assert methods == ["rrqr", "wanda", "taylor (form squared)"]
    for row in results.rows:
        repaired = row.repair != "none"
        factors = np.array([factor(methods.index(row.label), row.ratio, repaired, seed) for seed in range(3)])
        assert row.seeds == 3
        assert row.perplexity == pytest.approx(DENSE[row.model] * factors.mean())
        assert row.perplexity_spread == pytest.approx(DENSE[row.model] * factors.std(ddof=1))
        assert (row.increase, row.increase_spread) == pytest.approx((factors.mean() - 1, factors.std(ddof=1)))
        assert row.bits_per_byte == pytest.approx(DENSE[row.model] * factors.mean() / 4)
        # What prune took, seed by seed, and what recover took.
        assert (row.seconds, row.seconds_spread) == pytest.approx((2.0 + (10.0 if repaired else 0.0), 1.0))
        assert row.state == pytest.approx(1 - row.ratio)
        # Of decoding, the whole model with the most sequences.
        assert row.mixer_speedup == row.decode_speedup == speedup(row.ratio)
    assert results.kinds == ["mixer", "decode"]
    assert (results.failed, results.waiting) == ({}, [])


def test_a_cuda_graph_is_what_decoding_is_judged_by(tmp_path):
    root = make_up(tmp_path, ratios=(0.5,), repairs=("none",), seeds=(0,), methods=("l1",), models=("one-model",))
    (path,) = root.glob("runs/*/result.json")
    result = json.loads(path.read_text())
    for entry in result["steps"]["benchmark"]["result"]["decode"]:
        if entry["label"] == "pruned" and entry["scope"] == "model":
            entry["graph"] = {"speedup": {"median": 7.0}}
    path.write_text(json.dumps(result))
    (row,) = read_results(root).rows
    assert row.decode_speedup == 7.0


def test_speed_is_that_of_the_sizes_whatever_chose_them(tmp_path):
    ways = {"ratios": (0.5,), "repairs": ("none",), "methods": ("l1", "l2", "random"), "models": ("one-model",)}
    root = make_up(tmp_path, seeds=(0,), kinds=("mixer",), **ways)
    for path, speed in zip(sorted(root.glob("runs/*/result.json")), (1.0, 9.0, 2.0), strict=True):
        result = json.loads(path.read_text())
        result["steps"]["benchmark"]["result"]["mixer"][1]["speedup"]["median"] = speed
        path.write_text(json.dumps(result))
    rows = read_results(root).rows
    expected = [(2.0, pytest.approx(np.std([1, 9, 2], ddof=1)))] * 3
    assert [(row.mixer_speedup, row.mixer_speedup_spread) for row in rows] == expected


def test_runs_that_failed_or_are_not_done(tmp_path):
    root = make_up(tmp_path, seeds=(0, 1), models=("one-model",))
    gone, failed = sorted(root.glob("runs/*-0.25-none-*"))[:2]
    (gone / "result.json").unlink()
    (failed / "result.json").unlink()
    (failed / "failure.json").write_text('{"message": "it was too hot"}')
    results = read_results(root)
    assert len(results.failed) == len(results.waiting) == 1
    assert list(results.failed.values()) == ["it was too hot"]
    assert len(results.rows) == 3 * 3 * 2 - 1  # both were the seeds of one way
    (root / "dense/one-model/result.json").unlink()
    assert read_results(root).rows == []  # without the dense model there is nothing to compare with


@pytest.mark.parametrize("cost", [math.inf, math.nan])
def test_a_single_seed_has_no_spread_and_a_perplexity_that_is_not_finite_neither(tmp_path, cost):
    ways = {"ratios": (0.5,), "repairs": ("none",), "methods": ("l1", "l2"), "models": ("one-model",)}
    root = make_up(tmp_path, seeds=(0, 1), **ways)
    (root / "runs/one-model-key-0-0.5-none-1/result.json").unlink()
    damaged = root / "runs/one-model-key-1-0.5-none-1/result.json"
    result = json.loads(damaged.read_text())
    result["steps"]["eval"]["result"]["models"][0]["perplexity_per_token"] = cost
    damaged.write_text(json.dumps(result))
    one, other = read_results(root).rows
    assert (one.seeds, one.perplexity) == (1, 10.0) and math.isnan(one.perplexity_spread)
    assert (other.seeds, str(other.perplexity)) == (2, str(cost)) and math.isnan(other.perplexity_spread)
    assert [row["perplexity"]["spread"] for row in read_results(root).to_json()["rows"]] == [None, None]


@pytest.mark.parametrize(
    "content", ['{"steps": {}}', '{"steps": {"eval": {"result": {"models": []}}}}', "{}", '{"steps": 3}']
)
def test_a_result_that_is_damaged(tmp_path, content):
    root = make_up(tmp_path, seeds=(0,), models=("one-model",))
    next(root.glob("runs/*/result.json")).write_text(content)
    with pytest.raises(KeyreduceError, match="is damaged; remove that folder"):
        read_results(root)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_the_front_is_what_nothing_beats(points):
    front = pareto_front(points)
    chosen = [points[number] for number in front]
    assert chosen == sorted(chosen)

    def beaten(gain, cost) -> bool:
        return any(g >= gain and c <= cost and (g, c) != (gain, cost) for g, c in points)

    assert set(chosen) == {point for point in points if not beaten(*point)}
    assert len(set(chosen)) == len(chosen)
