"""benchmarks/vllm_serving.py as far as it goes without vLLM and a GPU: models, judgement, steps and tables."""

import importlib
import itertools
import json
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from transformers import AutoConfig

TINY = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 48, "moe_intermediate_size": 16}
TINY |= {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "mlp_only_layers": [0]}
TINY |= {"shared_expert_intermediate_size": 16, "head_dim": 16}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("vllm_serving")


def test_models_are_cut_by_keyreduce_and_compared_with_transformers(script, tmp_path):
    folder = script.small_model(tmp_path, "64x128-mended", **TINY)
    assert folder == script.small_model(tmp_path, "64x128", **TINY)  # both are the same model
    config = AutoConfig.from_pretrained(folder)
    assert (config.linear_key_head_dim, config.linear_value_head_dim, config.linear_num_value_heads) == (64, 128, 32)
    assert json.loads((folder / "keyreduce.json").read_text())["steps"]
    draw = torch.Generator().manual_seed(0)
    served = [{"prompt": torch.randint(48, (count,), generator=draw).tolist(), "new": [3, 5, 8]} for count in (1, 70)]
    found = script.apart(time.monotonic() + 300, script.vllm_engine.reference, str(folder), served, "cpu")
    for one, told in zip(served, found, strict=True):
        assert {len(row) for row in told.values()} == {len(one["prompt"]) + 2}
        assert all(exact <= best for exact, best in zip(told["exact_U"], told["best_U"], strict=True))
        one["logprobs_U"] = told["rough_U"]
    # An engine that rounds as bfloat16 does is right, and one that is off by more is not.
    told = script.judged(served, found)
    assert told["is_right"] and told["new"]["mean"] == told["new"]["rounding_mean"] > 0
    served[1]["logprobs_U"] = [number - 1 for number in served[1]["logprobs_U"]]
    assert not script.judged(served, found)["is_right"]


def test_what_is_judged(script):
    served = [{"prompt": [7, 8], "new": [1, 2], "logprobs_U": [-1.0, -2.0, -3.5]}]
    reference = [
        {
            "exact_U": [-1.5, -2.25, -3.0],
            "rough_U": [-1.0, -2.0, -3.0],
            "best_U": [-1.5, -2.25, -2.0],
            "choice_U": [8, 1, 9],
        }
    ]
    told = script.judged(served, reference)
    assert told["prompt"] == {"mean": 0.5, "most": 0.5, "rounding_mean": 0.5, "rounding_most": 0.5}
    assert told["new"] == {"mean": 0.375, "most": 0.5, "rounding_mean": 0.125, "rounding_most": 0.25}
    assert (told["greedy_same"], told["greedy_of"], told["regret"], told["is_right"]) == (1, 2, 1.0, False)


def test_large_models_have_the_sizes_and_what_fits(script):
    asked = script.parser().parse_args(["--output", "unused"])
    for name, variant in script.VARIANTS.items():
        config = script.large_config(name)
        assert (config["linear_key_head_dim"], config["linear_value_head_dim"]) == variant[:2]
        assert (config["num_hidden_layers"], config["linear_num_value_heads"]) == (48, 32)
    settings = script.engine_settings(asked, "64x128", Path("f"), 9, state="auto", pool_gib=1, sequences=8)
    assert (settings["mend"], settings["prefill"], settings["pool_bytes"]) == ("plugin", "auto", 2**30)
    assert script.engine_settings(asked, "72x128", Path("f"), 9, state="auto", pool_gib=1, sequences=8)["mend"] == "no"


def test_engines_share_a_gpu_as_far_as_its_memory_goes(script):
    asked = script.parser().parse_args(["--output", "unused"])
    names = ["64x64", "80x104", "128x128"]
    needed = {name: script.decode_pool(asked, name, "auto") + script.BESIDE_POOL_GIB for name in names}
    assert needed["64x64"] < needed["80x104"] < needed["128x128"]
    asked.memory_gib = sum(needed.values())
    # The dense model and the first sizes come first.
    assert script.shared(asked, names, "auto") == [["80x104", "128x128", "64x64"]]
    asked.memory_gib = 1
    assert len(script.shared(asked, names, "auto")) == 3


def test_a_log_of_steps_is_read(script):
    engine = script.vllm_engine
    # When, running, waiting, tokens, new tokens: filling, full while others wait, emptying.
    log = [
        (0.0, 1, 9, 128, 1),
        (1.0, 4, 6, 40, 4),
        (1.5, 4, 3, 4, 4),
        (2.5, 4, 1, 4, 4),
        (3.0, 4, 0, 4, 4),
        (9.0, 1, 0, 1, 1),
    ]
    assert engine.busy(log) == {"peak_running": 4, "busy_tokens_per_s": 8 / 1.5, "busy_s": 1.5}
    assert engine.busy(log[:1])["busy_tokens_per_s"] is None
    assert engine.decode_times(log, 4) == [1000.0, 500.0, 6000.0]
    assert engine.capture_sizes(4) == [1, 2, 4]
    assert engine.capture_sizes(1300)[-3:] == [1024, 1280, 1300]
    assert engine.capture_sizes(600, [64, 256, 1024]) == [64, 256, 600]


def test_the_mend_fits_a_source_or_is_refused(script):
    engine = script.vllm_engine
    branch = "mask_2d = 1\n    a = mask_2d\n    b = mask_2d\n    return a, b"
    head = "def kernel():\n    mask_2d = 0\n    # ==== V head + gating processing ====\n"
    source = f"{head}    {branch}\n\ndef after():\n    pass\n"
    module = engine.load_mended(source, "a_mended_module")
    assert module.kernel() == (1, 1)
    assert Path(module.__file__).read_text().count("mask_2d") == 1
    with pytest.raises(ValueError, match="not one of"):
        engine.load_mended(source.replace("b = mask_2d", ""), "another")


