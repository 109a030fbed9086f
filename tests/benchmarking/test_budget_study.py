"""benchmarks/budget_study.py, with a tiny model on a CPU."""

import importlib
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from tiny_models import build, save

from keyreduce.data.text import FileText
from keyreduce.evaluation.recall import RecallSettings
from keyreduce.models.loading import load_model


def test_a_study_is_measured_once_and_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    module = importlib.import_module("budget_study")
    monkeypatch.setattr(module, "ROW", 40)
    monkeypatch.setattr(module, "RECALL", RecallSettings(("mqar",), (32,), (2,), 2, 0))
    folder, output = save(build("delta_net", initializer_range=0.05), tmp_path / "model"), tmp_path / "study.json"
    texts = {name: tmp_path / f"{name}.jsonl" for name in ("calibration", "heldout")}
    for name, path in texts.items():
        path.write_text("".join(f'{{"text": "{name} {n} is {n * n}, yes"}}\n' for n in range(400)))
    given = ["--model", folder, *(word for name, path in texts.items() for word in (f"--{name}", path))]
    given += ["--num-batches", 1, "--heldout-rows", 2, "--first-rows", 1, "--device", "cpu", "--state-dtypes", "int8"]
    given += ["--cuts", "key=0.5", "--repairs", "none", "least-squares", "--seeds", 0, 1]

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [str(word) for word in (module.__file__, *arguments)])
        module.main()

    run("--output", output, "--work", tmp_path / "work", *given)
    found = json.loads(output.read_text())
    runs = {(one["seed"], one["repair"]): one for one in found["runs"]}
    assert runs.keys() == {(seed, repair) for seed in (0, 1) for repair in ("none", "least-squares")}
    assert {tuple(one["sizes"]) for one in runs.values()} == {(2, 8, 16)}
    assert len({one["perplexity"] for one in runs.values()}) == 4
    assert all(one["perplexity"] != one["perplexity_first"] for one in runs.values())
    assert all(0 <= one["recall"]["mqar"] <= 1 for one in runs.values())
    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("it was measured already"))
    capsys.readouterr()
    run("--output", output, "--work", tmp_path / "work", *given)
    run("--table", output)
    base = found["dense"]["perplexity"]
    rises = [100 * (runs[seed, "least-squares"]["perplexity"] / base - 1) for seed in (0, 1)]
    assert f"| key=0.5 | 2, 8 x 16 | least squares | float32 | {sum(rises) / 2:+.2f} ±" in capsys.readouterr().out


def test_rows_of_a_text_that_lie_apart(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    module = importlib.import_module("budget_study")
    monkeypatch.setattr(module, "HELDOUT_ROW", 32)
    loaded = load_model(
        save(build("delta_net", initializer_range=0.05), tmp_path / "model"), torch.device("cpu"), torch.float32
    )
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "{n} is {n * n}, yes"}}\n' for n in range(200)))
    text = FileText([tmp_path / "text.jsonl"])

    def nats(number: int, every: int) -> list[float]:
        options = Namespace(heldout_rows=number, every=every, batch_size=2)
        return [row.nats for row in module.row_costs(options, loaded, text)]

    assert nats(4, 3) == pytest.approx(nats(10, 1)[::3], rel=1e-5)
