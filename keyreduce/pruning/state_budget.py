"""A budget of bytes for the recurrent state, and the sizes and formats that fit into it. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from keyreduce.errors import KeyreduceError
from keyreduce.families import Family, MixerSizes, family_of
from keyreduce.pruning.budget import SIZE_OF, parse_amount
from keyreduce.serving.capacity import CacheLayout, cache_memory, parse_memory, state_bytes_that_fit
from keyreduce.serving.engines import runs
from keyreduce.serving.state_formats import bytes_of

if TYPE_CHECKING:
    from keyreduce.checkpoint.source import Checkpoint
    from keyreduce.serving.capacity import PoolEngine
    from keyreduce.serving.engines import EngineName

SearchMode = Literal["predicted", "measured"]
"""How candidates are compared."""
DEFAULT_STATE_RATIO = "0.5"
"""The share of the state's bytes that goes where nothing is said."""
STEPS = 16
"""Key channels are tried in steps of so many parts of a head's."""
VALUE_STEP = 2
"""Value channels are tried in steps of this: kernels of 16-bit types load pairs."""
SMALLEST = 8
"""No size becomes smaller than one part of so many."""
RESERVED = 4 * 10**9
"""Bytes that activations and CUDA graphs take of a GPU, as ``inspect`` has it."""


@dataclass(frozen=True)
class StateBudget:
    """Bytes that the state of a sequence may take, and what may be done for that.

    Attributes:
        ratio: the share to remove of what the dense model's state takes in the first of ``dtypes``; else one of:
        bytes: how many bytes may stay.
        fit: GPU memory, tokens of a sequence and number of sequences that it is to serve.
        dtypes: formats in which the state may be stored.
        targets: what may be removed.
        multiple_of: channels that stay are a multiple of it; None takes the steps above.
        engine: the serving engine that must run the sizes, and whose memory ``fit`` is about; None for any.
    """

    ratio: Fraction | None
    bytes: int | None
    fit: tuple[int, int, int] | None
    dtypes: tuple[str, ...]
    targets: tuple[str, ...]
    multiple_of: int | None
    engine: EngineName | None

    @classmethod
    def of(
        cls,
        *,
        ratio: str | None,
        bytes: str | None,
        fit: str | None,
        dtypes: Sequence[str],
        targets: Sequence[str],
        multiple_of: int | None,
        engine: EngineName | None,
    ) -> StateBudget:
        """Return the budget that texts say, of which exactly one is given.

        Raises KeyreduceError if a text is no such amount, or two are given.
        """
        given = {"state_ratio": ratio, "state_bytes": bytes, "fit": fit}
        named = [name for name, text in given.items() if text is not None]
        if len(named) > 1:
            raise KeyreduceError(f"`{named[0]}` and `{named[1]}` both say how large the state may be: give one of them")
        share = None
        if ratio is not None:
            share = parse_amount(ratio)
            if share is None or not 0 < share < 1:
                told = repr(ratio) if share is None else ratio
                takes = "the share of the state's bytes to remove, one number above 0 and below 1, such as 0.5"
                raise KeyreduceError(f"`state_ratio` is {told}; it is {takes}")
        if len(set(dtypes)) < len(dtypes) or not dtypes:
            raise KeyreduceError("`state_dtypes` names a format twice, or none")
        if multiple_of is not None and multiple_of < 1:
            raise KeyreduceError(f"`multiple_of` is {multiple_of}; it is at least 1")
        most = None if bytes is None else parse_memory(bytes, "state_bytes")
        served = None if fit is None else _parse_fit(fit)
        return cls(share, most, served, tuple(dtypes), tuple(targets), multiple_of, engine)

    def describe(self) -> dict:
        """Return the budget as a JSON object, for the record."""
        amounts = {"state_ratio": self.ratio and float(self.ratio), "state_bytes": self.bytes, "fit": self.fit}
        found: dict = {name: amount for name, amount in amounts.items() if amount is not None}
        found |= {"state_dtypes": list(self.dtypes)}
        return found | {name: value for name in ("multiple_of", "engine") if (value := getattr(self, name)) is not None}

    def most_bytes(self, source: Checkpoint, dtype: str) -> int:
        """Return how many bytes the state of a sequence may take where it is stored in a format."""
        family = family_of(source.config)
        layers = family.layer_sizes(source.config)
        if self.fit is None:
            return self.bytes or int(state_bytes(family, self.dtypes[0], layers) * (1 - (self.ratio or 0)))
        memory, tokens, sequences = self.fit
        engine: PoolEngine = "sglang" if self.engine == "sglang" else "vllm"
        room = cache_memory(memory, source.nbytes, engine, gpus=1, reserve_bytes=RESERVED)
        return state_bytes_that_fit(source.config, room, tokens, sequences, engine, dtype=dtype)


@dataclass(frozen=True)
class Candidate:
    """Sizes that a model's layers may get, and the format that their states would be stored in.

    Attributes:
        sizes: of each layer.
        state_dtype: the format.
        state_bytes: what the state of a sequence takes, in all layers.
    """

    sizes: MixerSizes
    state_dtype: str
    state_bytes: int

    @property
    def label(self) -> str:
        """The sizes as text: key channels x value channels of a head."""
        return f"{self.sizes.head_k_dim}x{self.sizes.head_v_dim}"


def state_bytes(family: Family, dtype: str, layers: Mapping[int, MixerSizes]) -> int:
    """Return the bytes of recurrent state of a sequence that stores it in a format; a preconditioner's stay float32."""
    return bytes_of(dtype, layers) + sum(map(family.preconditioner_bytes, layers.values()))


