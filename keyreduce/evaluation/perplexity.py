"""How well a model predicts text: perplexity per token and per word, and bits per byte.

Shapes: B rows in a batch, T tokens in a row, V token ids.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast

from keyreduce.data.batches import bytes_per_token
from keyreduce.data.text import TextSource
from keyreduce.errors import KeyreduceError
from keyreduce.evaluation.windows import Window, document_windows, equal_length_batches, windows
from keyreduce.models.loading import LoadedModel
from keyreduce.processes import Processes

_AT_ONCE = 2048  # positions of a row whose logits are widened together


class Perplexity(NamedTuple):
    """What it cost to predict some tokens, such as those of one row or of a whole text.

    Attributes:
        nats: the cross entropy, summed over the predictions.
        predictions: how many tokens were predicted.
        bytes: how many bytes of text they stand for. A separator stands for none, but predicting it costs, as the end
            of a document must be predicted too.
        words: how many words they begin (:func:`keyreduce.evaluation.windows.words_per_token`).
    """

    nats: float
    predictions: int
    bytes: int
    words: int = 0

    @classmethod
    def of(cls, rows: "Iterable[Perplexity]") -> "Perplexity":
        """Sum over rows. The sum of nats is rounded once, so that the rows' order does not change it."""
        nats, *counts = zip(cls(0.0, 0, 0), *rows, strict=True)
        return cls(math.fsum(nats), *map(sum, counts))

    @property
    def perplexity(self) -> float:
        """Perplexity per token; inf where it is beyond a float."""
        return _exponential(self.nats / self.predictions)

    @property
    def word_perplexity(self) -> float:
        """Perplexity per word, lm-evaluation-harness's ``word_perplexity``; inf where it is beyond a float.

        The two agree where all of each document is scored, on its own (``by_document``). Where documents are joined,
        their separators cost too. NaN where no word begins.
        """
        return _exponential(self.nats / self.words) if self.words else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text, which compares models of different tokenizers."""
        return self.nats / math.log(2) / self.bytes

    def metrics(self) -> dict:
        """Return the three metrics and what they are made of, as a JSON object; what is not finite is null."""
        metrics = {
            "perplexity_per_token": self.perplexity,
            "perplexity_per_word": self.word_perplexity,
            "bits_per_byte": self.bits_per_byte,
        }
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        return {**finite, **self._asdict()}


def _exponential(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


@torch.no_grad()
def row_logits(
    model: torch.nn.Module, batches: Iterable[list[Any]], name: str, progress: Callable[[int], None] | None
) -> Iterator[tuple[Any, torch.Tensor]]:
    """Run batches of rows of one length through a model, and yield each row with its logits ``[T, V]``.

    Rows have ``tokens_T``; logits are on the model's device, in its dtype. ``progress`` is called after each batch with
    its number of tokens. A KeyreduceError, which calls the model ``name``, says that a logit is NaN or inf.
    """
    for batch in batches:
        tokens_BT = torch.stack([row.tokens_T for row in batch])
        logits_BTV = model(input_ids=tokens_BT.to(next(model.parameters()).device), use_cache=False).logits
        refuse_not_finite(logits_BTV, f"the logits of {name}")
        yield from zip(batch, logits_BTV, strict=True)
        if progress is not None:
            progress(tokens_BT.numel())


def refuse_not_finite(values: torch.Tensor, what: str) -> None:
    """Raise a KeyreduceError if values of a model hold NaN or inf; ``what`` is their name, in the plural."""
    if not all(extreme.isfinite() for extreme in torch.aminmax(values)):
        raise KeyreduceError(
            f"{what} hold NaN or inf: the model is damaged, or its activations overflow this dtype "
            "(try `dtype` float32)"
        )


def window_costs(
    model: torch.nn.Module,
    window_batches: Iterable[list[Window]],
    bytes_V: torch.Tensor,
    *,
    name: str,
    progress: Callable[[int], None] | None = None,
) -> list[Perplexity]:
    """Return each window's cost of predicting its scored tokens: cross entropy in float32, summed in float64.

    The windows of a list run together, so they are of one length. ``bytes_V``, as `bytes_per_token` returns it, may be
    shorter than the model's vocabulary, which is often padded: no text holds the ids that it lacks. For the rest, and
    for errors, see `row_logits`.
    """
    costs = []
    for (tokens_T, words_T, first), logits_TV in row_logits(model, window_batches, name, progress):
        targets = tokens_T[first:]
        num_bytes, num_words = int(bytes_V[targets].sum()), int(words_T[first:].sum())
        nats = prediction_nats(logits_TV, tokens_T, first).sum().item()
        costs.append(Perplexity(nats, len(targets), num_bytes, num_words))
    return costs


def prediction_nats(logits_TV: torch.Tensor, tokens_T: torch.Tensor, first: int) -> torch.Tensor:
    """Return the cross entropy of each token of a row from the ``first`` on: float64 ``[T - first]``, on the CPU.

    It is computed in float32.
    """
    targets = tokens_T[first:].to(logits_TV.device)
    nats = torch.zeros(len(targets), dtype=torch.float64, device=targets.device)
    # In parts: with a large vocabulary, the logits of a row may fit into memory and a float32 copy of them all may not.
    for start in range(0, len(targets), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        nats[part] = F.cross_entropy(logits_TV[first - 1 : -1][part].float(), targets[part], reduction="none")
    return nats.cpu()


def measure_rows(
    model: torch.nn.Module, token_batches: Iterable[torch.Tensor], bytes_V: torch.Tensor, *, name: str
) -> Perplexity:
    """Return what it costs to predict each token of each row but the first; see `window_costs`.

    Batches are LongTensors (B, T) on the CPU, without padding. Words are not counted, since that takes the text.
    """
    batches = ([Window(tokens_T, torch.zeros_like(tokens_T), 1) for tokens_T in rows_BT] for rows_BT in token_batches)
    return Perplexity.of(window_costs(model, batches, bytes_V, name=name))


def chosen_stride(seq_len: int, stride: int | None, *, by_document: bool = False) -> int:
    """Return how far apart windows start (`text_costs`), or raise a KeyreduceError where they cannot be."""
    most, called = (seq_len - 1, "below") if by_document else (seq_len, "at most")
    stride = most if stride is None else stride
    if not 1 <= stride <= most:
        raise KeyreduceError(f"`stride` is {stride}; it is at least 1 and {called} `seq_len`, {seq_len}")
    return stride


def text_costs(
    loaded: LoadedModel,
    text: TextSource,
    *,
    seq_len: int,
    batch_size: int,
    num_rows: int | None,
    stride: int | None = None,
    by_document: bool = False,
    processes: Processes = Processes(),
    progress: Callable[[int], None] | None = None,
) -> list[Perplexity]:
    """Return the cost of each window of a text, which is taken in its own order, that runs in this process.

    Args:
        seq_len: T, the tokens in a window.
        batch_size: windows that run at a time; it does not change the cost, but for rounding.
        num_rows: take only so many windows; None takes them all.
        stride: how far apart windows start; None is as far as can be.
        by_document: whether each document is scored on its own, as lm-evaluation-harness does; else all are joined.
        processes: which process this is, and of how many; each runs its share of the batches.
        progress: called after each batch with its number of tokens.

    Raises:
        KeyreduceError: windows cannot be that far apart, a logit is NaN or inf, or the text cannot be read.
    """
    batches = text_batches(
        loaded.tokenizer, text, seq_len=seq_len, batch_size=batch_size, num_rows=num_rows, stride=stride,
        by_document=by_document, processes=processes,
    )  # fmt: skip
    bytes_V = bytes_per_token(loaded.tokenizer)
    return window_costs(loaded.model, batches, bytes_V, name=str(loaded.folder), progress=progress)


def text_batches(
    tokenizer: PreTrainedTokenizerFast,
    text: TextSource,
    *,
    seq_len: int,
    batch_size: int,
    num_rows: int | None,
    stride: int | None = None,
    by_document: bool = False,
    processes: Processes = Processes(),
) -> Iterator[list[Window]]:
    """Yield the batches of windows that run in this process; see :func:`text_costs`."""
    stride = chosen_stride(seq_len, stride, by_document=by_document)
    cut = document_windows if by_document else windows
    taken = islice(cut(text.in_pieces(), tokenizer, seq_len, stride), num_rows)
    return processes.own(equal_length_batches(taken, batch_size))


def total(rows: Iterable[Perplexity]) -> Perplexity:
    """Sum the rows of all processes, or raise a KeyreduceError if there is nothing to predict."""
    cost = Perplexity.of(rows)
    if not cost.predictions or not cost.bytes:
        raise KeyreduceError("the text leaves nothing to predict (one token, or special tokens alone); give other text")
    return cost
