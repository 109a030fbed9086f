"""``keyreduce eval``: what its options do, and what it reports."""

import json
import math
import shutil
from pathlib import Path

import pytest

from keyreduce.api import evaluate
from keyreduce.api.evaluate import EvaluateRequest
from keyreduce.api.request import Report
from keyreduce.cli import eval as command
from keyreduce.cli.console import Console
from keyreduce.errors import KeyreduceError

SIZES = ("--num-batches", 1, "--batch-size", 2, "--seq-len", 64)
RECALL = ("--recall-lengths", "128,200", "--recall-pairs", "2,40", "--recall-probes", 2)


@pytest.fixture
def eval_tiny(keyreduce, tiny_folder):
    """A function: run eval on a tiny model."""

    def run(*arguments: object):
        return keyreduce("eval", "--model", tiny_folder("delta_net"), *SIZES, *arguments)

    return run


def test_the_report_names_each_way(eval_tiny):
    report = eval_tiny("--json").json()
    (entry,) = report["models"]
    assert (report["seq_len"], report["stride"]) == (64, 64)
    assert entry["predictions"] == 2 * 63
    assert entry["perplexity_per_token"] == pytest.approx(math.exp(entry["nats"] / entry["predictions"]))
    assert entry["bits_per_byte"] == pytest.approx(entry["nats"] / math.log(2) / entry["bytes"])
    assert entry["perplexity_per_word"] == pytest.approx(math.exp(entry["nats"] / entry["words"]))
    told = eval_tiny().out
    assert all(
        way in " ".join(told.split()) for way in ("perplexity per token", "perplexity per word", "bits per byte")
    )
    assert "126 predictions in rows of 64 tokens" in told


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("perplexity_per_word", 14391.9008, "14,392"),
        ("perplexity_per_word", 139.19008, "139.19"),
        ("perplexity_per_word", 2.10081, "2.1008"),
        ("perplexity_per_word", 1e7, "1.000e+07"),
        ("perplexity_per_word", math.nan, "nan"),
        ("perplexity_per_token", 14391.90084, "14,391.9008"),
        ("bits_per_byte", 1.071, "1.0710"),
        ("perplexity_increase", 0.0482, "+4.8%"),
    ],
)
def test_figures_have_the_digits_that_mean_something(name, value, told):
    assert command._metric(name, value) == told


def test_a_difference_of_a_task_has_its_sign_and_no_more_digits():
    told = {12037.9558: "+12,038", 0.01234: "+0.0123", -139.19008: "-139.19"}
    assert {value: command._digits(value, "+") for value in told} == told


def test_a_stride_scores_fewer_tokens_of_each_row(eval_tiny):
    report = eval_tiny("--stride", 16, "--json").json()
    assert report["stride"] == 16
    assert report["models"][0]["predictions"] == 63 + 16
    assert "79 predictions in rows of 64 tokens, one every 16" in eval_tiny("--stride", 16).out


def test_documents_on_their_own(eval_tiny):
    Path("pages.jsonl").write_text('{"text": "one page"}\n{"text": "and another"}\n')
    arguments = ("--text", "pages.jsonl", "--by-document")
    result = eval_tiny(*arguments, "--json")
    report = result.json()
    assert (report["stride"], report["by_document"]) == (63, True)
    (entry,) = report["models"]
    assert (entry["predictions"], entry["bytes"], entry["words"]) == (19, 19, 4)
    assert "shorter than one sequence" not in result.err
    assert "rows of 64 tokens, one every 63, each document on its own" in eval_tiny(*arguments).out
    assert "below --seq-len, 64" in eval_tiny(*arguments, "--stride", 64).err


def test_text_without_a_space_has_no_perplexity_per_word(eval_tiny):
    Path("text.txt").write_text("x" * 500)
    entry = eval_tiny("--text", "text.txt", "--json").json()["models"][0]
    # The first row begins one word, at a cost that no float holds; the second begins none.
    assert (entry["words"], entry["perplexity_per_word"]) == (1, None)
    assert entry["perplexity_per_token"] > 1
    assert eval_tiny("--text", "text.txt").code == 0


def test_recall_is_measured_of_both_models(keyreduce, tiny_folder, eval_tiny):
    assert keyreduce("prune", "--model", tiny_folder("delta_net"), "--method", "l1", "--keep", 4).code == 0
    result = eval_tiny("--recall", "mqar,needle", *RECALL, "--seed", 3, "--json")
    report = result.json()
    assert json.loads(Path("keyreduce-out/eval.json").read_text()) == report
    assert report["recall"] == {
        "kinds": ["mqar", "needle"], "lengths": [128, 200], "pairs": [2, 40], "probes": 2, "seed": 3,
    }  # fmt: skip
    told = " ".join(result.err.split())
    assert "do not fit: mqar of 40 in 128 tokens, needle of 2 in 128 tokens, needle of 40" in told
    dense, cut = (entry["recall"] for entry in report["models"])
    for recall in (dense, cut):
        cells = {kind: [(cell["length"], cell["pairs"]) for cell in cells] for kind, cells in recall.items()}
        assert cells == {"mqar": [(128, 2), (200, 2), (200, 40)], "needle": [(200, 2)]}
        assert [cell["answers"] for cell in recall["mqar"]] == [4, 4, 80]
        assert [cell["depth"] for cell in recall["needle"][0]["depths"]] == [0, 1 / 3]
    assert dense["mqar"][2]["log_probability"] != cut["mqar"][2]["log_probability"]
    assert "a needle in a haystack, 2 sequences a row" in told
    again = eval_tiny("--recall", "needle", *RECALL, "--seed", 3, "--json").json()
    assert again["models"][0]["recall"]["needle"] == dense["needle"]
    assert again["models"][0]["nats"] == report["models"][0]["nats"]
    other = eval_tiny("--recall", "mqar", *RECALL, "--seed", 4, "--json").json()
    assert other["models"][0]["recall"]["mqar"] != dense["mqar"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--stride", 65), "--stride is 65; it is at least 1 and at most --seq-len, 64"),
        (("--stride", 0), "--stride"),
        (("--recall", "mqar,memory"), "--recall is 'memory'; take one of mqar, needle"),
        (("--recall", "mqar,mqar"), "--recall names nothing, or one thing twice"),
        (("--recall", "mqar", "--recall-lengths", "64,x"), "--recall-lengths has 'x', where whole numbers with commas"),
        (("--recall", "mqar", "--recall-lengths", "64,64"), "--recall-lengths names nothing, or one thing twice"),
        (("--recall", "mqar", "--recall-pairs", "0"), "--recall-pairs is 0; it is at least 1"),
        (("--recall", "mqar", "--recall-pairs", "17", "--recall-lengths", "64"), "no --recall-lengths has room for"),
        (("--recall", "needle", "--text", "short.txt"), "too few for a haystack of"),
    ],
)
def test_options_that_make_no_sense_are_refused(eval_tiny, arguments, told):
    Path("short.txt").write_text("too short for a haystack")
    result = eval_tiny(*arguments)
    assert (result.code, result.out) == (2, "")
    assert told in result.err.splitlines()[-1]
    assert not Path("keyreduce-out").exists()


