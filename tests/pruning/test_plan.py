import json
from decimal import Decimal, localcontext
from math import floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keyreduce.errors import KeyreduceError
from keyreduce.families import MixerSizes
from keyreduce.pruning.plan import Plan, channels_to_keep

HEAD_DIM = st.integers(1, 256)


@pytest.mark.parametrize(
    ("head_k_dim", "ratio", "expected"),
    [(10, 0.9, 1), (10, 0.8, 2), (10, 0.1, 9), (128, 0.25, 96), (128, 0.0, 128), (3, 0.34, 1), (4, 0.99, 1)],
)
def test_ratio(head_k_dim, ratio, expected):
    """``10 * (1 - 0.8)`` is a little less than 2 in binary, and 0.1 a little more than a tenth."""
    assert channels_to_keep(head_k_dim, ratio=ratio, keep=None) == expected


@settings(max_examples=25, deadline=None)
@given(HEAD_DIM, st.floats(0, 1, exclude_max=True))
def test_ratio_keeps_the_floor_in_decimal_and_at_least_one(head_k_dim, ratio):
    with localcontext(prec=1000):  # exact, for the smallest ratio too
        expected = max(1, floor(head_k_dim * (1 - Decimal(repr(ratio)))))
    assert channels_to_keep(head_k_dim, ratio=ratio, keep=None) == expected


@settings(max_examples=25, deadline=None)
@given(HEAD_DIM, st.data())
def test_multiples_are_the_nearest_that_fit(head_k_dim, data):
    keep = data.draw(st.integers(1, head_k_dim))
    multiple_of = data.draw(st.integers(1, head_k_dim))
    kept = channels_to_keep(head_k_dim, ratio=None, keep=keep, multiple_of=multiple_of)
    possible = range(multiple_of, head_k_dim + 1, multiple_of)
    assert kept == min(possible, key=lambda size: (abs(size - keep), -size))


@pytest.mark.parametrize(
    ("keep", "multiple_of", "expected"), [(48, 32, 64), (47, 32, 32), (1, 64, 64), (128, 48, 96), (96, 1, 96)]
)
def test_multiples_of_128(keep, multiple_of, expected):
    assert channels_to_keep(128, ratio=None, keep=keep, multiple_of=multiple_of) == expected


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan"), float("inf"), -float("inf")])
def test_ratios_outside_are_refused(ratio):
    with pytest.raises(KeyreduceError, match="--ratio is .*at least 0 and below 1"):
        channels_to_keep(128, ratio=ratio, keep=None)


@pytest.mark.parametrize("keep", [0, -1, 129])
def test_impossible_numbers_are_refused(keep):
    with pytest.raises(KeyreduceError, match=f"--keep is {keep}; .* has 1 to 128 channels"):
        channels_to_keep(128, ratio=None, keep=keep)


@pytest.mark.parametrize("multiple_of", [0, -2, 129])
def test_impossible_multiples_are_refused(multiple_of):
    with pytest.raises(KeyreduceError, match=f"--multiple-of is {multiple_of}"):
        channels_to_keep(128, ratio=0.5, keep=None, multiple_of=multiple_of)


@pytest.mark.parametrize(("ratio", "keep"), [(None, None), (0.5, 64)])
def test_either_a_ratio_or_a_number(ratio, keep):
    with pytest.raises(KeyreduceError, match="--ratio .* or --keep"):
        channels_to_keep(128, ratio=ratio, keep=keep)


def test_a_plan_is_json():
    kept = {0: torch.tensor([[0, 2], [1, 2]]), 10: torch.tensor([[1, 2], [0, 1]])}
    plan = Plan({"method": "l1", "calibration": None}, MixerSizes(2, 4, 3, 8), MixerSizes(2, 4, 2, 8), kept)
    written = json.loads(json.dumps(plan.to_json()))
    assert written == {
        "inputs": {"method": "l1", "calibration": None},
        "before": {"key_heads": 2, "value_heads": 4, "head_k_dim": 3, "head_v_dim": 8},
        "after": {"key_heads": 2, "value_heads": 4, "head_k_dim": 2, "head_v_dim": 8},
        "kept": {"0": [[0, 2], [1, 2]], "10": [[1, 2], [0, 1]]},
    }
    assert MixerSizes(**written["after"]) == plan.after
    for layer, rows in written["kept"].items():
        assert torch.equal(torch.tensor(rows), kept[int(layer)])
