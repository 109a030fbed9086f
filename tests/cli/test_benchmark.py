"""``keyreduce benchmark``, on tiny models."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import build, save

from keyreduce.benchmarking.metrics import Roofline

QUICK = ("--batch-size", 1, "--seq-len", 8, "--rounds", 2)
REPORT = Path("keyreduce-out/benchmark.json")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A device of 1 GB/s and 1 GFLOP/s, without measuring; a small cache; one thread."""
    monkeypatch.setattr("keyreduce.benchmarking.steps.copies_past_cache", lambda size, device, at_most=64: 2)
    monkeypatch.setattr("keyreduce.benchmarking.report.measure_roofline", lambda device, dtype: Roofline(1e9, 1e9))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pruned(tmp_path):
    """A model as ``prune`` leaves one, with a record of where it came from that says nothing."""
    folder = save(build("delta_net", expand_k=0.5), tmp_path / "pruned")
    (folder / "keyreduce.json").write_text("{}")
    return folder


def test_dense_and_pruned_side_by_side(keyreduce, tiny_folder, pruned):
    result = keyreduce("benchmark", *QUICK, "--model", tiny_folder("delta_net"), "--compressed", pruned, "--json")
    report = result.json()
    assert report == json.loads(REPORT.read_text())
    assert [(entry["label"], entry["head_k_dim"]) for entry in report["mixer"]] == [("dense", 16), ("pruned", 8)]
    assert report["models"][1]["folder"] == str(pruned)
    for told in (
        "one mixer layer, 1 x 8 tokens",
        "dense / pruned",
        "head_k_dim",
        "2.00x",
        "TFLOP/s",
        "compiled and tuned",
    ):
        assert told in result.err


def test_all_kinds_in_one_call(keyreduce, tiny_folder):
    result = keyreduce(
        "benchmark", "--mixer", "--forward", "--decode", "--train-step", "--scaling", "16,8,4", *QUICK,
        "--model", tiny_folder("gated_deltanet"), "--decode-batch-sizes", "1,2", "--max-batch-size", 2,
        "--plot", "figures.png", "--json",
    )  # fmt: skip
    report = result.json()
    assert [entry["label"] for entry in report["models"]] == ["16x24", "8x24", "4x24"]
    assert [len(report[kind]) for kind in ("mixer", "forward", "train_step", "decode")] == [3, 3, 3, 2 * 3 * 3]
    assert Path("figures.png").read_bytes().startswith(b"\x89PNG")
    for told in (
        "the whole model, 1 x 8 tokens", "a step of training", "decoding, the delta-rule operator alone, 2 sequences",
        "launched by Python:", "times floor", "the largest batch that fits", "bound",
    ):  # fmt: skip
        assert told in result.err
    assert "CUDA graph" not in result.err


def test_scaling_takes_a_config_alone(keyreduce, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(build("delta_net").config.to_dict()))
    for path in (config, tmp_path):
        report = keyreduce("benchmark", "--scaling", "8", "--config", path, *QUICK, "--json").json()
        assert [(entry["label"], entry["folder"]) for entry in report["models"]] == [("8x16", None)]


def test_time_per_token_of_pairs_of_sizes(keyreduce, tiny_folder):
    given = ("benchmark", *QUICK, "--mixer", "--model", tiny_folder("delta_net"), "--decode-batch-sizes", "1,3")
    result = keyreduce(*given, "--scaling", "16,8x12", "--plot", "figures.svg", "--json")
    report = result.json()
    full, cut = report["per_token"]
    assert [(entry["label"], entry["head_k_dim"], entry["head_v_dim"]) for entry in (full, cut)] == [
        ("16x16", 16, 16), ("8x12", 8, 12),
    ]  # fmt: skip
    # Two layers of two heads, 4 bytes a number.
    assert [entry["state_bytes_per_sequence"] for entry in (full, cut)] == [16 * 16 * 16, 16 * 8 * 12]
    assert [entry["state_bytes_per_sequence"] for entry in report["models"]] == [16 * 16 * 16, 16 * 8 * 12]
    for entry, passed in zip((full, cut), report["mixer"], strict=True):
        (prefill,) = entry["prefill"]
        assert prefill["seconds_per_token"]["median"] == pytest.approx(passed["latency_seconds"]["median"] / 8)
        assert [step["batch_size"] for step in entry["decode"]] == [1, 3]
        assert all(step["seconds_per_step"]["median"] > 0 for step in entry["decode"])
    assert "decode" not in report
    for text in ("microseconds a token in a prefill, and a decoding step", "8x12", "head_v_dim", "decode step, 3"):
        assert text in result.err
    assert "8x12" in Path("figures.svg").read_text()


