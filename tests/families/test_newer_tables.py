"""What the newer tables take for granted where a config does not say it, against the libraries' own configs."""

import pytest
from hybrid_models import WRAPPED, marked
from transformers import AutoConfig

from keyreduce.errors import KeyreduceError
from keyreduce.families import FAMILIES, LANGUAGE_MODELS, REFUSED, WRAPPERS, MixerSizes, family_of

FOUR = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
TWO = ("linear_num_heads", "linear_num_heads", "linear_head_dim", "linear_head_dim")
SIZES = {"qwen4_exp_text": FOUR, "lara_mini": FOUR, "glm5_next_text": TWO, "bailing_hybrid": TWO}


@pytest.mark.parametrize("model_type", marked(SIZES))
def test_missing_fields_take_the_defaults_of_transformers(model_type):
    family, config = FAMILIES[model_type], AutoConfig.for_model(model_type)
    assert family.sizes({}) == MixerSizes(*(getattr(config, name) for name in SIZES[model_type]))
    assert family.sizes(config.to_dict()) == family.sizes({})
    assert (family.width({}), family.depth({})) == (config.hidden_size, config.num_hidden_layers)
    kinds = [layer for layer, kind in enumerate(config.layer_types) if kind == "linear_attention"]
    assert family.mixer_layers({}) == kinds == family.mixer_layers(config.to_dict())


@pytest.mark.parametrize(("model_type", "softmax"), [("precond_gated_deltanet", None), ("precond_kda", [1, 3])])
def test_missing_fields_take_the_defaults_of_fla(model_type, softmax):
    family, config = FAMILIES[model_type], AutoConfig.for_model(model_type)
    heads, key = config.num_heads, config.head_dim
    assert family.sizes({}) == MixerSizes(heads, heads, key, round(key * config.expand_v))
    assert (family.width({}), family.depth({})) == (config.hidden_size, config.num_hidden_layers)
    attention = {"attn": {"layers": softmax}} if softmax else {}
    expected = [layer for layer in range(5) if layer not in (softmax or ())]
    assert family.mixer_layers({"num_hidden_layers": 5} | attention) == expected


@pytest.mark.parametrize("layers, period", [(13, None), (13, 4), (3, 5)])
@pytest.mark.parametrize("model_type", marked(["bailing_hybrid"]))
def test_groups_of_other_sizes(model_type, layers, period):
    config = {"num_hidden_layers": layers} | ({"layer_group_size": period} if period else {})
    kinds = AutoConfig.for_model(model_type, **config).layer_types
    expected = [layer for layer, kind in enumerate(kinds) if kind == "linear_attention"]
    assert FAMILIES[model_type].mixer_layers(config) == expected


@pytest.mark.parametrize("section", ["text_config", "linear_attn_config"])
def test_glm5_next_says_its_sizes_in_one_place_or_in_two(section):
    sizes = {"linear_attn_config": {"head_dim": 16, "num_heads": 3, "short_conv_kernel_size": 2}}
    config = {"text_config": sizes} if section == "text_config" else sizes
    family = FAMILIES["glm5_next"]
    assert family.sizes(config) == MixerSizes(3, 3, 16, 16)
    resized = family.resized(config, {0: MixerSizes(2, 2, 8, 8)})
    inner = resized.get("text_config", resized)
    assert inner == {"linear_attn_config": {"head_dim": 8, "num_heads": 2, "short_conv_kernel_size": 2}}
    assert config == ({"text_config": sizes} if section == "text_config" else sizes)


@pytest.mark.parametrize("model_type", marked(WRAPPED))
def test_larger_models_hold_the_language_model_that_their_config_says_or_has_by_default(model_type):
    config = AutoConfig.for_model(model_type).to_dict()
    inner = config["text_config"]["model_type"]
    assert WRAPPERS[model_type] is LANGUAGE_MODELS[inner]
    assert family_of({"model_type": model_type}) == family_of(config) == FAMILIES[model_type]
    assert family_of(config).sizes(config) == LANGUAGE_MODELS[inner].sizes(config["text_config"])
    other = family_of({"model_type": model_type, "text_config": {"model_type": "kimi_linear"}})
    assert other.operators == FAMILIES["kimi_linear"].operators


def test_a_larger_model_may_be_within_another_one():
    config = {
        "model_type": "jev",
        "text_config": {
            "model_type": "qwen3_5",
            "text_config": {"model_type": "qwen3_5_text", "linear_key_head_dim": 64, "num_hidden_layers": 4},
        },
    }
    family = family_of(config, ["model.language_model.layers.0.linear_attn.A_log"])
    assert family.mixer == "model.language_model.layers.{layer}.linear_attn"
    assert (family.sizes(config).head_k_dim, family.depth(config)) == (64, 4)
    resized = family.resized(config, dict.fromkeys((0, 1, 2), family.sizes(config)._replace(head_k_dim=32)))
    assert resized["text_config"]["text_config"]["linear_key_head_dim"] == 32
    assert config["text_config"]["text_config"]["linear_key_head_dim"] == 64


@pytest.mark.parametrize(
    ("names", "path"),
    [
        (["language_model.model.layers.0.linear_attn.A_log"], "language_model.model.layers.{layer}.linear_attn"),
        (["layers.3.linear_attn.conv1d.weight"], "layers.{layer}.linear_attn"),
        (
            ["mtp.layers.0.linear_attn.A_log", "x.layers.0.linear_attn.A_log", "x.layers.1.linear_attn.A_log"],
            "x.layers.{layer}.linear_attn",
        ),
        (["visual.layers.0.attn.q.weight"], "model.language_model.layers.{layer}.linear_attn"),
    ],
)
def test_mixers_of_larger_models_are_found_below_any_prefix(names, path):
    config = {"model_type": "unheard of", "text_config": {"model_type": "qwen3_5_text"}}
    assert family_of(config, names).mixer == path


@pytest.mark.parametrize("named", ["kimi_k3", "intern_s2_preview"])
def test_larger_models_that_are_refused_are_so_whatever_they_hold(named):
    with pytest.raises(KeyreduceError, match=f"{named}' cannot be pruned yet: its state is that of"):
        family_of({"model_type": named, "text_config": {"model_type": "kimi_linear"}})


def test_no_two_are_refused_for_one_reason():
    assert len({*REFUSED.values()}) == len(REFUSED)
    assert not REFUSED.keys() & FAMILIES.keys()
