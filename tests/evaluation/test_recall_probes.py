"""How answers are judged, and the sequences of multi-query associative recall."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recallers import Recaller

from keyreduce.errors import KeyreduceError
from keyreduce.evaluation.mqar import draw, fits
from keyreduce.evaluation.probes import CHOICES, Answer, ask, average, choices, judge

SYMBOLS = torch.arange(3, 250)


def probes(length: int, pairs: int, number: int, seed: int = 0):
    return list(draw(SYMBOLS, length, pairs, number, torch.Generator().manual_seed(seed)))


@given(st.lists(st.integers(-2, 2), min_size=6, max_size=6), st.integers(0, 5))
def test_answers_are_judged_by_the_definition(logits, right):
    """Small whole numbers, so that ties are common."""
    chosen = list(dict.fromkeys([right, 0, 3, 5]))
    (answer,) = judge(torch.tensor([logits], dtype=torch.bfloat16), torch.tensor([right]), torch.tensor([chosen]))

    def credit(rivals: list[int]) -> float:
        best = [rival for rival in rivals if logits[rival] == max(logits[rival] for rival in rivals)]
        return 1 / len(best) if right in best else 0.0

    order = sorted(logits, reverse=True)
    ranks = [place for place, logit in enumerate(order, start=1) if logit == logits[right]]
    total = sum(math.exp(logit) for logit in logits)
    expected = (credit(list(range(6))), credit(chosen), sum(ranks) / len(ranks), logits[right] - math.log(total))
    assert answer == pytest.approx(expected)


def test_averages():
    good, bad = Answer(1.0, 1.0, 1.0, -0.5), Answer(0.0, 0.5, 5.0, -2.5)
    assert average([[good, good], [good, bad]]) == {
        "probes": 2, "answers": 4, "accuracy": 0.75, "choice_accuracy": 0.875, "rank": 2.0, "log_probability": -1.0,
        "all_right": 0.5,
    }  # fmt: skip


def test_choices_are_the_answer_then_rivals_then_others():
    assert choices(5, [7, 5, 6], [6, 1, 2, 3, 4, 8, 9]).tolist() == [5, 7, 6, 1, 2, 3, 4, 8]
    assert choices(5, range(10, 30), range(40, 50)).tolist() == [5, *range(10, 17)]


@given(st.integers(1, 20), st.integers(0, 40), st.integers(0, 2**31))
def test_sequences_are_those_of_the_paper(pairs, extra, seed):
    length = 4 * pairs + extra
    (probe,) = probes(length, pairs, 1, seed)
    tokens, places = probe.tokens_T.tolist(), probe.places_Q.tolist()
    keys, values = tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
    assert len(tokens) == length
    assert len({*keys, *values}) == 2 * pairs
    assert set(tokens) <= set(SYMBOLS.tolist())
    # Each key is asked for once, where a pair would begin, and its value is the answer.
    assert [tokens[place] for place in places] == keys
    assert len(set(places)) == pairs
    assert all(place >= 2 * pairs and place % 2 == 0 for place in places)
    assert probe.answers_Q.tolist() == values
    # What else there is, is neither key nor value.
    others = [token for place, token in enumerate(tokens) if place >= 2 * pairs and place not in places]
    assert not {*others} & {*keys, *values}
    for answer, row in zip(values, probe.choices_QC.tolist(), strict=True):
        assert row[0] == answer
        assert len(set(row)) == CHOICES
        assert len(set(row) & set(values)) == min(pairs, CHOICES)
        assert not set(row) & set(keys)


def test_gaps_follow_the_power_law():
    """One pair in 42 tokens: 20 places for the question, the n-th with a probability in proportion to n ** -0.99."""
    count = torch.zeros(20)
    for probe in probes(42, 1, 4000):
        count[(int(probe.places_Q) - 2) // 2] += 1
    law = torch.arange(1, 21) ** -0.99
    deviation = (count / 4000 - law / law.sum()).abs()
    assert (deviation < 4 * (law / law.sum() / 4000).sqrt()).all()


def test_sequences_come_from_the_seed():
    first, again, other = probes(64, 4, 3), probes(64, 4, 3), probes(64, 4, 3, seed=1)
    for one, two in zip(first, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:4], two[:4], strict=True))
    assert not torch.equal(first[0].tokens_T, other[0].tokens_T)
    assert not torch.equal(first[0].tokens_T, first[1].tokens_T)


def test_what_does_not_fit():
    assert fits(16, 4, 8 + CHOICES)
    assert not fits(15, 4, 100) and not fits(16, 4, 7 + CHOICES) and not fits(16, 0, 100)


def test_a_model_that_recalls_answers_all_and_one_that_forgets_does_not():
    drawn = probes(128, 16, 4)
    batches = [drawn[:3], drawn[3:]]
    recalled = average(answers for _, answers in ask(Recaller(), batches, name="m"))
    assert (recalled["accuracy"], recalled["choice_accuracy"], recalled["rank"], recalled["all_right"]) == (1, 1, 1, 1)
    assert recalled["log_probability"] == pytest.approx(-math.log1p(263 * math.exp(-9)))
    reach = 40
    forgot = average(answers for _, answers in ask(Recaller(reach), batches, name="m"))
    near = [place - 2 * number <= reach for probe in drawn for number, place in enumerate(probe.places_Q.tolist())]
    # Whose pair is out of reach gets all logits equal: one in as many as there are.
    share = sum(near) / len(near)
    assert 0.1 < share < 0.9
    assert forgot["accuracy"] == pytest.approx(share + (1 - share) / 264)
    assert forgot["choice_accuracy"] == pytest.approx(share + (1 - share) / CHOICES)
    assert forgot["rank"] == pytest.approx(share + (1 - share) * 132.5)
    assert forgot["all_right"] == 0


def test_logits_that_are_not_finite_are_refused():
    model = Recaller()

    def damage(module, args, output):
        output.logits[0, 0, 0] = math.nan

    model.register_forward_hook(damage)
    with pytest.raises(KeyreduceError, match="logits of m hold NaN or inf"):
        ask(model, [probes(16, 2, 1)], name="m")
