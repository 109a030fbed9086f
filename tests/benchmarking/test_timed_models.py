import hybrid_models
import pytest
import torch
from hybrid_models import CHANNEL_DECAY, LANGUAGE, SEEING
from tiny_models import COMMON, build
from tiny_models import FAMILIES as TINY

from keyreduce.benchmarking.timed_models import (
    check_memory,
    explained_out_of_memory,
    is_out_of_memory,
    random_models,
    sizes_named,
    timed_models,
)
from keyreduce.errors import KeyreduceError

CPU = torch.device("cpu")


def of_sizes(config: dict, pairs: list, whole: bool = True):
    return random_models(config, sizes_named(config, pairs), CPU, torch.float32, whole=whole, seed=0)


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
        (lambda model: build("delta_net").to("meta"), "differ in device .cpu and meta."),
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
def test_random_models_of_several_sizes(model_type):
    model = build(model_type)
    values = model.model.layers[0].attn.head_v_dim
    whole = of_sizes(model.config.to_dict(), [(24, None), (7, 10)])
    assert [timed.label for timed in whole] == [f"24x{values}", "7x10"]
    for timed, sizes in zip(whole, ((24, values), (7, 10)), strict=True):
        assert timed.sizes[2:] == sizes
        assert timed.mixer.k_proj.weight.shape == (2 * sizes[0], 32)
        assert timed.mixer.v_proj.weight.shape == (timed.sizes.value_heads * sizes[1], 32)
        assert len(timed.model.model.layers) == 2
        assert not timed.model.training
    (short,) = of_sizes(model.config.to_dict(), [(7, 10)], whole=False)
    assert short.describe() == whole[1].describe()


@pytest.mark.parametrize("model_type", [*TINY, *LANGUAGE, *SEEING, *CHANNEL_DECAY])
def test_of_one_mixer_nothing_else_is_made(model_type, monkeypatch):
    is_tiny = model_type in TINY
    config = (build(model_type) if is_tiny else hybrid_models.build(model_type)).config.to_dict()
    (whole,) = of_sizes(config, [(6, 6)])
    # Memory that nobody writes to is NaN then.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        (alone,) = of_sizes(config, [(6, 6)], whole=False)
    finally:
        torch.use_deterministic_algorithms(False)
    theirs, ours = dict(whole.mixer.named_parameters()), dict(alone.mixer.named_parameters())
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in ours.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in theirs.items()
    }
    assert all(tensor.isfinite().all() for tensor in ours.values())
    assert all((tensor.std() > 0) == (theirs[name].std() > 0) for name, tensor in ours.items() if tensor.numel() > 1)
    assert not list(alone.mixer.buffers())  # they would have no numbers
    inside = {id(tensor) for tensor in ours.values()}
    assert all(tensor.is_meta == (id(tensor) not in inside) for tensor in alone.model.parameters())
    assert (alone.device, alone.dtype, alone.describe()) == (CPU, torch.float32, whole.describe())
    with torch.no_grad():
        outputs = alone.mixer(hidden_states=torch.randn(2, 5, 32))
    outputs_BTD = outputs[0] if isinstance(outputs, tuple) else outputs
    assert outputs_BTD.shape == (2, 5, 32) and outputs_BTD.isfinite().all()


def test_sizes_that_a_config_cannot_say_are_refused():
    config = hybrid_models.build("kimi_linear").config.to_dict()
    with pytest.raises(KeyreduceError, match="with heads of 8x6 channels: a kimi_linear config cannot say the sizes"):
        of_sizes(config, [(8, 6)])


def test_a_config_that_no_model_has_is_told():
    config = build("delta_net").config.to_dict() | {"hidden_size": 33}
    with pytest.raises(KeyreduceError):
        of_sizes(config, [(8, None)])


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
