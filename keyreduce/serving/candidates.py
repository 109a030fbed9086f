"""Cuts of a model's heads that are worth a look before anything is calibrated."""

from __future__ import annotations

from collections.abc import Mapping

from keyreduce.families import Family, MixerSizes
from keyreduce.serving.engines import EngineName, near_sizes, runs

SHARES = (0.25, 0.5, 0.75)
"""The shares of the state that candidates remove, about."""
_STEP = 8
_ASKED: tuple[EngineName, ...] = ("vllm", "sglang")


def candidates(family: Family, layers: Mapping[int, MixerSizes]) -> list[dict[int, MixerSizes]]:
    """Return cuts as layer -> its sizes afterwards, from the largest state to the smallest.

    For each of :data:`SHARES` they are: keys alone; keys and values, the keys about twice as much; both alike; and,
    where vLLM or SGLang does not run one of these, what it runs near it. Sizes are multiples of eight, or of one where
    heads are that small. The heads themselves stay: halving them lost most where it was tried.

    A model whose layers have different sizes has no candidates.
    """
    if len(set(layers.values())) != 1:
        return []
    before = next(iter(layers.values()))
    found = set()
    for share in SHARES:
        kept = 1 - share
        for key_power, value_power in ((1.0, 0.0), (2 / 3, 1 / 3), (1 / 2, 1 / 2)):
            key, value = _rounded(before.head_k_dim, kept**key_power), _rounded(before.head_v_dim, kept**value_power)
            if family.tied and key != value:
                continue
            after = before._replace(head_k_dim=key, head_v_dim=value)
            found.add((key, value))
            for engine in _ASKED:
                if not runs(engine, family, after):
                    found.update(near_sizes(engine, family, before, after)[:2])
    smaller = {pair for pair in found if pair[0] * pair[1] < before.head_k_dim * before.head_v_dim}
    ordered = sorted(smaller, key=lambda pair: (-pair[0] * pair[1], pair))
    return [
        {layer: sizes._replace(head_k_dim=key, head_v_dim=value) for layer, sizes in layers.items()}
        for key, value in ordered
    ]


def _rounded(size: int, share: float) -> int:
    step = _STEP if size >= 4 * _STEP else 1
    return min(size, max(1, round(size * share / step)) * step)
