"""The tables of fla's families against their mixers; shapes and switches are in ``test_mixer_tensors.py``."""

import sys

import pytest
import torch
from fla.layers import DeltaNet, GatedDeltaNet
from tiny_models import FAMILIES as MODELS
from tiny_models import build

from keyreduce.families import FAMILIES, MixerSizes, Part
from keyreduce.models.delta_net_2 import DeltaNet2

# Sizes that all differ, so that no axis can be taken for another one.
DELTA_NET = dict(hidden_size=40, num_heads=2, expand_k=0.6, expand_v=1.4)
GATED = dict(hidden_size=40, num_heads=2, num_v_heads=6, head_dim=10, expand_v=1.5)
MIXERS = {
    "delta_net": (DeltaNet, DELTA_NET, MixerSizes(2, 2, 12, 28)),
    "delta_net_2": (DeltaNet2, DELTA_NET, MixerSizes(2, 2, 12, 28)),
    "gated_deltanet": (GatedDeltaNet, GATED, MixerSizes(2, 6, 10, 15)),
}
VARIANTS = {
    "delta_net": [{}, {"use_gate": True}, {"use_beta": False}, {"use_short_conv": False}, {"conv_bias": True}],
    "delta_net_2": [
        {},
        {"per_head_conv": True},
        {"per_head_conv": True, "share_kv_conv": True},
        {"shift_only_conv": True},
        {"shift_only_conv": True, "conv_scaled_shift": True},
        {"shift_only_conv": True, "conv_scaled_shift": True, "per_head_conv": True},
        {"shift_only_conv": True, "conv_scaled_shift": True, "per_head_conv": True, "share_kv_conv": True},
        {"use_gate": True},
        {"use_beta": False},
        {"use_short_conv": False},
    ],
    "gated_deltanet": [{}, {"use_gate": False}, {"use_short_conv": False}, {"conv_bias": True}],
}
pytestmark = pytest.mark.filterwarnings("ignore:ShortConvolution is crucial")


def shapes_of(model_type: str, options: dict) -> dict[str, tuple[int, ...]]:
    mixer_class, arguments, _ = MIXERS[model_type]
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in mixer_class(**arguments, **options).state_dict().items()}


@pytest.mark.parametrize("model_type", MODELS)
def test_the_table_lists_nothing_that_no_mixer_has(model_type):
    seen = {name for options in VARIANTS[model_type] for name in shapes_of(model_type, options)}
    assert set(FAMILIES[model_type].tensors) == seen


@pytest.mark.parametrize("model_type", MODELS)
def test_the_mixer_is_where_the_family_says_and_calls_its_operators(model_type):
    family, model = FAMILIES[model_type], build(model_type)
    assert model.config.model_type == model_type
    mixer = model.get_submodule(family.mixer.format(layer=1))
    assert isinstance(mixer, MIXERS[model_type][0])
    for name in family.operators:
        assert callable(getattr(sys.modules[type(mixer).forward.__module__], name))
    assert family.tensor_name(1, "q_proj.weight") in model.state_dict()


@pytest.mark.parametrize("model_type", MODELS)
def test_the_gate_is_no_projection_of_values(model_type):
    """What methods read are the rows of q, k and v and the columns of o, each found by its axes alone."""
    tensors = FAMILIES[model_type].tensors
    assert tensors["g_proj.weight"] == (Part.GATE, Part.HIDDEN)
    for name, axes in (
        ("q_proj", (Part.QUERY, Part.HIDDEN)),
        ("k_proj", (Part.KEY, Part.HIDDEN)),
        ("v_proj", (Part.VALUE, Part.HIDDEN)),
        ("o_proj", (Part.HIDDEN, Part.VALUE)),
    ):
        assert [found for found, parts in tensors.items() if parts == axes] == [f"{name}.weight"]
