"""What a family reads from a config and writes into it, against the mixers that models build from that config."""

import json

import pytest
import torch
from fla.models import DeltaNetConfig, GatedDeltaNetConfig
from fla.models.configuration_utils import get_attention_spec
from fla.models.delta_net.modeling_delta_net import DeltaNetBlock
from fla.models.gated_deltanet.modeling_gated_deltanet import GatedDeltaNetBlock
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES as MODELS
from tiny_models import build, draw_tokens

from keyreduce.errors import KeyreduceError
from keyreduce.families import FAMILIES, MixerSizes, Part, family_of
from keyreduce.models.delta_net_2 import DeltaNet2Config
from keyreduce.models.delta_net_2.modeling_delta_net_2 import DeltaNet2Block

CLASSES = {
    "delta_net": (DeltaNetConfig, DeltaNetBlock),
    "delta_net_2": (DeltaNet2Config, DeltaNet2Block),
    "gated_deltanet": (GatedDeltaNetConfig, GatedDeltaNetBlock),
}
SIZE = st.integers(1, 256)


def sizes_in_fla(model_type: str, config: dict, layer: int = 0) -> MixerSizes:
    """The sizes of the mixer that is built; the config goes through JSON first, as on a disk."""
    config_class, block_class = CLASSES[model_type]
    with torch.device("meta"):
        mixer = block_class(config_class(**json.loads(json.dumps(config))), layer_idx=layer).attn
    value_heads = getattr(mixer, "num_v_heads", mixer.num_heads)
    sizes = MixerSizes(mixer.num_heads, value_heads, mixer.head_k_dim, mixer.head_v_dim)
    assert mixer.k_proj.out_features == sizes.key_heads * sizes.head_k_dim
    assert mixer.v_proj.out_features == sizes.value_heads * sizes.head_v_dim
    return sizes


@pytest.mark.parametrize("model_type", MODELS)
def test_missing_fields_take_the_defaults_of_fla(model_type):
    family, config_class = FAMILIES[model_type], CLASSES[model_type][0]
    assert family.sizes({}) == sizes_in_fla(model_type, {})
    assert family.mixer_layers({}) == list(range(config_class().num_hidden_layers))
    assert family.width({}) == config_class().hidden_size


def test_without_value_heads_there_are_as_many_as_key_heads():
    config = {"head_dim": 8, "num_heads": 3, "num_v_heads": None}
    assert FAMILIES["gated_deltanet"].sizes(config) == sizes_in_fla("gated_deltanet", config)


@settings(max_examples=25, deadline=None)
@given(st.integers(8, 300), st.integers(1, 8), SIZE, SIZE)
def test_delta_net_sizes_are_what_fla_builds(hidden_size, heads, head_k_dim, head_v_dim):
    for model_type in ("delta_net", "delta_net_2"):
        family, sizes = FAMILIES[model_type], MixerSizes(heads, heads, head_k_dim, head_v_dim)
        config = family.resized({"hidden_size": hidden_size, "num_heads": 1}, {0: sizes})
        assert family.sizes(config) == sizes == sizes_in_fla(model_type, config)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(1, 4), SIZE, SIZE)
def test_gated_deltanet_sizes_are_what_fla_builds(heads, group, head_k_dim, head_v_dim):
    family, sizes = FAMILIES["gated_deltanet"], MixerSizes(heads, group * heads, head_k_dim, head_v_dim)
    config = family.resized({"num_heads": 1, "num_v_heads": 1}, {0: sizes})
    assert family.sizes(config) == sizes == sizes_in_fla("gated_deltanet", config)


@settings(max_examples=25, deadline=None)
@given(st.data(), st.integers(8, 300), st.integers(1, 8), SIZE)
def test_layers_of_delta_net_2_have_sizes_of_their_own(data, hidden_size, heads, head_v_dim):
    """Also where some layers are softmax attention, of which the config's list has entries too."""
    family = FAMILIES["delta_net_2"]
    number = data.draw(st.integers(1, 4))
    softmax = sorted(data.draw(st.sets(st.integers(0, number - 1), max_size=number - 1)))
    sizes = {
        layer: MixerSizes(heads, heads, data.draw(SIZE), head_v_dim) for layer in range(number) if layer not in softmax
    }
    before = data.draw(st.sampled_from([1, [1] * number]))
    config = {"hidden_size": 8 * hidden_size, "num_heads": 8, "num_hidden_layers": number, "expand_k": before}
    if softmax:
        config["attn"] = {"layers": softmax, "num_heads": 8}
    resized = family.resized(config, sizes)
    assert config["expand_k"] == before
    assert family.layer_sizes(resized) == sizes
    assert {layer: sizes_in_fla("delta_net_2", resized, layer) for layer in sizes} == sizes
    # A list where there is a need for one.
    if len({layer_sizes.head_k_dim for layer_sizes in sizes.values()}) > 1:
        assert len(resized["expand_k"]) == number
    elif before == 1:
        assert not isinstance(resized["expand_k"], list)
    assert family.state_bytes(resized) == 4 * heads * head_v_dim * sum(each.head_k_dim for each in sizes.values())


