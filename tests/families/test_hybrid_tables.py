"""The tables of transformers' hybrids against the mixers that it builds, and the files that it writes, of odd sizes."""

import json

import hybrid_models
import pytest
import torch
from tiny_models import draw_tokens
from transformers import AutoConfig, AutoModelForCausalLM

from keyreduce.errors import KeyreduceError
from keyreduce.families import FAMILIES, Joined, MixerSizes, Part, family_of
from keyreduce.families.axes import kept_places, length_of, parts_of, place_of, places

ALL = pytest.mark.parametrize("model_type", hybrid_models.HYBRIDS)
LANGUAGE = pytest.mark.parametrize("model_type", hybrid_models.LANGUAGE)
# Sizes of which no two sums are alike, so that no axis can be taken for another one.
ODD = dict(
    hidden_size=40, linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=11, linear_value_head_dim=7
)
SIZES = MixerSizes(2, 6, 11, 7)


def language(config: dict) -> dict:
    return config.get("text_config", config)


def mixer_of(model_type: str, config: dict) -> torch.nn.Module:
    """The first mixer that transformers builds from a config that went through JSON, without numbers."""
    whole = AutoConfig.for_model(**json.loads(json.dumps(config)) | {"model_type": model_type})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(whole.get_text_config())
    return next(module for name, module in model.named_modules() if name.endswith("linear_attn"))


def sizes_in_transformers(model_type: str, config: dict) -> MixerSizes:
    mixer = mixer_of(model_type, config)
    return MixerSizes(mixer.num_k_heads, mixer.num_v_heads, mixer.head_k_dim, mixer.head_v_dim)


@ALL
def test_missing_fields_take_the_defaults_of_transformers(model_type):
    family = FAMILIES[model_type]
    config = AutoConfig.for_model(model_type).get_text_config()
    assert family.sizes({}) == sizes_in_transformers(model_type, {})
    assert family.width({}) == config.hidden_size
    assert family.depth({}) == config.num_hidden_layers
    expected = [layer for layer, kind in enumerate(config.layer_types) if kind == "linear_attention"]
    assert family.mixer_layers({}) == expected


@pytest.mark.parametrize("layers, interval", [(1, None), (3, None), (9, None), (9, 3), (7, 2)])
@LANGUAGE
def test_layers_without_a_list_of_kinds(model_type, layers, interval):
    if model_type == "olmo_hybrid" and (interval or layers == 1):
        pytest.skip("of which it refuses one layer, and knows no interval")
    config = {"num_hidden_layers": layers} | ({"full_attention_interval": interval} if interval else {})
    kinds = AutoConfig.for_model(model_type, **config).layer_types
    expected = [layer for layer, kind in enumerate(kinds) if kind == "linear_attention"]
    assert FAMILIES[model_type].mixer_layers(config) == expected


@ALL
def test_resized_configs_build_mixers_of_those_sizes(model_type):
    config = hybrid_models.build(model_type).config.to_dict()
    family = FAMILIES[model_type]
    assert family.resized(config, family.layer_sizes(config)) == config
    before = json.dumps(config)
    for sizes in (SIZES, MixerSizes(1, 1, 1, 1), MixerSizes(2, 4, 8, 5), MixerSizes(1, 2, 96, 127)):
        resized = family.resized(config, dict.fromkeys(family.mixer_layers(config), sizes))
        assert sizes_in_transformers(model_type, resized) == sizes
        assert language(resized).keys() == language(config).keys()
    assert json.dumps(config) == before


def test_olmo_hybrid_sizes_that_follow_from_others_are_written_out():
    family = FAMILIES["olmo_hybrid"]
    config = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    assert family.sizes(config) == MixerSizes(30, 30, 96, 192)
    resized = family.resized(config, {0: MixerSizes(20, 20, 96, 192)})
    assert sizes_in_transformers("olmo_hybrid", resized) == MixerSizes(20, 20, 96, 192)


