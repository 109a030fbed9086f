"""The engines' rows against what their kernels compiled for (``benchmarks/engine_kernels.py``)."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from keyreduce.families import FAMILIES, MixerSizes
from keyreduce.serving.engines import NAMED, runs

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "benchmarks" / "engine_kernels.py"
FOUND = {path.name: json.loads(path.read_text()) for path in (REPOSITORY / "benchmarks/serving").glob("kernels_*.json")}
# Kernels -> the architecture that calls them, and its heads where they were compiled.
CALLERS = {
    ("fla", "gated_deltanet"): ("gated_deltanet", 16, 32),
    ("fla", "kda"): ("kda", 16, 16),
    ("vllm", "qwen"): ("qwen3_next", 16, 32),
    ("vllm", "olmo_hybrid"): ("olmo_hybrid", 30, 30),
    ("vllm", "kimi_linear"): ("kimi_linear", 32, 32),
    ("vllm-plugin", "qwen"): ("qwen3_next", 16, 32),
    ("sglang", "qwen3_next"): ("qwen3_next", 16, 32),
    ("sglang", "qwen3_5"): ("qwen3_5", 16, 48),
    ("sglang", "kimi_linear"): ("kimi_linear", 32, 32),
}


def engine_of(found):
    return next(name for name in found if name in NAMED)


@pytest.mark.parametrize("name", ["fla", "vllm", "vllm-plugin", "sglang"])
def test_all_kernels_of_an_engine_were_compiled(name):
    found = {(row["kernels"], row["architecture"]) for row in FOUND[f"kernels_{name.replace('-', '_')}.json"]["rows"]}
    kernels = {kernels for engine, kernels in CALLERS if engine == name}
    assert {(one, architecture) for one in kernels for architecture in (80, 90, 100)} <= found


@pytest.mark.parametrize("file", sorted(FOUND))
def test_rows_say_what_compiled(file):
    engine = engine_of(FOUND[file])
    for row in FOUND[file]["rows"]:
        model_type, key_heads, value_heads = CALLERS[engine, row["kernels"]]
        sizes = MixerSizes(key_heads, value_heads, row["head_k_dim"], row["head_v_dim"])
        assert runs(engine, FAMILIES[model_type], sizes) == row["compiles"], row


@pytest.mark.parametrize("file", sorted(FOUND))
def test_rows_name_the_version_that_was_compiled(file):
    found = FOUND[file]
    engine = engine_of(found)
    for model_type in {CALLERS[engine, row["kernels"]][0] for row in found["rows"]}:
        evidence = NAMED[engine].row(model_type).evidence
        assert ("compiled", found[engine], f"benchmarks/serving/{file}") in {
            (one.how, one.version, one.what) for one in evidence
        }


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
@pytest.mark.parametrize("engine", ["vllm", "vllm-plugin"])
def test_vllm_compiles_what_its_row_says(tmp_path, engine):
    target = tmp_path / "found.json"
    command = [sys.executable, str(SCRIPT), engine, "--kernels", "qwen", "--sizes", "64x64", "64x128"]
    command += ["--architectures", "90", "--output", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found = {(row["head_k_dim"], row["head_v_dim"]): row for row in json.loads(target.read_text())["rows"]}
    assert found[64, 64]["compiles"], found[64, 64]
    if engine == "vllm-plugin":
        assert found[64, 128]["compiles"], found[64, 128]
    else:
        assert "mask_2d" in found[64, 128]["error"]
