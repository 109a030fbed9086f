"""What a cut means for Kimi Delta Attention, where each key channel has a decay, and bottlenecks go with the values.

Everything is exact but the bottlenecks: they get the nearest product of their new rank, in the masked model too.
"""

import hybrid_models
import numpy as np
import pytest
import torch
from cuts import assert_near, budget_of, config_of, cut, load, masked, plan_of
from hybrid_models import CHANNEL_DECAY
from test_exact_slices import EPS, assert_identical, shuffled
from tiny_models import draw_tokens, edit_config, edit_tensors, tensors_of

from keyreduce.checkpoint.folder import open_folder
from keyreduce.errors import KeyreduceError
from keyreduce.families import FAMILIES, MixerSizes, family_of
from keyreduce.pruning.budget import SIZE_OF
from keyreduce.pruning.edits import Narrow
from keyreduce.pruning.masked import check_logits
from keyreduce.pruning.methods import METHODS
from keyreduce.pruning.planning import check_method

CPU, TOLERANCE = torch.device("cpu"), 2e-4
EXACT = [("kda", {"key": 5}), ("kda", {"head": 1}), ("kda", {"key": 5, "head": 1}), ("kimi_linear", {"head": 1})]
NARROWED = [
    ("kda", {"value": 4}), ("kda", {"key": 5, "value": 4, "head": 1}), ("kimi_linear", {"key": 5, "value": 5}),
    ("kimi_linear", {"key": 5, "value": 5, "head": 1}),
]  # fmt: skip
ALL = pytest.mark.parametrize("model_type", CHANNEL_DECAY)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Model type -> its opened folder, made once."""
    made = {}

    def make(model_type):
        if model_type not in made:
            folder = tmp_path_factory.mktemp(model_type) / "dense"
            made[model_type] = open_folder(hybrid_models.store(hybrid_models.build(model_type), folder))
        return made[model_type]

    return make


def prefix(model_type, layer=0):
    return FAMILIES[model_type].tensor_name(layer, "")


@pytest.mark.parametrize(("model_type", "keep"), EXACT, ids=str)
@torch.no_grad()
def test_sliced_is_masked(tmp_path, dense, model_type, keep):
    source, tokens = dense(model_type), draw_tokens(2, 70)
    plan = plan_of(source, keep)
    assert sorted(plan.layers) == [0, 2]
    sliced = load(cut(source, plan, tmp_path / "cut"), torch.float32, eps=EPS)
    whole = load(source.path, torch.float32, eps=EPS)
    unmasked = whole(tokens).logits
    with masked(whole, plan):
        expected = whole(tokens).logits
    assert (unmasked - expected).abs().max() > 0.01 * expected.abs().max()
    assert_near(sliced(tokens).logits, expected, TOLERANCE)


def bottlenecks(tensors, model_type, layer):
    """The two products of a mixer, and nothing else of it."""
    names = {"kda": ("f_proj.0", "f_proj.1", "g_proj.0", "g_proj.1")}.get(
        model_type, ("f_a_proj", "f_b_proj", "g_a_proj", "g_b_proj")
    )
    inner_f, outer_f, inner_g, outer_g = (tensors[f"{prefix(model_type, layer)}{name}.weight"] for name in names)
    return (outer_f.double() @ inner_f.double()).numpy(), (outer_g.double() @ inner_g.double()).numpy()


@pytest.mark.parametrize(("model_type", "keep"), NARROWED, ids=str)
def test_bottlenecks_are_the_nearest_of_their_rank(tmp_path, dense, model_type, keep):
    source = dense(model_type)
    plan = plan_of(source, keep)
    before, after = tensors_of(source.path), tensors_of(cut(source, plan, tmp_path / "cut"))
    for layer, layer_cut in plan.layers.items():
        sizes, heads_W = layer_cut.before, layer_cut.value_heads_W.tolist()
        group = sizes.value_heads // sizes.key_heads
        decay_rows = [
            head * sizes.head_k_dim + channel
            for place, head in enumerate(heads_W)
            for channel in layer_cut.key_HR[place // group].tolist()
        ]
        gate_rows = [
            head * sizes.head_v_dim + channel
            for place, head in enumerate(heads_W)
            for channel in layer_cut.value_WR[place].tolist()
        ]
        pairs = zip(bottlenecks(before, model_type, layer), bottlenecks(after, model_type, layer), strict=True)
        for rows, (whole, found) in zip((decay_rows, gate_rows), pairs, strict=True):
            u, values, v = np.linalg.svd(whole[rows])
            rank = min(layer_cut.after.head_v_dim, len(values))
            expected = u[:, :rank] * values[:rank] @ v[:rank]
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * values[0])
        dt_bias = after[f"{prefix(model_type, layer)}dt_bias"]
        assert torch.equal(dt_bias, before[f"{prefix(model_type, layer)}dt_bias"][decay_rows])
    assert check_logits(source, tmp_path / "cut", plan, device=CPU) < TOLERANCE


@pytest.mark.parametrize(("model_type", "keep"), EXACT, ids=str)
def test_the_check_of_logits_passes_what_is_right(tmp_path, dense, model_type, keep):
    source = dense(model_type)
    plan = plan_of(source, keep)
    assert check_logits(source, cut(source, plan, tmp_path / "cut"), plan, device=CPU) < TOLERANCE


@ALL
def test_the_check_of_logits_refuses_decays_in_another_order(tmp_path, dense, model_type):
    source = dense(model_type)
    plan = plan_of(source, {"key": 5, "value": 5})
    target = cut(source, plan, tmp_path / "cut")
    edit_tensors(target, lambda tensors: tensors[f"{prefix(model_type)}dt_bias"].copy_(
        tensors[f"{prefix(model_type)}dt_bias"].flip(0)))  # fmt: skip
    with pytest.raises(KeyreduceError, match="differ from those of the dense model"):
        check_logits(source, target, plan, device=CPU)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "pca"])
@ALL
def test_keeping_all_is_the_identity(tmp_path, dense, model_type, method):
    source = dense(model_type)
    sizes = family_of(source.config).sizes(source.config)
    keep = {target: getattr(sizes, SIZE_OF[target]) for target in METHODS[method].select}
    assert_identical(source.path, cut(source, plan_of(source, keep, method), tmp_path / "cut"))


@pytest.mark.parametrize("is_cut", [False, True], ids=["full size", "cut"])
@ALL
@torch.no_grad()
def test_the_order_of_what_is_kept_does_not_matter(tmp_path, dense, model_type, is_cut):
    source, tokens = dense(model_type), draw_tokens(2, 9)
    plan = plan_of(source, {"key": 5, "value": 5} if is_cut else {})
    folders = [cut(source, some, tmp_path / name) for some, name in ((plan, "plan"), (shuffled(plan, 0), "other"))]
    found, expected = (load(path, torch.float32)(tokens).logits for path in folders)
    assert_near(found, expected, TOLERANCE)


@ALL
@torch.no_grad()
def test_steps_through_the_cache_give_the_logits_of_one_pass(tmp_path, dense, model_type):
    source, tokens = dense(model_type), draw_tokens(2, 12)
    plan = plan_of(source, {"key": 5, "value": 5, "head": 1})
    model = load(cut(source, plan, tmp_path / "cut"), torch.float32)
    result = model(tokens[:, :8], use_cache=True)
    logits = [result.logits]
    for step in range(8, 12):
        result = model(tokens[:, step : step + 1], past_key_values=result.past_key_values, use_cache=True)
        logits.append(result.logits)
    assert_near(torch.cat(logits, dim=1), model(tokens, use_cache=False).logits, TOLERANCE)


def test_both_places_of_kimi_linear_say_the_size(tmp_path, dense):
    """On the hub its config has a section with sizes, which transformers believes rather than what it writes itself."""
    source = dense("kimi_linear")
    section = {"head_dim": 8, "num_heads": 2, "kda_layers": [1, 3], "full_attn_layers": [2]}
    folder = hybrid_models.store(hybrid_models.build("kimi_linear"), tmp_path / "dense")
    edit_config(folder, linear_attn_config=section, linear_head_dim=128, linear_num_heads=32, layer_types=None)
    both = open_folder(folder)
    assert family_of(both.config).layer_sizes(both.config) == family_of(source.config).layer_sizes(source.config)
    plan = plan_of(both, {"key": 5, "value": 5, "head": 1})
    after = config_of(cut(both, plan, tmp_path / "cut"))
    assert after["linear_attn_config"] == section | {"head_dim": 5, "num_heads": 1}
    assert (after["linear_head_dim"], after["linear_num_heads"]) == (5, 1)
    assert load(tmp_path / "cut", torch.float32).model.layers[2].self_attn.head_dim == 5
    # Where the section alone says it, so it stays.
    alone = {name: value for name, value in both.config.items() if not name.startswith("linear_head")}
    resized = FAMILIES["kimi_linear"].resized(alone, dict.fromkeys((0, 2), MixerSizes(2, 2, 4, 4)))
    assert "linear_head_dim" not in resized and resized["linear_attn_config"]["head_dim"] == 4


@pytest.mark.parametrize("target", ["key", "value"])
def test_keys_and_values_of_kimi_linear_go_together(dense, target):
    with pytest.raises(KeyreduceError, match="cut both alike, with `target` key,value"):
        budget_of(target, keep="5").check(dense("kimi_linear").config, METHODS["l2"])
    budget_of("key,value", keep="5").check(dense("kimi_linear").config, METHODS["l2"])
    budget_of("head", keep="1").check(dense("kimi_linear").config, METHODS["l2"])


@ALL
def test_mixing_key_channels_is_refused(dense, model_type):
    with pytest.raises(KeyreduceError, match="each decays at a rate of its own"):
        check_method(dense(model_type), METHODS["pca"], ["key"])


def test_a_product_of_few_rows_is_filled_with_zeros():
    outer, inner = torch.randn(2, 6), torch.randn(6, 9)
    rows = torch.arange(2)
    new_outer = Narrow(4, True, lambda: inner, rows).apply(outer)
    new_inner = Narrow(4, False, lambda: outer, rows).apply(inner)
    assert (new_outer.shape, new_inner.shape) == ((2, 4), (4, 9))
    torch.testing.assert_close(new_outer @ new_inner, outer @ inner, rtol=1e-5, atol=1e-5)
