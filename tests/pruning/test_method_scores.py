"""Each method against loops that follow its definition, one channel at a time, for every target that it has.

Shapes: H key heads, W value heads, K key channels and V value channels of a head, D hidden, R kept.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from cuts import layer_statistics

from keyreduce.errors import KeyreduceError
from keyreduce.families import MixerSizes
from keyreduce.pruning.methods import METHODS, TARGETS, LayerView, all_targets, highest, method_named, ranked
from keyreduce.pruning.strong_rrqr import strong_rrqr

SIZES, HIDDEN = MixerSizes(key_heads=3, value_heads=6, head_k_dim=7, head_v_dim=5), 4
GROUPS = {"key": (3, 7), "value": (6, 5), "head": (1, 3)}
"""Target -> groups, and channels of each."""
FORMS = {"taylor": ("first", "squared", "element")}
# Those that rank by a score, with each of their options.
SCORED = [
    (name, target, {"form": form} if form else {})
    for name in ("l1", "l2", "wanda", "magnitude", "energy", "taylor")
    for target in TARGETS
    for form in FORMS.get(name, (None,))
]
ALL = [(name, target) for name, method in METHODS.items() for target in method.select]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def view(seed: int = 0, sizes: MixerSizes = SIZES, **replaced) -> LayerView:
    drawn = generator(seed)
    keys, values = sizes.key_heads * sizes.head_k_dim, sizes.value_heads * sizes.head_v_dim
    rows = {"query": keys, "key": keys, "value": values, "output": values}
    weights = {word: torch.randn(count, HIDDEN, generator=drawn) for word, count in rows.items()}
    return LayerView(sizes, replaced.get("statistics", layer_statistics(sizes, HIDDEN, seed=seed)), weights.__getitem__)


def select(name: str, target: str, layer: LayerView, keep: int, seed: int = 0, **options):
    method = METHODS[name]
    return method.select[target](layer, keep, generator(seed), **{**method.options, **options})


def row(layer: LayerView, word: str, head: int, channel: int) -> list[float]:
    """A row of a projection's weight, a column of the output projection."""
    size = SIZES.head_k_dim if word in ("query", "key") else SIZES.head_v_dim
    return layer.projection(word)[head * size + channel].double().tolist()


def norm(values, order: int) -> float:
    return sum(abs(value) ** order for value in values) ** (1 / order)


def of_channel(name: str, target: str, layer: LayerView, head: int, channel: int, form: str | None) -> float:
    """The score of a key channel of a key head, or of a value channel of a value head."""
    sums, words = layer.statistics, ("query", "key") if target == "key" else ("value", "output")
    if name in ("l1", "l2"):
        words = words if target == "key" else ("value",)
        return sum(norm(row(layer, word, head, channel), int(name[1])) for word in words)
    if name == "wanda" and target == "key":
        norms = [math.sqrt(square) for square in sums.input_square_D.tolist()]
        return sum(abs(w) * x for word in words for w, x in zip(row(layer, word, head, channel), norms, strict=True))
    if name == "wanda":
        square = float(sums.output_gram_WVV[head, channel, channel])
        return sum(abs(w) * math.sqrt(square) for w in row(layer, "output", head, channel))
    if name in ("magnitude", "energy"):
        grams = (sums.query_gram_HKK, sums.key_gram_HKK) if target == "key" else (sums.output_gram_WVV,)
        energies = [float(gram[head, channel, channel]) for gram in grams]
        return sum(energies) if name == "energy" else sum(math.sqrt(energy) for energy in energies)
    stem = {"first": "signed", "squared": "squared", "element": "element"}[form]
    ending = "HK" if target == "key" else "WV"
    return sum(abs(float(getattr(sums.taylor, f"{stem}_{word}_{ending}")[head, channel])) for word in words)


def of_head(name: str, layer: LayerView, head: int, form: str | None) -> float:
    """The score of a key head and the two value heads that it serves."""
    value_heads = [2 * head, 2 * head + 1]
    if name in ("magnitude", "energy"):
        energy = sum(float(layer.statistics.output_energy_W[w]) for w in value_heads)
        return energy if name == "energy" else math.sqrt(energy)
    values = sum(of_channel(name, "value", layer, w, c, form) for w in value_heads for c in range(SIZES.head_v_dim))
    if name == "wanda":
        return values
    return values + sum(of_channel(name, "key", layer, head, c, form) for c in range(SIZES.head_k_dim))


