import json
import weakref
from dataclasses import dataclass

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from keyreduce.checkpoint.folder import HfCheckpoint, open_folder
from keyreduce.checkpoint.rewrite import rewrite
from keyreduce.errors import KeyreduceError

QUERY = "model.layers.0.attn.q_proj.weight"
EMBEDDINGS = "model.embeddings.weight"


@dataclass
class KeepRows:
    rows: list[int]

    def shape(self, shape):
        return (len(self.rows), *shape[1:])

    def apply(self, tensor):
        return tensor[self.rows]


@dataclass
class Multiply:
    factor: float

    def shape(self, shape):
        return shape

    def apply(self, tensor):
        return tensor * self.factor


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_edited_tensors_change_and_the_rest_is_the_same(make_folder, tensors, target, shards):
    source = open_folder(make_folder(tensors, shards=shards))
    edits = {QUERY: [KeepRows([4, 0, 1]), Multiply(-2.0)], EMBEDDINGS: []}
    written = []
    rewrite(source, target, config={"hidden_size": 8, "new": 1}, edits=edits, progress=written.append)

    expected = tensors | {QUERY: tensors[QUERY][[4, 0, 1]] * -2.0}
    found = {}
    for file in source.shards:
        found |= load_file(target / file)
        with safe_open(target / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert set(opened.keys()) == {spec.name for spec in source.shards[file].tensors}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name

    total_size = sum(tensor.nbytes for tensor in expected.values())
    assert sum(written) == total_size
    assert json.loads((target / "config.json").read_text()) == {"hidden_size": 8, "new": 1}
    assert (target / "tokenizer.json").exists() and not (target / "README.md").exists()
    index = target / "model.safetensors.index.json"
    assert index.exists() == (shards > 1)
    if shards > 1:
        assert json.loads(index.read_text())["metadata"] == {"total_size": total_size}
    assert open_folder(target).tensors.keys() == tensors.keys()


def test_no_edits_give_the_same_data_and_the_same_identity(make_folder, tensors, target):
    source = open_folder(make_folder(tensors, shards=2))
    rewrite(source, target, config=source.config, edits={})
    assert open_folder(target).identity == source.identity


def test_one_tensor_is_held_at_a_time(make_folder, tensors, target, monkeypatch):
    source = open_folder(make_folder({f"layer.{i}": torch.ones(4, 4) for i in range(6)}))
    read, seen, most_alive = HfCheckpoint.read, [], 0

    def watched(self, name):
        nonlocal most_alive
        tensor = read(self, name)
        seen.append(weakref.ref(tensor))
        most_alive = max(most_alive, sum(ref() is not None for ref in seen))
        return tensor

    monkeypatch.setattr(HfCheckpoint, "read", watched)
    rewrite(source, target, config={}, edits={name: [KeepRows([0])] for name in source.tensors})
    assert len(seen) == 6 and most_alive == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_names_its_tensor(make_folder, tensors, target, value):
    tensors[QUERY][2, 3] = value
    source = open_folder(make_folder(tensors))
    with pytest.raises(KeyreduceError, match=f"{QUERY}.* holds NaN or inf"):
        rewrite(source, target, config={}, edits={QUERY: [Multiply(1.0)]})


def test_an_edit_of_nothing_or_of_numbers_that_are_no_weights_is_refused(make_folder, tensors, target):
    source = open_folder(make_folder(tensors))
    with pytest.raises(KeyreduceError, match="has no tensor 'model.missing'"):
        rewrite(source, target, config={}, edits={"model.missing": [Multiply(1.0)]})
    with pytest.raises(KeyreduceError, match="'model.step' .* is I64"):
        rewrite(source, target, config={}, edits={"model.step": [Multiply(1.0)]})
    assert not any(target.iterdir())


def test_an_edit_that_breaks_its_word_is_a_defect(make_folder, tensors, target):
    class Lies(KeepRows):
        def shape(self, shape):
            return shape

    source = open_folder(make_folder(tensors))
    with pytest.raises(ValueError, match="announced"):
        rewrite(source, target, config={}, edits={QUERY: [Lies([0])]})
