"""benchmarks/h100.py, with small models on a CPU."""

import importlib.util
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton.testing

from keyreduce.benchmarking.metrics import Roofline
from keyreduce.benchmarking.timed_models import random_models, sizes_named

REPOSITORY = Path(__file__).parents[2]
SMALL = {"hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "vocab_size": 50}


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A function: run the script with arguments, for small models of its configs."""
    monkeypatch.setattr(triton.testing, "do_bench", triton.testing.do_bench)  # the script puts another there
    monkeypatch.setattr("keyreduce.benchmarking.report.measure_roofline", lambda device, dtype: Roofline(1e9, 1e9))
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    spec = importlib.util.spec_from_file_location("h100", REPOSITORY / "benchmarks/h100.py")
    h100 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(h100)
    for name, path in h100.CONFIGS.items():
        config = json.loads(path.read_text()) | SMALL
        config |= {"num_v_heads": 2, "head_dim": 16} if "num_v_heads" in config else {}
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
        monkeypatch.setitem(h100.CONFIGS, name, tmp_path / f"{name}.json")
    for name, request in h100.MEASUREMENTS.items():
        small = {"batch_size": 1, "seq_len": (request.seq_len[0] // 1024,), "rounds": 1}
        small |= {"decode_batch_sizes": (1,), "max_batch_size": min(request.max_batch_size or 0, 2)}
        monkeypatch.setitem(h100.MEASUREMENTS, name, replace(request, **small))

    def run(*arguments: str):
        given = ["h100.py", "--device", "cpu", "--key-sizes", "16", "8", "--output", str(tmp_path / "out"), *arguments]
        monkeypatch.setattr(sys, "argv", given)
        h100.main()

    run.module = h100
    return run


@pytest.mark.parametrize("name", ["delta-net", "gated-deltanet"])
def test_configs_have_the_sizes_that_the_script_promises(script, name):
    config = json.loads((REPOSITORY / f"configs/benchmark/{name}-2048.json").read_text())
    sizes, meta = sizes_named(config, [(keys, None) for keys in script.module.KEY_SIZES]), torch.device("meta")
    models = random_models(config, sizes, meta, torch.bfloat16, whole=False, seed=0)
    assert [tuple(timed.sizes) for timed in models] == [(16, 16, keys, 128) for keys in (128, 96, 64, 48, 32)]
    assert {timed.hidden for timed in models} == {2048}


def test_measurements_are_made_once_and_put_together(script, tmp_path, capsys, monkeypatch):
    script("--only", "mixer-2048", "decode-32", "largest-batch")
    out = tmp_path / "out"
    files = {path.relative_to(out).as_posix() for path in out.rglob("*.*")}
    assert files == {
        f"{config}{end}"
        for config in ("delta-net", "gated-deltanet")
        for end in (".json", "/mixer-2048.json", "/decode-32.json", "/largest-batch.json")
    }
    whole = json.loads((out / "delta-net.json").read_text())
    assert [entry["head_k_dim"] for entry in whole["mixer"]] == [16, 8]
    assert {entry["scope"] for entry in whole["decode"]} == {"model", "mixer", "operator"}
    assert [entry["batch_size"] for entry in whole["largest_batch"]] == [2, 2]
    assert whole["settings"].keys() == whole["ceilings"].keys() == {"mixer-2048", "decode-32", "largest-batch"}
    told = capsys.readouterr().out
    assert "### gated-deltanet" in told
    assert "one mixer layer, 1 x 2 tokens, bfloat16" in told
    assert re.search(r"8x16 +2 +bound", told)
    monkeypatch.setattr("keyreduce.api.benchmark.run", lambda *arguments: pytest.fail("measured again"))
    script("--only", "mixer-2048", "decode-32", "largest-batch")
    script("--table")
    assert "the delta-rule operator alone, 1 sequences at once" in capsys.readouterr().out


def test_training_comes_after_all_else(script, capsys):
    script("--only", "train_step-2048", "mixer-8192")
    told = [line.split(",")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("==")]
    assert told == [
        f"== {config} {name}"
        for name in ("mixer-8192", "train_step-2048")
        for config in ("delta-net", "gated-deltanet")
    ]


def test_one_that_fails_is_told_and_the_rest_go_on(script, tmp_path, monkeypatch, capsys):
    measured = script.module.benchmark.run

    def run(request):
        if request.config.stem == "delta-net" and request.mixer:
            raise RuntimeError("Triton is too old")
        return measured(request)

    monkeypatch.setattr("keyreduce.api.benchmark.run", run)
    with pytest.raises(SystemExit, match=r"not measured:\ndelta-net mixer-8192: .*Triton is too old"):
        script("--only", "mixer-8192", "decode-1")
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*/*.json")}
    assert found == {"delta-net/decode-1.json", "gated-deltanet/decode-1.json", "gated-deltanet/mixer-8192.json"}
    assert "== delta-net mixer-8192: " in capsys.readouterr().out