def expected(name: str, target: str, layer: LayerView, keep: int, form: str | None) -> list[list[int]]:
    groups, channels = GROUPS[target]
    kept = []
    for group in range(groups):
        if target == "head":
            scores = [of_head(name, layer, head, form) for head in range(channels)]
        else:
            scores = [of_channel(name, target, layer, group, channel, form) for channel in range(channels)]
        kept.append(sorted(sorted(range(channels), key=lambda channel: (-scores[channel], channel))[:keep]))
    return kept


@pytest.mark.parametrize(("name", "target", "options"), SCORED, ids=str)
def test_the_highest_scores_stay(name, target, options):
    for seed in range(4):
        layer = view(seed)
        for keep in range(1, GROUPS[target][1] + 1):
            kept = select(name, target, layer, keep, **options).kept_GR
            assert kept.tolist() == expected(name, target, layer, keep, options.get("form"))


def test_rank_norm_keeps_heads_of_a_large_norm_and_a_low_rank():
    """Two value heads of each key head: 10 / 2 + 4 / 4 = 6, 9 / 9 + 3 / 1 = 4, 20 / 10 + 10 / 2 = 7."""
    sums = {"state_norm_W": [10, 4, 9, 3, 20, 10], "state_rank_W": [2, 4, 9, 1, 10, 2]}
    sums = {name: torch.tensor(numbers, dtype=torch.float64) for name, numbers in sums.items()}
    layer = view(statistics=dataclasses.replace(layer_statistics(SIZES, HIDDEN), **sums))
    assert select("rank-norm", "head", layer, 1).kept_GR.tolist() == [[2]]
    assert select("rank-norm", "head", layer, 2).kept_GR.tolist() == [[0, 2]]
    assert METHODS["rank-norm"].select.keys() == {"head"} and METHODS["rank-norm"].needs_statistics


@pytest.mark.parametrize("target", TARGETS)
def test_methods_and_forms_differ(target):
    """So that none of them can pass for another above."""
    choices = {
        (name, *options.values()): str(
            [expected(name, target, view(seed), 2, options.get("form")) for seed in range(40)]
        )
        for name, scored, options in SCORED
        if scored == target
    }
    assert len(choices) == 8
    # Magnitude is the root of energy, which ranks alike where it is not summed.
    assert len(set(choices.values())) == (8 if target == "key" else 7)


@pytest.mark.parametrize(("name", "target"), ALL)
def test_a_choice_is_rows_of_ascending_channels_and_the_same_again(name, target):
    groups, channels = GROUPS[target]
    keep = min(4, channels - 1)
    chosen, again = (select(name, target, view(), keep, seed=1) for _ in range(2))
    assert dict(chosen.report) == dict(again.report)
    if name == "pca":
        assert chosen.kept_GR is None
        assert torch.equal(chosen.projection_HKR, again.projection_HKR)
        return
    assert chosen.projection_HKR is None
    assert chosen.kept_GR.dtype == torch.long
    assert chosen.kept_GR.shape == (groups, keep)
    assert (chosen.kept_GR.diff(dim=1) > 0).all()
    assert 0 <= chosen.kept_GR.min() <= chosen.kept_GR.max() < channels
    assert torch.equal(chosen.kept_GR, again.kept_GR)
    whole = select(name, target, view(), channels).kept_GR
    assert torch.equal(whole, torch.arange(channels).expand(groups, -1))


@pytest.mark.parametrize(("name", "target"), [pair for pair in ALL if pair[0] not in ("random", "pca")])
def test_ties_break_by_lower_index_and_chance_has_no_part(name, target):
    sums = layer_statistics(SIZES, HIDDEN)
    for holder in (sums, sums.taylor):
        for field in dataclasses.fields(holder):
            if isinstance(tensor := getattr(holder, field.name), torch.Tensor):
                tensor.fill_(1)

    def equal(word: str) -> torch.Tensor:
        return torch.ones_like(view().projection(word))

    layer = dataclasses.replace(view(statistics=sums), projection=equal)
    for seed in (0, 1):
        assert select(name, target, layer, 2, seed=seed).kept_GR.tolist() == [[0, 1]] * GROUPS[target][0]


@pytest.mark.parametrize(("name", "target"), ALL)
def test_methods_change_nothing(name, target):
    layer = view()
    weights = {word: layer.projection(word) for word in ("query", "key", "value", "output")}
    tensors = [*weights.values(), *layer.statistics.tensors().values()]
    before = [tensor.clone() for tensor in tensors]
    select(name, target, layer, 2)
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))