def test_lists_of_sizes():
    family = FAMILIES["delta_net_2"]
    config = {"hidden_size": 32, "num_heads": 4, "num_hidden_layers": 3, "expand_k": [1, 0.5, 0.25]}
    sizes = family.layer_sizes(config)
    assert [layer_sizes.head_k_dim for layer_sizes in sizes.values()] == [8, 4, 2]
    assert family.resized(config, sizes) == config
    alike = family.resized(config, {layer: layer_sizes._replace(head_k_dim=2) for layer, layer_sizes in sizes.items()})
    assert alike == config | {"expand_k": 0.25}
    fewer = {layer: layer_sizes._replace(key_heads=3, value_heads=3) for layer, layer_sizes in sizes.items()}
    resized = family.resized(config, fewer)
    assert family.layer_sizes(resized) == fewer
    assert (resized["num_heads"], resized["expand_k"], resized["expand_v"]) == (3, [0.75, 0.375, 0.1875], 0.75)
    assert family.axis_sizes(config, 1)[Part.KEY] == 16
    assert family.axis_sizes(config, 2)[Part.QUERY] == 8


@pytest.mark.parametrize(
    ("expand_k", "told"),
    [
        ([1, 0.5], "expand_k lists 2 layers, not layer 2"),
        ([1, 0.5, "1"], "expand_k is '1'"),
        ([1, 0.5, 0.3], "head_k_dim comes to 2.4"),
        ([1, 0.5, -1], "expand_k is -1"),
    ],
)
def test_lists_of_impossible_sizes_are_refused(expand_k, told):
    config = {"hidden_size": 32, "num_heads": 4, "num_hidden_layers": 3, "expand_k": expand_k}
    with pytest.raises(KeyreduceError, match=told):
        FAMILIES["delta_net_2"].layer_sizes(config)


def test_only_delta_net_2_has_lists():
    assert {model_type for model_type, family in FAMILIES.items() if family.per_layer} == {"delta_net_2"}
    assert FAMILIES["delta_net_2"].per_layer == {"head_k_dim"}
    with pytest.raises(KeyreduceError, match=r"expand_k is \[1, 2\]"):
        FAMILIES["delta_net"].sizes({"expand_k": [1, 2]})
    unequal = {0: MixerSizes(2, 2, 4, 8), 1: MixerSizes(2, 2, 5, 8)}
    for model_type in ("delta_net", "gated_deltanet"):
        with pytest.raises(KeyreduceError, match=f"a {model_type} config says one head_k_dim for all layers"):
            FAMILIES[model_type].resized({}, unequal)
    unequal = {0: MixerSizes(2, 2, 4, 8), 1: MixerSizes(2, 2, 4, 7)}
    with pytest.raises(KeyreduceError, match="one head_v_dim for all layers"):
        FAMILIES["delta_net_2"].resized({}, unequal)


# GatedDeltaNet takes int(head_dim * expand_v), which for 49, 98, 103 and 107 gives 127 if expand_v is 128 / head_dim.
@pytest.mark.parametrize("size", [1, 31, 32, 48, 49, 64, 96, 98, 103, 107, 127])
@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("delta_net", {"hidden_size": 256, "num_heads": 2}),
        ("delta_net_2", {"hidden_size": 256, "num_heads": 2}),
        ("gated_deltanet", {"head_dim": 128, "num_heads": 2, "num_v_heads": 4, "expand_v": 1}),
    ],
)
def test_a_size_changes_and_the_others_stay(model_type, config, size):
    family = FAMILIES[model_type]
    before = family.sizes(config)
    assert before.head_k_dim == before.head_v_dim == 128
    for changes in ({"head_k_dim": size}, {"head_v_dim": size}, {"head_k_dim": size, "head_v_dim": 128 - size}):
        after = before._replace(**changes)
        resized = family.resized(config, dict.fromkeys(family.mixer_layers(config), after))
        assert sizes_in_fla(model_type, resized) == after


