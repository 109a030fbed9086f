"""From what the command line says to how many channels and heads stay."""

from decimal import Decimal, localcontext
from fractions import Fraction
from math import floor

import pytest
from cuts import budget_of, layer_statistics
from hypothesis import given, settings
from hypothesis import strategies as st

from keyreduce.calibration.statistics import Statistics
from keyreduce.errors import KeyreduceError
from keyreduce.families import FAMILIES, MixerSizes
from keyreduce.pruning.budget import keep_count, parse_amounts, sizes_after
from keyreduce.pruning.methods import METHODS

CONFIG = {
    "model_type": "delta_net_2",
    "hidden_size": 64,
    "num_heads": 4,
    "num_hidden_layers": 3,
    "expand_k": [1, 0.5, 1],
    "attn": {"layers": [2], "num_heads": 2},
}
GATED = {"model_type": "gated_deltanet", "num_heads": 4, "num_v_heads": 8, "head_dim": 10, "num_hidden_layers": 2}
HEAD_DIM = st.integers(1, 256)


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("keys", "`target` is 'keys'; take one of key, value, head"),
        ("key,", "`target` is ''"),
        ("", "`target` is ''"),
        ("key,value,key", "`target` key,value,key names a target twice"),
    ],
)
def test_targets_that_are_none(target, told):
    assert budget_of("value, key ,head").targets == ["value", "key", "head"]
    with pytest.raises(KeyreduceError, match=told):
        budget_of(target)


def test_amounts():
    assert parse_amounts("ratio", (), ["key", "head"]) == {"key": None, "head": None}
    assert parse_amounts("ratio", ("0.1",), ["key", "head"]) == {"key": Fraction(1, 10), "head": Fraction(1, 10)}
    assert parse_amounts("keep", ("3", "1"), ["head", "key"]) == {"head": 3, "key": 1}
    assert parse_amounts("ratio", ("1/3", "1e-1"), ["key", "head"]) == {"key": Fraction(1, 3), "head": Fraction(1, 10)}
    assert budget_of("key,head", ratio=" 0.5, 0.25").ratio == {"key": Fraction(1, 2), "head": Fraction(1, 4)}
    assert budget_of(ratio=0.3).ratio == {"key": Fraction(3, 10)}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("half", "`ratio` is 'half'; give a number, or one for each target with commas"),
        ("", "`ratio` is ''"),
        ("0.5,", "`ratio` is '0.5,'"),
        ("1/0", "`ratio` is '1/0'"),
        ("nan", "`ratio` is 'nan'"),
        ("0.5,0.5,0.5", r"`ratio` 0.5,0.5,0.5 gives 3 numbers for 2 targets \(key,head\)"),
    ],
)
def test_amounts_that_are_none(text, told):
    with pytest.raises(KeyreduceError, match=told):
        budget_of("key,head", ratio=text)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(ratio="0.5", keep="4"), r"either `ratio` \(or PRUNING_RATIO\) or `keep`, not both"),
        (dict(variance=0.9, ratio="0.5"), "leave `ratio` .* and `keep` out"),
        (dict(variance=0.9, keep="5"), "leave `ratio` .* and `keep` out"),
        (dict(allocate="evenly"), "`allocate` is 'evenly'; take one of uniform, energy"),
        (dict(target="value", allocate="energy"), "take `target` key and `ratio` or `keep`"),
        (dict(variance=0.9, allocate="energy"), "take `target` key and `ratio` or `keep`"),
        (dict(variance=0.0), "`variance` is 0; .* above 0 and at most 1"),
        (dict(variance=1.01), "`variance` is 1.01; .* above 0 and at most 1"),
        (dict(variance=float("nan")), "`variance` is nan; .* above 0 and at most 1"),
        (dict(target="kay"), "`target` is 'kay'"),
        (dict(keep="x"), "`keep` is 'x'"),
    ],
)
def test_options_that_do_not_go_together(options, told):
    with pytest.raises(KeyreduceError, match=told):
        budget_of(**options)