@ALL
@torch.no_grad()
def test_state_bytes_are_those_of_the_cache(tmp_path, model_type):
    folder = hybrid_models.store(hybrid_models.build(model_type), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    cache = model(draw_tokens(3, 5), use_cache=True).past_key_values
    if hasattr(cache, "layers"):
        states = [cache.layers[layer].recurrent_states for layer in (0, 2)]
    else:  # OLMo-Hybrid up to transformers 5.14
        states = [cache.recurrent_states[layer] for layer in (0, 2)]
    states = [state[0] if isinstance(state, (list, tuple, dict)) else state for state in states]
    family = family_of(json.loads((folder / "config.json").read_text()))
    assert family.state_bytes(model.config.to_dict()) == 4 * sum(state.numel() for state in states) / 3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"layer_types": ["linear_attention"]}, "does not name the kind of each of 3 layers"),
        ({"layer_types": 3}, "does not name the kind"),
        ({"linear_key_head_dim": 0}, "linear_key_head_dim is 0"),
        ({"linear_num_value_heads": 3}, "3 value heads cannot be shared out among 2"),
    ],
)
@ALL
def test_impossible_configs_are_refused(model_type, change, told):
    config = hybrid_models.build(model_type).config.to_dict()
    config = config | {"text_config": config["text_config"] | change} if "text_config" in config else config | change
    with pytest.raises(KeyreduceError, match=told):
        FAMILIES[model_type].layer_sizes(config)


@pytest.mark.parametrize("interval", [0, "4", True])
def test_an_impossible_interval_is_refused(interval):
    with pytest.raises(KeyreduceError, match="full_attention_interval is"):
        FAMILIES["qwen3_next"].mixer_layers({"full_attention_interval": interval})


def test_a_section_that_is_none_is_refused():
    with pytest.raises(KeyreduceError, match="text_config is 3, where an object belongs"):
        FAMILIES["qwen3_5"].sizes({"text_config": 3})


def test_packed_rows_are_those_that_transformers_takes(tmp_path):
    """Of an input projection whose rows are numbered, q, k, v and the gate come out of transformers' own splitting."""
    mixer = mixer_of("qwen3_next", hybrid_models.LANGUAGE["qwen3_next"] | ODD)
    axis = FAMILIES["qwen3_next"].tensors["in_proj_qkvz.weight"][0]
    rows = torch.arange(length_of(axis, SIZES.lengths)).float()
    ba = torch.arange(12).float()
    query, key, value, gate, b, a = mixer.fix_query_key_value_ordering(rows[None, None], ba[None, None])
    for part, expected in zip(axis.parts, (query, key, value, gate), strict=True):
        assert place_of(axis, part, SIZES.lengths, 2).tolist() == expected.flatten().tolist()
    axis = FAMILIES["qwen3_next"].tensors["in_proj_ba.weight"][0]
    found = [place.tolist() for _, place in places(axis, SIZES.lengths, 2)]
    assert found == [b.flatten().tolist(), a.flatten().tolist()]


@pytest.mark.parametrize("by_key_head", [False, True])
def test_what_stays_of_a_joined_axis(by_key_head):
    axis = Joined((Part.KEY, Part.VALUE_HEAD), by_key_head)
    before, after = MixerSizes(3, 6, 2, 1), MixerSizes(2, 4, 1, 1)
    kept = {Part.KEY: torch.tensor([1, 4]), Part.VALUE_HEAD: torch.tensor([0, 1, 4, 5])}
    found = kept_places(axis, kept, (before.lengths, 3), (after.lengths, 2))
    # Two keys and two heads for each key head, or six keys and then six heads; heads 0 and 2 stay.
    assert found.tolist() == ([1, 2, 3, 8, 10, 11] if by_key_head else [1, 4, 6, 7, 10, 11])
    assert parts_of(axis) == (Part.KEY, Part.VALUE_HEAD)
    assert parts_of(Part.GATE) == (Part.GATE,)


@pytest.mark.parametrize("model_type", hybrid_models.SEEING)
def test_the_path_of_the_mixers_is_found_in_the_names(model_type):
    family, text = FAMILIES[model_type], FAMILIES[hybrid_models.SEEING[model_type]]
    within, alone = "model.language_model.layers.0.linear_attn", "model.layers.0.linear_attn"
    for found in (family, text):
        assert found.located([f"{within}.A_log"]).tensor_name(0, "A_log") == f"{within}.A_log"
        assert found.located([f"{alone}.A_log"]).tensor_name(0, "A_log") == f"{alone}.A_log"
        assert found.located(["model.layers.0.mlp.up_proj.weight"]) is found
    assert family_of({"model_type": model_type}, [f"{alone}.A_log"]).mixer == text.mixer
