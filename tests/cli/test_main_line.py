"""The commands one after another, each finding what the one before it wrote."""

import json
from pathlib import Path

import pytest
from tiny_models import FAMILIES, tensors_of

CALIBRATE = ("calibrate", "--num-batches", 2, "--seq-len", 64)
BENCHMARK = ("benchmark", "--rounds", 2, "--seq-len", 64)
EVAL = ("eval", "--num-batches", 1, "--seq-len", 128)
WORK = Path("keyreduce-out")


def test_bare_commands_with_json(keyreduce):
    """On the shipped model, with nothing given that a first user would not give; each of them twice."""
    calibrated = keyreduce(*CALIBRATE, "--json").json()
    assert calibrated["made"]
    assert (calibrated["tokens"], calibrated["layers"]) == (2 * 4 * 64, 6)
    assert calibrated["bytes"] == (WORK / "calibration.safetensors").stat().st_size

    pruned = keyreduce("prune", "--method", "wanda", "--ratio", 0.25, "--json").json()
    assert pruned["head_k_dim"] == [128, 96]
    assert pruned["state_bytes_per_sequence"] == [4 * 6 * 2 * 128 * 128, 4 * 6 * 2 * 96 * 128]
    before, after = pruned["model_parameters"]
    # Six layers lose two heads' 32 channels of q and k: rows of 256 weights and 4 taps.
    assert before - after == 6 * 2 * 2 * 32 * (256 + 4)
    assert sum(tensor.numel() for tensor in tensors_of(WORK / "pruned").values()) == after

    assert keyreduce("convert-dcp", "--json").json()["converted"] == str(WORK / "dcp" / "step-0")
    assert keyreduce("convert-dcp", WORK / "dcp", "--json").json()["converted"] == str(WORK / "hf")
    back = tensors_of(WORK / "hf")
    for name, tensor in tensors_of(WORK / "pruned").items():
        assert back[name].dtype == tensor.dtype
        assert back[name].equal(tensor)

    timed = keyreduce(*BENCHMARK, "--json").json()
    assert [(entry["label"], entry["head_k_dim"]) for entry in timed["models"]] == [("dense", 128), ("pruned", 96)]
    assert timed["models"][1]["state_ratio"] == pytest.approx(128 / 96)
    assert json.loads((WORK / "benchmark.json").read_text()) == timed

    measured = keyreduce(*EVAL, "--json").json()
    dense, cut = measured["models"]
    assert (dense["label"], cut["label"]) == ("dense", "pruned")
    assert dense["predictions"] == cut["predictions"] == 4 * 127
    assert 1 < dense["perplexity_per_token"] < cut["perplexity_per_token"] < 2 * dense["perplexity_per_token"]
    assert json.loads((WORK / "eval.json").read_text()) == measured

    prune = ("prune", "--method", "wanda", "--ratio", 0.25)
    for again in (CALIBRATE, prune, ("convert-dcp",), ("convert-dcp", WORK / "dcp")):
        result = keyreduce(*again, "--json")
        assert result.json()["made"] is False
        assert "is there already, from the same inputs" in result.err
    # Figures are taken anew.
    assert keyreduce(*EVAL, "--json").json() == measured
    assert keyreduce(*BENCHMARK, "--json").json()["settings"] == timed["settings"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_bare_prune_calibrates_first_and_says_so(keyreduce, tiny_folder, monkeypatch, model_type):
    monkeypatch.setenv("BASE_MODEL_DIR", str(tiny_folder(model_type)))
    result = keyreduce("prune", "--json")
    assert result.json()["method"] == "auto"
    assert f"there are no calibration statistics at {WORK / 'calibration.safetensors'}: calibrating first" in result.err
    assert f"calibrating {model_type} on cpu (float32)" in result.err
    assert "32,768 tokens, 2 layers" in result.err
    # The sums serve the next method and the next ratio too.
    other = keyreduce("prune", "--method", "magnitude", "--ratio", 0.5, "--output", "other")
    assert "calibrating" not in other.err
    assert f"{model_type}, pruned with magnitude" in other.out


def test_tables_go_to_stdout_and_nothing_to_stderr(keyreduce, tiny_folder):
    model = ("--model", tiny_folder("delta_net"))
    result = keyreduce(*CALIBRATE, *model)
    assert (result.code, result.err) == (0, "calibrating delta_net on cpu (float32)\n")
    assert result.out.startswith("wrote keyreduce-out/calibration.safetensors: 512 tokens, 2 layers")
    for arguments, told in [
        (("prune", "--keep", 8, *model), ("50.0%", "its sizes suit: fla; fla, 16-bit training; SGLang")),
        (("convert-dcp",), ("wrote keyreduce-out/dcp/step-0: a distributed checkpoint, flat, of 31 tensors",)),
        (BENCHMARK, ("head_k_dim", "2.00x", "wrote keyreduce-out/benchmark.json")),
        (EVAL, ("perplexity per token", "508 predictions in rows of 128 tokens", "wrote keyreduce-out/eval.json")),
    ]:
        result = keyreduce(*arguments)
        assert (result.code, result.err) == (0, "")
        assert all(words in result.out for words in told)


def test_environment_variables(keyreduce, tiny_folder, monkeypatch, tmp_path):
    for name, value in {
        "BASE_MODEL_DIR": tiny_folder("delta_net"),
        "KEYREDUCE_WORK": tmp_path / "work",
        "NUM_BATCHES": 1,
        "OUTPUT_DIR": tmp_path / "cut",
        "PRUNING_RATIO": 0.5,
        "PRUNING_STRATEGY": "magnitude",
        "COMPRESSED_MODEL": tmp_path / "cut",
    }.items():
        monkeypatch.setenv(name, str(value))
    assert keyreduce("calibrate", "--seq-len", 32, "--json").json()["tokens"] == 4 * 32
    pruned = keyreduce("prune", "--json").json()
    assert (pruned["pruned"], pruned["method"]) == (str(tmp_path / "cut"), "magnitude")
    assert pruned["head_k_dim"] == [16, 8]
    assert keyreduce("convert-dcp", "--json").json()["converted"] == str(tmp_path / "work" / "dcp" / "step-0")
    assert keyreduce("eval", "--seq-len", 64, "--json").json()["models"][1]["folder"] == str(tmp_path / "cut")
    assert keyreduce(*BENCHMARK, "--json").json()["models"][1]["folder"] == str(tmp_path / "cut")
    assert {path.name for path in tmp_path.iterdir()} == {"here", "work", "cut"}
    assert not list((tmp_path / "here").iterdir())


def test_an_option_beats_its_variable(keyreduce, tiny_folder, monkeypatch):
    monkeypatch.setenv("PRUNING_STRATEGY", "nonsense")
    monkeypatch.setenv("PRUNING_RATIO", "0.5")
    model = ("--model", tiny_folder("delta_net"))
    assert keyreduce("prune", *model, "--method", "l1", "--ratio", 0.75, "--json").json()["head_k_dim"] == [16, 4]


def test_eval_and_benchmark_find_the_dense_model(keyreduce, tiny_copy, tiny_folder):
    """It is the one that was never pruned, by its full path, however it was called and wherever one is now."""
    dense = tiny_copy("dense")
    keyreduce("prune", "--model", "../dense", "--method", "l1", "--keep", 9)
    keyreduce("prune", "--model", WORK / "pruned", "--method", "l1", "--keep", 4, "--output", "twice")
    for command in (EVAL, BENCHMARK):
        for arguments, head_k_dim in [((), 9), (("--compressed", "twice"), 4)]:
            models = keyreduce(*command, *arguments, "--json").json()["models"]
            assert next(entry["folder"] for entry in models) == str(dense)
            if command is BENCHMARK:
                assert [entry["head_k_dim"] for entry in models] == [16, head_k_dim]


def test_eval_and_benchmark_take_the_dense_model_alone(keyreduce, tiny_folder):
    for command in (EVAL, BENCHMARK):
        result = keyreduce(*command, "--model", tiny_folder("gated_deltanet"), "--json")
        assert [entry["label"] for entry in result.json()["models"]] == ["dense"]
        assert f"there is no pruned model at {WORK / 'pruned'}: the dense model alone is measured" in result.err


def test_a_distributed_checkpoint_is_a_model_too(keyreduce, tiny_folder):
    keyreduce("prune", "--model", tiny_folder("gated_deltanet"), "--method", "l2", "--keep", 6)
    keyreduce("convert-dcp", "--step", 3)
    whole = keyreduce(*EVAL, "--json").json()["models"]
    for folder in (WORK / "dcp", WORK / "dcp" / "step-3"):
        models = keyreduce(*EVAL, "--compressed", folder, "--json").json()["models"]
        assert models[0] == whole[0]
        assert models[1]["perplexity_per_token"] == whole[1]["perplexity_per_token"]
    again = keyreduce("prune", "--model", WORK / "dcp", "--method", "l2", "--keep", 3, "--output", "again")
    assert "dcp, pruned with l2" in again.out
    record = json.loads(Path("again/keyreduce.json").read_text())
    assert record["dense"] == str(tiny_folder("gated_deltanet"))
    assert len(record["steps"]) == 2


def test_a_distributed_checkpoint_without_config_takes_one(keyreduce, tiny_folder):
    keyreduce("convert-dcp", tiny_folder("delta_net"), "dcp")
    Path("dcp/step-0/config.json").unlink()
    keyreduce("convert-dcp", "dcp", "hf", "--config", tiny_folder("delta_net"))
    assert json.loads(Path("hf/config.json").read_text())["model_type"] == "delta_net"
    assert Path("hf/tokenizer.json").is_file()


def test_text_of_ones_own(keyreduce, tiny_folder):
    Path("short.txt").write_text("ab")
    model, text = ("--model", tiny_folder("delta_net")), ("--text", "short.txt")
    result = keyreduce(*CALIBRATE, *model, *text)
    assert "the text is shorter than one sequence: 3 tokens instead of 64" in result.err
    assert "3 tokens, 2 layers" in result.out
    result = keyreduce(*EVAL, *model, *text, "--json")
    assert result.json()["models"][0]["predictions"] == 2
    assert "the text is shorter than one sequence: 3 tokens instead of 128" in result.err


def test_overwrite(keyreduce, tiny_folder):
    model = ("--model", tiny_folder("delta_net"))
    for arguments in (
        (*CALIBRATE, *model),
        ("prune", *model),
        ("convert-dcp",),
        (*BENCHMARK, "--output", "benchmark.json"),
        (*EVAL, "--output", "eval.json"),
    ):
        assert keyreduce(*arguments).code == 0
        assert keyreduce(*arguments, "--overwrite").code == 0
    assert keyreduce("prune", *model, "--keep", 2, "--overwrite", "--json").json()["head_k_dim"] == [16, 2]


def test_converted_shards_are_as_large_as_one_says(keyreduce, tiny_folder, tmp_path):
    assert keyreduce("convert-dcp", tiny_folder("delta_net"), tmp_path / "dcp").code == 0
    assert keyreduce("convert-dcp", tmp_path / "dcp", tmp_path / "hf", "--max-shard-size", "20kB").code == 0
    shards = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()
    again = keyreduce("convert-dcp", tmp_path / "dcp", tmp_path / "hf", "--max-shard-size", "40kB")
    assert again.code == 2 and "differs in max_shard_size" in again.err
    refused = keyreduce("convert-dcp", tmp_path / "dcp", tmp_path / "other", "--max-shard-size", "large")
    assert refused.code == 2 and "not a shard size" in refused.err and not (tmp_path / "other").exists()
