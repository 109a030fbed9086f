"""Our arithmetic against what vLLM's own cache manager computed (``benchmarks/vllm_capacity.py``)."""

import json
import re
from pathlib import Path

import pytest

from keyreduce.serving.capacity import CacheLayout, sequences_that_fit, vllm_pool

FOUND = json.loads((Path(__file__).parents[2] / "benchmarks" / "serving" / "vllm_capacity.json").read_text())
GIB = 2**30


def asked(row):
    dtype = None if row["state_dtype"] == "auto" else row["state_dtype"]
    return {"dtype": dtype, "gpus": row["gpus"], "prefix_caching": row["prefix_caching"]}


def test_there_are_settings_enough():
    assert len(FOUND["settings"]) >= 40
    assert {config["model_type"] for config in FOUND["configs"].values()} == {
        *("kimi_linear", "olmo_hybrid", "qwen3_5", "qwen3_next")
    }


def test_pages_and_blocks_are_those_of_vllm():
    for row in FOUND["settings"]:
        layout = CacheLayout.of(FOUND["configs"][row["config"]])
        pool = vllm_pool(layout, row["memory_gib"] * GIB, row["tokens"], **asked(row))
        assert (pool.block_tokens, pool.page_bytes, pool.blocks) == (
            *(row["block_tokens"], row["page_bytes"], row["blocks"]),
        ), row


def test_sequences_are_those_of_vllm():
    for row in FOUND["settings"]:
        config = FOUND["configs"][row["config"]]
        found = sequences_that_fit(config, row["memory_gib"] * GIB, row["tokens"], **asked(row))
        # Of the concurrency, which vLLM only logs, a fraction of a sequence is no sequence.
        expected = int(row["concurrency"]) if row["admitted"] is None else row["admitted"]
        assert found == pytest.approx(expected, rel=0.02), row
        assert row["admitted"] in (None, found), row


def test_the_table_of_the_docs_is_that_of_the_file():
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    found = re.findall(r"^\| (\d+) x (\d+) \| (bfloat16|float32) \| (.+) \|$", text, flags=re.MULTILINE)
    assert len(found) == 10
    for key, value, dtype, figures in found:
        admitted = {}
        for row in FOUND["settings"]:
            config = FOUND["configs"][row["config"]]
            kept = "float32" if row["state_dtype"] == "float32" else "bfloat16"
            is_it = (config.get("linear_key_head_dim"), config.get("linear_value_head_dim")) == (int(key), int(value))
            is_plain = row["gpus"] == 1 and not row["prefix_caching"]
            if config["model_type"] == "qwen3_next" and is_it and kept == dtype and is_plain:
                admitted[row["tokens"]] = row["admitted"]
        assert figures == " | ".join(f"{admitted[tokens]:,}" for tokens in (288, 4096, 32_768))
    assert f"all {len(FOUND['settings'])} settings" in text
