"""The tables of Kimi Delta Attention against the mixers that fla and transformers build, and the files they write."""

import json

import hybrid_models
import pytest
import torch
from hybrid_models import CHANNEL_DECAY
from tiny_models import draw_tokens
from transformers import AutoConfig, AutoModelForCausalLM

from keyreduce.errors import KeyreduceError
from keyreduce.families import FAMILIES, REFUSED, MixerSizes, family_of

ALL = pytest.mark.parametrize("model_type", CHANNEL_DECAY)
ODD = {
    "kda": (dict(hidden_size=40, num_heads=2, num_v_heads=6, head_dim=12, expand_v=0.75), MixerSizes(2, 6, 12, 9)),
    "kimi_linear": (dict(hidden_size=40, linear_num_heads=3, linear_head_dim=7), MixerSizes(3, 3, 7, 7)),
}


def sizes_built(model_type, config):
    """The sizes of the first mixer that is built, without numbers, from a config that went through JSON."""
    config = json.loads(json.dumps(config)) | {"model_type": model_type}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    mixer = model.get_submodule(FAMILIES[model_type].mixer.format(layer=0))
    if model_type == "kda":
        return MixerSizes(mixer.num_heads, mixer.num_v_heads, mixer.head_k_dim, mixer.head_v_dim)
    return MixerSizes(mixer.num_heads, mixer.num_heads, mixer.head_dim, mixer.head_dim)


@ALL
def test_missing_fields_take_the_defaults_of_the_library(model_type):
    hybrid_models.needs(model_type)
    family, config = FAMILIES[model_type], AutoConfig.for_model(model_type)
    small = {} if model_type == "kda" else {"num_experts": 2}
    assert family.sizes({}) == sizes_built(model_type, small)
    assert family.width({}) == config.hidden_size
    kinds = getattr(config, "layer_types", None) or ["linear_attention"] * config.num_hidden_layers
    assert family.mixer_layers({}) == [layer for layer, kind in enumerate(kinds) if kind == "linear_attention"]


def test_layers_that_are_listed_from_one():
    hybrid_models.needs("kimi_linear")
    config = {"num_hidden_layers": 5, "linear_attn_config": {"kda_layers": [1, 2, 4, 5], "full_attn_layers": [3]}}
    assert FAMILIES["kimi_linear"].mixer_layers(config) == [0, 1, 3, 4]
    kinds = AutoConfig.for_model("kimi_linear", **config).layer_types
    assert [layer for layer, kind in enumerate(kinds) if kind == "linear_attention"] == [0, 1, 3, 4]


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [("kda", MixerSizes(2, 4, 49, 128)), ("kda", MixerSizes(1, 3, 64, 31)), ("kimi_linear", MixerSizes(1, 1, 5, 5))],
)
def test_resized_configs_build_mixers_of_those_sizes(model_type, sizes):
    family, config = FAMILIES[model_type], hybrid_models.build(model_type).config.to_dict()
    assert family.resized(config, family.layer_sizes(config)) == config
    resized = family.resized(config, dict.fromkeys(family.mixer_layers(config), sizes))
    assert sizes_built(model_type, resized) == sizes


def test_unequal_sizes_are_refused():
    family = FAMILIES["kimi_linear"]
    with pytest.raises(KeyreduceError, match="cannot say the sizes"):
        family.resized({}, {0: MixerSizes(32, 32, 64, 128)})
    with pytest.raises(KeyreduceError, match="one size for the key and the value channels of a head"):
        family.check_cut(MixerSizes(32, 32, 64, 128))


@torch.no_grad()
def test_state_bytes_are_those_of_the_cache():
    model = hybrid_models.build("kda")
    cache = model(draw_tokens(3, 5), use_cache=True).past_key_values
    numbers = sum(cache[layer]["recurrent_state"].numel() for layer in (0, 2))
    assert FAMILIES["kda"].state_bytes(model.config.to_dict()) == 4 * numbers / 3


@pytest.mark.parametrize("model_type", REFUSED)
def test_their_kin_is_refused_with_a_reason(model_type):
    with pytest.raises(KeyreduceError, match=f"{model_type}' cannot be pruned yet: it"):
        family_of({"model_type": model_type})
