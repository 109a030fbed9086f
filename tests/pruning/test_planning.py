"""What planning asks of a method, what it makes of the answer, and what it refuses before any work."""

import dataclasses

import pytest
import torch
from cuts import build, plan_of, statistics_of, store
from safetensors.torch import save_file
from tiny_models import edit_config, edit_tensors

from keyreduce.checkpoint.folder import open_folder
from keyreduce.errors import KeyreduceError
from keyreduce.families import family_of
from keyreduce.pruning.methods import METHODS, Method, Selection, ranked
from keyreduce.pruning.planning import check_method, check_options, make_plan, read_options


def plan(source, method="l1", keep=4, target="key", **given):
    layers = family_of(source.config).mixer_layers(source.config)
    method = METHODS[method] if isinstance(method, str) else method
    arguments = {"seed": 0, "statistics": None, "inputs": {}} | given
    return make_plan(source, method, {target: dict.fromkeys(layers, keep)}, **arguments)


@pytest.fixture
def source(tiny_folder):
    return open_folder(tiny_folder("delta_net"))


def spy(seen: list) -> Method:
    """A method that notes what it is asked, and keeps the first ones."""

    def select_of(target):
        def select(layer, keep, generator, **options):
            drawn = torch.rand(1, generator=generator).item()
            seen.append((target, layer, keep, drawn, options))
            groups = {"key": 2, "value": layer.sizes.value_heads, "head": 1}[target]
            return Selection(torch.arange(keep).expand(groups, -1))

        return select

    return Method("spy", "s", "c", {target: select_of(target) for target in ("key", "value", "head")}, options={"f": 2})


def test_a_method_sees_weights_and_sums_of_each_layer(tmp_path):
    source = store(build("gated_deltanet", {"expand_v": 0.5}), tmp_path / "source")
    seen, statistics = [], statistics_of(source)
    keep = {target: {0: 1, 1: 1} for target in ("key", "value", "head")}
    made = make_plan(source, spy(seen), keep, seed=5, statistics=statistics, inputs={"a": 1}, options={"f": 3})
    assert made.inputs == {"a": 1}
    assert [target for target, *_ in seen] == ["key", "value", "head"] * 2
    for place, (_, view, number, _, options) in enumerate(seen):
        layer = place // 3
        prefix = f"model.layers.{layer}.attn."
        assert (number, options) == (1, {"f": 3})
        assert view.statistics is statistics.layers[layer]
        assert tuple(view.sizes) == (2, 4, 12, 6)
        for name, words in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            rows = getattr(view, f"{name}_weight_{'WVD' if name == 'value' else 'HKD'}")
            assert rows.dtype == torch.float32
            assert torch.equal(rows.flatten(0, 1), source.read(f"{prefix}{words}.weight").float())
        assert torch.equal(view.output_weight_WVD[3, 2], source.read(f"{prefix}o_proj.weight")[:, 20].float())
    # Each layer and target draws from a stream of its own, and so does each seed.
    assert len({drawn for *_, drawn, _ in seen}) == 6
    again, other = [], []
    make_plan(source, spy(again), keep, seed=5, statistics=None, inputs={})
    make_plan(source, spy(other), keep, seed=6, statistics=None, inputs={})
    assert [drawn for *_, drawn, _ in again] == [drawn for *_, drawn, _ in seen]
    assert not {drawn for *_, drawn, _ in other} & {drawn for *_, drawn, _ in seen}
    assert again[0][-1] == {"f": 2}


def test_what_a_target_draws_does_not_depend_on_the_others(source):
    alone = plan_of(source, {"value": 5})
    together = plan_of(source, {"key": 3, "value": 5})
    assert all(torch.equal(alone.layers[layer].value_WR, together.layers[layer].value_WR) for layer in (0, 1))
    seeds = [plan(source, "random", seed=seed) for seed in (0, 1)]
    kept = {str(cut.key_HR.tolist()) for made in seeds for cut in made.layers.values()}
    assert len(kept) == 4


def test_where_all_stay_no_method_is_asked(source):
    seen = []
    made = plan(source, spy(seen), keep=16)
    assert not seen
    assert all(cut.before == cut.after for cut in made.layers.values())
    # Not even one that needs what is not there.
    plan(source, "pca", keep=16)


