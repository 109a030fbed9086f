"""What it costs a model to keep its recurrent state in fewer bits: perplexity along the sequence, and by head.

Shapes: B rows in a batch, T tokens in a row, N predictions, H key heads, W value heads, K key channels, V value
channels; X is 1 where one number serves all channels.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from fla_torch.stored_state import stored_delta_rule
from scipy.stats import spearmanr

from keyreduce.errors import KeyreduceError
from keyreduce.evaluation.perplexity import Perplexity, prediction_nats, refuse_not_finite, row_logits
from keyreduce.evaluation.recall import recall_metrics
from keyreduce.evaluation.windows import Window
from keyreduce.models.loading import LoadedModel
from keyreduce.models.state_rounding import storing
from keyreduce.models.state_storage import replaced_recurrences, stored_states
from keyreduce.processes import Processes
from keyreduce.reporting import Reporter
from keyreduce.serving.state_formats import FORMATS, StateDtypes, bytes_of

EXACT = "float32"
AUTO = "auto"
_FIRST_BIN = 64  # tokens; each bin of positions after the second is twice as long as the one before it
_EPS = 1e-6  # of the norm that readouts are compared after
_TINY = torch.finfo(torch.float64).tiny
_HEAD_TOKENS = 2048  # of each row, that the errors of heads are measured on
_MOST_MEASURED = 8  # choices of a format for each head that are measured


@dataclass(frozen=True)
class StateSettings:
    """What is to be measured.

    Attributes:
        dtypes: formats of :data:`keyreduce.serving.state_formats.FORMATS`.
        chunk: tokens between two times that the state is stored; None stores it after each.
        tolerance: the increase in perplexity that a choice of a format for each head may cost, as a share; None where
            none is to be found. It takes one process that has all of the text.
    """

    dtypes: tuple[str, ...]
    chunk: int | None = None
    tolerance: float | None = None


class PositionCost(NamedTuple):
    """What it cost to predict the tokens of a part of a row."""

    nats: float
    predictions: int

    @property
    def mean(self) -> float:
        """Nats of a prediction."""
        return self.nats / self.predictions


def bins_of(seq_len: int) -> list[tuple[int, int]]:
    """Return bins of positions, ``start <= position < end``: to 64, to 128, to 256, and so on to ``seq_len``."""
    edges = [1]
    while edges[-1] < seq_len:
        edges.append(min(seq_len, max(_FIRST_BIN, 2 * edges[-1])))
    return list(pairwise(edges))


def position_costs(
    loaded: LoadedModel,
    batches: Iterable[list[Window]],
    bins: Sequence[tuple[int, int]],
    progress: Callable[[int], None] | None = None,
) -> list[list[PositionCost]]:
    """Return for each window the cost of its scored tokens by bin of their position in it; see ``window_costs``."""
    found = []
    for (tokens_T, _, first), logits_TV in row_logits(loaded.model, batches, str(loaded.folder), progress):
        nats_N = prediction_nats(logits_TV, tokens_T, first)
        parts = [nats_N[max(0, start - first) : max(0, end - first)] for start, end in bins]
        found.append([PositionCost(part.sum().item(), len(part)) for part in parts])
    return found


class _HeadSums:
    """Sums over tokens for the heads of one layer, on its device, in float64."""

    def __init__(self, dtypes: Sequence[str]):
        self.tokens = 0
        self.errors_W: dict[str, torch.Tensor | float] = dict.fromkeys(dtypes, 0.0)
        self.log_kept_W: torch.Tensor | float = 0.0
        self.decay_W: torch.Tensor | None = None

    def add_memory(
        self, key_BTHK: torch.Tensor, beta_BTWX: torch.Tensor, log_decay_BTWXX: torch.Tensor | None, heads: int
    ) -> None:
        """Add what a token leaves of a state, as a share of its squared norm, averaged over directions.

        A token multiplies the state from the left by ``(I - beta k k^T) diag(a)``, whose mean squared gain is
        ``1 / K sum_j a_j^2 (1 - (2 beta - beta^2 |k|^2) k_j^2)``.
        """
        key_BTWK = key_BTHK.double().repeat_interleave(heads // key_BTHK.shape[2], dim=2)
        square_BTWK = key_BTWK.square()
        norm_BTW1 = square_BTWK.sum(dim=-1, keepdim=True)
        removed_BTWX = 2 * beta_BTWX.double() - beta_BTWX.double().square() * norm_BTW1
        kept_BTWK = 1 - removed_BTWX.mean(dim=-1, keepdim=True) * square_BTWK
        if log_decay_BTWXX is not None:
            decay_BTWX = log_decay_BTWXX.double().exp().mean(dim=-1)
            kept_BTWK = kept_BTWK * decay_BTWX.square()
            added_W = decay_BTWX.mean(dim=-1).sum(dim=(0, 1))
            self.decay_W = added_W if self.decay_W is None else self.decay_W + added_W
        self.log_kept_W = self.log_kept_W + kept_BTWK.mean(dim=-1).clamp(min=_TINY).log().sum(dim=(0, 1))
        self.tokens += key_BTHK.shape[0] * key_BTHK.shape[1]

    def to_json(self, layer: int) -> list[dict]:
        """Return an entry for each head; what is not finite is null."""
        log_kept_W = torch.as_tensor(self.log_kept_W).tolist()
        entries = []
        for head, log_kept in enumerate(log_kept_W):
            entry: dict[str, Any] = {"layer": layer, "head": head}
            entry["memory_tokens"] = -2 * self.tokens / log_kept if log_kept < 0 else None
            entry["decay"] = None if self.decay_W is None else self.decay_W[head].item() / self.tokens
            means = {name: float(sums[head]) / self.tokens for name, sums in self.errors_W.items()}  # pyright: ignore
            entry["errors"] = {name: math.sqrt(mean) for name, mean in means.items()}
            entries.append(entry)
        return entries


@torch.no_grad()
def head_errors(
    loaded: LoadedModel, batches: Iterable[torch.Tensor], dtypes: Sequence[str], chunk: int | None = None
) -> list[dict]:
    """Return for each value head how much storing its state in each format changes what it reads out of it.

    All come from one pass of the exact model: beside the state of each head run states that are stored, on the same
    queries, keys and values, so that a head's error is its own. The error is the root mean square, over tokens, of the
    relative change of the readout after a norm without weights, as the mixers' output norms take it: from 0 to 2.

    Args:
        batches: LongTensors ``[B, T]`` without padding.
        dtypes, chunk: formats, and tokens between two times that the state is stored.

    Returns:
        For each ``layer`` and ``head``: ``errors``, format -> error; ``decay``, the mean decay, None in an ungated
        model; ``memory_tokens``, after how many tokens 1/e is left of what the state held, by decay and by overwriting,
        of a direction taken at random; None where all is left.

    Raises:
        KeyreduceError: a readout holds NaN or inf, as where a format overflows.
    """
    model, family = loaded.model, loaded.family
    sizes = family.layer_sizes(model.config.to_dict())
    sums = {layer: _HeadSums(dtypes) for layer in sizes}
    every = 1 if chunk is None else chunk

    def compare(layer: int, query, key, value, beta, log_decay=None, **settings):
        W = value.shape[2]
        operands = (query, key, value, beta, log_decay)
        sums[layer].add_memory(key, beta if beta.ndim == value.ndim else beta[..., None], log_decay, W)
        output_BTWV, state = stored_delta_rule(*operands, **settings, every=max(2, key.shape[1]))
        normed_BTWV = _normed(output_BTWV)
        for name in dtypes:
            store = storing([name] * W)
            stored_BTWV, _ = stored_delta_rule(*operands, **settings, store=store, every=every)
            refuse_not_finite(stored_BTWV, f"the readouts of layer {layer} of {loaded.folder}, its state in {name},")
            squares_BTW = (_normed(stored_BTWV) - normed_BTWV).square().mean(dim=-1)
            sums[layer].errors_W[name] = sums[layer].errors_W[name] + squares_BTW.sum(dim=(0, 1))
        return output_BTWV, state

    with replaced_recurrences(model, family, lambda layer: partial(compare, layer)):
        for tokens_BT in batches:
            model.base_model(input_ids=tokens_BT.to(model.device), use_cache=False)
    return [entry for layer in sizes for entry in sums[layer].to_json(layer)]


def _normed(readout_BTWV: torch.Tensor) -> torch.Tensor:
    wide = readout_BTWV.double()
    return wide * (wide.square().mean(dim=-1, keepdim=True) + _EPS).rsqrt()


def memory_correlation(heads: Sequence[dict], dtype: str) -> float | None:
    """Return Spearman's rank correlation, over heads, of memory length and error; None where one does not vary."""
    pairs = [(head["memory_tokens"], head["errors"][dtype]) for head in heads if head["memory_tokens"] is not None]
    if any(len({pair[place] for pair in pairs}) < 2 for place in (0, 1)):
        return None
    found: Any = spearmanr([memory for memory, _ in pairs], [error for _, error in pairs])
    return float(found.statistic)


