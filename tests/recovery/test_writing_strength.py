"""The writing strength that a correction lowered is the trained one again after a recovery."""

import json
from pathlib import Path

import hybrid_models
import numpy as np
import pytest
import torch
from tiny_models import build, save, tensors_of

from keyreduce.calibration.run import Settings, calibrate
from keyreduce.checkpoint.folder import open_folder
from keyreduce.checkpoint.record import Record
from keyreduce.data.text import FileText
from keyreduce.pruning.methods import METHODS
from keyreduce.pruning.planning import make_plan
from keyreduce.pruning.prune import write_pruned
from keyreduce.recovery.layers import recover_checkpoint
from keyreduce.recovery.writing import write_recovered
from keyreduce.recovery.writing_strength import corrected_heads

CPU = torch.device("cpu")
SETTINGS = Settings(num_batches=2, batch_size=2, seq_len=64)
# Model type -> the weight that gives the strength, and which of its rows do: of 2 key heads with 2 value heads each.
ROWS = {
    "gated_deltanet": ("model.layers.0.attn.b_proj.weight", [0, 1, 2, 3]),
    "qwen3_5_text": ("model.layers.0.linear_attn.in_proj_b.weight", [0, 1, 2, 3]),
    "qwen3_next": ("model.layers.0.linear_attn.in_proj_ba.weight", [0, 1, 4, 5]),
}


@pytest.fixture
def text(tmp_path: Path) -> FileText:
    drawn = np.random.default_rng(0).integers(32, 127, 4000).astype(np.uint8)
    (tmp_path / "text.txt").write_bytes(drawn.tobytes())
    return FileText([tmp_path / "text.txt"])


def corrected(dense: Path, folder: Path, text: FileText, **keep: int):
    """A cut by the L2 norm, corrected by the statistics of a text."""
    source = open_folder(dense)
    statistics = calibrate(source, text, SETTINGS, device=CPU, dtype=torch.float32)
    numbers = {target: dict.fromkeys(statistics.layers, number) for target, number in keep.items()}
    inputs = {"source": source.identity, "method": "l2", "target": ",".join(keep)}
    options = dict(seed=0, statistics=statistics, inputs=inputs, correct=True)
    plan = make_plan(source, METHODS["l2"], numbers, **options)
    write_pruned(source, plan, folder, dense=str(dense))
    return plan


def recovered(dense: Path, pruned: Path, folder: Path, text: FileText) -> None:
    sources = open_folder(dense), open_folder(pruned)
    result = recover_checkpoint(*sources, text, SETTINGS, steps=None, device=CPU)
    write_recovered(sources[1], result, folder, inputs={"mode": "least-squares"}, seconds=1.0)


def made(model_type: str, folder: Path) -> Path:
    if model_type in ("gated_deltanet", "delta_net"):
        return save(build(model_type), folder)
    return hybrid_models.store(hybrid_models.build(model_type), folder)


@pytest.mark.parametrize("head", [2, 1])
@pytest.mark.parametrize("model_type", ROWS)
def test_rows_of_a_corrected_cut_are_the_dense_ones_again(tmp_path, text, model_type, head):
    dense, (name, rows) = made(model_type, tmp_path / "dense"), ROWS[model_type]
    plan = corrected(dense, tmp_path / "pruned", text, key=4, head=head)
    recovered(dense, tmp_path / "pruned", tmp_path / "recovered", text)
    kept = [rows[row] for row in plan.layers[0].value_heads_W.tolist()]
    before, cut, after = (tensors_of(tmp_path / folder)[name] for folder in ("dense", "pruned", "recovered"))
    own = rows[: len(kept)]
    assert not any(torch.equal(cut[place], before[row]) for place, row in zip(own, kept, strict=True))
    assert torch.equal(after[own], before[kept])
    others = sorted({*range(len(cut))} - {*own})
    assert torch.equal(after[others], cut[others])


def test_heads_of_two_cuts_are_those_of_the_first_that_the_second_left(tmp_path, text):
    dense = save(build("delta_net", num_heads=4), tmp_path / "dense")
    first = corrected(dense, tmp_path / "once", text, key=4, head=3)
    second = corrected(tmp_path / "once", tmp_path / "twice", text, head=2)
    found = corrected_heads(Record.read(tmp_path / "twice"))
    assert found.keys() == {0, 1}
    for layer, heads_W in found.items():
        expected = [first.layers[layer].heads_H.tolist()[head] for head in second.layers[layer].heads_H.tolist()]
        assert heads_W.tolist() == expected
    recovered(dense, tmp_path / "twice", tmp_path / "recovered", text)
    name = "model.layers.1.attn.b_proj.weight"
    assert torch.equal(tensors_of(tmp_path / "recovered")[name], tensors_of(dense)[name][found[1]])


def test_a_record_with_repairs_or_without_corrections_leaves_it(tmp_path, text):
    dense = save(build("delta_net"), tmp_path / "dense")
    corrected(dense, tmp_path / "pruned", text, key=4)
    recovered(dense, tmp_path / "pruned", tmp_path / "recovered", text)
    assert corrected_heads(Record.read(tmp_path / "pruned"))
    assert corrected_heads(Record.read(tmp_path / "recovered")) == {}
    path = tmp_path / "pruned" / "keyreduce.json"
    record = json.loads(path.read_text())
    for layer in record["steps"][0]["layers"].values():
        del layer["correction"]
    path.write_text(json.dumps(record))
    assert corrected_heads(Record.read(tmp_path / "pruned")) == {}
    recovered(dense, tmp_path / "pruned", tmp_path / "again", text)
    name = "model.layers.0.attn.b_proj.weight"
    assert torch.equal(tensors_of(tmp_path / "again")[name], tensors_of(tmp_path / "pruned")[name])
    assert not torch.equal(tensors_of(tmp_path / "again")[name], tensors_of(dense)[name])