def test_channels_of_heads_that_go_go_with_them(tmp_path):
    source = store(build("gated_deltanet", {"num_heads": 3, "num_v_heads": 6}), tmp_path / "source")
    key_HR = torch.tensor([[0, 1], [2, 3], [4, 5]])
    value_WR = torch.arange(6)[:, None] + torch.arange(3)
    projection_HKR = torch.arange(3.0)[:, None, None].expand(-1, 12, 2)
    select = {
        "key": lambda *_, **__: Selection(key_HR, report={"rho": [1.0, 2.0, 3.0]}),
        "value": lambda *_, **__: Selection(value_WR),
        "head": lambda *_, **__: Selection(torch.tensor([[0, 2]])),
    }
    keep = {"key": {0: 2, 1: 2}, "value": {0: 3, 1: 3}, "head": {0: 2, 1: 2}}
    cut = make_plan(source, Method("m", "s", "c", select), keep, seed=0, statistics=None, inputs={}).layers[1]
    assert cut.heads_H.tolist() == [0, 2]
    assert cut.key_HR.tolist() == [[0, 1], [4, 5]]
    assert cut.value_WR.tolist() == [[0, 1, 2], [1, 2, 3], [4, 5, 6], [5, 6, 7]]
    assert cut.report == {"key": {"rho": [1.0, 2.0, 3.0]}}
    assert tuple(cut.after) == (2, 4, 2, 3)
    select["key"] = lambda *_, **__: Selection(None, projection_HKR)
    cut = make_plan(source, Method("m", "s", "c", select), keep, seed=0, statistics=None, inputs={}).layers[1]
    assert cut.key_HR is None
    assert cut.projection_HKR[:, 0, 0].tolist() == [0, 2]


def test_progress_is_told_layer_by_layer(source):
    steps = []
    plan(source, progress=steps.append)
    assert steps == [1, 1]


# What is refused.


@pytest.mark.parametrize(
    ("method", "targets", "told"),
    [
        ("pca", ["value"], "`method` pca is for `target` key alone"),
        ("pca", ["key", "head"], "`method` pca is for `target` key alone; for head"),
        ("rrqr", ["head"], "`method` rrqr is for `target` key and `target` value alone; for head take another"),
    ],
)
def test_targets_that_a_method_does_not_choose_are_refused(source, method, targets, told):
    with pytest.raises(KeyreduceError, match=told):
        check_method(source, METHODS[method], targets)
    with pytest.raises(KeyreduceError, match=told):
        make_plan(source, METHODS[method], {key: {} for key in targets}, seed=0, statistics=None, inputs={})


@pytest.mark.parametrize("model_type", ["delta_net", "delta_net_2"])
def test_pca_refuses_a_norm_that_a_rotation_changes(tmp_path, model_type):
    source = store(build(model_type, {"qk_norm": "sum"}), tmp_path / "source")
    with pytest.raises(KeyreduceError, match="pca rotates .* qk_norm 'sum' .* take a method that selects"):
        check_method(source, METHODS["pca"], ["key"])
    check_method(source, METHODS["rrqr"], ["key"])


def test_options():
    assert check_options(METHODS["rrqr"], {}) == {"f": 1.5, "permute": False}
    assert check_options(METHODS["rrqr"], {"f": 2.0}) == {"f": 2.0, "permute": False}
    with pytest.raises(KeyreduceError, match="`method` wanda takes no `include_queries`; leave it out"):
        check_options(METHODS["wanda"], {"include_queries": True})
    with pytest.raises(KeyreduceError, match="`f` is 0.5"):
        check_options(METHODS["rrqr"], {"f": 0.5})


def test_calibration_without_gradients_is_refused(source):
    statistics = statistics_of(source)
    statistics.layers[1] = dataclasses.replace(statistics.layers[1], taylor=None)
    with pytest.raises(KeyreduceError, match="taylor needs gradients.*calibrate `gradients` `overwrite`"):
        plan(source, "taylor", statistics=statistics)
    plan(source, "rrqr", statistics=statistics)


def test_calibration_of_another_model_is_refused(source, tiny_folder):
    other = statistics_of(open_folder(tiny_folder("gated_deltanet")))
    with pytest.raises(KeyreduceError, match=f"made from another model .{other.model[:12]}.*keyreduce calibrate"):
        plan(source, "wanda", statistics=other)


def test_calibration_without_some_layers_is_refused(source):
    statistics = statistics_of(source)
    del statistics.layers[1]
    with pytest.raises(KeyreduceError, match="lacks layers"):
        plan(source, "wanda", statistics=statistics)


@pytest.mark.parametrize(
    ("target", "name"),
    [("key", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("head", "o_proj"), ("head", "k_proj")],
)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(tiny_copy, target, name, number):
    folder, full_name = tiny_copy(), f"model.layers.1.attn.{name}.weight"
    edit_tensors(folder, lambda tensors: tensors[full_name][3].fill_(number))
    source = open_folder(folder)
    # Of these two, the one that reads what it says.
    method, statistics = ("wanda", statistics_of(source)) if name == "o_proj" else ("l1", None)
    with pytest.raises(KeyreduceError, match=f"tensor '{full_name}' of .* holds NaN or inf"):
        plan(source, method, 1, target, statistics=statistics)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_heads": 4}, r"model.layers.0.attn.b_proj.weight \[2, 32\] for \[4, 32\]"),
        ({"hidden_size": 64}, r"model.layers.0.attn.q_proj.weight \[32, 32\] for \[64, 64\]"),
        ({"expand_v": 2}, r"model.layers.0.attn.v_proj.weight \[32, 32\] for \[64, 32\]"),
        ({"num_hidden_layers": 3}, "missing: model.layers.2.attn.q_proj.weight"),
    ],
)
def test_a_config_of_another_model_is_refused(tiny_copy, changes, told):
    folder = tiny_copy()
    edit_config(folder, **changes)
    with pytest.raises(KeyreduceError, match=told):
        plan(open_folder(folder))


