"""Which heads and channels of the dense model a pruned one kept: the steps of its record, combined."""

from collections.abc import Mapping
from typing import NamedTuple

from keyreduce.checkpoint.record import Record
from keyreduce.errors import KeyreduceError
from keyreduce.families import MixerSizes
from keyreduce.workspace import RECORD_NAME


class Kept(NamedTuple):
    """The heads and channels of one layer's mixer that pruning kept, by their numbers in the dense model.

    ``before`` and ``after`` are the sizes of the dense and the pruned mixer. Heads are in the order in which the pruned
    model has them; ``key`` and ``value`` list the kept channels of each, and ``key`` is None where they were projected.
    """

    before: MixerSizes
    after: MixerSizes
    key_heads: list[int]
    value_heads: list[int]
    key: list[list[int]] | None
    value: list[list[int]]


def kept_channels(record: Record) -> dict[int, Kept]:
    """Combine the steps of a pruned checkpoint's record (``keyreduce.json``).

    Returns:
        Layer -> what is kept of the dense model, from which the first step started; layers that no step names are not
        in it.

    Raises:
        KeyreduceError: the record is damaged.
    """
    kept: dict[int, Kept] = {}
    try:
        for step in record.steps:
            for number, cut in step.get("layers", {}).items():
                layer = int(number)
                kept[layer] = _after(kept.get(layer), cut)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise KeyreduceError(
            f"the pruned model's {RECORD_NAME} is damaged: it does not say which channels were kept; prune again"
        ) from error
    return kept


def is_cut_of(kept: Mapping[int, Kept], dense: Mapping[int, MixerSizes], pruned: Mapping[int, MixerSizes]) -> bool:
    """Return whether two models have the sizes that the record of the pruned one says (:func:`kept_channels`)."""
    expected = {layer: (sizes, sizes) for layer, sizes in dense.items()}
    expected |= {layer: (one.before, one.after) for layer, one in kept.items()}
    return dense.keys() == pruned.keys() and expected == {layer: (dense[layer], pruned[layer]) for layer in dense}


def _after(earlier: Kept | None, cut: Mapping) -> Kept:
    before, after = MixerSizes(**cut["before"]), MixerSizes(**cut["after"])
    group = before.value_heads // before.key_heads
    heads = cut["heads"]
    value_heads = [head * group + member for head in heads for member in range(group)]
    if earlier is None:
        return Kept(before, after, heads, value_heads, cut["key"], cut["value"])
    key = None
    if earlier.key is not None and cut["key"] is not None:
        key = [_pick(earlier.key[head], cut["key"][place]) for place, head in enumerate(heads)]
    value = [_pick(earlier.value[head], cut["value"][place]) for place, head in enumerate(value_heads)]
    both_heads = _pick(earlier.key_heads, heads), _pick(earlier.value_heads, value_heads)
    return Kept(earlier.before, after, *both_heads, key, value)


def _pick(numbers: list[int], places: list[int]) -> list[int]:
    return [numbers[place] for place in places]
