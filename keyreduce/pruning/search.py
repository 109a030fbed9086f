"""A budget of state bytes to the sizes that lose least: candidates are predicted, the best few measured."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from keyreduce.benchmarking.per_token import TokenTimes
from keyreduce.benchmarking.timing import ratio
from keyreduce.calibration.statistics import Statistics
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.data.text import TextSource
from keyreduce.evaluation.perplexity import Perplexity
from keyreduce.families import Family, MixerSizes, family_of
from keyreduce.outputs import write_json
from keyreduce.pruning.budget import SIZE_OF
from keyreduce.pruning.methods import Method
from keyreduce.pruning.prediction import Curves, predicted_losses, read_curves
from keyreduce.pruning.state_budget import (
    Candidate,
    SearchMode,
    StateBudget,
    allowed_sizes,
    find_candidates,
    state_bytes,
)
from keyreduce.pruning.trial import Trial, measured_after
from keyreduce.reporting import Reporter

MEASURED = 4
"""How many of each format are measured: those of the lowest predicted loss."""
CLEARLY_FASTER = 1.05
"""How many times faster a decoding step must be, beyond doubt, to win a tie: below that a user would not notice it."""
SMALL = 100_000_000
"""A model of up to so many parameters is small enough to be measured on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Considered:
    """A cut that was considered.

    Attributes:
        key_heads, head_k_dim, head_v_dim: the sizes that it leaves.
        state_dtype, state_bytes: the format of the state, and what it takes for a sequence in all layers.
        predicted: the score of :mod:`keyreduce.pruning.prediction`; it has no unit, and knows nothing of formats.
        perplexity_increase: the measured increase over the dense model with a state in float32, as a share; and its
            standard error over rows of text.
        decode_seconds, prefill_seconds: of one mixer layer, for a step of eight sequences and a token of a prompt; None
            unless this is one of several sizes between which the increase does not decide.
    """

    key_heads: int
    head_k_dim: int
    head_v_dim: int
    state_dtype: str
    state_bytes: int
    predicted: float
    perplexity_increase: float | None = None
    perplexity_error: float | None = None
    decode_seconds: float | None = None
    prefill_seconds: float | None = None

    @property
    def label(self) -> str:
        """The cut in words."""
        return f"{self.key_heads} heads of {self.head_k_dim}x{self.head_v_dim}, {self.state_dtype}"


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found.

    Attributes:
        mode: whether the best few were measured.
        candidates: all that were considered, the best first, of which the first is the choice.
        keep: target -> layer -> how many stay, of the choice; targets of which all stay are missing.
        dense_bytes: what the dense model's state takes in the first format that was allowed.
        recovery: the mode of the recovery that is to follow.
        measured_after: what the measured ones went through before, in words; None if nothing.
        frontier: format -> bytes of the state and predicted loss of all sizes than which no other has both fewer bytes
            and a smaller loss, whatever the budget.
    """

    mode: SearchMode
    candidates: tuple[Considered, ...]
    keep: Mapping[str, Mapping[int, int]]
    dense_bytes: int
    recovery: str | None
    measured_after: str | None
    frontier: Mapping[str, Sequence[tuple[int, float]]]

    @property
    def chosen(self) -> Considered:
        """The choice."""
        return self.candidates[0]

    def to_json(self) -> dict:
        """Return the search as a JSON object."""
        rows = [{name: value for name, value in vars(one).items() if value is not None} for one in self.candidates]
        return {
            "search": self.mode,
            "recover": self.recovery,
            "measured_after": self.measured_after,
            "dense_state_bytes": self.dense_bytes,
            "chosen": rows[0],
            "candidates": rows,
            "frontier": {dtype: [list(point) for point in points] for dtype, points in self.frontier.items()},
        }


@dataclass(frozen=True, kw_only=True)
class Search:
    """What is searched for, and on what.

    Attributes:
        source, statistics: the model, and its calibration statistics.
        text: the text that these were made from; candidates are measured on what follows.
        budget: the bytes and formats.
        method, options, seed, correct: what chooses the channels; see :func:`keyreduce.pruning.planning.make_plan`.
        recovery: the mode of the recovery that follows; see :class:`keyreduce.pruning.trial.Trial`.
        mode: None measures on a GPU, and on a CPU if the model is small.
        device: where candidates run.
    """

    source: Checkpoint
    statistics: Statistics
    text: TextSource
    budget: StateBudget
    method: Method
    options: Mapping[str, object]
    seed: int
    correct: bool
    recovery: str | None
    mode: SearchMode | None
    device: torch.device

    def run(self, reporter: Reporter) -> Found:
        """Search; KeyreduceError if no cut fits into the budget, or a candidate cannot be measured."""
        layers = self._layers
        candidates = find_candidates(self.source, self.budget)
        curves = read_curves(self.source, self.statistics)
        losses = predicted_losses(curves, [one.sizes for one in candidates], self.recovery)
        scored = list(zip(losses, candidates, strict=True))
        order = {dtype: place for place, dtype in enumerate(self.budget.dtypes)}
        scored.sort(key=lambda pair: (pair[0], order[pair[1].state_dtype]))
        considered = [_considered(one, score) for score, one in scored]
        sizes = {row: one.sizes for row, (_, one) in zip(considered, scored, strict=True)}
        mode = self.mode or self._default_mode()
        if mode == "measured":
            measured = self._measure(sizes, reporter)
            rest = [row for row in considered if row not in measured]
            chosen = {new: sizes[old] for old, new in measured.items()}
            considered, sizes = [*chosen, *rest], sizes | chosen
        dense = state_bytes(self._family, self.budget.dtypes[0], layers)
        keep = self._keep(sizes[considered[0]])
        return Found(
            mode=mode,
            candidates=tuple(considered),
            keep=keep,
            dense_bytes=dense,
            recovery=self.recovery,
            measured_after=measured_after(self.recovery, self.device) if mode == "measured" else None,
            frontier=self._frontier(curves),
        )

    def _frontier(self, curves: Mapping[int, Curves]) -> dict[str, list[tuple[int, float]]]:
        layers = self._layers
        grid = allowed_sizes(self.source, self.budget)
        losses = list(zip(grid, predicted_losses(curves, grid, self.recovery), strict=True))
        found: dict[str, list[tuple[int, float]]] = {}
        for dtype in self.budget.dtypes:
            taken = [len(layers) * state_bytes(self._family, dtype, {0: sizes}) for sizes, _ in losses]
            points = sorted((size, loss) for size, (_, loss) in zip(taken, losses, strict=True))
            best: list[tuple[int, float]] = []
            for size, loss in points:
                if not best or loss < best[-1][1]:
                    best.append((size, loss))
            found[dtype] = best
        return found

    @property
    def _family(self) -> Family:
        return family_of(self.source.config)

    @property
    def _layers(self) -> dict[int, MixerSizes]:
        return self._family.layer_sizes(self.source.config)

    def _keep(self, after: MixerSizes) -> dict[str, dict[int, int]]:
        before = next(iter(self._layers.values()))
        numbers = {target: getattr(after, size) for target, size in SIZE_OF.items()}
        changed = {target: n for target, n in numbers.items() if n != getattr(before, SIZE_OF[target])}
        return {target: {layer: number for layer in self._layers} for target, number in changed.items()}

    def _default_mode(self) -> SearchMode:
        parameters = sum(math.prod(spec.shape) for spec in self.source.tensors.values())
        return "measured" if self.device.type == "cuda" or parameters <= SMALL else "predicted"

    def _measure(self, sizes: Mapping[Considered, MixerSizes], reporter: Reporter) -> dict[Considered, Considered]:
        """Return what was predicted -> the same, measured, the best first; ``sizes`` has all, the best predicted first.

        After the few of the lowest predicted loss, those next to the best one follow for as long as that changes.
        """
        choose = {"method": self.method, "options": self.options, "seed": self.seed, "correct": self.correct}
        trial = Trial.of(self.source, self.statistics, self.text, choose, self.recovery, self.device)
        costs: dict[Considered, list[Perplexity]] = {}
        with reporter.progress("measuring candidates", None, "models") as progress:
            dense = trial.costs(trial.dense, "float32")
            progress(1)
            waiting = _best(list(sizes))
            while waiting:
                for row in waiting:
                    costs[row] = trial.candidate_costs(self._keep(sizes[row]), row.state_dtype)
                    progress(1)
                best = min(costs, key=lambda row: _difference(costs[row], dense)[0])
                waiting = [row for row in _neighbours(best, list(sizes)) if row not in costs]
        # What the rows of text cannot tell apart is a tie, and goes to what is clearly faster.
        tied = [row for row in costs if row is best or not _is_worse(costs[row], costs[best])]
        times = _times({row: sizes[row] for row in tied}, trial, reporter)
        ordered = sorted(costs, key=lambda row: _difference(costs[row], dense)[0])
        first = best
        for row in ordered:
            if row in times and ratio(times[first].decode, times[row].decode)[1][0] > CLEARLY_FASTER:
                first = row
        ordered = [first, *(row for row in ordered if row is not first)]
        return {row: dataclasses.replace(row, **_figures(costs[row], dense, times.get(row))) for row in ordered}


def _times(sizes: Mapping[Considered, MixerSizes], trial: Trial, reporter: Reporter) -> dict[Considered, TokenTimes]:
    """Return how fast candidates are, or nothing if all are of one size.

    On a GPU kernels are compiled for each size, which may take longer than all else that is done with a candidate.
    """
    alike = list(dict.fromkeys(sizes.values()))
    if len(alike) == 1:
        return {}
    times = dict(zip(alike, trial.times(alike, reporter), strict=True))
    return {row: times[size] for row, size in sizes.items()}


def _figures(costs: Sequence[Perplexity], dense: Sequence[Perplexity], times: TokenTimes | None) -> dict[str, float]:
    """Return what was measured of a candidate, by the names of the fields."""
    increase, error = _increase(costs, dense)
    figures = {"perplexity_increase": increase, "perplexity_error": error}
    if times is not None:
        figures |= {"decode_seconds": times.decode.median, "prefill_seconds": times.prefill.median}
    return figures


def write_search(found: Found, path: Path, model: str, about: str = "") -> None:
    """Write what a search found as JSON, and beside it the picture of it, whose title says ``about``: text, device."""
    from keyreduce.pruning.budget_picture import write_picture  # matplotlib takes a second

    write_json(path, {"model": model, **found.to_json()}, overwrite=True)
    write_picture(found.to_json(), model, path.with_suffix(".png"), about=about)


def _considered(one: Candidate, score: float) -> Considered:
    sizes = {name: getattr(one.sizes, name) for name in ("key_heads", "head_k_dim", "head_v_dim")}
    return Considered(**sizes, state_dtype=one.state_dtype, state_bytes=one.state_bytes, predicted=score)


def _best(considered: Sequence[Considered]) -> list[Considered]:
    """The few of each format that are worth measuring."""
    formats = dict.fromkeys(one.state_dtype for one in considered)
    return [one for dtype in formats for one in [row for row in considered if row.state_dtype == dtype][:MEASURED]]


def _neighbours(row: Considered, considered: Sequence[Considered]) -> list[Considered]:
    """Those with as many heads and the same format whose key channels are the next fewer and the next more."""
    alike = [one for one in considered if (one.key_heads, one.state_dtype) == (row.key_heads, row.state_dtype)]
    alike.sort(key=lambda one: one.head_k_dim)
    place = alike.index(row)
    return alike[max(0, place - 1) : place] + alike[place + 1 : place + 2]


def _increase(costs: Sequence[Perplexity], dense: Sequence[Perplexity]) -> tuple[float, float]:
    """The relative increase in perplexity, and its standard error over rows."""
    difference, error = _difference(costs, dense)
    return math.expm1(difference), math.exp(difference) * error


def _is_worse(costs: Sequence[Perplexity], best: Sequence[Perplexity]) -> bool:
    difference, error = _difference(costs, best)
    return difference > error


def _difference(costs: Sequence[Perplexity], others: Sequence[Perplexity]) -> tuple[float, float]:
    """The mean difference in nats per token of rows of one length, and its standard error."""
    rows = [(one.nats - other.nats) / one.predictions for one, other in zip(costs, others, strict=True)]
    mean = math.fsum(rows) / len(rows)
    if len(rows) < 2:
        return mean, 0.0
    return mean, math.sqrt(math.fsum((row - mean) ** 2 for row in rows) / (len(rows) - 1) / len(rows))