def test_the_dense_model_is_the_one_that_was_pruned(keyreduce, tiny_folder, tiny_copy, eval_tiny):
    dense, other = tiny_folder("delta_net"), tiny_folder("gated_deltanet")
    for output, model in (("one", dense), ("two", "one")):
        assert keyreduce("prune", "--model", model, "--method", "l1", "--ratio", 0.25, "--output", output).code == 0
    for model in (other, "delta-net-5m"):
        refused = keyreduce("eval", "--model", model, "--compressed", "two", *SIZES)
        assert (refused.code, refused.out) == (2, "")
        assert f"two was not made from {model}" in refused.err and "pass --unrelated" in refused.err
        assert len(refused.err.splitlines()) == 1
    for model in (dense, "one", tiny_copy()):
        assert len(keyreduce("eval", "--model", model, "--compressed", "two", *SIZES, "--json").json()["models"]) == 2
    meant = keyreduce("eval", "--model", other, "--compressed", "two", "--unrelated", *SIZES, "--json").json()
    assert meant["models"][1]["perplexity_increase"] != 0


def test_the_variable_says_where_prune_wrote(monkeypatch, keyreduce, tiny_folder, eval_tiny):
    monkeypatch.setenv("OUTPUT_DIR", "apart")
    assert keyreduce("prune", "--model", tiny_folder("delta_net"), "--method", "l1").code == 0
    assert [entry["folder"] for entry in eval_tiny("--json").json()["models"]][1:] == ["apart"]


def test_a_dense_model_that_is_gone_is_asked_for(keyreduce, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder("delta_net"), tmp_path / "dense")
    assert keyreduce("prune", "--model", tmp_path / "dense", "--method", "l1", "--output", "cut").code == 0
    (tmp_path / "dense").rename(tmp_path / "moved")
    refused = keyreduce("eval", *SIZES, "--compressed", "cut")
    assert (refused.code, refused.out) == (2, "")
    assert f"cut was pruned from {tmp_path / 'dense'}, which is not found now; say where with --model" in refused.err
    assert keyreduce("eval", *SIZES, "--compressed", "cut", "--model", tmp_path / "moved").code == 0


def test_a_folder_of_models_or_one(monkeypatch, eval_tiny):
    refused = eval_tiny("--base", "many", "--compressed", "one")
    assert (refused.code, refused.out) == (2, "")
    assert "--base measures a folder of models and --compressed one: give one of the two" in refused.err
    monkeypatch.setenv("COMPRESSED_BASE", "many")
    assert "there is no model 'one'" in eval_tiny("--compressed", "one").err
    for name, value in {"TORCHELASTIC_RUN_ID": "one", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(KeyreduceError, match="leave out torchrun, and see `jobs`"):
        evaluate.run(EvaluateRequest(base=Path("many")))


def test_many_models_in_a_table(monkeypatch, capsys):
    """What is printed of the result; how it is made is in ``tests/api/test_many.py``."""
    monkeypatch.setenv("COLUMNS", "120")
    costs = {"perplexity_per_token": 4.0, "perplexity_per_word": 9.0, "bits_per_byte": 2.0, "perplexity_increase": 1.0}
    models = [
        {"name": "dense", "state": "kept", "message": "", "figures": {"perplexity_per_token": 2.0, "piqa acc": 0.5}},
        {"name": "deep/a", "state": "measured", "message": "", "figures": costs},
        {"name": "b", "state": "failed", "message": "it is too large", "figures": {}},
    ]

    made = Report(content={"base": "many", "models": models}, output=Path("eval.json"))
    monkeypatch.setattr(evaluate, "run", lambda request, reporter: made)
    with pytest.raises(KeyreduceError, match="1 of 3 models could not be measured, b among them: it is too large"):
        command.show(EvaluateRequest(base=Path("many")), Console(as_json=True))
    printed = capsys.readouterr()
    assert json.loads(printed.out) == made.to_json()
    rows = [line.split() for line in printed.err.splitlines() if line.strip()]
    assert rows[1] == ["perplexity", "over", "dense", "bits", "per", "byte", "piqa", "acc"]
    assert ["dense", "2.0000", "0.5000", "kept"] in rows
    assert ["deep/a", "4.0000", "+100.0%", "2.0000", "measured"] in rows
    assert ["b", "failed"] in rows and ["wrote", "eval.json"] in rows
