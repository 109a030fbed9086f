"""What the tables say of a config's mixers against the models that fla, transformers and keyreduce build of it."""

import itertools

import hybrid_models
import pytest
import tiny_models
from tiny_models import file_shapes
from transformers import AutoConfig

from keyreduce.errors import KeyreduceError, UnknownArchitecture
from keyreduce.families import FAMILIES, family_of
from keyreduce.families.axes import Joined
from keyreduce.families.mixer_tensors import below_mixers, check_mixers, expected_tensors
from keyreduce.models.meta import build_model, check_loading

# Sizes of which no two sums are alike, so that no axis can be taken for another one.
OF_FLA = dict(hidden_size=40, num_hidden_layers=3, intermediate_size=8, vocab_size=9)
OF_FLA |= dict(attn={"layers": [1], "num_heads": 2}, conv_size=3)
DELTA_NET = OF_FLA | dict(num_heads=2, expand_k=0.6, expand_v=1.4)
GATED = OF_FLA | dict(num_heads=2, num_v_heads=6, head_dim=12, expand_v=0.75)
HYBRID = dict(
    hidden_size=40, linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=11, linear_value_head_dim=7,
    linear_conv_kernel_dim=3,
)  # fmt: skip
ODD = {
    "delta_net": DELTA_NET,
    "delta_net_2": DELTA_NET | dict(expand_k=[0.6, 0.5, 0.8]),
    "gated_deltanet": GATED,
    "kda": GATED,
    "kimi_linear": hybrid_models.CHANNEL_DECAY["kimi_linear"]
    | dict(hidden_size=40, linear_num_heads=3, linear_head_dim=7, linear_conv_kernel_dim=3),
    **{model_type: sizes | HYBRID for model_type, sizes in hybrid_models.LANGUAGE.items()},
    **{model_type: hybrid_models.ALIKE[model_type] | HYBRID for model_type in ("lara_mini", "qwen4_exp_text")},
    "bailing_hybrid": hybrid_models.ALIKE["bailing_hybrid"]
    | dict(hidden_size=40, num_attention_heads=3, num_key_value_heads=3, head_dim=7, short_conv_kernel_size=3),
    "precond_gated_deltanet": GATED,
    "precond_kda": GATED,
}
SWITCHES = {
    "delta_net": ("use_gate", "use_beta", "use_short_conv"),
    "delta_net_2": (
        "use_gate", "use_short_conv", "per_head_conv", "share_kv_conv", "shift_only_conv", "conv_scaled_shift",
    ),
    "gated_deltanet": ("use_gate", "use_short_conv"),
    "kda": ("use_short_conv",),
    "precond_gated_deltanet": ("use_gate", "use_short_conv"),
    "precond_kda": ("use_short_conv",),
}  # fmt: skip
MORE = {
    "kda": {"lower_bound": -5, "safe_gate": True},
    "kimi_linear": {"linear_attn_config": {"short_conv_kernel_size": 5}},
}
pytestmark = pytest.mark.filterwarnings("ignore:ShortConvolution is crucial")


def configs(model_type):
    """The config of odd sizes, as its class writes it, with all the settings of its switches, and without any."""
    hybrid_models.needs(model_type)
    names = SWITCHES.get(model_type, ())
    settings = [dict(zip(names, values, strict=True)) for values in itertools.product([False, True], repeat=len(names))]
    settings = [flags for flags in settings if flags.get("shift_only_conv") or not flags.get("conv_scaled_shift")]
    for flags in [*settings, MORE.get(model_type, {})]:
        yield AutoConfig.for_model(model_type, **ODD[model_type] | flags).to_dict()
    yield {"model_type": model_type, **ODD[model_type]}


def mixers_of(config):
    """Name -> shape of the mixers' tensors, as the library would write them, and those that the table gives."""
    written = file_shapes(config)
    expected = expected_tensors(config, written)
    check_mixers(config, written, "somewhere")
    check_loading(config, written, "somewhere")
    return {name: written[name] for name in below_mixers(config, written)}, expected


