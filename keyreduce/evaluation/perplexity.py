"""What it costs a model to predict text: perplexity and bits per byte.

Shapes: B rows in a batch, T tokens in a row, V token ids.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F

from keyreduce.data.batches import batches, bytes_per_token, token_rows
from keyreduce.data.text import TextSource
from keyreduce.errors import KeyreduceError
from keyreduce.models.loading import LoadedModel


@dataclass(frozen=True)
class Perplexity:
    """What it cost to predict some tokens.

    Attributes:
        nats: the cross entropy, summed over the predictions.
        predictions: how many tokens were predicted.
        bytes: how many bytes of text they stand for. A separator stands for none, but predicting it costs, as the end
            of a document must be told too.
    """

    nats: float
    predictions: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """Perplexity per token; inf where it is beyond a float."""
        try:
            return math.exp(self.nats / self.predictions)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text, which compares models of different tokenizers."""
        return self.nats / math.log(2) / self.bytes


@torch.no_grad()
def measure_rows(
    model: torch.nn.Module,
    token_batches: Iterable[torch.Tensor],
    bytes_V: torch.Tensor,
    *,
    name: str,
    progress: Callable[[int], None] | None = None,
) -> Perplexity:
    """Predict each token of each row, but its first, from those before it.

    Args:
        model: a causal language model, in evaluation mode.
        token_batches: LongTensors (B, T) on the CPU, without padding.
        bytes_V: how many bytes each token id stands for, as `bytes_per_token` returns it. It may be shorter than the
            model's vocabulary, which is often padded: the ids that it lacks are in no text.
        name: what an error calls the model.
        progress: called after each batch with its number of tokens.

    Returns:
        The cost: cross entropy in float32, summed in float64.

    Raises:
        KeyreduceError: a logit is NaN or inf.
    """
    device = next(model.parameters()).device
    nats, predictions, num_bytes = 0.0, 0, 0
    for tokens_BT in token_batches:
        tokens_on_device_BT = tokens_BT.to(device)
        logits_BTV = model(input_ids=tokens_on_device_BT, use_cache=False).logits
        if not all(extreme.isfinite() for extreme in torch.aminmax(logits_BTV)):
            raise KeyreduceError(
                f"logits of {name} are NaN or inf: the model is damaged, or its activations overflow this dtype "
                "(try --dtype float32)"
            )
        # Row by row: of a large vocabulary, float32 copies of all rows would not fit where the logits do.
        for logits_TV, tokens_T in zip(logits_BTV, tokens_on_device_BT, strict=True):
            costs = F.cross_entropy(logits_TV[:-1].float(), tokens_T[1:], reduction="none")
            nats += costs.double().sum().item()
        targets = tokens_BT[:, 1:]
        predictions += targets.numel()
        num_bytes += int(bytes_V[targets].sum())
        if progress is not None:
            progress(tokens_BT.numel())
    return Perplexity(nats, predictions, num_bytes)


def evaluate(
    loaded: LoadedModel,
    text: TextSource,
    *,
    seq_len: int,
    batch_size: int,
    num_rows: int | None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Perplexity, bool]:
    """Measure a model on text, cut into rows as `token_rows` does; each row is predicted on its own.

    Args:
        loaded: the model.
        text: the text, taken in its own order.
        seq_len: T; a row gives T - 1 predictions.
        batch_size: rows that run at a time; it does not change the figure, but for rounding.
        num_rows: take only so many rows; None takes them all.
        progress: called after each batch with its number of tokens.

    Returns:
        The cost, and whether the text was shorter than one row, so that the only row was a short one.

    Raises:
        KeyreduceError: there is nothing to predict, a logit is NaN or inf, or the text cannot be read.
    """
    if seq_len < 2:
        raise KeyreduceError(f"rows of {seq_len} token leave nothing to predict; give --seq-len 2 or more")
    rows = islice(token_rows(text.documents(), loaded.tokenizer, seq_len), num_rows)
    cost = measure_rows(
        loaded.model,
        batches(rows, batch_size),
        bytes_per_token(loaded.tokenizer),
        name=str(loaded.folder),
        progress=progress,
    )
    if not cost.predictions or not cost.bytes:
        raise KeyreduceError("the text leaves nothing to predict (one token, or special tokens alone); give other text")
    return cost, cost.predictions < seq_len - 1
