"""benchmarks/training_study.py, with a tiny model on a CPU."""

import json
from itertools import product
from pathlib import Path

import pytest

FULL = "full-distilled:lr=0.003,batch_size=2,seq_len=40"
LORA = "lora:lr=0.003,rank=2,batch_size=1,seq_len=40"


@pytest.fixture
def script(study, tmp_path):
    """A function: run the script with arguments, and return the folder of the runs."""
    module, run = study("training_study")

    def run_into(*arguments: str) -> Path:
        run("--output", tmp_path / "out", *arguments)
        return tmp_path / "out"

    run_into.module = module
    return run_into


def test_each_run_is_made_once_and_all_are_in_the_table(script, capsys, monkeypatch):
    out = script("--ratios", "0.5", "--tokens", "160", "320", "--kinds", FULL, LORA)
    runs = {path.relative_to(out).as_posix(): json.loads(path.read_text()) for path in out.glob("*/*.json")}
    assert {(run["repair"], run["kind"], run["tokens"]) for run in runs.values()} == {
        *((repair, None, 0) for repair in ("none", "least-squares")),
        *product(("none", "least-squares"), (FULL, LORA), (160, 320)),
    }
    distilled = runs["rrqr-0.5-least-squares-0/full-distilled_lr_0.003_batch_size_2_seq_len_40-320.json"]
    assert distilled["trained_tokens"] == 320 and len(distilled["losses"]) == 4
    assert distilled["options"]["lr"] == 0.003 and distilled["options"]["distill_weight"] == 1
    (row,) = [line for line in capsys.readouterr().out.splitlines() if f"| least-squares | {FULL} |" in line]
    dense = json.loads((out / "dense.json").read_text())["perplexity"]
    at_start = runs["rrqr-0.5-least-squares-0/start.json"]["perplexity"]
    rises = [f"{100 * (value / dense - 1):+.1f}%" for value in (at_start, distilled["perplexity"])]
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[1:4] == ["rrqr", "50%", "least-squares"] and (cells[5], cells[7]) == tuple(rises)

    # Cut off, it makes what is missing alone.
    lost = out / "rrqr-0.5-none-0/lora_lr_0.003_rank_2_batch_size_1_seq_len_40-160.json"
    lost.unlink()
    made = []
    run_one = script.module.run_one
    monkeypatch.setattr(script.module, "run_one", lambda *arguments: made.append(arguments) or run_one(*arguments))
    script("--ratios", "0.5", "--tokens", "160", "320", "--kinds", FULL, LORA)
    assert len(made) == 1
    assert json.loads(lost.read_text())["perplexity"] == runs[lost.relative_to(out).as_posix()]["perplexity"]
    script("--table")
    assert len(made) == 1 and FULL in capsys.readouterr().out


def test_processes_share_the_runs(script, capsys):
    out = script("--ratios", "0.5", "--repairs", "none", "--tokens", "80", "--kinds", FULL, LORA, "--jobs", "2")
    logs = [(out / f"{number}.log").read_text() for number in range(2)]
    for name in ("full-distilled", "lora"):
        assert sum(log.count(f"rrqr-0.5-none-0/{name}_") for log in logs) == 1
    assert "failed" not in capsys.readouterr().out


def test_a_run_that_diverges_stops_no_other(script, capsys):
    diverging = "full:lr=1e30,batch_size=1,seq_len=40"
    out = script("--ratios", "0.5", "--repairs", "none", "--tokens", "160", "--kinds", diverging, LORA)
    assert "NaN or inf" in capsys.readouterr().out
    assert [json.loads(path.read_text())["kind"] for path in out.glob("*/*-160.json")] == [LORA]


def test_runs_of_another_process_are_left_to_it(script, tmp_path):
    path = tmp_path / "a/run.json"
    with script.module.claimed(path, wait=False) as first, script.module.claimed(path, wait=False) as second:
        assert first and not second
    with script.module.claimed(path, wait=False) as again:
        assert again


def test_another_model_or_text_needs_another_folder(script, tmp_path):
    arguments = ("--ratios", "0.5", "--repairs", "none", "--tokens", "80", "--kinds", LORA)
    script(*arguments)
    (tmp_path / "heldout.jsonl").write_text('{"text": "of another kind"}\n' * 100)
    with pytest.raises(SystemExit, match="of another model or other text"):
        script(*arguments)