@pytest.mark.parametrize("model_type", hybrid_models.marked(ODD))
def test_table_and_library_agree(model_type):
    family = FAMILIES[model_type]
    for config in configs(model_type):
        written, expected = mixers_of(config)
        located = family.located(written)
        assert written.keys() == expected.keys()
        assert {tensor.layer for tensor in expected.values()} == set(family.mixer_layers(config)) == {0, 2}
        model = dict(build_model(config).named_parameters())
        for name, tensor in expected.items():
            names = [family.tensor_name(tensor.layer, one) for one in tensor.inner]
            is_joined = all(one in model for one in names)  # OLMo-Hybrid of transformers up to 5.14 joins none
            shapes = [model[one].shape for one in (names if is_joined else [name])]
            inner = (sum(shape[0] for shape in shapes), *shapes[0][1:])
            assert len(shapes) == 1 or tensor.rows == tuple(shape[0] for shape in shapes)
            pieces = [located.tensor_name(tensor.layer, piece) for piece in family.joined_with(tensor.name)]
            if pieces and is_joined:
                assert inner == (sum(expected[piece].shape[0] for piece in pieces), *tensor.shape[1:]), name
            else:
                assert tensor.shape == inner == written[name], name


@pytest.mark.parametrize("model_type", hybrid_models.SEEING)
def test_table_and_library_agree_on_models_that_see(tmp_path, model_type):
    """Also on the files of their language models alone."""
    model = hybrid_models.build(model_type, **HYBRID)
    shapes = {name: tuple(t.shape) for name, t in tiny_models.tensors_of(hybrid_models.store(model, tmp_path)).items()}
    config = model.config.to_dict()
    for names in (shapes, {name.replace("model.language_model.", "model."): shapes[name] for name in shapes}):
        expected = expected_tensors(config, names)
        assert {name: tensor.shape for name, tensor in expected.items()} == {
            name: names[name] for name in below_mixers(config, names)
        }
        assert len(expected) == 2 * len(FAMILIES[model_type].tensors)
        check_mixers(config, names, tmp_path)
        check_loading(config, names, tmp_path)


@pytest.mark.parametrize("model_type", hybrid_models.marked(ODD))
def test_every_tensor_of_a_table_is_seen(model_type):
    family = FAMILIES[model_type]
    seen = {tensor.name for config in configs(model_type) for tensor in expected_tensors(config).values()}
    assert seen | set(family.optional) == set(family.tensors)
    assert set(family.only_with) | set(family.optional) <= set(family.tensors)


@pytest.mark.parametrize("model_type", ["delta_net", "gated_deltanet", "kda"])
def test_a_bias_that_no_config_asks_for_may_be_there(model_type):
    config = {"model_type": model_type, **ODD[model_type]}
    shapes, name = file_shapes(config), FAMILIES[model_type].tensor_name(0, "v_conv1d.bias")
    length = shapes[name.replace("bias", "weight")][0]
    check_mixers(config, shapes | {name: (length,)}, "somewhere")
    with pytest.raises(KeyreduceError, match="of another shape: "):
        check_mixers(config, shapes | {name: (length - 1,)}, "somewhere")


@pytest.mark.parametrize("model_type", hybrid_models.marked(hybrid_models.WRAPPED))
def test_table_and_library_agree_on_larger_models(tmp_path, model_type):
    odd = dict(hidden_size=40, linear_num_heads=3, linear_head_dim=7) if model_type == "glm5_next" else HYBRID
    wide = {"hidden_size": 40} if model_type == "jev" else {}
    model = hybrid_models.build(model_type, outer=wide, **odd | dict(linear_conv_kernel_dim=3))
    shapes = {name: tuple(t.shape) for name, t in tiny_models.tensors_of(hybrid_models.store(model, tmp_path)).items()}
    config, expected = model.config.to_dict(), expected_tensors(model.config.to_dict(), shapes)
    assert {name: tensor.shape for name, tensor in expected.items()} == {
        name: shapes[name] for name in below_mixers(config, shapes)
    }
    assert len(expected) == 2 * len(FAMILIES[model_type].tensors)
    check_mixers(config, shapes, tmp_path)
    check_loading(config, shapes, tmp_path)