def cheapest_choice(
    heads: Sequence[dict], dtypes: Sequence[str], limit: float, sizes: Mapping[int, Any]
) -> dict[int, list[str]]:
    """Return layer -> for each value head the format of fewest bytes whose error is at most ``limit``, else float32.

    Of formats with equally many bytes it is the one of the smaller error.
    """
    choice: dict[int, list[str]] = {layer: [] for layer in sizes}
    for head in heads:
        size, errors = sizes[head["layer"]], head["errors"]
        allowed = [name for name in dtypes if errors[name] <= limit]
        ranked = [(FORMATS[name].bytes(size.head_k_dim, size.head_v_dim), errors[name], name) for name in allowed]
        choice[head["layer"]].append(min(ranked)[2] if ranked else EXACT)
    return choice


def search_choice(
    heads: Sequence[dict],
    dtypes: Sequence[str],
    sizes: Mapping[int, Any],
    increase: Callable[[StateDtypes], float | None],
    tolerance: float,
) -> tuple[dict[int, list[str]], list[dict]]:
    """Find the cheapest format of each head such that all of them together cost no more than ``tolerance``.

    One limit on the error of a head (:func:`cheapest_choice`) decides for all; it is found by bisection, with at most
    eight choices measured by ``increase``, which returns the increase in perplexity as a share.

    Returns:
        The choice, float32 for all heads where no other is cheap enough, and what was measured: for each the ``limit``,
        ``bytes_per_sequence`` and ``perplexity_increase``.
    """
    limits = sorted({error for head in heads for error in head["errors"].values()})
    best = cheapest_choice(heads, dtypes, -1.0, sizes)
    tried: list[dict] = []
    costs: list[tuple[dict, float | None]] = []
    # Below `low` all limits are cheap enough, from `high` on they cost too much. The largest one comes first.
    low, high, place = 0, len(limits), len(limits) - 1
    while low < high:
        choice = cheapest_choice(heads, dtypes, limits[place], sizes)
        known = [cost for other, cost in costs if other == choice]
        if not known and len(costs) == _MOST_MEASURED:
            break
        cost = known[0] if known else increase(choice)
        if not known:
            costs.append((choice, cost))
            bytes_per_sequence = bytes_of(choice, sizes)
            tried.append(
                {"limit": limits[place], "bytes_per_sequence": bytes_per_sequence, "perplexity_increase": cost}
            )
        if cost is not None and cost <= tolerance:
            best, low = choice, place + 1
        else:
            high = place
        place = (low + high) // 2
    return best, tried