def find_candidates(source: Checkpoint, budget: StateBudget) -> list[Candidate]:
    """Return all cuts that fit into a budget and that no other one of the same format exceeds in every size.

    Raises KeyreduceError if there are none, with the reason; or layers differ in size.
    """
    family = family_of(source.config)
    layers = family.layer_sizes(source.config)
    if not layers:
        raise KeyreduceError(f"{source.path} has no layer with a recurrent state, so there is nothing to prune")
    if len(set(layers.values())) > 1:
        raise KeyreduceError(
            "layers of this model differ in their sizes, for which no budget is searched: give `ratio` or `keep`"
        )
    before, first = next(iter(layers.values())), budget.dtypes[0]
    now, most = state_bytes(family, first, layers), budget.most_bytes(source, first)
    if now <= most:
        raise KeyreduceError(
            f"the state takes {now:,} bytes a sequence, and {most:,} are allowed: there is nothing to remove"
        )
    # The whole model is among them, for a format alone may be enough.
    grid = [*([before] if _is_allowed(source.config, budget.engine, before) else []), *allowed_sizes(source, budget)]
    found: list[Candidate] = []
    for dtype in budget.dtypes:
        most = budget.most_bytes(source, dtype)
        bytes_by = {after: len(layers) * state_bytes(family, dtype, {0: after}) for after in grid}
        fitting = _largest([after for after, size in bytes_by.items() if size <= most])
        possible = [after for after in fitting if _can_be_said(family, source.config, dict.fromkeys(layers, after))]
        found += [Candidate(after, dtype, bytes_by[after]) for after in possible]
    if not found:
        raise KeyreduceError(_why_none(source, budget, layers))
    return found


def _parse_fit(text: str) -> tuple[int, int, int]:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 3 or not all(part.isdecimal() and 0 < int(part) < 10**9 for part in parts[1:]):
        raise KeyreduceError(f"`fit` is {text!r}; give GPU memory, tokens of a sequence and sequences: 80GB,4096,200")
    return parse_memory(parts[0], "fit"), int(parts[1]), int(parts[2])


def allowed_sizes(source: Checkpoint, budget: StateBudget) -> list[MixerSizes]:
    """Return all sizes on the grid that are smaller than the model's, that its family can have, and the engine runs.

    The model's layers are all of one size. At least half of the heads stay.
    """
    family = family_of(source.config)
    before = next(iter(family.layer_sizes(source.config).values()))
    return [after for after in _grid(before, budget) if _is_allowed(source.config, budget.engine, after)]


def _grid(before: MixerSizes, budget: StateBudget) -> list[MixerSizes]:
    multiple, targets = budget.multiple_of, budget.targets
    heads = range((before.key_heads + 1) // 2, before.key_heads + 1) if "head" in targets else (before.key_heads,)
    steps = {
        "key": multiple or max(1, before.head_k_dim // STEPS),
        "value": multiple or min(VALUE_STEP, max(1, before.head_v_dim // STEPS)),
    }
    channels = {}
    for target, step in steps.items():
        size = getattr(before, SIZE_OF[target])
        multiples = range(step * max(1, -(-size // SMALLEST // step)), size, step)
        channels[target] = [*multiples, size] if target in targets else [size]
    group = before.value_heads // before.key_heads
    found = [
        MixerSizes(number, number * group, key, value)
        for number in heads
        for key in channels["key"]
        for value in channels["value"]
    ]
    return [sizes for sizes in found if sizes != before]


def _largest(found: Sequence[MixerSizes]) -> list[MixerSizes]:
    """Those that no other one is at least as large as in every size."""

    def exceeds(other: MixerSizes, one: MixerSizes) -> bool:
        return other != one and all(theirs >= own for theirs, own in zip(other, one, strict=True))

    # The largest value size of each pair of the others is enough to compare.
    best: dict[tuple[int, int], MixerSizes] = {}
    for one in found:
        place = (one.key_heads, one.head_k_dim)
        if place not in best or best[place].head_v_dim < one.head_v_dim:
            best[place] = one
    return [one for one in best.values() if not any(exceeds(other, one) for other in best.values())]


def _is_allowed(config: Mapping, engine: EngineName | None, after: MixerSizes) -> bool:
    """Whether the family can have such sizes, and the engine, if there is one, runs them."""
    family = family_of(config)
    try:
        family.check_cut(after)
    except KeyreduceError:
        return False
    return engine is None or runs(engine, family, after, config)


def _can_be_said(family: Family, config: Mapping, after: Mapping[int, MixerSizes]) -> bool:
    """Whether the family's config can express such sizes."""
    try:
        family.resized(config, after)
    except KeyreduceError:
        return False
    return True


def _why_none(source: Checkpoint, budget: StateBudget, layers: Mapping[int, MixerSizes]) -> str:
    most = max(budget.most_bytes(source, dtype) for dtype in budget.dtypes)
    now = state_bytes(family_of(source.config), budget.dtypes[0], layers)
    if budget.fit is not None and most <= 0:
        layout = CacheLayout.of(source.config)
        rest = ", keys and values of softmax layers" if layout.softmax else ""
        return f"`fit`: weights, convolution states{rest} leave no room for a state; ask for fewer sequences or tokens"
    what = f", in sizes that {budget.engine} runs" if budget.engine else ""
    return (
        f"no cut of {','.join(budget.targets)} brings the state of a sequence from {now:,} to {most:,} bytes{what}: "
        "allow more bytes, or more `target`s"
    )