def test_a_tensor_of_another_rank_is_refused(tiny_copy):
    folder = tiny_copy()
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.0.attn.k_conv1d.weight": torch.ones(32, 4)}))
    with pytest.raises(KeyreduceError, match=r"k_conv1d.weight \[32, 4\] for \[32, 1, 4\]"):
        plan(open_folder(folder))


def test_kernels_of_another_number_of_heads_are_refused(tiny_copy):
    folder = tiny_copy(model_type="delta_net_2")
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.1.attn.k_conv1d.weight": torch.ones(3, 1, 4)}))
    with pytest.raises(KeyreduceError, match=r"model.layers.1.attn.k_conv1d.weight \[3, 1, 4\] for \[2, 1, 4\]"):
        plan(open_folder(folder))


def test_a_checkpoint_without_projections_is_refused(tiny_copy):
    folder = tiny_copy()
    save_file({name: torch.ones(2, 2) for name in ("a", "b")}, folder / "model.safetensors")
    with pytest.raises(KeyreduceError, match="missing: model.layers.0.attn.q_proj.weight, .* and 8 more$"):
        plan(open_folder(folder))


def test_a_model_of_softmax_layers_alone_is_refused(tiny_copy):
    folder = tiny_copy()
    edit_config(folder, attn={"layers": [0, 1], "num_heads": 2})
    with pytest.raises(KeyreduceError, match="no layer with a recurrent state"):
        plan(open_folder(folder))


WRONG = {
    "too many": Selection(torch.arange(5).expand(2, -1)),
    "of one head": Selection(torch.arange(4).expand(1, -1)),
    "not ascending": Selection(torch.tensor([[0, 1, 3, 2]] * 2)),
    "twice the same": Selection(torch.tensor([[0, 1, 1, 2]] * 2)),
    "beyond the last": Selection(torch.tensor([[0, 1, 2, 16]] * 2)),
    "below the first": Selection(torch.tensor([[-1, 0, 1, 2]] * 2)),
    "no whole numbers": Selection(torch.arange(4.0).expand(2, -1)),
    "nothing": Selection(None),
    "a narrow projection": Selection(None, torch.zeros(2, 16, 3)),
    "a projection of NaN": Selection(None, torch.full((2, 16, 4), torch.nan)),
    "both": Selection(torch.arange(4).expand(2, -1), torch.zeros(2, 16, 4)),
}


@pytest.mark.parametrize("answer", WRONG.values(), ids=WRONG)
def test_what_is_no_choice_of_that_many_is_refused(source, answer):
    method = Method("odd", "s", "c", {"key": lambda *_: answer})
    with pytest.raises(KeyreduceError, match="method odd is wrong: for key it must return 2 ascending rows of 4 of 16"):
        plan(source, method)


def test_a_projection_of_values_is_refused(source):
    method = Method("odd", "s", "c", {"value": lambda *_: Selection(None, torch.zeros(2, 16, 4))})
    with pytest.raises(KeyreduceError, match="method odd is wrong: for value"):
        plan(source, method, target="value")


def test_scores_that_are_no_numbers_are_refused(source):
    method = Method("odd", "s", "c", {"key": ranked(lambda layer: torch.full((2, 16), torch.nan))})
    with pytest.raises(KeyreduceError, match="NaN"):
        plan(source, method)


def test_a_method_that_forgets_that_it_needs_sums_is_told(source):
    method = Method("odd", "s", "c", {"key": ranked(lambda layer: layer.statistics.query_gram_HKK[:, 0])})
    with pytest.raises(KeyreduceError, match="needs_statistics=True"):
        plan(source, method)


def test_options_as_text_take_the_type_of_their_default():
    method = Method("odd", "s", "c", {}, options={"f": 1.5, "steps": 3, "is_fast": False, "form": "first"})
    texts = ["f=2", "steps=7", "is-fast=True", "form=a=b"]
    assert read_options(method, texts) == {"f": 2.0, "steps": 7, "is_fast": True, "form": "a=b"}
    assert read_options(method, []) == {}
    for text, told in [
        ("g=1", "options of odd: f=1.5, steps=3, is_fast=False, form=first"),
        ("f", "give NAME=VALUE"),
        ("f=x", "the value must be a float"),
        ("steps=1.5", "the value must be a int"),
        ("is_fast=2", "the value must be a bool"),
    ]:
        with pytest.raises(KeyreduceError, match=told):
            read_options(method, [text])