def test_no_tokenizer_is_needed(keyreduce, tiny_copy):
    folder = tiny_copy()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert keyreduce("benchmark", *QUICK, "--model", folder).code == 0


def test_layers_that_differ_are_told(keyreduce, tmp_path):
    config = build("delta_net_2").config.to_dict() | {"expand_k": [0.5, 1.0]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    folder = save(build("delta_net_2", expand_k=[0.5, 1.0]), tmp_path / "uneven")
    told = keyreduce("benchmark", *QUICK, "--model", folder)
    assert told.code == 0
    assert "dense: its layers differ in size; where one layer is timed, that is layer 0" in told.out
    assert "differ" not in keyreduce("benchmark", "--scaling", "8", *QUICK, "--config", tmp_path).out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scaling", "8,x"), "--scaling has 'x'; a size is K or KxV, in whole numbers from 1, such as 96 or 96x104"),
        (("--scaling", "8x8x8"), "--scaling has '8x8x8'; a size is K or KxV"),
        (("--scaling", "8,0x8"), "--scaling has '0x8'; a size is K or KxV"),
        (("--scaling", ""), "--scaling has ''; a size is K or KxV"),
        (("--scaling", "8,8x4,8x16"), "--scaling names 8x16 twice"),
        (("--seq-len", ""), "--seq-len has '', where whole numbers"),
        (("--config", "config.json"), "--config is for --scaling"),
        (("--scaling", "8", "--config", "nowhere"), "there is no file nowhere"),
        (("--plot", "figures.txt"), "--plot is figures.txt; its name ends in .png, .svg or .pdf"),
        (("--batch-size", 10**9), "a batch of 1000000000 x 8 tokens needs more memory than there is"),
        (("--decode", "--decode-batch-sizes", 10**9), "decoding 1000000000 sequences needs more memory"),
        (("--forward", "--seq-len", 10**9), "a batch of 1 x 1000000000 tokens needs more memory"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(keyreduce, tiny_folder, arguments, message):
    result = keyreduce("benchmark", *QUICK, "--model", tiny_folder("delta_net"), *arguments)
    assert (result.code, result.out) == (2, "")
    last = result.err.strip().splitlines()[-1]
    assert message in last
    assert "Traceback" not in result.err
    assert list(Path().iterdir()) == []


def test_what_exists_is_not_replaced_unasked(keyreduce, tiny_folder):
    given = ("benchmark", *QUICK, "--model", tiny_folder("delta_net"))
    for option in ("--output", "--plot"):
        path = Path("figures.svg")
        path.write_text("mine")
        result = keyreduce(*given, option, path)
        assert result.code == 2
        assert "--overwrite" in result.err
        assert path.read_text() == "mine"
        assert keyreduce(*given, option, path, "--overwrite").code == 0
        assert path.read_text() != "mine"


def test_prune_and_benchmark_take_their_folder_from_the_same_variable(keyreduce, tiny_folder, monkeypatch):
    monkeypatch.setenv("OUTPUT_DIR", "elsewhere")
    assert keyreduce("prune", "--method", "l2", "--ratio", 0.5, "--model", tiny_folder("delta_net")).code == 0
    models = keyreduce("benchmark", *QUICK, "--json").json()["models"]
    assert [(entry["label"], Path(entry["folder"]).name) for entry in models][1:] == [("pruned", "elsewhere")]


def test_a_dense_model_that_is_another_one_is_refused_unless_it_is_meant(keyreduce, tiny_folder, tmp_path):
    assert keyreduce("prune", "--method", "l2", "--ratio", 0.5, "--model", tiny_folder("delta_net")).code == 0
    given = ("benchmark", *QUICK, "--model", save(build("delta_net", initializer_range=0.05), tmp_path / "other"))
    result = keyreduce(*given)
    assert result.code == 2 and "was not made from" in result.err and "--unrelated" in result.err
    assert keyreduce(*given, "--unrelated").code == 0


def test_decoding_is_timed_in_the_scopes_that_are_named(keyreduce, tiny_folder):
    given = ("benchmark", *QUICK, "--decode", "--decode-batch-sizes", 1, "--max-batch-size", 1)
    given += ("--scaling", 8, "--model", tiny_folder("delta_net"), "--json")
    assert [entry["scope"] for entry in keyreduce(*given, "--scopes", "mixer,model").json()["decode"]] == [
        "mixer", "model",
    ]  # fmt: skip
    assert "--scopes is 'head'; take one of model, mixer, operator" in keyreduce(*given, "--scopes", "head").err
