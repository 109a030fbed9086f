"""What a cut means for the hybrids of transformers: the pruned model is the dense one with masked channels.

Their norms and gates compute in float32 whatever the model's dtype: the tolerances are those of float32.
"""

import dataclasses
import itertools

import hybrid_models
import pytest
import torch
import transformers
from cuts import assert_near, config_of, cut, load, masked, plan_of, set_eps
from hybrid_models import ALIKE, HYBRIDS, SEEING, WRAPPED
from test_exact_slices import EPS, assert_identical, shuffled
from tiny_models import draw_tokens, edit_tensors, save, tensors_of

from keyreduce.checkpoint.folder import open_folder
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.errors import KeyreduceError
from keyreduce.families import FAMILIES, family_of
from keyreduce.pruning.budget import SIZE_OF
from keyreduce.pruning.masked import check_logits
from keyreduce.pruning.methods import METHODS, TARGETS

TARGET_SETS = [targets for count in (1, 2, 3) for targets in itertools.combinations(TARGETS, count)]
TOLERANCE = 2e-4
KEEP = {"key": 5, "value": 4, "head": 1}
ALL = pytest.mark.parametrize("model_type", HYBRIDS)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Model type -> its opened folder, made once."""
    made: dict[str, Checkpoint] = {}

    def make(model_type: str) -> Checkpoint:
        if model_type not in made:
            folder = tmp_path_factory.mktemp(model_type) / "dense"
            made[model_type] = open_folder(hybrid_models.store(hybrid_models.build(model_type), folder))
        return made[model_type]

    return make


def assert_sizes(model, plan) -> None:
    for layer, sizes in plan.after.items():
        mixer = model.model.layers[layer].linear_attn
        assert (mixer.num_k_heads, mixer.num_v_heads, mixer.head_k_dim, mixer.head_v_dim) == tuple(sizes)


@pytest.mark.parametrize("targets", TARGET_SETS, ids=",".join)
@ALL
@torch.no_grad()
def test_sliced_is_masked(tmp_path, dense, model_type, targets):
    source, tokens = dense(model_type), draw_tokens(2, 70)
    plan = plan_of(source, {target: KEEP[target] for target in targets})
    before, after = plan.layers[0].before, plan.after[0]
    assert {name for name, size in SIZE_OF.items() if getattr(before, size) != getattr(after, size)} == {*targets}
    assert sorted(plan.layers) == [0, 2]
    sliced = load(cut(source, plan, tmp_path / "cut"), torch.float32, eps=EPS)
    assert_sizes(sliced, plan)
    whole = load(source.path, torch.float32, eps=EPS)
    unmasked = whole(tokens).logits
    with masked(whole, plan):
        expected = whole(tokens).logits
    assert (unmasked - expected).abs().max() > 0.01 * expected.abs().max()
    assert_near(sliced(tokens).logits, expected, TOLERANCE)


@ALL
@torch.no_grad()
def test_steps_through_the_cache_give_the_logits_of_one_pass(tmp_path, dense, model_type):
    source, tokens = dense(model_type), draw_tokens(2, 12)
    model = load(cut(source, plan_of(source, KEEP), tmp_path / "cut"), torch.float32)
    result = model(tokens[:, :8], use_cache=True)
    logits = [result.logits]
    for step in range(8, 12):
        result = model(tokens[:, step : step + 1], past_key_values=result.past_key_values, use_cache=True)
        logits.append(result.logits)
    assert_near(torch.cat(logits, dim=1), model(tokens, use_cache=False).logits, TOLERANCE)


@pytest.mark.parametrize("method", METHODS)
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
    plan = plan_of(source, {"key": 5, "value": 4} if is_cut else {})
    folders = [cut(source, some, tmp_path / name) for some, name in ((plan, "plan"), (shuffled(plan, 0), "other"))]
    found, expected = (load(path, torch.float32)(tokens).logits for path in folders)
    assert_near(found, expected, TOLERANCE)
    before, after = (tensors_of(folder) for folder in folders)
    assert any(not torch.equal(before[name], after[name]) for name in before)


@ALL
def test_what_has_no_mixer_is_copied(tmp_path, dense, model_type):
    """Also the vision part, and layers that predict several tokens ahead."""
    source = dense(model_type)
    extra = hybrid_models.store(hybrid_models.build(model_type), tmp_path / "extra")
    with_mtp = {"mtp.layers.0.self_attn.q_proj.weight": torch.randn(4, 4), "mtp.norm.weight": torch.ones(4)}
    edit_tensors(extra, lambda tensors: tensors.update(with_mtp))
    source = open_folder(extra)
    before, after = tensors_of(extra), tensors_of(cut(source, plan_of(source, KEEP), tmp_path / "cut"))
    assert after.keys() == before.keys()
    changed = {name for name, tensor in before.items() if tensor.shape != after[name].shape}
    assert changed
    assert all(".linear_attn." in name for name in changed)
    same = [name for name in before if ".linear_attn." not in name]
    assert set(with_mtp) < set(same)
    assert any("visual" in name for name in same) == (model_type in SEEING)
    assert all(torch.equal(after[name], before[name]) for name in same)
    assert load(tmp_path / "cut", torch.float32).config.model_type == SEEING.get(model_type, model_type)


@ALL
def test_the_configs_differ_in_sizes_and_say_twice_how_positions_turn(tmp_path, dense, model_type):
    source = dense(model_type)
    after = config_of(cut(source, plan_of(source, KEEP), tmp_path / "cut"))
    sizes = {"linear_num_key_heads": 1, "linear_num_value_heads": 2}
    sizes |= {"linear_key_head_dim": 5, "linear_value_head_dim": 4}
    if model_type in SEEING:
        assert after == source.config | {"text_config": source.config["text_config"] | sizes}
    else:
        # transformers nests what mlx-lm wants at the top.
        rope = source.config.get("rope_parameters") or {}
        twice = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        assert twice
        assert after == source.config | sizes | twice
        assert load(tmp_path / "cut").config.rope_parameters == rope


@pytest.mark.parametrize("model_type", SEEING)
@torch.no_grad()
def test_a_language_model_that_was_saved_alone_is_found_too(tmp_path, dense, model_type):
    """transformers leaves the names of the larger model's checkpoint, and its config says that it is none."""
    alone = load(dense(model_type).path, torch.float32)
    alone.save_pretrained(tmp_path / "alone")
    source, tokens = open_folder(tmp_path / "alone"), draw_tokens(1, 9)
    assert source.config["model_type"] == SEEING[model_type]
    plan = plan_of(source, {"key": 5})
    sliced = load(cut(source, plan, tmp_path / "cut"), torch.float32, eps=EPS)
    assert_sizes(sliced, plan)
    set_eps(alone, EPS)
    found = sliced(tokens).logits
    with masked(alone, plan):
        assert_near(found, alone(tokens).logits, TOLERANCE)


