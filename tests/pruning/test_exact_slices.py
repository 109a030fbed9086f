"""What a cut means: the pruned model is the dense one with what was dropped masked to zero, for any config.

The delta-rule operator scales by ``head_k_dim ** -0.5``, which the norm of its output takes away, but for that norm's
eps. So where the cut one is compared with the dense one the eps is made tiny, in both.
"""

import dataclasses
import itertools
import math

import pytest
import torch
from cuts import (
    assert_near,
    build,
    config_of,
    configs,
    cut,
    folder,
    load,
    load_with_biases,
    masked,
    numbers,
    plan_of,
    set_eps,
    store,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES as MODELS
from tiny_models import draw_tokens, tensors_of

from keyreduce.families import family_of
from keyreduce.pruning.budget import SIZE_OF
from keyreduce.pruning.methods import METHODS, TARGETS
from keyreduce.pruning.plan import LayerCut, Plan

TARGET_SETS = [targets for count in (1, 2, 3) for targets in itertools.combinations(TARGETS, count)]
ALL = pytest.mark.parametrize("model_type", MODELS)
GROUPED = {"gated_deltanet": {"num_v_heads": 8, "head_dim": 8}}
EPS = 1e-30

pytestmark = pytest.mark.filterwarnings("ignore:ShortConvolution is crucial")


def bounded(examples: int):
    return settings(max_examples=examples, deadline=None, derandomize=True)


def assert_sizes(model, plan: Plan) -> None:
    """The mixers that were built are of the plan's sizes."""
    for layer, sizes in plan.after.items():
        mixer = model.model.layers[layer].attn
        value_heads = getattr(mixer, "num_v_heads", mixer.num_heads)
        assert (mixer.num_heads, value_heads, mixer.head_k_dim, mixer.head_v_dim) == tuple(sizes)


@ALL
@bounded(35)
@given(st.data())
@torch.no_grad()
def test_sliced_is_masked(model_type, data):
    config = data.draw(configs(model_type))
    tokens = draw_tokens(2, data.draw(st.sampled_from([1, 2, 9, 13, 70])))
    dense = build(model_type, config)
    with folder() as path:
        source = store(dense, path / "source")
        plan = plan_of(source, data.draw(numbers(source, data.draw(st.sampled_from(TARGET_SETS)))))
        sliced = load(cut(source, plan, path / "cut"), eps=EPS)
    assert_sizes(sliced, plan)
    set_eps(dense, EPS)
    with masked(dense, plan):
        expected = dense(tokens).logits
    assert_near(sliced(tokens).logits, expected, 1e-8)


@pytest.mark.parametrize("targets", TARGET_SETS, ids=",".join)
@ALL
@torch.no_grad()
def test_each_target_makes_a_difference(tmp_path, model_type, targets):
    """Of which the tests above would not tell if cut and mask both did nothing."""
    dense, tokens = build(model_type, {"num_heads": 4} | GROUPED.get(model_type, {})), draw_tokens(2, 9)
    source = store(dense, tmp_path / "source")
    plan = plan_of(source, dict.fromkeys(targets, 2))
    before, after = plan.layers[0].before, plan.after[0]
    assert {name for name, size in SIZE_OF.items() if getattr(before, size) != getattr(after, size)} == {*targets}
    whole = dense(tokens).logits
    with masked(dense, plan):
        part = dense(tokens).logits
    assert (whole - part).abs().max() > 0.05 * whole.abs().max()
    sliced = load(cut(source, plan, tmp_path / "cut"))
    assert_sizes(sliced, plan)
    assert sliced.num_parameters() < dense.num_parameters()


@pytest.mark.parametrize("targets", TARGET_SETS, ids=",".join)
@pytest.mark.parametrize("model_type", ["delta_net", "gated_deltanet"])
@torch.no_grad()
def test_biases_of_convolutions_are_cut_along(tmp_path, model_type, targets):
    dense, tokens = build(model_type, {"num_heads": 4, "use_gate": True}, conv_bias=True), draw_tokens(2, 9)
    source = store(dense, tmp_path / "source")
    assert "model.layers.0.attn.q_conv1d.bias" in source.tensors
    plan = plan_of(source, dict.fromkeys(targets, 2))
    sliced = load_with_biases(cut(source, plan, tmp_path / "cut"))
    for model in (dense, sliced):
        set_eps(model, EPS)
    with masked(dense, plan):
        expected = dense(tokens).logits
    assert_near(sliced(tokens).logits, expected, 1e-8)


@pytest.mark.parametrize("method", METHODS)
@ALL
def test_keeping_all_is_the_identity(tmp_path, model_type, method):
    source = store(build(model_type, GROUPED.get(model_type, {}) | {"use_gate": True}), tmp_path / "source")
    sizes = family_of(source.config).sizes(source.config)
    available = {"key": sizes.head_k_dim, "value": sizes.head_v_dim, "head": sizes.key_heads}
    targets = list(METHODS[method].select)
    for count in range(1, len(targets) + 1):
        for chosen in itertools.combinations(targets, count):
            plan = plan_of(source, {target: available[target] for target in chosen}, method)
            assert_identical(source.path, cut(source, plan, tmp_path / ",".join(chosen)))


@ALL
@bounded(12)
@given(st.data())
def test_keeping_all_is_the_identity_for_any_config(model_type, data):
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    model = build(model_type, data.draw(configs(model_type))).to(dtype)
    with folder() as path:
        source = store(model, path / "source")
        layers = family_of(source.config).layer_sizes(source.config)
        keep = {
            target: {layer: getattr(sizes, name) for layer, sizes in layers.items()} for target, name in SIZE_OF.items()
        }
        assert_identical(source.path, cut(source, plan_of(source, keep), path / "cut"))


def assert_identical(source, target) -> None:
    before, after = tensors_of(source), tensors_of(target)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert after[name].shape == tensor.shape
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert config_of(target) == config_of(source)


def shuffled(plan: Plan, seed: int) -> Plan:
    """The same cuts, with heads, the key channels of each and the value channels of each in another order."""
    generator = torch.Generator().manual_seed(seed)

    def in_rows(index_GR: torch.Tensor) -> torch.Tensor:
        return torch.stack([row_R[torch.randperm(len(row_R), generator=generator)] for row_R in index_GR])

    def shuffle(layer_cut: LayerCut) -> LayerCut:
        order_H = torch.randperm(len(layer_cut.heads_H), generator=generator)
        group = layer_cut.before.value_heads // layer_cut.before.key_heads
        value_HGR = layer_cut.value_WR.unflatten(0, (-1, group))[order_H]
        return dataclasses.replace(
            layer_cut,
            heads_H=layer_cut.heads_H[order_H],
            key_HR=in_rows(layer_cut.key_HR[order_H]),
            value_WR=in_rows(value_HGR.flatten(0, 1)),
        )

    return Plan(plan.inputs, {layer: shuffle(layer_cut) for layer, layer_cut in plan.layers.items()})


@ALL
@bounded(25)
@given(st.data())
@torch.no_grad()
def test_the_order_of_what_is_kept_does_not_matter(model_type, data):
    dense, tokens = build(model_type, data.draw(configs(model_type))), draw_tokens(2, 9)
    with folder() as path:
        source = store(dense, path / "source")
        targets = data.draw(st.sampled_from([(), *TARGET_SETS]))
        plan = plan_of(source, data.draw(numbers(source, targets)))
        other = shuffled(plan, seed=data.draw(st.integers(0, 99)))
        models = [load(cut(source, some, path / name)) for some, name in ((plan, "plan"), (other, "other"))]
    found, expected = models[1](tokens).logits, models[0](tokens).logits
    assert_near(found, expected, 1e-10)
    if not targets:
        assert_near(found, dense(tokens).logits, 1e-10)


@pytest.mark.parametrize("is_cut", [False, True], ids=["full size", "cut"])
@ALL
@torch.no_grad()
def test_the_order_does_not_matter_in_float32(tmp_path, model_type, is_cut):
    config = {"num_heads": 4, "use_gate": True, "initializer_range": 0.1} | GROUPED.get(model_type, {})
    source, tokens = store(build(model_type, config).float(), tmp_path / "source"), draw_tokens(2, 70)
    plan = plan_of(source, {"key": 5, "value": 6, "head": 3} if is_cut else {})
    folders = [cut(source, some, tmp_path / name) for some, name in ((plan, "plan"), (shuffled(plan, 0), "other"))]
    assert_near(*(load(path, torch.float32)(tokens).logits for path in folders), 1e-5)
    weights = [tensors_of(path)["model.layers.0.attn.q_proj.weight"] for path in folders]
    assert not torch.equal(*weights)


@ALL
@torch.no_grad()
def test_sliced_is_masked_in_float32(tmp_path, model_type):
    config = {"num_heads": 4, "use_gate": True, "initializer_range": 0.1} | GROUPED.get(model_type, {})
    dense, tokens = build(model_type, config).float(), draw_tokens(2, 70)
    source = store(dense, tmp_path / "source")
    plan = plan_of(source, {"key": 5, "value": 6, "head": 3})
    sliced = load(cut(source, plan, tmp_path / "cut"), torch.float32, eps=EPS)
    set_eps(dense, EPS)
    with masked(dense, plan):
        expected = dense(tokens).logits
    assert_near(sliced(tokens).logits, expected, 3e-5)  # both round; norms of small outputs enlarge that


@ALL
@bounded(12)
@given(st.data())
@torch.no_grad()
def test_steps_through_the_cache_give_the_logits_of_one_pass(model_type, data):
    config = data.draw(configs(model_type))
    method = data.draw(st.sampled_from(["random", "pca"] if config.get("qk_norm", "l2") == "l2" else ["random"]))
    start = data.draw(st.sampled_from([1, 3, 66]))
    tokens = draw_tokens(2, start + 4)
    with folder() as path:
        source = store(build(model_type, config), path / "source")
        targets = data.draw(st.sampled_from(TARGET_SETS)) if method == "random" else ("key",)
        model = load(cut(source, plan_of(source, data.draw(numbers(source, targets)), method), path / "cut"))
    whole = model(tokens, use_cache=False).logits
    result = model(tokens[:, :start], use_cache=True)
    logits = [result.logits]
    for step in range(start, start + 4):
        result = model(tokens[:, step : step + 1], past_key_values=result.past_key_values, use_cache=True)
        logits.append(result.logits)
    assert_near(torch.cat(logits, dim=1), whole, 1e-8)


@pytest.mark.parametrize("method", ["random", "pca"])
@ALL
@torch.no_grad()
def test_generation_takes_the_likeliest_token_of_each_pass(tmp_path, model_type, method):
    source = store(build(model_type, GROUPED.get(model_type, {}) | {"num_heads": 4}), tmp_path / "source")
    keep = {"key": 3} if method == "pca" else {"key": 3, "value": 5, "head": 2}
    model, tokens = load(cut(source, plan_of(source, keep, method), tmp_path / "cut")), draw_tokens(2, 9)
    generated = model.generate(tokens, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = tokens
    for _ in range(5):
        expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, expected)


@pytest.mark.parametrize("rank", [1, 31, 32, 48, 49, 64, 96, 98, 103, 107, 127])
@pytest.mark.parametrize("targets", [("key",), ("value",), ("key", "value")], ids=",".join)
@ALL
@torch.no_grad()
def test_any_size_out_of_128(model_type, targets, rank):
    """Of 128 / rank and rank / 128, some are no exact binary numbers, and fla rounds down in places."""
    heads = 2
    config = dict(hidden_size=16, num_heads=heads, num_hidden_layers=1, intermediate_size=16)
    if model_type == "gated_deltanet":
        config |= dict(head_dim=128, expand_v=1, num_v_heads=heads)
    else:
        config |= dict(expand_k=8 * heads, expand_v=8 * heads)
    dense, tokens = build(model_type, config), draw_tokens(1, 9)
    with folder() as path:
        source = store(dense, path / "source")
        plan = plan_of(source, dict.fromkeys(targets, rank))
        sliced = load(cut(source, plan, path / "cut"), eps=EPS)
    sizes = {"head_k_dim": 128, "head_v_dim": 128} | {SIZE_OF[target]: rank for target in targets}
    assert plan.after[0]._asdict() == {"key_heads": heads, "value_heads": heads} | sizes
    assert_sizes(sliced, plan)
    set_eps(dense, EPS)
    with masked(dense, plan):
        expected = dense(tokens).logits
    assert_near(sliced(tokens).logits, expected, 1e-8)


@torch.no_grad()
def test_lists_of_ranks_pass_over_softmax_layers(tmp_path):
    """Their entries nobody reads, but a config whose entries do not fit its heads is refused."""
    config = dict(num_heads=4, num_hidden_layers=3, expand_k=[1.0, 1.0, 0.5], attn={"layers": [1], "num_heads": 2})
    dense, tokens = build("delta_net_2", config), draw_tokens(2, 9)
    source = store(dense, tmp_path / "source")
    plan = plan_of(source, {"head": 3, "key": {0: 5, 2: 3}})
    sliced = load(cut(source, plan, tmp_path / "cut"), eps=EPS)
    assert_sizes(sliced, plan)
    ratios = config_of(tmp_path / "cut")["expand_k"]
    assert [math.isclose(ratio, expected) for ratio, expected in zip(ratios[::2], (15 / 32, 9 / 32), strict=True)]
    set_eps(dense, EPS)
    with masked(dense, plan):
        expected = dense(tokens).logits
    assert_near(sliced(tokens).logits, expected, 1e-8)