class MadeUpEngine:
    """In the place of a process with vLLM."""

    started: ClassVar[list] = []
    fails: str | None = None
    broken: str | None = None  # the engine that does not start

    def __init__(self, until, target, *arguments):
        self.arguments = arguments
        self.started.append(arguments)

    def result(self):
        if isinstance(self.arguments[0], dict):
            if self.broken and self.broken in self.arguments[0]["folder"]:
                raise sys.modules["vllm_serving"].FailedStep("it broke")
            facts = {"vllm": "0", "torch": "0", "device": "made up", "page_bytes": 1024}
            return facts | {name: self.arguments[0][name] for name in ("max_num_seqs", "mend")}
        if self.fails:
            raise sys.modules["vllm_serving"].FailedStep(self.fails)
        row = {"head_k_dim": 64, "head_v_dim": 128, "tokens": 512, "us": {"ours": 2.0, "mended": 3.0}}
        row["device"] = "made up"
        references = [{"exact_U": [-1.0] * 3, "rough_U": [-1.1] * 3, "best_U": [-1.0] * 3, "choice_U": [1] * 3}]
        return references if self.arguments[0].__name__ == "reference" else [row]

    def ask(self, name, *arguments):
        sequences = self.arguments[0]["max_num_seqs"]
        return {
            "full_load": {"peak_running": sequences, "busy_tokens_per_s": 10.0 * sequences, "tokens_per_s": 1.0},
            "first_token": {"ms": 30.0, "least_ms": 29.0},
            "decode": {"ms": None if arguments[0] == 1024 else 4.0, "least_ms": 3.5},
            "logprobs": [{"prompt": [0, 1], "new": [1, 1], "logprobs_U": [-1.05] * 3}],
        }[name]

    def stop(self):
        self.arguments = None


def test_steps_are_written_one_by_one_and_put_together(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "Apart", MadeUpEngine)
    monkeypatch.setattr(script, "small_model", lambda folder, name: folder / name)
    monkeypatch.setattr(MadeUpEngine, "started", [])

    def run(*arguments):
        MadeUpEngine.started.clear()
        words = [script.__file__, "--output", tmp_path, "--variants", "128x128", "80x104", "64x128", *arguments]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        script.main()
        return capsys.readouterr().out

    assert "not measured yet, for want of time: right-128x128-auto" in run("--minutes", 1.4)
    assert {path.stem for path in tmp_path.glob("*.json")} == {"preparation", "vllm_serving"}
    monkeypatch.setattr(MadeUpEngine, "fails", "CompilationError: mask_2d")
    failed = run("--minutes", 600, "--only", "right")
    assert failed.count("failed: CompilationError: mask_2d") == 6
    monkeypatch.setattr(MadeUpEngine, "fails", None)
    # An engine that does not start costs the others nothing, and is tried again when the rest is there.
    monkeypatch.setattr(MadeUpEngine, "broken", "large-80x104")
    run("--minutes", 600, "--only", "load", "decode")
    broken = json.loads((tmp_path / "load-80x104-auto.json").read_text())
    assert broken["error"] == "80x104: it broke" and len(broken["engines"]["128x128"]["rounds"]) == 3
    assert "batches" not in json.loads((tmp_path / "decode-80x104-auto.json").read_text())
    asked = script.parser().parse_args(["--output", str(tmp_path)])
    planned = [names for _, names in script.missing(tmp_path, script.steps(asked))]
    assert planned[0][0] == "right-96x128-auto" and planned[-1] == ["decode-80x104-float32"]
    monkeypatch.setattr(MadeUpEngine, "broken", None)
    printed = run("--minutes", 600)
    assert "for want of time" not in printed
    found = json.loads((tmp_path / "vllm_serving.json").read_text())
    names = ("128x128", "80x104", "64x128")
    pairs = [*itertools.product(("right", "decode"), names), ("load", "80x104"), ("load", "64x128")]
    assert found.keys() == {
        "preparation", *(f"{kind}-{name}-{state}" for kind, name in pairs for state in ("auto", "float32"))
    }  # fmt: skip
    assert found["right-64x128-auto"]["is_right"]
    for state, least in {"auto": 1.5, "float32": 1.9}.items():
        engines = found[f"load-80x104-{state}"]["engines"]
        dense, cut = (engines[name]["max_num_seqs"] for name in names[:2])
        assert cut > least * dense
        over, dtype = f"(x{cut / dense:.2f})", "bfloat16" if state == "auto" else state
        figures = f"{cut} {over} | {10 * cut:,} {over} | {10 * cut:,} to {10 * cut:,} | 30 (29) |"
        assert f"| {dtype} | 80 x 104 | 1 | {figures}" in printed
    assert "| 64 x 128, the plugin | bfloat16 | 0.0500 (0.1000), at most 0.05 (0.10) |" in printed
    assert "| bfloat16 | 64 x 128, the plugin | 4.00 (x1.00), least 3.50 | 4.00 (x1.00), least 3.50 |  |" in printed
    assert "| 64 x 128 | 512 | 2.0 |  | 3.0 (x1.50) |" in printed
    assert "failed" not in printed
    run("--minutes", 600)
    assert not MadeUpEngine.started  # all of it is there