@pytest.mark.parametrize("keep", [{"key": 5}, KEEP], ids=",".join)
@ALL
def test_the_check_of_logits_passes_what_is_right(tmp_path, dense, model_type, keep):
    source = dense(model_type)
    plan = plan_of(source, keep)
    assert check_logits(source, cut(source, plan, tmp_path / "cut"), plan, device=torch.device("cpu")) < TOLERANCE


@pytest.mark.parametrize("heads", [2, 1])
@ALL
def test_projections(tmp_path, dense, model_type, heads):
    source = dense(model_type)
    plan = plan_of(source, {"key": 5}, "pca")
    if heads == 1:
        plan = dataclasses.replace(plan, layers={layer: one_head(each) for layer, each in plan.layers.items()})
    target = cut(source, plan, tmp_path / "cut")
    assert check_logits(source, target, plan, device=torch.device("cpu")) < TOLERANCE


def one_head(layer_cut):
    """The same cut, of which the second head alone stays."""
    return dataclasses.replace(
        layer_cut,
        after=layer_cut.after._replace(key_heads=1, value_heads=2),
        heads_H=torch.tensor([1]),
        value_WR=layer_cut.value_WR[2:],
        projection_HKR=layer_cut.projection_HKR[1:],
    )


@pytest.mark.parametrize("fault", ["query", "value", "gate", "decay"])
def test_the_check_of_logits_refuses_what_is_wrong(tmp_path, dense, fault):
    source = dense("qwen3_next")
    plan = plan_of(source, {"key": 5, "value": 4})
    target = cut(source, plan, tmp_path / "cut")
    # A key head has 5 rows of q, 5 of k, 2 x 4 of v and 2 x 4 of the gate; then 2 of beta and 2 of the decay.
    first, name = {"query": (0, "qkvz"), "value": (10, "qkvz"), "gate": (18, "qkvz"), "decay": (2, "ba")}[fault]

    def swap(tensors):
        rows = tensors[f"model.layers.0.linear_attn.in_proj_{name}.weight"]
        rows[[first, first + 1]] = rows[[first + 1, first]]

    edit_tensors(target, swap)
    with pytest.raises(KeyreduceError, match="differ from those of the dense model"):
        check_logits(source, target, plan, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("method", "keep"),
    [("pca", {"key": 5}), *(("random", keep) for keep in ({"key": 5}, {"value": 4}, {"head": 1}, KEEP, {}))],
    ids=str,
)
def test_convolutions_that_transformers_divided_otherwise_are_divided_anew(tmp_path, method, keep):
    """What it saves of olmo_hybrid itself are thirds, each with some rows of two of q, k and v."""
    model, found = hybrid_models.build("olmo_hybrid"), []
    for write in (hybrid_models.store, save):
        source = open_folder(write(model, tmp_path / write.__name__))
        found.append(tensors_of(cut(source, plan_of(source, keep, method), tmp_path / f"{write.__name__}-cut")))
    rows = [source.tensors[f"model.layers.0.linear_attn.{which}_conv1d.weight"].shape[0] for which in "qkv"]
    if transformers.__version__.startswith("5.6."):
        assert rows == [16, 16, 24]  # this one saves them as the config says
    else:
        assert rows == [19, 19, 18]
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor), name


def test_convolutions_that_are_no_division_of_what_the_config_says_are_refused(tmp_path):
    folder = hybrid_models.store(hybrid_models.build("olmo_hybrid"), tmp_path / "saved")
    name = "model.layers.0.linear_attn.q_conv1d.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name][1:].contiguous()}))
    with pytest.raises(KeyreduceError, match=r"of another shape: \S*q_conv1d.weight \[15, 1, 4\] for \[16, 1, 4\]$"):
        plan_of(open_folder(folder), {"key": 5})


def test_every_family_of_transformers_is_tested():
    known = {name for name, family in FAMILIES.items() if family.shipped_by == "transformers"}
    assert known | {"precond_gated_deltanet", "precond_kda"} == {*HYBRIDS, "kimi_linear", *ALIKE, *WRAPPED}
