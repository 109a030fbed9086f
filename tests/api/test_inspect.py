"""What ``inspect`` says of a model, against plain counting and what is known of published models."""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from sparse_checkpoints import QWEN3_5_27B, write_sparse
from tiny_models import edit_tensors

from keyreduce.api.inspect import InspectRequest, run
from keyreduce.errors import KeyreduceError
from keyreduce.families import FAMILIES, family_of
from keyreduce.serving.capacity import FURTHER_CACHES
from keyreduce.serving.engines import NAMED

GIB = 2**30


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return write_sparse(tmp_path_factory.mktemp("models") / "qwen", QWEN3_5_27B)


def inspect(model, **settings):
    return run(InspectRequest(model=str(model), **settings))


def test_bytes_of_a_sequence(large):
    found = inspect(large, tokens=1000)
    assert (found.mixer_layers, found.softmax_layers) == (48, 16)
    assert found.state_bytes == 144 * 2**20  # what Qwen3.5-27B is known to keep in float32
    assert found.convolution_bytes == 48 * 3 * (2 * 16 * 128 + 48 * 128) * 2
    assert found.softmax_bytes == 16 * 1000 * 2 * 4 * 256 * 2
    assert (found.equal_from_tokens, found.little_gain_from_tokens) == (2304, 10_368)
    for dtype, share in (("bfloat16", 2), ("float16", 2), ("int8", 4), ("fp8", 4)):
        scales = 48 * 48 * 128 * 4 if share == 4 else 0
        assert inspect(large, state_dtype=dtype).state_bytes == found.state_bytes / share + scales


def test_parameters_are_those_of_the_files(tiny_folder):
    folder = tiny_folder("gated_deltanet")
    tensors = load_file(folder / "model.safetensors")
    found = inspect(folder)
    assert found.parameters == sum(one.numel() for one in tensors.values())
    assert found.mixer_parameters == sum(one.numel() for name, one in tensors.items() if ".attn." in name)
    assert found.file_bytes == sum(one.nbytes for one in tensors.values())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_by_its_defaults(tmp_path, model_type):
    config = {"model_type": model_type, "num_hidden_layers": 4, "vocab_size": 8, "intermediate_size": 4}
    if FAMILIES[model_type].sections:
        config = {"model_type": model_type, "text_config": config}
    config.get("text_config", config)["hidden_size"] = 3840
    found = inspect(write_sparse(tmp_path / model_type, config), gpu_memory="80GB")
    sizes = family_of(config).layer_sizes(config)
    assert found.mixer_layers == len(sizes)
    assert found.state_bytes == family_of(config).state_bytes(config)
    own = 4 * sum(one.state_elements for one in sizes.values())
    assert found.state_bytes == own or ("precond" in model_type and own < found.state_bytes < 1.05 * own)
    assert found.cuts
    served = {one["engine"] for one in found.capacity}
    assert served <= {"vllm", "sglang"}
    known = {name for name in ("vllm", "sglang") if model_type in NAMED[name].knows}
    assert served == (set() if model_type in FURTHER_CACHES else known)
    assert any("no sequences are counted" in note for note in found.notes) == (model_type in FURTHER_CACHES)
    is_of_fla = FAMILIES[model_type].shipped_by == "fla"
    assert any("transformers 5.6.2 to 5.23, or fla_torch.mend()" in note for note in found.notes) == is_of_fla


def test_cuts_save_what_a_resized_config_has_less(large):
    found = inspect(large, gpu_memory="80GiB")
    family = FAMILIES["qwen3_5"]
    pairs = {(cut["head_k_dim"], cut["head_v_dim"]): cut for cut in found.cuts}
    assert {(96, 128), (80, 104), (72, 128), (64, 128), (64, 64)} <= pairs.keys()
    for (key, value), cut in pairs.items():
        after = {
            layer: one._replace(head_k_dim=key, head_v_dim=value)
            for layer, one in family.layer_sizes(QWEN3_5_27B).items()
        }
        assert cut["state_bytes"] == family.state_bytes(family.resized(QWEN3_5_27B, after))
        fewer = 48 * 5120 * ((128 - key) * 32 + (128 - value) * 96) + 48 * (128 - value) * 48 * 5120
        convolution = 48 * 4 * ((128 - key) * 32 + (128 - value) * 48)
        assert cut["saved_parameters"] == fewer + convolution + 48 * (128 - value)
    capacity = {one["engine"]: one for one in pairs[64, 128]["capacity"]}
    assert (capacity["vllm"]["runs"], capacity["vllm"]["needs_plugin"]) == (False, True)
    assert not capacity["sglang"]["needs_plugin"]
    assert pairs[64, 128]["engines"] == ["fla", "transformers", "vllm-plugin", "sglang", "mlx"]
    assert pairs[80, 104]["engines"] == ["fla", "transformers", "vllm", "vllm-plugin"]
    assert not any(one["needs_plugin"] for one in pairs[80, 104]["capacity"])
    assert any(
        "vLLM with the plugin" in note and "run, with 0.26.0, Qwen3-Next on an NVIDIA H200" in note
        for note in found.notes
    )
    assert pairs[80, 104]["prune"] == "--target key,value --keep 80,104"
    assert pairs[72, 128]["prune"] == "--target key --keep 72"