@pytest.mark.parametrize(("name", "target"), ALL)
def test_methods_say_what_they_read(name, target):
    method = METHODS[name]
    assert method.name == name
    assert method.summary
    assert method.citation
    if method.needs_statistics:
        with pytest.raises(KeyreduceError, match="needs_statistics=True"):
            select(name, target, view(statistics=None), 2)
    else:
        assert torch.equal(
            select(name, target, view(statistics=None), 2).kept_GR, select(name, target, view(), 2).kept_GR
        )
    if method.needs_statistics and not method.needs_gradients:
        sums = dataclasses.replace(layer_statistics(SIZES, HIDDEN), taylor=None)
        select(name, target, view(statistics=sums), 2)
    assert method.needs_gradients == (name == "taylor")


def test_which_method_chooses_what():
    everything = set(TARGETS)
    assert {name: set(method.select) for name, method in METHODS.items()} == {
        "auto": everything,
        "rrqr": {"key", "value"},
        "wanda": everything,
        "taylor": everything,
        "pca": {"key"},
        "l1": everything,
        "l2": everything,
        "magnitude": everything,
        "energy": everything,
        "rank-norm": {"head"},
        "random": everything,
    }


@pytest.mark.parametrize(("target", "name"), [("key", "rrqr"), ("value", "energy"), ("head", "wanda")])
def test_auto_chooses_as_the_method_that_it_names(target, name):
    assert f"{name} for {target}s" in METHODS["auto"].summary
    for seed in range(4):
        assert select("auto", target, view(seed), 2).kept_GR.equal(select(name, target, view(seed), 2).kept_GR)


# random


@pytest.mark.parametrize("target", TARGETS)
def test_random_is_drawn_from_the_generator_alone(target):
    groups, channels = GROUPS[target]
    kept = [select("random", target, view(), 2, seed=seed).kept_GR.tolist() for seed in range(60)]
    counts = torch.bincount(torch.tensor(kept).flatten(), minlength=channels)
    assert counts.min() > 0.6 * 60 * groups * 2 / channels
    assert select("random", target, view(5), 2, seed=0).kept_GR.tolist() == kept[0]
    if groups > 1:
        assert any(rows[0] != rows[1] for rows in kept)


# rrqr


@pytest.mark.parametrize("f", [1.0, 1.5, 10.0])
@pytest.mark.parametrize("target", ["key", "value"])
def test_rrqr_takes_each_head_by_its_gram_matrix(target, f):
    layer = view()
    sums, keep = layer.statistics, 3
    chosen = select("rrqr", target, layer, keep, f=f)
    gram = sums.output_gram_WVV if target == "value" else sums.query_gram_HKK + sums.key_gram_HKK
    results = [strong_rrqr(gram_CC.numpy(), keep, f=f) for gram_CC in gram]
    assert chosen.kept_GR.tolist() == [result.kept_R.tolist() for result in results]
    assert chosen.report == {
        name: [getattr(result, name) for result in results]
        for name in ("rho", "swaps", "smallest_kept", "largest_dropped")
    }
    assert all(1e-9 < rho <= max(f, 1 + 1e-6) for rho in chosen.report["rho"])


def test_rrqr_shuffles_ties_and_nothing_else():
    layer = view()
    expected = select("rrqr", "key", layer, 3, f=1.0)
    for seed in range(5):
        assert torch.equal(select("rrqr", "key", layer, 3, seed=seed, f=1.0, permute=True).kept_GR, expected.kept_GR)
    sums = layer_statistics(SIZES, HIDDEN)
    for name in ("query_gram_HKK", "key_gram_HKK"):
        getattr(sums, name).copy_(torch.eye(7).double())
    tied = view(statistics=sums)
    assert select("rrqr", "key", tied, 3, seed=1).kept_GR.tolist() == [[0, 1, 2]] * 3
    drawn = [select("rrqr", "key", tied, 3, seed=seed, permute=True).kept_GR.tolist() for seed in range(30)]
    assert select("rrqr", "key", tied, 3, seed=4, permute=True).kept_GR.tolist() == drawn[4]
    assert {channel for rows in drawn for kept in rows for channel in kept} == set(range(7))
    assert any(rows[0] != rows[1] for rows in drawn)


@pytest.mark.parametrize("f", [0.99, 0.0, -1.0, math.nan, math.inf])
def test_rrqr_refuses_a_bound_below_one(f):
    with pytest.raises(KeyreduceError, match=f"`f` is {f:g}; it is at least 1"):
        METHODS["rrqr"].check({"f": f, "permute": False})
    METHODS["rrqr"].check({"f": 1.0, "permute": False})