def measure_states(
    loaded: LoadedModel,
    batches: Sequence[list[Window]],
    settings: StateSettings,
    seq_len: int,
    reporter: Reporter,
    *,
    label: str = "the model",
    ask: Callable[[Callable[[int], None]], list[dict]] | None = None,
    processes: Processes = Processes(),
) -> dict:
    """Return what this process's share of the text gives: ``states``, an entry for each format, and ``heads``.

    Float32 comes first, and the choice for each head last (where there is a tolerance), whatever formats are asked for.

    Args:
        batches: windows of at most ``seq_len`` tokens that run in this process.
        label: what the reporter calls the model.
        ask: asks recall probes, and is given what reports progress.
        processes: which process this is; the heads are measured in the first, on the first 2,048 tokens of the rows of
            its first batch.

    Raises:
        KeyreduceError: a logit is NaN or inf, or the text leaves nothing to predict.
    """
    sizes = loaded.family.layer_sizes(loaded.model.config.to_dict())
    bins, tokens = bins_of(seq_len), sum(len(window.tokens_T) for batch in batches for window in batch)

    def measure(name: str, dtypes: StateDtypes, with_recall: bool = True) -> dict:
        entry: dict[str, Any] = {"dtype": name, "bytes_per_sequence": bytes_of(dtypes, sizes)}
        with stored_states(loaded.model, loaded.family, dtypes, settings.chunk):
            with reporter.progress(f"measuring {label}, its state in {name}", tokens, "tokens") as progress:
                entry["rows"] = position_costs(loaded, batches, bins, progress)
            if ask is not None and with_recall:
                with reporter.progress(f"asking {label}, its state in {name}", None, "tokens") as progress:
                    entry["recall"] = ask(progress)
        return entry

    formats = tuple(dict.fromkeys(name for name in settings.dtypes if name != EXACT))
    entries = [measure(name, name) for name in (EXACT, *formats)]
    heads: list[dict] = []
    if processes.rank == 0 and formats and batches:
        tokens_BT = torch.stack([window.tokens_T[:_HEAD_TOKENS] for window in batches[0]])
        with reporter.progress(f"comparing the heads of {label}", None, "tokens"):
            heads = head_errors(loaded, [tokens_BT], formats, settings.chunk)
    if settings.tolerance is not None:
        base = _mean(entries[0]["rows"])

        def increase(choice: StateDtypes) -> float | None:
            return _increase(_mean(measure(AUTO, choice, with_recall=False)["rows"]), base)

        choice, tried = search_choice(heads, formats, sizes, increase, settings.tolerance)
        found = [{"layer": layer, "formats": names} for layer, names in choice.items()]
        entries.append(measure(AUTO, choice) | {"choice": found, "tried": tried, "tolerance": settings.tolerance})
    return {"states": entries, "heads": heads}