def test_commands_have_the_flags_that_sizes_need(large):
    found = inspect(large, gpu_memory="80GiB", tokens=512, gpus=2, state_dtype="bfloat16")
    (dense,) = [one for one in found.capacity if one["engine"] == "vllm"]
    assert dense["command"].startswith(f"vllm serve {large} --max-model-len 512 --max-num-seqs {dense['sequences']} ")
    assert "gdn-prefill-backend" not in dense["settings"]
    assert dense["settings"]["tensor-parallel-size"] == "2"
    assert dense["settings"]["mamba-ssm-cache-dtype"] == "bfloat16"
    (cut,) = [one for one in found.cuts if (one["head_k_dim"], one["head_v_dim"]) == (80, 104)]
    (served,) = [one for one in cut["capacity"] if one["engine"] == "vllm"]
    assert "--gdn-prefill-backend triton" in served["command"]
    assert served["sequences"] > 1.6 * dense["sequences"]
    # vLLM captures CUDA graphs for 512 sequences at most unless it is asked for more.
    assert int(served["settings"]["max-cudagraph-capture-size"]) >= served["sequences"] > 512
    with_caching = inspect(large, gpu_memory="80GiB", tokens=512, prefix_caching=True)
    assert "--enable-prefix-caching" in with_caching.capacity[0]["command"].split()
    assert with_caching.capacity[0]["sequences"] == with_caching.capacity[0]["with_prefix_caching"]


def test_long_sequences_are_said_to_gain_nothing(large):
    assert any("will not help" in note for note in inspect(large, tokens=20_000).notes)
    assert not any("will not help" in note for note in inspect(large, tokens=2000).notes)


def test_weights_that_leave_no_room_are_said_to(large):
    found = inspect(large, gpu_memory="40GB")
    assert [one["sequences"] for one in found.capacity] == [0, 0]
    assert sum("not one sequence of 4,096 tokens fits beside the weights" in note for note in found.notes) == 2


def test_the_length_from_which_little_is_gained(large):
    """From there on half a state admits a tenth more sequences, counted in bytes."""
    found = inspect(large)
    for factor, gains in ((0.95, True), (1.05, False)):
        kept = found.softmax_bytes / found.tokens * found.little_gain_from_tokens * factor
        assert ((found.state_bytes + kept) / (found.state_bytes / 2 + kept) > 1.1) == gains


def test_a_model_of_mixers_alone_has_nothing_that_grows():
    found = inspect("gated-deltanet-5m", gpu_memory="80GB")
    assert (found.softmax_layers, found.softmax_bytes, found.equal_from_tokens) == (0, 0, None)
    assert found.capacity == []
    assert any("vllm has no class for gated_deltanet" in note for note in found.notes)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"gpu_memory": "much"}, "`gpu_memory` is 'much'"),
        ({"gpu_memory": "80GB", "reserve": "-1GB"}, "`reserve` is '-1GB'"),
        ({"gpu_memory": "80GB", "gpus": 5}, "`gpus` is 5, which does not divide 16 key"),
        ({"gpu_memory": "80GB", "state_dtype": "fp8"}, "`state_dtype` fp8: vllm keeps states in"),
        ({"tokens": 0}, "`tokens` is 0"),
    ],
)
def test_bad_settings(large, settings, told):
    with pytest.raises(KeyreduceError, match=told):
        inspect(large, **settings)


def test_tensors_that_do_not_fit_the_config_are_refused(tiny_copy):
    """As those of an older fla."""
    folder = tiny_copy()
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.0.attn.D": torch.ones(2)}))
    with pytest.raises(KeyreduceError, match=rf"{re.escape(str(folder))} are not those .* left over: .*0\.attn\.D$"):
        inspect(folder)


def test_a_pruned_model_names_its_dense_one(tmp_path):
    from keyreduce.api.prune import PruneRequest
    from keyreduce.api.prune import run as prune

    prune(PruneRequest(output=tmp_path / "cut", method="random", keep="64", work=tmp_path))
    found = inspect(tmp_path / "cut")
    assert (found.pruned_from, found.head_k_dim, found.head_v_dim) == ("delta-net-5m", 64, 128)


def test_nothing_heavy_is_imported(large):
    program = "import sys; from keyreduce.cli import main\n"
    program += "heavy = {'torch', 'transformers', 'numpy', 'safetensors', 'fla', 'datasets'}\n"
    program += "try:\n    main()\nexcept SystemExit:\n    pass\n"
    program += "print(sorted(heavy & sys.modules.keys()))"
    command = [sys.executable, "-c", program, "inspect", str(large), "--gpu-memory", "80GB", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answer, modules = done.stdout.splitlines()
    assert modules == "[]"
    assert json.loads(answer)["model_type"] == "qwen3_5"
