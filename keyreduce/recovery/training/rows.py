"""The rows that a model is trained on: documents joined and cut into rows, which are shuffled in a buffer.

Shapes: T tokens in a row.
"""

import random
from collections.abc import Iterable, Iterator

import torch
from transformers import PreTrainedTokenizerFast

from keyreduce.data.batches import token_rows
from keyreduce.data.text import TextSource
from keyreduce.errors import KeyreduceError

_SHUFFLE_BUFFER = 1_000  # rows


class Rows(torch.utils.data.IterableDataset):
    """An endless stream of rows of T tokens; each pass through the text has the documents in another order.

    Each row is drawn from the next 1,000, so that a batch does not consist of rows of one document.

    Accelerate reads the rows in the first process and distributes each batch among all of them. Row i depends on text
    and seed alone, so that a run that was interrupted, or one in more processes, gets the same rows.

    Args:
        text: the source of the documents.
        tokenizer: the tokenizer of the model.
        row_length: T, at least 2.
        seed: the seed of the order of the documents in the first pass.

    Raises:
        KeyreduceError: the text does not fill one row.
    """

    def __init__(self, text: TextSource, tokenizer: PreTrainedTokenizerFast, row_length: int, seed: int):
        self.text, self.tokenizer, self.row_length, self.seed = text, tokenizer, row_length, seed
        self.passes = 0
        first_T = next(token_rows(text.documents(seed), tokenizer, row_length))
        if len(first_T) < row_length:
            raise KeyreduceError(
                f"the text has {len(first_T):,} tokens, which do not fill one row of {row_length:,}; "
                "give more text, or a smaller `seq_len`"
            )

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self.passes = 0
        while True:
            self.passes += 1
            seed = self.seed + self.passes - 1
            rows = token_rows(self.text.documents(seed), self.tokenizer, self.row_length)
            yield from ({"input_ids": row_T} for row_T in _shuffled(rows, random.Random(seed)))


def _shuffled(rows: Iterable[torch.Tensor], generator: random.Random) -> Iterator[torch.Tensor]:
    buffer: list[torch.Tensor] = []
    for row_T in rows:
        buffer.append(row_T)
        if len(buffer) > _SHUFFLE_BUFFER:
            place = generator.randrange(len(buffer))
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            yield buffer.pop()
    generator.shuffle(buffer)
    yield from buffer
