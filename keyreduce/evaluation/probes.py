"""Sequences that ask for what stood earlier in them, and how well a model answers.

Shapes: B probes in a batch, T tokens in a probe, Q questions of a probe, C choices for an answer, V token ids.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from keyreduce.evaluation.perplexity import row_logits

CHOICES = 8


class Probe(NamedTuple):
    """One sequence with its questions.

    Attributes:
        tokens_T: the sequence (LongTensor).
        places_Q: the positions after which an answer is predicted, whether or not the sequence goes on with it.
        answers_Q: the right token for each of them.
        choices_QC: the tokens that an answer is chosen from: the right one and others, none of them twice (`choices`).
        depth: where in the text the answer stands, from 0 to 1; None where there is no text.
    """

    tokens_T: torch.Tensor
    places_Q: torch.Tensor
    answers_Q: torch.Tensor
    choices_QC: torch.Tensor
    depth: float | None = None


class Answer(NamedTuple):
    """How well one question was answered.

    Attributes:
        accuracy: 1 where the right token has the highest logit of all; 1 / n where n tokens, itself included, share it.
        choice_accuracy: the same among the choices alone. A model that ignores the probe scores 1 / C on average.
        rank: that of the right token in the vocabulary by its logit, 1 being the best; of a tie, the middle rank.
        log_probability: that of the right token, in nats.
    """

    accuracy: float
    choice_accuracy: float
    rank: float
    log_probability: float


def choices(answer: int, rivals: Iterable[int], others: Iterable[int]) -> torch.Tensor:
    """Return `CHOICES` different tokens (LongTensor, C): the answer, then its rivals, then others to fill up.

    Rivals answer other questions of the probe, so a model must tell them apart; others are at least C tokens.
    """
    distinct = dict.fromkeys(itertools.chain([answer], rivals, others))
    return torch.tensor(list(itertools.islice(distinct, CHOICES)))


def judge(logits_QV: torch.Tensor, answers_Q: torch.Tensor, choices_QC: torch.Tensor) -> list[Answer]:
    """Return how well each question was answered.

    Ties, which are common in bfloat16, count in part, so that the order of the vocabulary does not decide them.
    """
    logits_QV = logits_QV.double()
    right_Q1 = logits_QV.gather(1, answers_Q[:, None])
    above_Q, beside_Q = _rivals(logits_QV, right_Q1)
    choice_above_Q, choice_beside_Q = _rivals(logits_QV.gather(1, choices_QC), right_Q1)
    accuracies = (above_Q == 0) / (1 + beside_Q), (choice_above_Q == 0) / (1 + choice_beside_Q)
    columns = (*accuracies, 1 + above_Q + beside_Q / 2, right_Q1[:, 0] - logits_QV.logsumexp(dim=1))
    return [Answer(*row) for row in torch.stack([column.double() for column in columns], dim=1).tolist()]


def _rivals(logits_QC: torch.Tensor, right_Q1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, for each question, how many logits are above the right one, and how many others are equal to it."""
    return (logits_QC > right_Q1).sum(dim=1), (logits_QC == right_Q1).sum(dim=1) - 1


def ask(
    model: torch.nn.Module, batches: Iterable[list[Probe]], *, name: str, progress: Callable[[int], None] | None = None
) -> list[tuple[float | None, list[Answer]]]:
    """Run batches of probes through a model (`row_logits`), and return for each probe its depth and its answers."""
    answered = []
    for probe, logits_TV in row_logits(model, batches, name, progress):
        logits_QV = logits_TV[probe.places_Q.to(logits_TV.device)].cpu()
        answered.append((probe.depth, judge(logits_QV, probe.answers_Q, probe.choices_QC)))
    return answered


def average(probes: Iterable[list[Answer]]) -> dict:
    """Return means over all answers, each rounded once, and ``all_right``, the share of probes without a mistake.

    Where the answers of a probe are the tokens of one text, ``all_right`` is how often greedy decoding would write it.
    """
    probes = list(probes)
    answers = [answer for probe in probes for answer in probe]
    columns = zip(Answer._fields, zip(*answers, strict=True), strict=True)
    means = {name: math.fsum(column) / len(answers) for name, column in columns}
    all_right = sum(all(answer[0] == 1 for answer in probe) for probe in probes) / len(probes)
    return {"probes": len(probes), "answers": len(answers), **means, "all_right": all_right}