# taylor


def test_taylor_refuses_other_forms():
    with pytest.raises(KeyreduceError, match="`form` is 'second'; take one of first, squared, element"):
        METHODS["taylor"].check({"form": "second"})
    for form in FORMS["taylor"]:
        METHODS["taylor"].check({"form": form})


# pca


@pytest.mark.parametrize("include_queries", [False, True])
def test_pca_projects_on_the_principal_directions(include_queries):
    layer, keep = view(), 3
    sums = layer.statistics
    chosen = select("pca", "key", layer, keep, include_queries=include_queries)
    assert chosen.kept_GR is None
    assert chosen.projection_HKR.shape == (3, 7, keep)
    assert chosen.projection_HKR.dtype == torch.float64
    for head, basis_KR in enumerate(chosen.projection_HKR.numpy()):
        moment = sums.unit_key_gram_HKK[head].numpy()
        if include_queries:
            moment = moment + sums.unit_query_gram_HKK[head].numpy()
        value_K, vector_KK = np.linalg.eigh(moment)
        np.testing.assert_allclose(basis_KR.T @ basis_KR, np.eye(keep), atol=1e-12)
        best_KR = vector_KK[:, ::-1][:, :keep]
        np.testing.assert_allclose(np.abs(best_KR.T @ basis_KR), np.eye(keep), atol=1e-8)
        assert (basis_KR[np.abs(basis_KR).argmax(0), range(keep)] > 0).all()
        share = value_K[-keep:].sum() / value_K.sum()
        assert math.isclose(chosen.report["variance_kept"][head], share)
        assert math.isclose(np.trace(basis_KR.T @ moment @ basis_KR) / np.trace(moment), share)


def test_pca_of_dead_heads_is_still_orthonormal():
    sums = layer_statistics(SIZES, HIDDEN)
    sums.unit_key_gram_HKK[1] = 0
    chosen = select("pca", "key", view(statistics=sums), 3)
    grams = chosen.projection_HKR.mT @ chosen.projection_HKR
    torch.testing.assert_close(grams, torch.eye(3).double().expand(3, -1, -1))
    assert chosen.report["variance_kept"][1] == 0


def test_pca_does_not_fit_a_norm_by_sums():
    unfit, config = METHODS["pca"].unfit, {"model_type": "delta_net"}
    assert unfit(config) is None
    assert unfit(config | {"qk_norm": "l2"}) is None
    assert "qk_norm 'sum'" in unfit(config | {"qk_norm": "sum"})
    others = (method for name, method in METHODS.items() if name != "pca")
    assert all(method.unfit(config | {"qk_norm": "sum"}) is None for method in others)


# What a method is made of.


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
    assert highest(torch.tensor([row, row]), keep).kept_GR.tolist() == [expected, expected]


def test_a_score_becomes_a_choice_and_heads_add_their_channels():
    options = {"scale": -1.0}
    select_key = ranked(lambda layer, scale: scale * torch.arange(7.0).expand(3, -1))
    assert select_key(view(), 2, generator(), **options).kept_GR.tolist() == [[0, 1]] * 3
    # Value heads 4 and 5 go with key head 2.
    made = all_targets(
        key=lambda layer, scale: torch.tensor([[5.0], [2.0], [1.0]]).expand(-1, 7),
        value=lambda layer, scale: torch.tensor([0.0, 0, 0, 0, 9, 0])[:, None].expand(-1, 5),
    )
    # 35, 14 and 7 + 45
    assert made["head"](view(), 1, generator(), **options).kept_GR.tolist() == [[2]]
    assert made["head"](view(), 2, generator(), **options).kept_GR.tolist() == [[0, 2]]
    assert view().in_groups(torch.arange(6.0)).tolist() == [1, 5, 9]


@pytest.mark.parametrize(("name", "told"), [("wandaa", "wanda"), ("RANDOM", "random"), ("magnitud", "magnitude")])
def test_the_nearest_method_is_suggested(name, told):
    with pytest.raises(KeyreduceError, match=f"there is no method '{name}'; did you mean {told}\\?"):
        method_named(name)


def test_all_methods_are_named_where_none_is_near():
    with pytest.raises(KeyreduceError, match=f"take one of {', '.join(METHODS)}"):
        method_named("zzz")
    assert method_named("l2") is METHODS["l2"]