@pytest.mark.parametrize(
    ("options", "config", "recorded"),
    [
        ({}, GATED, {"key": 7}),
        (dict(ratio="0.3"), CONFIG, {"key": [11, 5]}),
        (dict(target="value,head", keep="6,2", multiple_of=4), CONFIG, {"value": 8, "head": 2}),
        (dict(variance=0.95), CONFIG, {"variance": 0.95, "multiple_of": 1}),
        (
            dict(target="key,head", ratio="0.5", allocate="energy", multiple_of=2),
            CONFIG,
            {"key": [8, 4], "head": 2, "allocate": "energy", "multiple_of": 2},
        ),
    ],
)
def test_the_record_has_the_numbers_themselves(options, config, recorded):
    """So that two ways to say the same are the same."""
    budget = budget_of(**options)
    assert budget.describe(config) == {"target": options.get("target", "key"), "keep": recorded}
    assert budget.targets == options.get("target", "key").split(",")
    assert budget.needs_statistics == ("variance" in options or "allocate" in options)


@pytest.mark.parametrize(
    ("config", "options", "method", "told"),
    [
        (CONFIG, dict(keep="9"), "l1", "`keep` is 9; a key head of this model has 1 to 8 channels to keep"),
        (CONFIG, dict(target="value", keep="17"), "l1", "`keep` is 17; a value head .* 1 to 16 channels"),
        (CONFIG, dict(target="head", keep="5"), "l1", "`keep` is 5; a layer of this model has 1 to 4 key heads"),
        (CONFIG, dict(keep="2.5"), "l1", "`keep` is 2.5;"),
        (CONFIG, dict(target="key,head", keep="4,0"), "l1", "`keep` is 0; a layer"),
        (CONFIG, dict(ratio="1"), "l1", "`ratio` is 1; it is the share to remove, at least 0 and below 1"),
        (CONFIG, dict(multiple_of=9), "l1", "`multiple_of` is 9; it is at least 1, and at most head_k_dim, 8"),
        (CONFIG, dict(variance=0.9), "l1", "`variance` goes with `method` pca `target` key"),
        (CONFIG, dict(target="key,value", variance=0.9), "pca", "`variance` goes with `method` pca `target` key"),
        (CONFIG, dict(variance=0.9, multiple_of=9), "pca", "`multiple_of` is 9"),
        (GATED, dict(allocate="energy"), "l1", "gated_deltanet config says one head_k_dim .* only delta_net_2"),
        (GATED, dict(target="value", keep="21"), "l1", "`keep` is 21; a value head of this model has 1 to 20"),
        ({"model_type": "llama"}, {}, "l1", "none of the delta-rule models"),
    ],
)
def test_what_a_model_cannot_have_is_refused_before_any_work(config, options, method, told):
    with pytest.raises(KeyreduceError, match=told):
        budget_of(**options).check(config, METHODS[method])


@pytest.mark.parametrize("options", [dict(ratio="0.5"), dict(variance=0.9), dict(target="key,head", allocate="energy")])
def test_what_it_can_have_is_not(options):
    method = METHODS["pca" if "variance" in options else "l1"]
    budget_of(**options).check(CONFIG, method)


def test_numbers_are_of_each_layer():
    numbers = budget_of("key,head,value", ratio="0.3,0.5,0.25").numbers(CONFIG, None, METHODS["l1"], {})
    assert numbers == {"key": {0: 11, 1: 5}, "head": {0: 2, 1: 2}, "value": {0: 12, 1: 12}}
    assert budget_of("key", keep="5", multiple_of=2).numbers(GATED, None, METHODS["l1"], {}) == {"key": {0: 6, 1: 6}}


def test_numbers_may_come_from_the_calibration():
    family = FAMILIES["delta_net_2"]
    layers = {layer: layer_statistics(sizes, 64, seed=layer) for layer, sizes in family.layer_sizes(CONFIG).items()}
    statistics = Statistics("", 0, layers, {})
    shared = budget_of("key,head", ratio="0.5", allocate="energy")
    numbers = shared.numbers(CONFIG, statistics, METHODS["energy"], {})
    assert sum(numbers["key"].values()) == 8 + 4
    assert numbers["head"] == {0: 2, 1: 2}
    ranks = budget_of("key", variance=1.0).numbers(CONFIG, statistics, METHODS["pca"], {"include_queries": False})
    assert ranks == {"key": {0: 16, 1: 8}}


