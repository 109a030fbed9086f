"""``keyreduce eval``: what its options do, and what it reports."""

import json
import math
from pathlib import Path

import pytest

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
        (("--recall", "mqar,memory"), "--recall 'memory' is unknown; take mqar or needle, or both with a comma"),
        (("--recall", "mqar,mqar"), "--recall names nothing, or one thing twice"),
        (("--recall", "mqar", "--recall-lengths", "64,x"), "--recall-lengths is '64,x'; give whole numbers"),
        (("--recall", "mqar", "--recall-lengths", "64,64"), "--recall-lengths names nothing, or one thing twice"),
        (("--recall", "mqar", "--recall-pairs", "0"), "--recall-pairs and --recall-probes are at least 1"),
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
