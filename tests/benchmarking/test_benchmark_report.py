import json

import pytest
import torch

from keyreduce.benchmarking import report as module
from keyreduce.benchmarking.metrics import Roofline, measure_roofline
from keyreduce.benchmarking.plot import draw_report, plot_report
from keyreduce.benchmarking.report import benchmark_report, total_rounds
from keyreduce.benchmarking.timing import RoundTimes
from keyreduce.errors import KeyreduceError

KINDS = ("mixer", "forward", "decode", "train_step")
SIZES = {"seq_lens": (5, 70), "decode_batch_sizes": (1, 2), "scopes": ("mixer",), "rounds": 2}
INPUTS = {**SIZES, "batch_size": 2, "max_batch_size": 4, "seed": 0}


@pytest.fixture
def quick_roofline(monkeypatch):
    """A device of 1 GB/s and 1 GFLOP/s, without measuring."""
    monkeypatch.setattr(module, "measure_roofline", lambda device, dtype: Roofline(1e9, 1e9))


@pytest.fixture
def report(pair, quick_roofline) -> dict:
    """All kinds of measurement of two tiny models."""
    return benchmark_report(pair, kinds=KINDS, **INPUTS)


def test_report_is_json_and_says_what_was_run(pair, quick_roofline):
    ticks = []
    report = benchmark_report(pair, kinds=KINDS, **INPUTS, progress=ticks.append)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert sum(ticks) == total_rounds(kinds=KINDS, **SIZES, device=torch.device("cpu")) == 2 * (2 + 2 + 2 + 2)
    settings = report["settings"]
    assert (settings["kinds"], settings["seq_len"], settings["decode_batch_sizes"]) == (list(KINDS), [5, 70], [1, 2])
    assert (settings["dtype"], settings["device_type"]) == ("float32", "cpu")
    assert "CPU" in settings["device"]
    assert torch.__version__.startswith(settings["versions"]["torch"])
    assert report["ceilings"] == {"bytes_per_second": 1e9, "flops_per_second": 1e9}
    for kind in ("mixer", "forward", "train_step"):
        assert [(entry["label"], entry["seq_len"]) for entry in report[kind]] == [
            (label, seq_len) for seq_len in (5, 70) for label in ("dense", "pruned")
        ]
    assert [(entry["batch_size"], entry["label"]) for entry in report["decode"]] == [
        (size, label) for size in (1, 2) for label in ("dense", "pruned")
    ]
    assert [entry["batch_size"] for entry in report["largest_batch"]] == [4, 4]
    assert [entry.get("state_ratio") for entry in report["models"]] == [None, 2.0]
    warmed = [entry for kind in ("mixer", "forward", "train_step") for entry in report[kind]]
    warmed += [entry["eager"] for entry in report["decode"]]
    assert report["warmup_seconds"] == pytest.approx(sum(entry["warmup_seconds"] for entry in warmed))


def test_the_mixer_is_decoded_once_for_its_time_per_token(pair, quick_roofline):
    for kinds, is_there in ((("mixer", "per_token"), False), ((*KINDS, "per_token"), True)):
        ticks = []
        report = benchmark_report(pair, kinds=kinds, **INPUTS, progress=ticks.append)
        assert ("decode" in report) == is_there
        assert sum(ticks) == total_rounds(kinds=kinds, **SIZES, device=torch.device("cpu"))
        assert sum(ticks) == 2 * (2 + 2 + (4 if is_there else 0))
        dense, pruned = report["per_token"]
        assert (dense["label"], pruned["label"]) == ("dense", "pruned")
        assert [(one["batch_size"], one["seq_len"]) for one in pruned["prefill"]] == [(2, 5), (2, 70)]
        assert [one["batch_size"] for one in pruned["decode"]] == [1, 2]
        assert report["warmup_seconds"] > sum(entry["warmup_seconds"] for entry in report["mixer"])
    # What the steps took is what was measured of them beside.
    steps = [entry for entry in report["decode"] if entry["label"] == "pruned"]
    assert [one["seconds_per_step"] for one in pruned["decode"]] == [one["eager"]["latency_seconds"] for one in steps]


def test_what_was_not_asked_for_is_not_there(pair, quick_roofline):
    report = benchmark_report(pair, kinds=["decode"], **INPUTS | {"max_batch_size": 0, "scopes": ["operator"]})
    assert not {"mixer", "forward", "train_step", "largest_batch"} & report.keys()
    assert {entry["scope"] for entry in report["decode"]} == {"operator"}