# How many of a group.


@pytest.mark.parametrize(
    ("available", "ratio", "expected"),
    [(10, "0.9", 1), (10, "0.8", 2), (10, "0.1", 9), (128, "0.25", 96), (128, "0", 128), (3, "0.34", 1), (4, ".99", 1)],
)
@pytest.mark.parametrize("target", ["key", "value", "head"])
def test_ratio(target, available, ratio, expected):
    """``10 * (1 - 0.8)`` is a little less than 2 in binary, and 0.1 a little more than a tenth."""
    assert keep_count(target, available, ratio=Fraction(ratio), keep=None) == expected


@settings(max_examples=25, deadline=None)
@given(HEAD_DIM, st.floats(0, 1, exclude_max=True))
def test_ratio_keeps_the_floor_in_decimal_and_at_least_one(available, ratio):
    with localcontext(prec=1000):  # exact, for the smallest ratio too
        expected = max(1, floor(available * (1 - Decimal(repr(ratio)))))
    amounts = parse_amounts("ratio", (repr(ratio),), ["key"])
    assert keep_count("key", available, ratio=amounts["key"], keep=None) == expected


@settings(max_examples=25, deadline=None)
@given(HEAD_DIM, st.data())
def test_multiples_are_the_nearest_that_fit(available, data):
    keep = data.draw(st.integers(1, available))
    multiple_of = data.draw(st.integers(1, available))
    kept = keep_count("value", available, ratio=None, keep=Fraction(keep), multiple_of=multiple_of)
    possible = range(multiple_of, available + 1, multiple_of)
    assert kept == min(possible, key=lambda size: (abs(size - keep), -size))


@pytest.mark.parametrize(
    ("keep", "multiple_of", "expected"), [(48, 32, 64), (47, 32, 32), (1, 64, 64), (128, 48, 96), (96, 1, 96)]
)
def test_multiples_of_128(keep, multiple_of, expected):
    assert keep_count("key", 128, ratio=None, keep=Fraction(keep), multiple_of=multiple_of) == expected


def test_heads_are_not_rounded():
    assert keep_count("head", 16, ratio=None, keep=Fraction(5), multiple_of=32) == 5


@pytest.mark.parametrize("ratio", ["-0.1", "1", "1.5", "1e9"])
def test_ratios_outside_are_refused(ratio):
    with pytest.raises(KeyreduceError, match="`ratio` is .*at least 0 and below 1"):
        keep_count("key", 128, ratio=Fraction(ratio), keep=None)


@pytest.mark.parametrize("keep", ["0", "-1", "129", "0.5"])
def test_impossible_numbers_are_refused(keep):
    with pytest.raises(KeyreduceError, match=f"`keep` is {keep}; .* has 1 to 128 channels"):
        keep_count("key", 128, ratio=None, keep=Fraction(keep))


@pytest.mark.parametrize("multiple_of", [0, -2, 129])
def test_impossible_multiples_are_refused(multiple_of):
    with pytest.raises(KeyreduceError, match=f"`multiple_of` is {multiple_of}; .* at most head_v_dim, 128"):
        keep_count("value", 128, ratio=Fraction(1, 2), keep=None, multiple_of=multiple_of)


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ({}, (4, 12, 8, 16)),
        ({"key": 3}, (4, 12, 3, 16)),
        ({"value": 5}, (4, 12, 8, 5)),
        ({"head": 3}, (3, 9, 8, 16)),
        ({"head": 1, "value": 2, "key": 7}, (1, 3, 7, 2)),
    ],
)
def test_sizes_after(keep, expected):
    assert tuple(sizes_after(MixerSizes(4, 12, 8, 16), keep)) == expected
