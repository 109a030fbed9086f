"""The tokens that a model is trained on, in a file that is mapped into memory, and the text to measure it on.

FOLDER/
    tokenizer/          as transformers saves it
    train.bin           all documents, each after the token that separates them: uint16, uint32 beyond 65,536 ids
    heldout.jsonl       the held-out documents
    calibration.jsonl   those to calibrate and repair with, where the text has such a split
    corpus.json         where the text is from, and how much of it there is; written last

Processes of a training share the file's pages, so that memory does not grow with their number.

Shapes: T tokens in a row, N tokens of text.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from bpe_tokenizer import bpe_tokenizer
from byte_tokenizer import byte_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from keyreduce.data.batches import separator_ids
from keyreduce.data.text import TEXT_FIELD, FileText, TextSource
from keyreduce.errors import KeyreduceError
from keyreduce.outputs import claimed, read_json, write_json

_AT_ONCE = 16_000_000  # characters that are encoded together, by all cores
_RECORD = "corpus.json"
_TOKENS = "train.bin"


class Corpus(NamedTuple):
    """A folder that :func:`write_corpus` made: its tokenizer, the tokens to train on, and its record."""

    folder: Path
    tokenizer: PreTrainedTokenizerFast
    tokens_N: np.ndarray
    record: dict

    @property
    def heldout(self) -> TextSource:
        """The held-out text."""
        return FileText([self.folder / "heldout.jsonl"])


def write_corpus(
    folder: Path, texts: Mapping[str, TextSource], vocabulary: int | None, tell: Callable[[str], None] = print
) -> None:
    """Write a corpus, or leave the one that is there and made from the same text.

    Args:
        folder: it appears whole or not at all.
        texts: ``train``, ``heldout`` and, if there is one, ``calibration``.
        vocabulary: of how many ids a BPE tokenizer is trained on the text; None takes one of bytes.
        tell: called with a line when it is done.

    Raises:
        KeyreduceError: a text cannot be read or is empty, or the folder holds a corpus of other text.
    """
    inputs = {"vocabulary": vocabulary, "texts": {name: text.describe() for name, text in texts.items()}}
    with claimed(folder, folder=True) as claim:
        if folder.exists():
            if read_json(folder / _RECORD)["inputs"] != inputs:
                raise KeyreduceError(f"{folder} holds the tokens of other text; give another --data")
            return
        start = time.perf_counter()
        with claim.appearing() as made:
            train = texts["train"]
            tokenizer = bpe_tokenizer(train.documents(), vocabulary) if vocabulary else byte_tokenizer()
            tokenizer.save_pretrained(made / "tokenizer")
            counts = {"train": _write_tokens(made / _TOKENS, train.documents(), tokenizer)}
            for name in texts.keys() - {"train"}:
                _write_documents(made / f"{name}.jsonl", texts[name].documents())
            seconds = round(time.perf_counter() - start, 1)
            write_json(made / _RECORD, {"inputs": inputs, "tokens": counts["train"], "seconds": seconds})
    tell(f"{folder}: {counts['train']:,} tokens to train on, in {seconds:.0f} s")


def open_corpus(folder: Path) -> Corpus:
    """Return a corpus that was written."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False)
    tokens_N = np.memmap(folder / _TOKENS, dtype=_dtype(tokenizer), mode="r")
    return Corpus(folder, tokenizer, tokens_N, read_json(folder / _RECORD))


class RandomWindows(torch.utils.data.Dataset):
    """Rows of T tokens from one long text, as many as the training takes.

    Each pass over the text starts its windows at another random offset and visits them in another random order, so each
    token is seen once a pass. Row i depends on the seed and on i alone: a resumed run sees the rows of an unbroken one.
    """

    def __init__(self, tokens_N: np.ndarray, row_length: int, num_rows: int, seed: int):
        self.tokens_N, self.row_length, self.num_rows, self.seed = tokens_N, row_length, num_rows, seed
        # One row less than fits, so that every offset leaves room for the last window.
        self.rows_per_pass = len(tokens_N) // row_length - 1
        if self.rows_per_pass < 1:
            raise KeyreduceError(
                f"the text has {len(tokens_N)} tokens, fewer than two rows of {row_length}; "
                "give more text, or a smaller --seq-len"
            )
        self._pass = (-1, 0, torch.empty(0))

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        number, place = divmod(index, self.rows_per_pass)
        if self._pass[0] != number:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            offset = int(torch.randint(self.row_length, (), generator=generator))
            self._pass = (number, offset, torch.randperm(self.rows_per_pass, generator=generator))
        _, offset, order = self._pass
        start = offset + int(order[place]) * self.row_length
        tokens_T = torch.from_numpy(self.tokens_N[start : start + self.row_length].astype(np.int64))
        return {"input_ids": tokens_T, "labels": tokens_T}


def _dtype(tokenizer: PreTrainedTokenizerFast) -> type[np.unsignedinteger]:
    return np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32


def _write_tokens(path: Path, documents: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> int:
    """Write the tokens of all documents, each after its separator, and return how many there are."""
    separator, dtype, count = separator_ids(tokenizer), _dtype(tokenizer), 0
    with path.open("wb") as file:
        for batch in _batches(documents):
            # transformers' own call also returns masks and offsets, which takes several times as long.
            for encoded in tokenizer.backend_tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                tokens = np.array(separator + encoded.ids, dtype=dtype)
                tokens.tofile(file)
                count += len(tokens)
    return count


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch, length = [], 0
    for document in documents:
        batch.append(document)
        length += len(document)
        if length >= _AT_ONCE:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def _write_documents(path: Path, documents: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({TEXT_FIELD: document}) + "\n" for document in documents)
