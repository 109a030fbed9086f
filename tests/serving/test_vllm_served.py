"""The rows of vLLM against what it ran on a GPU (``benchmarks/vllm_serving.py``)."""

import importlib
import json
import re
from pathlib import Path

import pytest

from keyreduce.families import FAMILIES, MixerSizes
from keyreduce.serving.engines import NAMED, runs

REPOSITORY = Path(__file__).parents[2]
FILE = "benchmarks/serving/vllm_serving.json"
FOUND = json.loads((REPOSITORY / FILE).read_text())
RIGHT = {name: step for name, step in FOUND.items() if name.startswith("right-")}
FAMILY = FAMILIES["qwen3_next"]


def engine_of(step: dict) -> str:
    return "vllm-plugin" if step["mend"].startswith("plugin") else "vllm"


@pytest.mark.parametrize("name", sorted(RIGHT))
def test_sizes_that_were_served_right_are_sizes_that_run(name):
    step, (key, value) = RIGHT[name], map(int, name.split("-")[1].split("x"))
    assert step["is_right"]
    sizes = MixerSizes(16, 32, key, value)
    assert runs("vllm-plugin", FAMILY, sizes)
    # vLLM by itself runs all that it served without a mend, and those alone.
    assert runs("vllm", FAMILY, sizes) == (step["mend"] == "no")


@pytest.mark.parametrize("engine", ["vllm", "vllm-plugin"])
def test_a_row_that_was_run_is_in_the_file(engine):
    served = [step for step in RIGHT.values() if engine_of(step) == engine and step["mend"] != "source"]
    assert served
    for row in NAMED[engine].rows:
        run = [one for one in row.evidence if one.how == "run"]
        assert bool(run) == (row is NAMED[engine].row(FAMILY.model_type)), row.model_types
        for one in run[:1]:  # what was run elsewhere comes after it
            assert one.what == FILE
            for step in served:
                assert step["vllm"] == one.version and step["device"] in one.on


def test_the_tables_of_the_docs_are_those_of_the_file(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    report = importlib.import_module("vllm_report")
    text = (REPOSITORY / "docs" / "serving.md").read_text()
    loads = re.findall(r"^\| (bfloat16|float32) \| (\d+) x (\d+) \| (.+) \| (.+) \|$", text, flags=re.MULTILINE)
    assert len(loads) == 6
    for dtype, key, value, *figures in loads:
        engines = FOUND[f"load-80x104-72x128-{'auto' if dtype == 'bfloat16' else dtype}"]["engines"]
        row, dense = engines[f"{key}x{value}"], engines[report.DENSE]
        for figure, of in zip(figures, (report.most_of, report.speed_of), strict=True):
            over = "" if row is dense else f", x{of(row) / of(dense):.2f}"
            assert figure == f"{of(row):,.0f}{over}"
    steps = re.findall(r"^\| (\d+) x (\d+)(?:, the plugin)? \| (\d\.\d\d \| .+) \|$", text, flags=re.MULTILINE)
    assert len(steps) == 5
    for key, value, figures in steps:
        faster = []
        for state, batches in {"auto": ("64", "256", "1024"), "float32": ("64", "256")}.items():
            dense, cut = (FOUND[f"decode-{name}-{state}"]["batches"] for name in (report.DENSE, f"{key}x{value}"))
            faster += [f"{dense[batch]['ms'] / cut[batch]['ms']:.2f}" for batch in batches]
        assert figures == " | ".join(faster)