def test_what_cannot_be_trained_here_is_refused_before_anything_is_measured(pair, quick_roofline, monkeypatch):
    monkeypatch.setattr("keyreduce.models.miscompiled._is_affected", lambda device: True)
    monkeypatch.setattr("keyreduce.models.miscompiled._SMALL", 8)
    assert {(timed.sizes.head_k_dim, timed.sizes.head_v_dim) for timed in pair} == {(16, 16), (8, 16)}
    with pytest.raises(KeyreduceError, match=r"of heads of 8 x 16 channels may be wrong.*, or leave `train_step` out"):
        benchmark_report(pair, kinds=["mixer", "train_step"], **INPUTS, progress=pytest.fail)
    assert benchmark_report(pair, kinds=["mixer"], **INPUTS)["mixer"]


def test_memory_that_ends_is_one_line(pair, quick_roofline):
    with pytest.raises(KeyreduceError, match="needs more memory than there is; take a smaller batch size"):
        benchmark_report(pair, kinds=["mixer"], **INPUTS | {"batch_size": 10**30})


def test_the_roofline_is_that_of_a_copy_and_a_product(monkeypatch):
    ran = []

    def interleave(functions, device, **settings):
        ran.extend(functions)
        assert torch.isfinite(functions["product"]()).all()
        return {"copy": RoundTimes((0.5,)), "product": RoundTimes((2.0,))}

    monkeypatch.setattr("keyreduce.benchmarking.metrics.interleave", interleave)
    roofline = measure_roofline(torch.device("cpu"), torch.float32)
    assert ran == ["copy", "product"]
    assert roofline == (2 * (128 << 20) / 0.5, 2 * 1024**3 / 2.0)


def test_pictures_show_each_measurement(report, tmp_path):
    figure = draw_report(report)
    title, about = figure.get_suptitle().split("\n", 1)
    assert title == "delta_net: time and memory"  # the folder of both
    assert "CPU" in about and "float32" in about and "95% intervals" in about
    axes = {one.get_title(): one for one in figure.get_axes()}
    assert list(axes) == [
        "Speed on whole sequences",
        "Peak memory on whole sequences, beyond weights",
        "Decoding, one mixer layer\n(launched by Python)",
    ]
    speed, memory, _ = axes.values()
    assert (speed.get_ylabel(), memory.get_ylabel()) == ("times as fast as dense", "share of the memory of dense")
    # Six lines of two sizes, each with its interval, and no two alike without colours.
    assert len(speed.containers) == len(report["mixer"] + report["forward"] + report["train_step"]) / 2
    looks = {(one.lines[0].get_linestyle(), one.lines[0].get_marker()) for one in speed.containers}
    assert len(looks) == len(speed.containers)
    for container, entry in zip(speed.containers, report["mixer"][1::2], strict=False):
        (_, (bottom, top)) = (segment[:, 1] for segment in container.lines[2][0].get_segments())
        assert (bottom, top) == pytest.approx((entry["speedup"]["low"], entry["speedup"]["high"]))
    told = [[text.get_text() for text in one.legends[0].get_texts()] for one in figure.subfigs]
    assert told[0][0] == "one mixer layer, 2 x 5 tokens" and told[0][-1] == "a step of training, 2 x 70 tokens"
    assert told[1][:2] == ["1 at once", "2 at once"] and "lower bound" in told[1][2]
    assert not any(one.get_legend() for one in axes.values())  # none lies on the data


def test_pictures_of_decoding_and_of_pairs_of_sizes(report, tmp_path):
    common = {name: report[name] for name in ("settings", "models")}
    graph = report["decode"][0]["eager"]
    decode = [entry | {"graph": graph} for entry in report["decode"]]
    (axes,) = draw_report(common | {"decode": decode}, "a model").get_axes()
    assert "CUDA graph" in axes.get_title() and axes.get_xlabel() == "key channels of a head (K)"
    pairs = [entry | {"head_v_dim": 16 - number} for number, entry in enumerate(report["decode"][:2])]
    (axes,) = draw_report(common | {"decode": pairs}).get_axes()
    assert axes.get_xlabel() == "key x value channels of a head"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["16x16", "8x15"]
    plot_report(common | {"mixer": report["mixer"]}, tmp_path / "mixer.png")
    assert (tmp_path / "mixer.png").read_bytes().startswith(b"\x89PNG")
    random = [entry | {"folder": None} for entry in report["models"]]
    title = draw_report(report | {"models": random}).get_suptitle()
    assert title.startswith("delta_net of 2 layers, hidden size 32, 2 key heads, random weights")