@pytest.mark.parametrize("model_type", MODELS)
def test_sizes_that_the_config_says_already_change_nothing(model_type):
    config = CLASSES[model_type][0]().to_dict()
    family = FAMILIES[model_type]
    assert family.resized(config, family.layer_sizes(config)) == config
    assert family.resized({}, family.layer_sizes({})) == {}


def test_resizing_leaves_the_other_fields_and_the_given_config_alone():
    config = {"hidden_size": 256, "num_heads": 2, "vocab_size": 9, "expand_k": 1}
    resized = FAMILIES["delta_net"].resized(config, {0: MixerSizes(2, 2, 64, 128)})
    assert config["expand_k"] == 1
    assert resized == config | {"expand_k": 0.5}


@pytest.mark.parametrize(
    ("model_type", "config", "told"),
    [
        ("delta_net", {"num_heads": 0}, "num_heads is 0"),
        ("delta_net", {"num_heads": -2}, "num_heads is -2"),
        ("delta_net", {"num_heads": "2"}, "num_heads is '2'"),
        ("delta_net", {"num_heads": True}, "num_heads is True"),
        ("delta_net", {"num_heads": 2.5}, "key_heads comes to 2.5"),
        ("delta_net", {"hidden_size": float("nan")}, "hidden_size is nan"),
        ("delta_net", {"expand_v": float("inf")}, "expand_v is inf"),
        ("delta_net", {"hidden_size": 32, "num_heads": 3}, "head_k_dim comes to 10.6667"),
        ("delta_net", {"expand_k": 1e-9}, "head_k_dim comes to"),
        ("gated_deltanet", {"head_dim": [8]}, r"head_dim is \[8\]"),
        ("gated_deltanet", {"head_dim": 7, "expand_v": 1.5}, "head_v_dim comes to 10.5"),
        ("gated_deltanet", {"num_heads": 4, "num_v_heads": 6}, "6 value heads cannot be shared out among 4"),
        ("gated_deltanet", {"num_heads": 4, "num_v_heads": 2}, "2 value heads cannot be shared out among 4"),
    ],
)
def test_impossible_configs_are_refused(model_type, config, told):
    with pytest.raises(KeyreduceError, match=told):
        FAMILIES[model_type].sizes(config)


def test_sizes_that_a_config_cannot_say_are_refused():
    with pytest.raises(KeyreduceError, match="cannot say"):
        FAMILIES["delta_net"].resized({"num_heads": 2}, {0: MixerSizes(2, 4, 64, 64)})


@pytest.mark.parametrize(
    "attention",
    [
        None,
        {"layers": [1, 3], "num_heads": 2},
        [{"layers": [0], "num_heads": 2}, {"layers": [2, 4], "num_heads": 4, "window_size": 16}],
    ],
)
@pytest.mark.parametrize("model_type", MODELS)
def test_softmax_layers_have_no_state(model_type, attention):
    config = CLASSES[model_type][0](num_hidden_layers=5, attn=attention).to_dict()
    expected = [layer for layer in range(5) if get_attention_spec(config["attn"], layer_idx=layer) is None]
    assert FAMILIES[model_type].mixer_layers(json.loads(json.dumps(config))) == expected


@pytest.mark.parametrize("attention", [{"layers": 3}, {"num_heads": 2}, [1], 7])
def test_softmax_layers_that_are_not_listed_are_refused(attention):
    with pytest.raises(KeyreduceError, match="attn does not list"):
        FAMILIES["delta_net"].mixer_layers({"attn": attention})


@pytest.mark.parametrize("config", [{"model_type": "llama"}, {"model_type": ["delta_net"]}, {}])
def test_other_architectures_are_refused_and_the_known_ones_named(config):
    with pytest.raises(KeyreduceError, match="delta_net, delta_net_2, gated_deltanet, .*olmo_hybrid"):
        family_of(config)


@pytest.mark.parametrize("model_type", MODELS)
@torch.no_grad()
def test_state_bytes_are_those_of_the_cache(model_type):
    model = build(model_type)
    cache = model(draw_tokens(3, 5), use_cache=True).past_key_values
    layers = range(model.config.num_hidden_layers)
    numbers = sum(cache[layer]["recurrent_state"].numel() for layer in layers)
    assert FAMILIES[model_type].state_bytes(model.config.to_dict()) == 4 * numbers / 3