def test_pieces_may_be_divided_otherwise():
    config = {"model_type": "olmo_hybrid", **ODD["olmo_hybrid"]}
    shapes = file_shapes(config)
    names = [f"model.layers.0.linear_attn.{which}_conv1d.weight" for which in "qkv"]
    assert [expected_tensors(config)[name].shape for name in names] == [(22, 1, 3), (22, 1, 3), (42, 1, 3)]
    check_mixers(config, shapes | dict(zip(names, [(1, 1, 3), (2, 1, 3), (83, 1, 3)], strict=True)), "somewhere")
    for wrong in ((82, 1, 3), (83, 2, 3), (83, 1, 4), (83, 1), ()):
        with pytest.raises(KeyreduceError, match=f"of another shape: .*{names[2]}"):
            check_mixers(config, shapes | dict(zip(names, [(1, 1, 3), (2, 1, 3), wrong], strict=True)), "somewhere")
    shapes |= dict(zip(names, [(1, 1, 3), (2, 1, 3), (83, 1, 3)], strict=True))
    del shapes[names[1]]
    with pytest.raises(KeyreduceError, match=f"missing: {names[1]}; of another shape"):
        check_mixers(config, shapes, "somewhere")


def test_a_prefix_before_all_names_is_named():
    config = tiny_models.build("delta_net").config.to_dict()
    shapes = {f"student.{name}": shape for name, shape in file_shapes(config).items()}
    told = "tensors of somewhere have the prefix 'student.' in their names, such as 'student.model.layers.0.attn.q_proj"
    with pytest.raises(KeyreduceError, match=told):
        check_mixers(config, shapes, "somewhere")


def test_every_fault_is_listed_in_one_line():
    config = {"model_type": "delta_net", **ODD["delta_net"], "attn": None}
    shapes = file_shapes(config)
    names = list(expected_tensors(config))[:12]
    shapes |= {f"{name}.scales": shapes.pop(name) for name in names} | {"model.layers.2.attn.o_norm.weight": (3,)}
    shapes |= {"model.layers.7.attn.A_log": (3,), "model.norm.weight": (1,)}  # no mixers, and for others to see
    with pytest.raises(KeyreduceError) as caught:
        check_mixers(config, shapes, "somewhere")
    told = str(caught.value)
    assert told.count(" and 2 more") == 2 and "\n" not in told
    assert f"somewhere are not those that its config.json asks for; missing: {names[0]}, " in told
    assert f"left over: {names[0]}.scales, " in told
    assert told.endswith("of another shape: model.layers.2.attn.o_norm.weight [3] for [28]")
    with pytest.raises(UnknownArchitecture, match="missing"):
        check_mixers(config | {"quantization_config": {}}, shapes, "somewhere")


def test_a_billion_layers_are_refused_at_once():
    config = {"model_type": "qwen3_5", "text_config": {"num_hidden_layers": 10**9}}
    with pytest.raises(KeyreduceError, match="says num_hidden_layers 1e.09, but there are only 1 tensors"):
        check_mixers(config, {"model.norm.weight": (3,)}, "somewhere")


def test_of_other_models_nothing_is_said():
    with pytest.raises(UnknownArchitecture, match="'llama' is none of the delta-rule models"):
        check_mixers({"model_type": "llama"}, {}, "somewhere")


def test_joined_axes_are_as_long_as_their_parts():
    config = {"model_type": "qwen3_next", **ODD["qwen3_next"]}
    axis, lengths = family_of(config).tensors["in_proj_qkvz.weight"][0], family_of(config).axis_sizes(config)
    assert isinstance(axis, Joined)
    shape = expected_tensors(config)["model.layers.0.linear_attn.in_proj_qkvz.weight"].shape
    assert shape == (sum(lengths[part] for part in axis.parts), 40) == (2 * 22 + 2 * 42, 40)
