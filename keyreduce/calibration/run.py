"""Calibration: a model and text to statistics."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch

from keyreduce.calibration.capture import collect
from keyreduce.calibration.partial import PartialSums
from keyreduce.calibration.statistics import Statistics
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.data.batches import batches, token_rows
from keyreduce.data.text import TextSource
from keyreduce.errors import KeyreduceError
from keyreduce.models.loading import LoadedModel, load_model
from keyreduce.models.offloading import offloading
from keyreduce.models.quantized import refuse_quantized
from keyreduce.processes import Processes

_MOST = 10**9  # beyond any text, and far below where counting itself fails


class Settings(NamedTuple):
    """How much text to take: ``num_batches`` batches of ``batch_size`` rows of ``seq_len`` tokens.

    The order of the documents is drawn from ``seed``.
    """

    num_batches: int = 16
    batch_size: int = 4
    seq_len: int = 512
    seed: int = 0

    def check(self, *, gradients: bool = False) -> None:
        """Raise KeyreduceError for numbers that no text could meet, or rows too short for ``gradients``."""
        for name, number in self._asdict().items():
            if name != "seed" and not 1 <= number <= _MOST:
                raise KeyreduceError(f"`{name}` is {number}; it is at least 1 and at most {_MOST:,}")
        if gradients and self.seq_len < 2:
            raise KeyreduceError("`seq_len` is 1; `gradients` need at least 2, to predict one from the other")

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return self.num_batches * self.batch_size * self.seq_len


def describe_inputs(
    source: Checkpoint, text: TextSource, settings: Settings, dtype: torch.dtype, *, gradients: bool = False
) -> dict:
    """Return what a calibration is made from; equal inputs give equal statistics, up to rounding."""
    return {
        "model": source.identity,
        "text": {**text.describe(), "identity": text.identity},
        **settings._asdict(),
        "dtype": str(dtype).removeprefix("torch."),
        "gradients": gradients,
    }


def calibrate(
    source: Checkpoint,
    text: TextSource,
    settings: Settings,
    *,
    device: torch.device,
    dtype: torch.dtype,
    gradients: bool = False,
    offload: str | None = None,
    processes: Processes = Processes(),
    progress: Callable[[int], None] | None = None,
    note: Callable[[str], None] = lambda message: None,
    partial_sums: PartialSums | None = None,
) -> Statistics:
    """Load the model, run the text through it, and return the statistics.

    Args:
        device, dtype: where and in what dtype to run the model; the statistics are float64 in any case.
        gradients: whether to gather ``TaylorStatistics`` too, from a backward pass for each batch.
        offload: where layers that are not running are kept: "disk", "cpu", or "auto" for wherever there is room.
        processes: the processes of torchrun over which the batches are distributed; each returns all statistics.
        progress: called after each batch with its number of tokens.
        note: called with a message if the text is shorter than was asked for.
        partial_sums: keeps the sums on the way, and has those of a run that was stopped.

    Raises:
        KeyreduceError: the model is quantised or does not load, the text is empty (with gradients, of one token),
            weights, activations, losses or gradients are NaN or inf, or the calls of a mixer's operator were not seen.
    """
    settings.check(gradients=gradients)
    refuse_quantized(source)
    with offloading(source.config, device, offload) as placement:
        loaded = load_model(source.path, device, dtype, gradients=gradients, placement=placement, with_head=gradients)
        given = (loaded, source, text, settings, dtype, gradients, processes, progress, note)
        return calibrate_loaded(*given, partial_sums=partial_sums)


def calibrate_loaded(
    loaded: LoadedModel,
    source: Checkpoint,
    text: TextSource,
    settings: Settings,
    dtype: torch.dtype,
    gradients: bool = False,
    processes: Processes = Processes(),
    progress: Callable[[int], None] | None = None,
    note: Callable[[str], None] = lambda message: None,
    partial_sums: PartialSums | None = None,
) -> Statistics:
    """Do what :func:`calibrate` does with a model that is loaded from ``source`` already."""
    rows = token_rows(text.in_pieces(settings.seed), loaded.tokenizer, settings.seq_len)
    first_row = next(rows)
    if len(first_row) < settings.seq_len:
        note(f"the text is shorter than one sequence: {len(first_row)} tokens instead of {settings.seq_len}")
    taken = batches(itertools.chain([first_row], rows), settings.batch_size, settings.num_batches)
    with processes.adding() as add:
        own = processes.own(taken)
        layers, tokens = collect(loaded, own, progress, gradients=gradients, add=add, partial_sums=partial_sums)
        count = torch.tensor(tokens, dtype=torch.int64)
        add(count)
        for layer in sorted(layers):
            for name, tensor in vars(layers[layer]).items():
                if name != "taylor":  # what gradients gave is the sum over all processes already
                    add(tensor)
            layers[layer].find_constant()
    tokens = int(count)
    if tokens < settings.tokens and len(first_row) == settings.seq_len:
        note(f"the text ended after {tokens:,} of {settings.tokens:,} tokens")
    inputs = describe_inputs(source, text, settings, dtype, gradients=gradients)
    statistics = Statistics(source.identity, tokens, layers, inputs)
    statistics.check_finite()
    statistics.check_seen()
    return statistics
