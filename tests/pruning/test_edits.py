"""Edits one by one, and those that a cut gives a layer, against index lists written out by hand."""

import numpy as np
import pytest
import torch

from keyreduce.families import FAMILIES, MixerSizes
from keyreduce.pruning.edits import Divide, Fill, Narrow, Project, Scale, Select, layer_edits
from keyreduce.pruning.plan import LayerCut

BEFORE = MixerSizes(key_heads=3, value_heads=6, head_k_dim=3, head_v_dim=2)
# Channel c of head h is row 3 h + c; value channel c of value head w is row 2 w + c.
CUT = LayerCut(
    before=BEFORE,
    after=MixerSizes(key_heads=2, value_heads=4, head_k_dim=2, head_v_dim=1),
    heads_H=torch.tensor([0, 2]),
    key_HR=torch.tensor([[0, 2], [1, 2]]),
    value_WR=torch.tensor([[1], [0], [0], [1]]),
)
KEY_ROWS, VALUE_ROWS, VALUE_HEADS = [0, 2, 7, 8], [1, 2, 8, 11], [0, 1, 4, 5]
NORM = torch.tensor([2.0, 3.0])
HIDDEN = 5
LENGTHS = {"QUERY": 9, "KEY": 9, "VALUE": 12, "GATE": 12, "SHARED_VALUE": 2, "VALUE_HEAD": 6, "HIDDEN": HIDDEN}
LENGTHS["BETA"] = 6
ROWS = {"QUERY": KEY_ROWS, "KEY": KEY_ROWS, "VALUE": VALUE_ROWS, "GATE": VALUE_ROWS, "VALUE_HEAD": VALUE_HEADS}
ROWS["BETA"] = VALUE_HEADS


def shapes_of(family, layer: int, lengths=LENGTHS) -> dict[str, tuple[int, ...]]:
    def shape(parts) -> tuple[int, ...]:
        return tuple(lengths.get(part.name, 1 if axis == 1 else 4) for axis, part in enumerate(parts))

    return {family.tensor_name(layer, name): shape(parts) for name, parts in family.tensors.items()}


def edits_of(family, cut: LayerCut, lengths=LENGTHS, without: str | None = None):
    shapes = shapes_of(family, 7, lengths)
    if without is not None:
        del shapes[family.tensor_name(7, without)]
    edits = layer_edits(family, 7, cut, shapes, {family.tensor_name(7, "o_norm.weight"): NORM}.__getitem__)
    assert edits.keys() <= shapes.keys()
    return {name.removeprefix("model.layers.7.attn."): changes for name, changes in edits.items()}


# Each edit, a dense tensor, and by hand what the masked reference has in its place.
MASKED = {
    "select": (Select(0, torch.tensor([2, 0])), torch.arange(3.0), [0.0, 1.0, 2.0]),
    "scale": (Scale(0, torch.tensor([2.0, 3.0])), torch.tensor([5.0, 7.0]), [10.0, 21.0]),
    "fill": (Fill(2.0, 1), torch.arange(4.0), [1.0] * 4),
    # Of three heads of two channels the last stays, and one combination of its channels; the last row is a value.
    "project": (
        Project(
            torch.tensor([[[10.0], [1.0]]]),
            ((torch.tensor([4, 5]), torch.tensor([0]), True), (torch.tensor([6]), torch.tensor([1]), False)),
        ),
        torch.arange(1.0, 8.0),
        [1.0, 2.0, 3.0, 4.0, 56.0, 0.0, 7.0],
    ),
    "divide": (Divide((lambda: torch.ones(2), lambda: torch.arange(4.0)), 1, 4), torch.ones(2), [1.0, 0.0, 1.0]),
    "narrow outer": (
        Narrow(1, True, lambda: torch.diag(torch.tensor([1.0, 4.0])), torch.tensor([1, 2])),
        torch.tensor([[9.0, 9.0], [0.0, 1.0], [0.0, 0.0]]),
        [[0.0, 0.0], [2.0, 0.0], [0.0, 0.0]],
    ),
    "narrow inner": (
        Narrow(1, False, lambda: torch.tensor([[9.0, 9.0], [0.0, 1.0], [0.0, 0.0]]), torch.tensor([1, 2])),
        torch.diag(torch.tensor([1.0, 4.0])),
        [[0.0, 2.0], [0.0, 0.0]],
    ),
}


