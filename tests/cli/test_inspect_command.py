"""``keyreduce inspect``: what people read, and one JSON object for shells."""

import re
import shlex

from sparse_checkpoints import QWEN3_5_27B, write_sparse


def test_tables_and_commands(keyreduce, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folder = write_sparse(tmp_path / "my models", QWEN3_5_27B)
    result = keyreduce("inspect", folder, "--gpu-memory", "80GB", "--tokens", 512, "--gpus", 2)
    assert result.code == 0, result.err
    words = " ".join(result.out.split())
    assert "48 layers with a delta-rule state and 16 of softmax attention" in words
    assert "recurrent state, float32 144.00 MiB" in words
    assert "vllm yes since 0.26 run: 0.26.0, Qwen3-Next on an NVIDIA H200, 2026-11" in words
    assert "vllm-plugin yes" not in words
    figures = r"[\d,]+ \(x[\d.]+\)"
    assert re.search(rf"64 x 128 -50% 72\.56 MiB -2\.1% {figures} {figures} vllm-plugin sglang", words)
    assert re.search(rf"80 x 104 -49% [^%]+% {figures} - vllm 64 x 128", words)
    assert "vLLM, with about half the state:" in words
    commands = [shlex.split(line) for line in result.out.splitlines() if line.startswith("  ")]
    commands = [command for command in commands if command[:2] in (["vllm", "serve"], ["keyreduce", "prune"])]
    dense, prune, cut = commands[:3]
    assert dense[2] == str(folder)
    assert prune[-6:] == ["--target", "key,value", "--keep", "80,104", "--output", "PRUNED"]
    assert cut[2] == "PRUNED"
    assert "from 2,304 tokens on the keys and values" in result.err


def test_a_model_that_needs_the_plugin(keyreduce, tmp_path):
    config = QWEN3_5_27B | {"text_config": QWEN3_5_27B["text_config"] | {"linear_key_head_dim": 64}}
    result = keyreduce("inspect", write_sparse(tmp_path / "pruned", config), "--gpu-memory", "80GB", "--gpus", 2)
    assert result.code == 0, result.err
    words = " ".join(result.out.split())
    assert "vllm-plugin yes since 0.26 run: 0.26.0, Qwen3-Next on an NVIDIA H200, 2026-11-27" in words
    assert "vLLM, as it is, with the plugin: vllm serve" in words
    assert "vllm-plugin is vLLM with the plugin" in result.err


def test_commands_to_paste_are_those_of_the_json(keyreduce, tmp_path):
    folder = write_sparse(tmp_path / "qwen", QWEN3_5_27B)
    found = keyreduce("inspect", folder, "--gpu-memory", "79.6GiB", "--json").json()
    plain = keyreduce("inspect", folder, "--gpu-memory", "79.6GiB")
    for one in found["capacity"]:
        assert f"  {one['command']}\n" in plain.out


def test_the_shipped_model_without_an_argument(keyreduce):
    found = keyreduce("inspect", "--json").json()
    assert (found["model"], found["head_k_dim"], found["capacity"]) == ("delta-net-5m", 128, [])
    assert keyreduce("inspect").code == 0


def test_the_model_is_named_as_for_other_commands(keyreduce, monkeypatch):
    by_place = keyreduce("inspect", "gated-deltanet-5m", "--json").json()
    assert by_place["model"] == "gated-deltanet-5m"
    for arguments in (("--model", "gated-deltanet-5m"), ("-m", "gated-deltanet-5m", "gated-deltanet-5m")):
        assert keyreduce("inspect", *arguments, "--json").json() == by_place
    monkeypatch.setenv("BASE_MODEL_DIR", "gated-deltanet-5m")
    assert keyreduce("inspect", "--json").json() == by_place
    # The command line overrules the environment, in either way.
    for arguments in (("delta-net-5m",), ("--model", "delta-net-5m")):
        assert keyreduce("inspect", *arguments, "--json").json()["model"] == "delta-net-5m"


def test_two_models_are_refused(keyreduce):
    result = keyreduce("inspect", "delta-net-5m", "--model", "gated-deltanet-5m")
    assert (result.code, result.out) == (2, "")
    told = "MODEL is 'delta-net-5m' and --model is 'gated-deltanet-5m': give one of the two"
    assert result.err == f"keyreduce: {told}\n"


def test_mistakes_are_told_in_one_line(keyreduce, tmp_path):
    for arguments, told in (
        ([tmp_path / "nowhere"], "there is no model"),
        (["--gpu-memory", "big"], "--gpu-memory is 'big'; give an amount of memory such as 80GB or 79.6GiB"),
        (["--state-dtype", "int4"], "--state-dtype"),
    ):
        result = keyreduce("inspect", *arguments)
        assert result.code == 2
        assert told in result.err
        assert len(result.err.splitlines()) == 1
