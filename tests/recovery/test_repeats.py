"""Rows of random tokens that repeat, among those of text."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keyreduce.errors import KeyreduceError
from keyreduce.recovery.repeats import check_repeats, with_repeats

TEXT = 1_000  # an id that nothing is drawn from
DRAWN = torch.arange(10, 60)


def rows(number: int, length: int) -> list[torch.Tensor]:
    return [torch.full((length,), TEXT + n) for n in range(number)]


def replaced(found: list[torch.Tensor]) -> list[bool]:
    return [bool((row_T < TEXT).all()) for row_T in found]


@settings(max_examples=50, deadline=None)
@given(number=st.integers(1, 40), length=st.integers(2, 70), share=st.floats(0, 0.99), seed=st.integers(0, 2**32 - 1))
def test_a_share_of_the_rows_repeats_with_a_period(number, length, share, seed):
    found = list(with_repeats(rows(number, length), share, DRAWN, seed))
    assert [len(row_T) for row_T in found] == [length] * number
    is_replaced = replaced(found)
    assert abs(sum(is_replaced) - number * share) <= 1
    for before_T, row_T, changed in zip(rows(number, length), found, is_replaced, strict=True):
        if not changed:
            assert row_T.equal(before_T)
            continue
        assert set(row_T.tolist()) <= set(DRAWN.tolist())
        periods = range(max(1, int(length / 16)), length // 2 + 1)
        assert any(row_T[period:].equal(row_T[:-period]) for period in periods)


def test_they_are_spread_and_no_two_alike():
    found = list(with_repeats(rows(64, 128), 0.25, DRAWN, 0))
    assert replaced(found) == [number % 4 == 3 for number in range(64)]
    assert len({tuple(row_T.tolist()) for row_T in found[3::4]}) == 16


def test_the_seed_alone_decides():
    def drawn(seed: int) -> torch.Tensor:
        return torch.stack(list(with_repeats(rows(16, 64), 0.5, DRAWN, seed)))

    assert drawn(0).equal(drawn(0)) and not drawn(0).equal(drawn(1))


def test_without_tokens_to_draw_all_rows_stay():
    found = list(with_repeats(rows(8, 32), 0.5, DRAWN[:0], 0))
    assert all(row_T.equal(before_T) for row_T, before_T in zip(found, rows(8, 32), strict=True))


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5, float("nan")])
def test_what_is_no_share_is_refused(share):
    with pytest.raises(KeyreduceError, match="`repeats` is"):
        check_repeats(share)
