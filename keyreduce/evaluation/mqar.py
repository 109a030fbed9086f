"""Multi-query associative recall: pairs of a key and a value, then the keys again.

Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models", arXiv:2312.04927, section 4. A
sequence lists its pairs. After them each key comes once more, with short gaps more often than long ones, and the model
is to predict the key's value there. Keys, values and the tokens in the gaps are drawn from the vocabulary for each
sequence, and no token has two of these roles, so that the sequence alone holds the answer.

Shapes: S symbols, N pairs, T tokens.
"""

from collections.abc import Iterator

import torch

from keyreduce.evaluation.probes import CHOICES, Probe, choices

_POWER = 0.01  # exponent of the distribution of gaps, as in the paper's experiments


def fits(length: int, pairs: int, symbols: int) -> bool:
    """Return whether ``length`` tokens have room for pairs and questions, and ``symbols`` tokens for all roles."""
    return pairs >= 1 and length >= 4 * pairs and symbols >= 2 * pairs + CHOICES


def draw(symbols_S: torch.Tensor, length: int, pairs: int, number: int, generator: torch.Generator) -> Iterator[Probe]:
    """Yield ``number`` sequences of T = ``length`` tokens and N = ``pairs`` questions each.

    All tokens are drawn from ``symbols_S``, which holds each id once; values of other keys are the first of the wrong
    choices. The sizes are to be such that `fits` says so.
    """
    # Questions stand at every other position, since a pair takes two.
    slots = torch.arange(1, (length - 2 * pairs) // 2 + 1, dtype=torch.float64)
    weights = slots ** (_POWER - 1)
    for _ in range(number):
        shuffled_S = symbols_S[torch.randperm(len(symbols_S), generator=generator)]
        keys_N, values_N, rest = shuffled_S.tensor_split([pairs, 2 * pairs])
        tokens_T = rest[torch.randint(len(rest), (length,), generator=generator)]
        tokens_T[: 2 * pairs : 2], tokens_T[1 : 2 * pairs : 2] = keys_N, values_N
        places_N = 2 * pairs + 2 * torch.multinomial(weights, pairs, generator=generator)
        tokens_T[places_N] = keys_N
        rows = []
        for value in values_N.tolist():
            rivals = values_N[torch.randperm(pairs, generator=generator)]
            others = rest[torch.randperm(len(rest), generator=generator)[:CHOICES]]
            rows.append(choices(value, rivals.tolist(), others.tolist()))
        yield Probe(tokens_T, places_N, values_N, torch.stack(rows))