def state_metrics(shares: Sequence[dict], seq_len: int) -> dict:
    """Combine what all processes found (:func:`measure_states`), as a JSON object.

    Returns:
        ``states``: for each format ``dtype``, ``bytes_per_sequence``, ``perplexity_per_token``,
        ``perplexity_increase`` over float32, ``drift`` (for each bin of positions that has predictions its ``start``
        and ``end``, the number of ``predictions``, their mean ``nats`` and the ``difference`` from float32) and
        ``recall`` if it was asked for; that of ``auto`` also has the ``choice``, what was ``tried`` and the
        ``tolerance``. And where there are formats beside float32, ``heads`` (:func:`head_errors`) and
        ``memory_correlation``, format -> :func:`memory_correlation`.
    """
    states: list[dict] = []
    exact: list[PositionCost] = []
    for parts in zip(*(share["states"] for share in shares), strict=True):
        entry = {name: value for name, value in parts[0].items() if name not in ("rows", "recall")}
        rows = [row for part in parts for row in part["rows"]]
        mean, by_bin = _mean(rows), [_total(costs) for costs in zip(*rows, strict=True)]
        exact = exact or by_bin
        entry["perplexity_per_token"] = _finite(Perplexity(mean, 1, 0).perplexity)
        entry["perplexity_increase"] = _increase(mean, _mean([exact]))
        entry["drift"] = [
            {"start": start, "end": end, "predictions": cost.predictions, "nats": cost.mean}
            | {"difference": cost.mean - other.mean}
            for (start, end), cost, other in zip(bins_of(seq_len), by_bin, exact, strict=True)
            if cost.predictions
        ]
        if "recall" in parts[0]:
            entry["recall"] = recall_metrics(part["recall"] for part in parts)
        states.append(entry)
    found: dict[str, Any] = {"states": states}
    if heads := shares[0]["heads"]:
        correlations = {name: memory_correlation(heads, name) for name in heads[0]["errors"]}
        found |= {"heads": heads, "memory_correlation": correlations}
    return found


def _mean(rows: Iterable[Iterable[PositionCost]]) -> float:
    """Mean nats of all predictions."""
    total = _total(cost for row in rows for cost in row)
    if not total.predictions:
        raise KeyreduceError("the text leaves nothing to predict (one token); give other text")
    return total.mean


def _total(costs: Iterable[Iterable]) -> PositionCost:
    """Sum over costs; that of nats is rounded once, so that their order does not change it."""
    pairs = [PositionCost(*cost) for cost in costs]
    return PositionCost(math.fsum(cost.nats for cost in pairs), sum(cost.predictions for cost in pairs))


def _increase(mean: float, base: float) -> float | None:
    """The increase in perplexity as a share; None where it is beyond a float."""
    return math.expm1(mean - base) if mean - base < 700 else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
