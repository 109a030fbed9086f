"""benchmarks/recovery_study.py, with a tiny model on a CPU."""

import importlib
import json
import os
import sys
from itertools import product
from pathlib import Path

import pytest
from tiny_models import build, save

FULL = "full-distilled:lr=0.003,batch_size=2,seq_len=40"
LORA = "lora:lr=0.003,lora_rank=2,batch_size=1,seq_len=40"
FEW = ("--ratios", "0.5", "--repairs", "none", "--tokens", "80", "--kinds")


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A function: run the script on a tiny model and some text, with arguments, and return the folder of the runs."""
    folder = save(build("delta_net", initializer_range=0.05), tmp_path / "model")
    texts = {name: tmp_path / f"{name}.jsonl" for name in ("calibration", "heldout")}
    for name, path in texts.items():
        path.write_text("".join(f'{{"text": "{name} {n} is {n * n}, yes"}}\n' for n in range(100)))
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    module = importlib.import_module("recovery_study")
    given = ["--model", folder, *(word for name, path in texts.items() for word in (f"--{name}", path))]
    given += ["--num-batches", 1, "--batch-size", 2, "--seq-len", 40, "--device", "cpu", "--output", tmp_path / "out"]

    def run(*arguments: object) -> Path:
        monkeypatch.setattr(sys, "argv", [str(word) for word in (module.__file__, *given, *arguments)])
        module.main()
        return tmp_path / "out"

    run.module = module
    return run


def row_of(printed: str, *cells: str) -> list[str]:
    (row,) = [line for line in printed.splitlines() if line.startswith(f"| {' | '.join(cells)} |")]
    return [cell.strip() for cell in row.split("|")]


def test_repairs_alone_with_recall_over_seeds(script, capsys):
    repairs = ("none", "least-squares", "reconstruct:steps=1,lr=0.001")
    out = script("--ratios", 0.5, "--seeds", 0, 1, "--repairs", *repairs, "--kinds", "--recall")
    runs = {(run["seed"], run["repair"]): run for run in map(read, out.glob("*/start.json"))}
    assert runs.keys() == {(seed, repair) for seed in (0, 1) for repair in repairs}
    assert len({run["perplexity"] for run in runs.values()}) == 6
    assert set(runs[0, "least-squares"]["layers"]) == {"0", "1"}
    dense, printed = read(out / "dense.json"), capsys.readouterr().out
    rises = [100 * (runs[seed, "least-squares"]["perplexity"] / dense["perplexity"] - 1) for seed in (0, 1)]
    told = f"| rrqr | 50% | least squares |  | {sum(rises) / 2:+.2f} ± {abs(rises[0] - rises[1]) / 2:.1f}% |"
    assert told in printed
    assert f"mqar, right answers of eight; the dense model {100 * dense['recall']['mqar']:.1f}%" in printed


def test_each_run_is_made_once_and_all_are_in_the_table(script, capsys, monkeypatch):
    given = ("--ratios", "0.5", "--tokens", "160", "320", "--kinds", FULL, LORA)
    out = script(*given)
    runs = {path.relative_to(out).as_posix(): read(path) for path in out.glob("rrqr*/*.json")}
    assert {(run["repair"], run["kind"], run["tokens"]) for run in runs.values()} == {
        *((repair, None, 0) for repair in ("none", "least-squares")),
        *product(("none", "least-squares"), (FULL, LORA), (160, 320)),
    }
    distilled = runs["rrqr-0.5-least-squares-0/full-distilled_lr_0.003_batch_size_2_seq_len_40-320.json"]
    assert distilled["trained_tokens"] == 320 and distilled["options"]["num_batches"] == 4
    assert distilled["options"]["lr"] == 0.003 and distilled["options"]["distill_weight"] == 1
    dense = read(out / "dense.json")["perplexity"]
    at_start = runs["rrqr-0.5-least-squares-0/start.json"]["perplexity"]
    rises = [f"{100 * (value / dense - 1):+.2f}%" for value in (at_start, distilled["perplexity"])]
    cells = row_of(capsys.readouterr().out, "rrqr", "50%", "least squares", FULL)
    assert (cells[5], cells[7]) == tuple(rises)

    # Cut off, it makes what is missing alone.
    lost = out / "rrqr-0.5-none-0/lora_lr_0.003_lora_rank_2_batch_size_1_seq_len_40-160.json"
    lost.unlink()
    made = []
    recover = script.module.recover.run
    monkeypatch.setattr("keyreduce.api.recover.run", lambda request: made.append(request) or recover(request))
    script(*given)
    assert len(made) == 1
    assert read(lost)["perplexity"] == runs[lost.relative_to(out).as_posix()]["perplexity"]
    script("--table")
    assert len(made) == 1 and FULL in capsys.readouterr().out


def test_processes_share_the_runs(python, script, capsys, monkeypatch):
    monkeypatch.setattr("multiprocessing.spawn._python_exe", os.fsencode(python))
    out = script(*FEW, FULL, LORA, "--jobs", "2")
    assert {read(path)["kind"] for path in out.glob("rrqr*/*.json")} == {None, FULL, LORA}


def test_a_run_that_diverges_stops_no_other(script, capsys):
    out = script(*FEW, "full:lr=1e30,batch_size=1,seq_len=40", LORA)
    assert "NaN or inf" in capsys.readouterr().out
    assert [read(path)["kind"] for path in out.glob("*/*-80.json")] == [LORA]


def test_another_model_or_text_needs_another_folder(script, tmp_path):
    script(*FEW, LORA)
    (tmp_path / "heldout.jsonl").write_text('{"text": "of another kind"}\n' * 100)
    with pytest.raises(SystemExit, match="of another model, other text"):
        script(*FEW, LORA)


def read(path: Path) -> dict:
    return json.loads(path.read_text())
