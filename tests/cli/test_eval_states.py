"""``keyreduce eval --state-dtype``: what it prints and writes, and what it refuses."""

import json
from pathlib import Path

import pytest

from keyreduce.api import evaluate
from keyreduce.api.evaluate import EvaluateRequest
from keyreduce.errors import KeyreduceError

SIZES = ("--num-batches", 1, "--batch-size", 2, "--seq-len", 100)


@pytest.fixture
def eval_tiny(keyreduce, tiny_folder):
    """A function: run eval on a tiny model."""

    def run(*arguments: object, model_type: str = "gated_deltanet"):
        return keyreduce("eval", "--model", tiny_folder(model_type), *SIZES, *arguments)

    return run


def test_what_is_printed_and_written(eval_tiny):
    recall = ("--recall", "mqar", "--recall-lengths", 64, "--recall-pairs", 2, "--recall-probes", 2)
    result = eval_tiny("--state-dtype", "int8,float32,bfloat16", *recall, "--json")
    report = result.json()
    assert json.loads(Path("keyreduce-out/eval.json").read_text()) == report
    (entry,) = report["models"]
    precision = entry["precision"]
    assert precision["chunk"] is None
    exact, int8, bfloat16 = precision["states"]
    assert [state["dtype"] for state in (exact, int8, bfloat16)] == ["float32", "int8", "bfloat16"]
    # Two layers of 4 heads of 12 x 24.
    assert [state["bytes_per_sequence"] for state in (exact, int8, bfloat16)] == [9216, 2304 + 4 * 192, 4608]
    assert exact["perplexity_per_token"] == entry["perplexity_per_token"]
    assert exact["recall"] == entry["recall"] != int8["recall"]
    assert int8["recall"]["mqar"][0]["answers"] == 4
    assert [(part["start"], part["end"]) for part in int8["drift"]] == [(1, 64), (64, 100)]
    assert [(head["layer"], head["head"]) for head in precision["heads"]] == [(n // 4, n % 4) for n in range(8)]
    told = " ".join(result.err.split())
    assert "dense: the state rounded after each token" in told
    assert "state in of a sequence perplexity over float32 mqar, right" in told
    assert "1 to 63 64 to 99" in told and "memory, tokens int8 bfloat16" in told
    assert f"int8 {int8['drift'][0]['difference']:+.4f} {int8['drift'][1]['difference']:+.4f}" in told


def test_both_models_are_measured_in_chunks(keyreduce, tiny_folder, eval_tiny):
    assert keyreduce("prune", "--model", tiny_folder("gated_deltanet"), "--method", "l1", "--ratio", 0.5).code == 0
    report = eval_tiny("--state-dtype", "fp8", "--state-chunk", 32, "--json").json()
    dense, pruned = (entry["precision"] for entry in report["models"])
    assert dense["chunk"] == 32
    assert pruned["states"][0]["bytes_per_sequence"] == dense["states"][0]["bytes_per_sequence"] / 2
    assert "the state rounded after every 32 tokens" in eval_tiny("--state-dtype", "fp8", "--state-chunk", 32).out


def test_auto_writes_a_format_for_each_head(eval_tiny):
    report = eval_tiny("--state-dtype", "auto,int4", "--state-tolerance", 0.1, "--json").json()
    *_, int4, auto = report["models"][0]["precision"]["states"]
    assert (int4["dtype"], auto["dtype"]) == ("int4", "auto")
    assert [entry["layer"] for entry in auto["choice"]] == [0, 1]
    assert all(len(entry["formats"]) == 4 for entry in auto["choice"])
    assert auto["perplexity_increase"] <= 0.1
    alone = eval_tiny("--state-dtype", "auto", "--json").json()["models"][0]["precision"]["states"]
    assert [state["dtype"] for state in alone] == ["float32", "bfloat16", "float16", "fp8", "int8", "auto"]


def test_rows_of_32k_tokens(keyreduce, tiny_folder):
    arguments = ("--num-batches", 1, "--batch-size", 1, "--seq-len", 32768, "--state-chunk", 4096)
    report = keyreduce(
        "eval", "--model", tiny_folder("delta_net"), *arguments, "--state-dtype", "int8", "--json"
    ).json()
    drift = report["models"][0]["precision"]["states"][1]["drift"]
    assert (drift[-1]["start"], drift[-1]["end"], drift[-1]["predictions"]) == (16384, 32768, 16384)
    assert drift[0]["difference"] == 0 != drift[-1]["difference"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--state-dtype", "int3"), "--state-dtype is 'int3'; take one of float32, bfloat16"),
        (("--state-dtype", "int8,"), "--state-dtype is ''"),
        (("--state-chunk", 8), "--state-chunk says when the state is rounded: give --state-dtype too"),
        (("--state-dtype", "int8", "--state-chunk", 0), "--state-chunk is 0; it is at least 1"),
        (("--state-dtype", "auto", "--state-tolerance", -1), "--state-tolerance is -1.0; it is at least 0"),
    ],
)
def test_what_makes_no_sense_is_refused(eval_tiny, arguments, told):
    result = eval_tiny(*arguments)
    assert (result.code, result.out) == (2, "")
    assert told in result.err.splitlines()[-1]
    assert not Path("keyreduce-out").exists()


def test_auto_takes_one_process(monkeypatch, tmp_path, tiny_folder):
    monkeypatch.setattr(evaluate.Processes, "of_torchrun", lambda: evaluate.Processes(0, 2, 0))
    monkeypatch.setattr(evaluate.Processes, "gather", lambda self, work: [work()])
    with pytest.raises(KeyreduceError, match="`state_dtype` auto measures one choice after another"):
        evaluate.run(EvaluateRequest(model=str(tiny_folder("delta_net")), state_dtype=("auto",), work=tmp_path / "new"))
