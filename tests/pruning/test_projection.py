"""Projection: what is written is the formula's, and exact where what lies before the operator commutes with it.

Shapes: H key heads, K key channels of a head, R kept, N anything else.
"""

import dataclasses

import numpy as np
import pytest
import torch
from cuts import (
    assert_near,
    build,
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

from keyreduce.checkpoint.folder import open_folder
from keyreduce.pruning.plan import LayerCut, Plan

EPS = 1e-30

pytestmark = pytest.mark.filterwarnings("ignore:ShortConvolution is crucial")


def bounded(examples: int):
    return settings(max_examples=examples, deadline=None, derandomize=True)


def random_bases(source_plan: Plan, seed: int = 0) -> Plan:
    """The cuts of a plan, with any orthonormal basis of each head in the place of its key channels."""
    generator = torch.Generator().manual_seed(seed)

    def project(layer_cut: LayerCut) -> LayerCut:
        H, K, R = len(layer_cut.heads_H), layer_cut.before.head_k_dim, layer_cut.after.head_k_dim
        square_HKK = torch.randn(H, K, K, generator=generator, dtype=torch.float64)
        return dataclasses.replace(layer_cut, key_HR=None, projection_HKR=torch.linalg.qr(square_HKK).Q[..., :R])

    return Plan(source_plan.inputs, {layer: project(layer_cut) for layer, layer_cut in source_plan.layers.items()})


# Here nothing but kernels that a head's channels share is between projection and operator.
COMMUTING = dict(qk_activation="identity", qk_norm="l2")


@bounded(30)
@given(st.data())
@torch.no_grad()
def test_projection_is_exact_where_all_commutes(data):
    """The cut model is the dense one whose q and k are projected by ``P P^T`` right before the operator."""
    model_type = data.draw(st.sampled_from(["delta_net", "delta_net_2"]))
    # Without a convolution DeltaNet too has nothing in between.
    fixed = COMMUTING | ({"use_short_conv": False} if model_type == "delta_net" else {})
    dense = build(model_type, data.draw(configs(model_type, **fixed)))
    tokens = draw_tokens(2, data.draw(st.sampled_from([1, 9, 70])))
    targets = data.draw(st.sampled_from([("key",), ("key", "value"), ("key", "head"), ("key", "value", "head")]))
    with folder() as path:
        source = store(dense, path / "source")
        keep = data.draw(numbers(source, targets))
        if targets == ("key",) and data.draw(st.booleans()):
            plan = plan_of(source, keep, "pca", include_queries=data.draw(st.booleans()))
        else:
            plan = random_bases(plan_of(source, keep))
        sliced = load(cut(source, plan, path / "cut"), eps=EPS)
    set_eps(dense, EPS)
    with masked(dense, plan):
        expected = dense(tokens).logits
    assert_near(sliced(tokens).logits, expected, 1e-8)


@bounded(15)
@given(st.data())
@torch.no_grad()
def test_a_rotation_at_full_rank_leaves_the_logits(data):
    dense, tokens = build("delta_net_2", data.draw(configs("delta_net_2", **COMMUTING))), draw_tokens(2, 9)
    with folder() as path:
        source = store(dense, path / "source")
        plan = random_bases(plan_of(source, {}))
        rotated = load(cut(source, plan, path / "cut"))
        changed = tensors_of(path / "cut")
        name = f"model.layers.{min(plan.layers)}.attn.q_proj.weight"
        if plan.layers[min(plan.layers)].before.head_k_dim > 1:
            assert not torch.allclose(changed[name], source.read(name), atol=0.1)
    assert_near(rotated(tokens).logits, dense(tokens).logits, 1e-10)


@torch.no_grad()
@pytest.mark.parametrize("rank", [1, 31, 32, 48, 49, 64, 96, 98, 103, 107, 127])
def test_any_rank_out_of_128(rank):
    config = dict(hidden_size=16, num_heads=2, num_hidden_layers=1, expand_k=16, expand_v=16) | COMMUTING
    dense, tokens = build("delta_net_2", config), draw_tokens(1, 9)
    with folder() as path:
        source = store(dense, path / "source")
        plan = plan_of(source, {"key": rank}, "pca")
        sliced = load(cut(source, plan, path / "cut"), eps=EPS)
    assert sliced.model.layers[0].attn.head_k_dim == rank
    set_eps(dense, EPS)
    with masked(dense, plan):
        expected = dense(tokens).logits
    assert_near(sliced(tokens).logits, expected, 1e-8)


def by_loops(tensor: torch.Tensor, plan: Plan, layer: int, kernel: bool) -> np.ndarray:
    """``P^T`` of each kept head's rows, one sum at a time; of kernels, the squares of P."""
    layer_cut = plan.layers[layer]
    K, R = layer_cut.before.head_k_dim, layer_cut.after.head_k_dim
    old = tensor.double().reshape(len(tensor), -1).numpy()
    new = np.zeros((len(layer_cut.heads_H) * R, old.shape[1]))
    for place, head in enumerate(layer_cut.heads_H.tolist()):
        for r in range(R):
            for c in range(K):
                coefficient = float(layer_cut.projection_HKR[place, c, r])
                new[place * R + r] += (coefficient**2 if kernel else coefficient) * old[head * K + c]
    return new


@pytest.mark.parametrize("heads", [None, 2], ids=["all heads", "fewer heads"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", ["delta_net", "gated_deltanet"])
def test_tensors_are_the_formulas(tmp_path, model_type, dtype, heads):
    model = build(model_type, {"num_heads": 4, "use_gate": True}, conv_bias=True).to(dtype)
    source = store(model, tmp_path / "source")
    if heads is None:
        plan = plan_of(source, {"key": 3}, "pca")
    else:
        plan = random_bases(plan_of(source, {"key": 3, "head": heads}))
    before, after = tensors_of(source.path), tensors_of(cut(source, plan, tmp_path / "cut"))
    for layer in plan.layers:
        for operand in "qk":
            for part in ("proj.weight", "conv1d.weight", "conv1d.bias"):
                name = f"model.layers.{layer}.attn.{operand}_{part}"
                expected = by_loops(before[name], plan, layer, kernel=part == "conv1d.weight")
                found = after[name].double().flatten(1) if after[name].ndim > 1 else after[name].double()[:, None]
                tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
                assert after[name].dtype == dtype
                np.testing.assert_allclose(found.numpy(), expected, rtol=tolerance, atol=tolerance)
    if heads is None:
        touched = {name for name in before if after[name].shape != before[name].shape}
        modules = {name.split("attn.")[1].split(".")[0] for name in touched}
        assert modules == {"q_proj", "k_proj", "q_conv1d", "k_conv1d"}
        assert all(torch.equal(after[name], before[name]) for name in before.keys() - touched)
    assert load_with_biases(tmp_path / "cut")(draw_tokens(1, 5)).logits.isfinite().all()


@pytest.mark.parametrize("options", [{"per_head_conv": True}, {"per_head_conv": False}], ids=["per head", "shared"])
def test_shared_kernels_are_not_touched(tmp_path, options):
    source = store(build("delta_net_2", options | {"num_heads": 4}), tmp_path / "source")
    before = tensors_of(source.path)
    after = tensors_of(cut(source, plan_of(source, {"key": 3}, "pca"), tmp_path / "cut"))
    kernels = [name for name in before if "conv1d" in name]
    assert len(kernels) == 6
    assert all(torch.equal(after[name], before[name]) for name in kernels)


@pytest.mark.parametrize("model_type", MODELS)
def test_projections_are_kept_beside_the_checkpoint(tmp_path, model_type):
    """Of every step, also of those before the last."""
    source = store(build(model_type, {}), tmp_path / "source")
    first = plan_of(source, {"key": 9}, "pca")
    once = open_folder(cut(source, first, tmp_path / "once"))
    second = plan_of(once, {"value": 3})
    twice = open_folder(cut(once, second, tmp_path / "twice"))
    third = plan_of(twice, {"key": 4}, "pca")
    cut(twice, third, tmp_path / "thrice")
    with np.load(tmp_path / "thrice" / "keyreduce.npz") as arrays:
        expected = {
            f"steps.{step}.layers.{layer}.projection_HKR": layer_cut.projection_HKR
            for step, plan in ((0, first), (2, third))
            for layer, layer_cut in plan.layers.items()
        }
        assert set(arrays) == set(expected)
        for name, projection_HKR in expected.items():
            np.testing.assert_allclose(arrays[name], projection_HKR.numpy(), atol=1e-7)
    selected = cut(source, plan_of(source, {"key": 9}), tmp_path / "selected")
    assert not (selected / "keyreduce.npz").exists()
