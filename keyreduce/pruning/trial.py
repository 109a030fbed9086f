"""Cuts of one model that are made in memory, recovered and measured, on text that chose none of them."""

import contextlib
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from keyreduce.benchmarking.per_token import TokenTimes, time_per_token
from keyreduce.calibration.run import Settings
from keyreduce.calibration.statistics import Statistics
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.data.batches import SPREAD, bytes_per_token, spread_rows, token_rows
from keyreduce.data.text import TextSource
from keyreduce.errors import KeyreduceError
from keyreduce.evaluation.perplexity import Perplexity, window_costs
from keyreduce.evaluation.windows import Window, equal_length_batches
from keyreduce.families import MixerSizes
from keyreduce.models.in_memory import ModuleCheckpoint, loaded_module
from keyreduce.models.loading import LoadedModel, load_model
from keyreduce.models.state_storage import stored_states
from keyreduce.models.tuning import tune_few_variants
from keyreduce.pruning.in_memory import pruned_module
from keyreduce.pruning.planning import make_plan
from keyreduce.recovery.layers import recover_layers
from keyreduce.recovery.modes import LEAST_SQUARES, RECONSTRUCT, Steps
from keyreduce.reporting import Reporter

ROWS, ROW_LENGTH, BATCH = 32, 1024, 4
"""The text that candidates are measured on: rows, tokens of a row, rows at a time.

The rows are spread over the text that follows: side by side they would be of few documents, and what such a text
prefers may not hold for others. The longer a row, the more a state has to hold, and the more a cut of keys costs beside
one of values: on rows of 512 tokens too few keys would be kept.
"""
RECOVERED = {"cpu": Settings(num_batches=16), "cuda": Settings(num_batches=32)}
"""Type of device -> the most text that candidates are recovered on: less than a recovery takes by default, as there are
several. It is never more than the statistics are of.

On less text than the recovery itself will take, cuts that leave more weights to fit look worse than they will be.
"""
STEPS = Steps(steps=128)
"""The gradient steps of candidates on a GPU, where ``reconstruct`` follows: fewer than it takes by default."""


@dataclass(frozen=True)
class Trial:
    """A dense model, and how its cuts are tried.

    Attributes:
        dense: the model, in float32, on the device.
        source: the same as a checkpoint in memory.
        statistics: its calibration statistics.
        windows: the text to measure on.
        text, spread: the text that recovery takes, and over how many times as much its rows are spread.
        choose: arguments of :func:`keyreduce.pruning.planning.make_plan`: what chooses the channels.
        recovery: the mode of the recovery that follows, if one does. Candidates are measured after a short one; on a
            CPU, where gradient steps would take longer than all else, after ``least-squares`` alone.
    """

    dense: LoadedModel
    source: ModuleCheckpoint
    statistics: Statistics
    windows: Sequence[Window]
    text: TextSource
    spread: int
    choose: Mapping[str, Any]
    recovery: str | None

    @classmethod
    def of(
        cls,
        source: Checkpoint,
        statistics: Statistics,
        text: TextSource,
        choose: Mapping[str, Any],
        recovery: str | None,
        device: torch.device,
    ) -> "Trial":
        """Load the model, and take the text that follows what it was calibrated on and will be recovered on.

        Raises KeyreduceError if there is no such text.
        """
        dense = load_model(source.path, device, torch.float32, gradients=True)
        rows = token_rows(text.in_pieces(_seed(statistics)), dense.tokenizer, ROW_LENGTH)
        recovered = _recovered_on(statistics, device).tokens if recovery else 0

        def first(spread: int) -> int:
            """The first row that is seen neither by the choice nor by a recovery that is spread so far."""
            return -(-max(statistics.tokens, spread * recovered) // ROW_LENGTH)

        drawn = list(itertools.islice(rows, first(SPREAD) + ROWS * SPREAD))
        # Where the text is short, rows of either kind lie nearer to each other.
        spread = next((one for one in range(SPREAD, 1, -1) if len(drawn) - first(one) >= ROWS * one), 1)
        taken = spread_rows(drawn[first(spread) :], ROWS, SPREAD)
        if len(taken) < 2:
            raise KeyreduceError(
                f"after the {first(spread) * ROW_LENGTH:,} tokens for the choice and the recovery of candidates, the "
                f"text has not {2 * ROW_LENGTH:,} more to measure candidates on: give more text, or `search` predicted"
            )
        windows = [Window(row_T, torch.zeros_like(row_T), 1) for row_T in taken]
        module = ModuleCheckpoint(dense.model)
        known = dataclasses.replace(statistics, model=module.identity)
        return cls(dense, module, known, windows, text, spread, choose, recovery)

    def costs(self, loaded: LoadedModel, state_dtype: str) -> list[Perplexity]:
        """Return what each row costs a model that stores its state in a format."""
        batches, bytes_V = equal_length_batches(self.windows, BATCH), bytes_per_token(self.dense.tokenizer)
        with contextlib.ExitStack() as stack:
            if state_dtype != "float32":
                stack.enter_context(stored_states(loaded.model, loaded.family, state_dtype))
            return window_costs(loaded.model, batches, bytes_V, name=str(loaded.folder))

    def candidate_costs(self, keep: Mapping[str, Mapping[int, int]], state_dtype: str) -> list[Perplexity]:
        """Return the same of what a cut leaves of the model, recovered if that is to follow."""
        if not keep:
            return self.costs(self.dense, state_dtype)
        plan = make_plan(self.source, keep=keep, statistics=self.statistics, inputs={}, **self.choose)
        module: Any = pruned_module(self.dense.model, self.source, plan)
        pruned = loaded_module(module, self.dense.tokenizer, gradients=True)
        if self.recovery is not None:
            device = self.dense.model.device
            steps = _steps(self.recovery, device)
            settings = _recovered_on(self.statistics, device)
            dtypes = {name: parameter.dtype for name, parameter in module.named_parameters()}
            how: dict[str, Any] = {"steps": steps, "spread": self.spread, "device": device}
            recover_layers(self.dense, pruned, dtypes, self.text, settings, **how)
        return self.costs(pruned, state_dtype)

    def times(self, sizes: Sequence[MixerSizes], reporter: Reporter) -> list[TokenTimes]:
        """Return how long a mixer layer of each of these sizes takes."""
        device = self.dense.model.device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        if device.type == "cuda":
            tune_few_variants()  # all of them would take minutes for each size
        with reporter.progress("timing candidates", None, "rounds") as progress:
            return time_per_token(self.source.config, sizes, device, dtype, progress=progress)


def measured_after(recovery: str | None, device: torch.device) -> str | None:
    """Return in words what candidates went through before they are measured; None if no recovery is to follow."""
    steps = _steps(recovery, device)
    return f"{steps.steps} steps of {RECONSTRUCT}" if steps else recovery and LEAST_SQUARES


def _steps(recovery: str | None, device: torch.device) -> Steps | None:
    return STEPS if recovery == RECONSTRUCT and device.type == "cuda" else None


def _recovered_on(statistics: Statistics, device: torch.device) -> Settings:
    """The text that candidates are recovered on."""
    most = RECOVERED["cpu" if device.type == "cpu" else "cuda"]
    batches = statistics.tokens // most._replace(num_batches=1).tokens
    return most._replace(num_batches=max(1, min(most.num_batches, batches)), seed=_seed(statistics))


def _seed(statistics: Statistics) -> int:
    """The seed of the order of documents in which the statistics were made."""
    return statistics.inputs.get("seed", 0)
