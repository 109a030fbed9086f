from types import SimpleNamespace

import pytest
import torch
from tiny_models import COMMON, build

from keyreduce.benchmarking.timed_models import (
    check_memory,
    explained_out_of_memory,
    is_out_of_memory,
    random_models,
    timed_models,
)
from keyreduce.errors import KeyreduceError

CPU = torch.device("cpu")


def sizes_of(config: dict, key_sizes: list[int], whole: bool = True):
    return random_models(config, key_sizes, CPU, torch.float32, whole=whole, seed=0)


def test_sizes_of_each_model(loaded):
    models = {"dense": loaded(), "pruned": loaded(expand_k=0.5), "gated": loaded("gated_deltanet")}
    described = [timed.describe() for timed in timed_models(models)]
    names = ("label", "folder", "layer", "key_heads", "value_heads", "head_k_dim", "head_v_dim", "layers_alike")
    assert [tuple(entry[name] for name in names) for entry in described] == [
        ("dense", "delta_net", 0, 2, 2, 16, 16, True),
        ("pruned", "delta_net", 0, 2, 2, 8, 16, True),
        ("gated", "gated_deltanet", 0, 2, 4, 12, 24, True),
    ]
    # Two layers, 4 bytes a number.
    assert [entry["state_bytes_per_sequence"] for entry in described] == [
        2 * 4 * heads * keys * values for heads, keys, values in ((2, 16, 16), (2, 8, 16), (4, 12, 24))
    ]
    # Projections of q, k, v and output, of beta; three convolutions of 4 taps; the output norm.
    assert [entry["mixer_parameters"] for entry in described[:2]] == [
        4 * 32 * 32 + 2 * 32 + 3 * 4 * 32 + 16,
        2 * 32 * 32 + 2 * 32 * 16 + 2 * 32 + 4 * (16 + 16 + 32) + 16,
    ]


def test_a_hybrid_is_timed_in_its_first_delta_rule_layer(loaded):
    (timed,) = timed_models({"hybrid": loaded(attn={"layers": [0], "num_heads": 2})})
    assert timed.layer == 1
    assert timed.mixer is timed.model.model.layers[1].attn
    assert (timed.hidden, timed.vocabulary) == (32, COMMON["vocab_size"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: build("delta_net", hidden_size=64), "dense and other differ in hidden size .32 and 64."),
        (lambda model: build("delta_net").bfloat16(), "differ in dtype"),
        (
            lambda model: SimpleNamespace(config=model.config, device=torch.device("meta"), dtype=model.dtype),
            "differ in device .cpu and meta.",
        ),
    ],
)
def test_models_that_differ_are_refused(loaded, change, message):
    other = loaded()._replace(model=change(loaded().model))
    with pytest.raises(KeyreduceError, match=message):
        timed_models({"dense": loaded(), "other": other})


def test_model_without_a_delta_rule_layer_is_refused(loaded):
    with pytest.raises(KeyreduceError, match="has no delta-rule layer"):
        timed_models({"dense": loaded(attn={"layers": [0, 1], "num_heads": 2})})


@pytest.mark.parametrize("model_type", ["delta_net", "delta_net_2", "gated_deltanet"])
def test_random_models_of_several_key_sizes(model_type):
    model = build(model_type)
    whole = sizes_of(model.config.to_dict(), [24, 7])
    assert [timed.label for timed in whole] == ["K=24", "K=7"]
    for timed, keys in zip(whole, (24, 7), strict=True):
        assert timed.sizes.head_k_dim == keys
        assert timed.mixer.k_proj.weight.shape == (2 * keys, 32)
        assert timed.mixer.v_proj.weight.shape == model.model.layers[0].attn.v_proj.weight.shape
        assert len(timed.model.model.layers) == 2
        assert not timed.model.training
    (short,) = sizes_of(model.config.to_dict(), [24], whole=False)
    assert len(short.model.model.layers) == 1
    assert torch.equal(short.mixer.k_proj.weight, whole[0].mixer.k_proj.weight) or short.mixer.k_proj.weight.std() > 0
    assert short.describe() == whole[0].describe()


def test_random_models_of_a_hybrid_of_transformers():
    from transformers import Qwen3NextConfig

    config = Qwen3NextConfig(
        hidden_size=32, num_hidden_layers=4, vocab_size=64, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=16, linear_value_head_dim=16, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
    ).to_dict()  # fmt: skip
    (short,) = sizes_of(config, [8], whole=False)
    assert len(short.model.model.layers) == 1
    assert len(config["layer_types"]) == 4
    assert short.describe()["state_bytes_per_sequence"] == 4 * 3 * 4 * 8 * 16


def test_a_config_that_no_model_has_is_told():
    config = build("delta_net").config.to_dict() | {"hidden_size": 33}
    with pytest.raises(KeyreduceError):
        sizes_of(config, [8])


@pytest.mark.parametrize("shape", [(1 << 61,), (1 << 45,)])
def test_memory_that_is_not_there_is_told(shape):
    refused = pytest.raises(KeyreduceError, match="a batch of 7 needs more memory than there is")
    with refused, explained_out_of_memory("a batch of 7"):
        torch.ones(shape, dtype=torch.float64)


def test_other_errors_are_left_alone():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), explained_out_of_memory("a product"):
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_more_than_is_free_is_refused_before_it_is_asked_for():
    check_memory(1 << 10, CPU, "a little")
    with pytest.raises(KeyreduceError, match="a lot needs more memory"):
        check_memory(1 << 60, CPU, "a lot")
