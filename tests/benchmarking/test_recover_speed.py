"""benchmarks/recover_speed.py, with a tiny model on a CPU."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from tiny_models import COMMON


def test_the_parts_of_a_recovery_are_timed_and_added_up(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    module = importlib.import_module("recover_speed")
    (tmp_path / "tiny.json").write_text(json.dumps({**COMMON, "model_type": "delta_net"}))
    words = ["--config", tmp_path / "tiny.json", "--num-batches", 2, "--batch-size", 2, "--seq-len", 70]
    words += ["--steps", 4, "--device", "cpu", "--output", tmp_path / "report.json"]
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, words)])
    module.main()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["layers"] == 2
    (way,) = report["ways"].values()
    assert way["error_last"] > 0 and way["computing"] > 0  # the time of a step is a difference, which noise can invert
    assert way["kernels"] == sorted(way["kernels"], key=lambda one: -one["seconds"])
    gathered = sum(report["gather"]["device"].values())
    parts = way["recovery"]
    assert parts["steps"] == pytest.approx(2 * 512 * way["step"])
    assert parts["gather"] == pytest.approx(2 * gathered)
    assert parts["all"] == pytest.approx(sum(parts[name] for name in ("gather", "least_squares", "steps", "besides")))
    assert f"| float32 | {1e3 * way['step']:.2f} |" in capsys.readouterr().out
