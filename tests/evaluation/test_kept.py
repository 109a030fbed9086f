"""What stays of the dense model, against labels that are cut step by step with numpy.

Shapes: H key heads, W value heads, K key channels, V value channels.
"""

import numpy as np
import pytest

from keyreduce.checkpoint.record import Record
from keyreduce.errors import KeyreduceError
from keyreduce.evaluation.kept import is_cut_of, kept_channels
from keyreduce.families import MixerSizes

GROUP = 2


def draw_cut(before: MixerSizes, rng: np.random.Generator, *, projects: bool = False) -> dict:
    """A step's entry of a layer, as `prune` records it."""

    def some(size: int, count: int) -> list[int]:
        return sorted(rng.choice(size, count, replace=False).tolist())

    heads = some(before.key_heads, max(1, before.key_heads - 1))
    after = MixerSizes(len(heads), GROUP * len(heads), before.head_k_dim - 2, before.head_v_dim - 1)
    return {
        "before": before._asdict(),
        "after": after._asdict(),
        "heads": heads,
        "key": None if projects else [some(before.head_k_dim, after.head_k_dim) for _ in heads],
        "value": [some(before.head_v_dim, after.head_v_dim) for _ in range(after.value_heads)],
        "report": {},
    }


def cut_labels(labels_HK: np.ndarray, heads: list[int], channels: list[list[int]]) -> np.ndarray:
    return np.stack([labels_HK[head][picked] for head, picked in zip(heads, channels, strict=True)])


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_steps_are_put_together(num_steps):
    rng, dense = np.random.default_rng(num_steps), MixerSizes(5, 5 * GROUP, 9, 7)
    key_labels = np.arange(5 * 9).reshape(5, 9)
    value_labels = np.arange(5 * GROUP * 7).reshape(5 * GROUP, 7)
    steps, sizes = [], dense
    for _ in range(num_steps):
        cut = draw_cut(sizes, rng)
        value_heads = [GROUP * head + member for head in cut["heads"] for member in range(GROUP)]
        key_labels = cut_labels(key_labels, cut["heads"], cut["key"])
        value_labels = cut_labels(value_labels, value_heads, cut["value"])
        steps.append({"inputs": {}, "layers": {"3": cut}})
        sizes = MixerSizes(**cut["after"])
    # A step of another kind, and one that leaves the layer alone.
    steps[1:1] = [{"inputs": {}}, {"inputs": {}, "layers": {}}]
    (layer, kept), *others = kept_channels(Record(steps=steps)).items()
    assert (layer, others) == (3, [])
    assert (kept.before, kept.after) == (dense, sizes)
    found = [[9 * head + channel for channel in kept.key[place]] for place, head in enumerate(kept.key_heads)]
    assert found == key_labels.tolist()
    found = [[7 * head + channel for channel in kept.value[place]] for place, head in enumerate(kept.value_heads)]
    assert found == value_labels.tolist()


@pytest.mark.parametrize("projected", [0, 1])
def test_projected_keys_have_no_channels(projected):
    rng, sizes, steps = np.random.default_rng(0), MixerSizes(3, 3 * GROUP, 8, 8), []
    for number in range(2):
        cut = draw_cut(sizes, rng, projects=number == projected)
        steps.append({"inputs": {}, "layers": {"0": cut}})
        sizes = MixerSizes(**cut["after"])
    kept = kept_channels(Record(steps=steps))[0]
    assert kept.key is None
    assert len(kept.key_heads) == 1
    assert [len(channels) for channels in kept.value] == [6, 6]


def test_a_model_that_was_never_pruned():
    assert kept_channels(Record()) == {}


def test_whether_two_models_are_those_of_a_record():
    rng, dense, other = np.random.default_rng(0), MixerSizes(3, 6, 8, 8), MixerSizes(3, 6, 8, 4)
    cut = draw_cut(dense, rng)
    kept, pruned = kept_channels(Record(steps=({"inputs": {}, "layers": {"1": cut}},))), MixerSizes(**cut["after"])
    assert is_cut_of(kept, {0: other, 1: dense}, {0: other, 1: pruned})
    assert not is_cut_of(kept, {0: other, 1: dense}, {0: dense, 1: pruned})
    assert not is_cut_of(kept, {0: other, 1: other}, {0: other, 1: pruned})
    assert not is_cut_of(kept, {0: other, 1: dense}, {0: other, 1: dense})
    assert not is_cut_of(kept, {0: other}, {0: other})
    assert not is_cut_of(kept, {0: other, 1: dense}, {1: pruned})


@pytest.mark.parametrize(
    "damage",
    [
        [{"layers": []}],
        [{"layers": {"zero": {}}}],
        [{"layers": {"0": {}}}],
        [{"layers": {"0": {"before": {"key_heads": 1}}}}],
        [1],
    ],
)
def test_damaged_records_are_refused(damage):
    with pytest.raises(KeyreduceError, match=r"keyreduce\.json is damaged"):
        kept_channels(Record(steps=damage))


def test_a_record_whose_steps_do_not_fit_is_refused():
    rng, sizes = np.random.default_rng(0), MixerSizes(3, 6, 8, 8)
    cut = draw_cut(sizes, rng)
    cut["heads"], cut["key"], cut["value"] = [2], [list(range(8))], [list(range(8))] * 2
    with pytest.raises(KeyreduceError, match=r"keyreduce\.json is damaged"):
        kept_channels(Record(steps=({"layers": {"0": cut}},) * 2))
