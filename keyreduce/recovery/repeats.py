"""Rows of random tokens that repeat, among the rows of text that a layer is fitted on.

The next word of a text can mostly be predicted without any single association that the state holds. A fit to text
alone loses such associations: perplexity gets better, and recall gets worse. In a row of random tokens that repeat, the
next token can be predicted by recall alone (Olsson et al., arXiv:2209.11895, measure induction in this way), so that a
fit to what the dense mixers give for it keeps recall.

Shapes: T tokens in a row, P tokens in a period, S token ids to draw from.
"""

import math
import random
from collections.abc import Iterable, Iterator

import torch

from keyreduce.errors import KeyreduceError


def check_repeats(share: float) -> None:
    """Raise KeyreduceError for a share that is not from 0 up to, but not including, 1."""
    if not 0 <= share < 1:
        raise KeyreduceError(f"`repeats` is {share:g}; it is a share of the rows, at least 0 and below 1")


def with_repeats(
    rows: Iterable[torch.Tensor], share: float, tokens_S: torch.Tensor, seed: int
) -> Iterator[torch.Tensor]:
    """Yield the rows, with a share of them, evenly spread, replaced by random tokens that repeat.

    A period is from a sixteenth to half of the row, short ones as often as long ones (uniform in the logarithm).

    Args:
        rows: LongTensors of T token ids.
        share: the share of the rows to replace, at least 0 and below 1.
        tokens_S: the token ids to draw from; where there are none, all rows stay.
    """
    periods, drawn = random.Random(seed), torch.Generator().manual_seed(seed)
    share = share if len(tokens_S) else 0.0
    for number, row_T in enumerate(rows):
        if math.floor((number + 1) * share) > math.floor(number * share) and len(row_T) > 1:
            shortest, longest = max(1.0, len(row_T) / 16), len(row_T) / 2
            length = round(math.exp(periods.uniform(math.log(shortest), math.log(longest))))
            period_P = tokens_S[torch.randint(len(tokens_S), (length,), generator=drawn)]
            row_T = period_P.repeat(math.ceil(len(row_T) / length))[: len(row_T)]
        yield row_T
