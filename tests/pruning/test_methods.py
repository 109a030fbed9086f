"""Each method against loops that follow its definition, one channel at a time."""

import math

import pytest
import torch

from keyreduce.calibration.statistics import LayerStatistics
from keyreduce.errors import KeyreduceError
from keyreduce.pruning.methods import METHODS, LayerView, method_named
from keyreduce.pruning.methods.method import highest

HEADS, CHANNELS, HIDDEN, TOKENS = 3, 7, 5, 11


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def inputs() -> tuple[torch.Tensor, ...]:
    """Weights of query and key, hidden states, and q and k of each token."""
    drawn = generator(7)
    shapes = [(HEADS, CHANNELS, HIDDEN)] * 2 + [(TOKENS, HIDDEN)] + [(TOKENS, HEADS, CHANNELS)] * 2
    return tuple(torch.randn(shape, generator=drawn) for shape in shapes)


@pytest.fixture
def layer(inputs) -> LayerView:
    query_weight, key_weight, hidden, query, key = inputs
    statistics = LayerStatistics.zeros(HIDDEN, HEADS, CHANNELS, torch.device("cpu"))
    statistics.add_input(hidden[None])
    statistics.add_operands(query[None], key[None])
    return LayerView(query_weight, key_weight, statistics)


def norm(values) -> float:
    return math.sqrt(sum(float(value) ** 2 for value in values))


def scores(name: str, inputs, head: int, channel: int) -> float:
    query_weight, key_weight, hidden, query, key = inputs
    rows = query_weight[head, channel], key_weight[head, channel]
    if name == "l1":
        return sum(abs(float(weight)) for row in rows for weight in row)
    if name == "l2":
        return sum(norm(row) for row in rows)
    if name == "wanda":
        return sum(abs(float(row[d])) * norm(hidden[:, d]) for row in rows for d in range(HIDDEN))
    assert name == "magnitude"
    return norm(query[:, head, channel]) + norm(key[:, head, channel])


@pytest.mark.parametrize("keep", [1, 4, CHANNELS])
@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"random"}))
def test_the_highest_scores_stay(name, keep, inputs, layer):
    kept = METHODS[name].select(layer, keep, generator())
    for head in range(HEADS):
        ranking = sorted(range(CHANNELS), key=lambda channel: -scores(name, inputs, head, channel))
        assert kept[head].tolist() == sorted(ranking[:keep])


@pytest.mark.parametrize("name", METHODS)
def test_a_selection_is_rows_of_ascending_channels_and_the_same_again(name, layer):
    kept = METHODS[name].select(layer, 4, generator(1))
    assert kept.dtype == torch.long
    assert kept.shape == (HEADS, 4)
    assert (kept.diff(dim=1) > 0).all()
    assert 0 <= kept.min() <= kept.max() < CHANNELS
    assert torch.equal(METHODS[name].select(layer, 4, generator(1)), kept)
    assert torch.equal(METHODS[name].select(layer, CHANNELS, generator()), torch.arange(CHANNELS).expand(HEADS, -1))


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"random"}))
def test_ties_break_by_lower_index_and_chance_has_no_part(name):
    statistics = LayerStatistics.zeros(HIDDEN, HEADS, CHANNELS, torch.device("cpu"))
    statistics.add_input(torch.ones(1, 2, HIDDEN))
    statistics.add_operands(torch.ones(1, 2, HEADS, CHANNELS), torch.ones(1, 2, HEADS, CHANNELS))
    weight = torch.ones(HEADS, CHANNELS, HIDDEN)
    for seed in (0, 1):
        kept = METHODS[name].select(LayerView(weight, -weight, statistics), 3, generator(seed))
        assert kept.tolist() == [[0, 1, 2]] * HEADS


def test_random_is_drawn_from_the_seed_alone(layer):
    kept = [METHODS["random"].select(layer, 3, generator(seed)).tolist() for seed in range(20)]
    assert len({str(channels) for channels in kept}) > 15
    counts = torch.bincount(torch.tensor(kept).flatten(), minlength=CHANNELS)
    assert counts.min() > 10  # of 26 expected
    blank = LayerView(torch.zeros(HEADS, CHANNELS, HIDDEN), torch.zeros(HEADS, CHANNELS, HIDDEN), None)
    assert METHODS["random"].select(blank, 3, generator(0)).tolist() == kept[0]


@pytest.mark.parametrize("name", METHODS)
def test_methods_say_what_they_read(name, layer):
    method = METHODS[name]
    assert method.name == name
    assert method.summary
    assert method.citation
    without = LayerView(layer.query_weight_HKD, layer.key_weight_HKD, None)
    if method.needs_statistics:
        with pytest.raises(AttributeError):
            method.select(without, 3, generator())
    else:
        assert torch.equal(method.select(without, 3, generator()), method.select(layer, 3, generator()))


@pytest.mark.parametrize("name", METHODS)
def test_methods_change_nothing(name, layer):
    tensors = [layer.query_weight_HKD, layer.key_weight_HKD, *layer.statistics.tensors().values()]
    before = [tensor.clone() for tensor in tensors]
    METHODS[name].select(layer, 3, generator())
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))


@pytest.mark.parametrize(
    ("row", "keep", "expected"),
    [
        ([1.0, 3.0, 2.0], 2, [1, 2]),
        ([1.0, 1.0, 1.0], 2, [0, 1]),
        ([0.0, 2.0, 1.0, 1.0], 2, [1, 2]),
        ([-1.0, -3.0], 1, [0]),
        ([-0.0, 0.0], 1, [0]),
    ],
)
def test_highest(row, keep, expected):
    assert highest(torch.tensor([row, row]), keep).tolist() == [expected, expected]


@pytest.mark.parametrize(("name", "told"), [("wandaa", "wanda"), ("RANDOM", "random"), ("magnitud", "magnitude")])
def test_the_nearest_method_is_suggested(name, told):
    with pytest.raises(KeyreduceError, match=f"there is no method '{name}'; did you mean {told}\\?"):
        method_named(name)


def test_all_methods_are_named_where_none_is_near():
    with pytest.raises(KeyreduceError, match="take one of wanda, l1, l2, magnitude, random"):
        method_named("zzz")
    assert method_named("l2") is METHODS["l2"]