@pytest.mark.parametrize("name", MASKED)
def test_each_edit_gives_its_masked_reference(name):
    edit, tensor, expected = MASKED[name]
    before = tensor.clone()
    found = edit.masked(tensor)
    # The signs of a bottleneck's channels are arbitrary.
    found_abs = found.abs() if "narrow" in name else found
    torch.testing.assert_close(found_abs.float(), torch.tensor(expected), rtol=0, atol=1e-6)
    assert found.dtype == (torch.float64 if name == "fill" else torch.float32)
    assert torch.equal(tensor, before)


def test_select():
    tensor = torch.arange(24).view(2, 3, 4)
    edit = Select(1, torch.tensor([2, 0]))
    assert torch.equal(edit.apply(tensor), torch.stack([tensor[:, 2], tensor[:, 0]], dim=1))
    assert edit.shape((2, 3, 4)) == (2, 2, 4)
    assert torch.equal(tensor, torch.arange(24).view(2, 3, 4))


@pytest.mark.parametrize("shape", [(6,), (6, 4), (6, 1, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_project(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    matrix_HKR = torch.randn(2, 3, 2, generator=generator, dtype=torch.float64)
    tensor = torch.randn(shape, generator=generator).to(dtype)
    before = tensor.clone()
    edit = Project(matrix_HKR, ((torch.arange(6), torch.arange(4), True),))
    found = edit.apply(tensor)
    assert found.dtype == dtype
    assert edit.shape(shape) == tuple(found.shape) == (4, *shape[1:])
    assert torch.equal(tensor, before)
    rows = tensor.double().reshape(6, -1).numpy()
    blocks = [matrix_HKR[head].numpy().T @ rows[3 * head : 3 * head + 3] for head in (0, 1)]
    expected = np.concatenate(blocks).reshape(found.shape)
    tolerance = {torch.bfloat16: 2**-8, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("axis", "factors"), [(0, [1.5, -2.0]), (1, [0.0, 2.0, 3.0]), (2, [1.0, 2.0, 3.0, 4.0])])
def test_scale(axis, factors):
    tensor = torch.arange(24.0).view(2, 3, 4)
    found = Scale(axis, torch.tensor(factors, dtype=torch.float64)).apply(tensor)
    view = [1, 1, 1]
    view[axis] = -1
    assert found.dtype == torch.float32
    assert torch.equal(found, tensor * torch.tensor(factors).view(view))
    assert torch.equal(tensor, torch.arange(24.0).view(2, 3, 4))
    assert Scale(axis, torch.tensor(factors)).shape((2, 3, 4)) == (2, 3, 4)


def test_scale_rounds_once():
    """The factor is not rounded to the tensor's dtype, in which this one would be 1."""
    tensor, factor = torch.full((2,), 1.5, dtype=torch.bfloat16), torch.full((2,), 1 + 2**-8, dtype=torch.float64)
    found = Scale(0, factor).apply(tensor)
    assert found.dtype == torch.bfloat16
    assert found.tolist() == [1.5 + 2**-7] * 2
    assert (tensor * factor.bfloat16()).tolist() == [1.5] * 2


def test_fill():
    assert Fill(1.0, 3).shape((8,)) == (3,)
    found = Fill(1.0, 3).apply(torch.zeros(8, dtype=torch.bfloat16))
    assert (found.tolist(), found.dtype) == ([1.0] * 3, torch.bfloat16)


@pytest.mark.parametrize("model_type", ["delta_net", "gated_deltanet"])
def test_each_axis_is_selected_by_what_it_holds(model_type):
    family, edits = FAMILIES[model_type], edits_of(FAMILIES[model_type], CUT)
    assert edits.keys() == family.tensors.keys()  # nothing of a mixer is without heads
    for name, parts in family.tensors.items():
        if name == "o_norm.weight":
            assert edits[name] == [Fill(1.0, 1)]
            continue
        selected = {edit.axis: edit.index_R.tolist() for edit in edits[name] if isinstance(edit, Select)}
        assert selected == {axis: ROWS[part.name] for axis, part in enumerate(parts) if part.name in ROWS}
    scale, select = edits["o_proj.weight"]
    # sqrt(V / R) = sqrt(2), and the norm's weight again for each of the value heads before the cut.
    np.testing.assert_allclose(scale.factor_N.numpy(), [2 * 2**0.5, 3 * 2**0.5] * 6)
    assert (scale.axis, select.axis) == (1, 1)


def test_only_what_changes_is_edited():
    family, whole = FAMILIES["gated_deltanet"], LayerCut.of_nothing(BEFORE)
    assert edits_of(family, whole) == {}
    keys = LayerCut(BEFORE, BEFORE._replace(head_k_dim=2), whole.heads_H, torch.tensor([[0, 1]] * 3), whole.value_WR)
    assert edits_of(family, keys).keys() == {
        f"{operand}_{part}" for operand in "qk" for part in ("proj.weight", "conv1d.weight", "conv1d.bias")
    }
    values = LayerCut(BEFORE, BEFORE._replace(head_v_dim=1), whole.heads_H, whole.key_HR, torch.tensor([[1]] * 6))
    assert edits_of(family, values).keys() == {
        "v_proj.weight", "v_conv1d.weight", "v_conv1d.bias", "g_proj.weight", "o_norm.weight", "o_proj.weight"
    }  # fmt: skip
    after = BEFORE._replace(key_heads=2, value_heads=4)
    heads = LayerCut(BEFORE, after, CUT.heads_H, whole.key_HR[:2], whole.value_WR[:4])
    assert edits_of(family, heads).keys() == family.tensors.keys() - {"o_norm.weight"}
    (select,) = edits_of(family, heads)["o_proj.weight"]
    assert select.index_R.tolist() == [0, 1, 2, 3, 8, 9, 10, 11]


def test_values_in_another_order_move_the_weight_of_the_norm():
    whole = LayerCut.of_nothing(BEFORE)
    turned = LayerCut(BEFORE, BEFORE, whole.heads_H, whole.key_HR, torch.tensor([[1, 0]] * 6))
    edits = edits_of(FAMILIES["delta_net"], turned)
    assert edits["o_norm.weight"] == [Fill(1.0, 2)]
    assert edits["o_proj.weight"][0].factor_N.tolist() == [2, 3] * 6


def test_tensors_that_a_model_has_not_are_not_edited():
    family = FAMILIES["gated_deltanet"]
    for name in family.tensors:
        assert edits_of(family, CUT, without=name).keys() == family.tensors.keys() - {name}
    # Without a norm there is no mean over channels either.
    (select,) = edits_of(family, CUT, without="o_norm.weight")["o_proj.weight"]
    assert isinstance(select, Select)


@pytest.mark.parametrize("kernels", [1, 3])
def test_kernels_of_heads_go_with_their_heads_alone(kernels):
    family, whole = FAMILIES["delta_net_2"], LayerCut.of_nothing(BEFORE._replace(value_heads=3))
    lengths = LENGTHS | {"HEAD_OR_ALL": kernels, "VALUE": 6, "GATE": 6, "VALUE_HEAD": 3, "BETA": 3}
    sizes = whole.before
    cut = LayerCut(sizes, MixerSizes(2, 2, 2, 1), CUT.heads_H, CUT.key_HR, torch.tensor([[0], [1]]))
    edits = edits_of(family, cut, lengths)
    for name in ("q_conv1d", "k_conv1d", "v_conv1d", "kv_conv1d"):
        for part in ("weight", "scale"):
            if kernels == 1:
                assert f"{name}.{part}" not in edits
            else:
                (select,) = edits[f"{name}.{part}"]
                assert (select.axis, select.index_R.tolist()) == (0, [0, 2])
    keys = LayerCut(sizes, sizes._replace(head_k_dim=1), whole.heads_H, torch.tensor([[1]] * 3), whole.value_WR)
    assert edits_of(family, keys, lengths).keys() == {"q_proj.weight", "k_proj.weight"}


def test_projections_take_the_heads_that_stay():
    matrix_HKR = torch.randn(2, 3, 2, dtype=torch.float64)
    cut = LayerCut(BEFORE, CUT.after, CUT.heads_H, None, CUT.value_WR, matrix_HKR)
    edits = edits_of(FAMILIES["delta_net"], cut)
    for name in ("q_proj.weight", "k_proj.weight", "q_conv1d.bias", "k_conv1d.weight"):
        (project,) = edits[name]
        ((old_P, new_P, is_projected),) = project.places
        assert (old_P.tolist(), new_P.tolist(), is_projected) == ([0, 1, 2, 6, 7, 8], [0, 1, 2, 3], True)
        expected = matrix_HKR**2 if name == "k_conv1d.weight" else matrix_HKR
        assert torch.equal(project.matrix_HKR, expected)
