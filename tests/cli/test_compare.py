"""``keyreduce compare``: what two calibrations or two pruned models choose alike, against counts by hand."""

import json

import pytest
import torch

from keyreduce.calibration.file import write_statistics
from keyreduce.calibration.statistics import LayerStatistics, Statistics
from keyreduce.checkpoint.record import Record
from keyreduce.families import MixerSizes

SIZES = MixerSizes(2, 2, 4, 4)


def calibration(path, keys, seed=0):
    """A file whose key channels have these energies in each head, and whose value channels fall off in order."""
    sums = LayerStatistics.zeros(8, SIZES, torch.device("cpu"))
    sums.key_gram_HKK += torch.diag_embed(torch.tensor(keys, dtype=torch.float64))
    sums.output_gram_WVV += torch.diag_embed(torch.tensor([4.0, 3.0, 2.0, 1.0]).double())
    sums.output_energy_W += torch.tensor([1.0, 2.0]).double()
    inputs = {"seed": seed, "text": {"identity": "abc"}, "gradients": False}
    write_statistics(Statistics("model", 100, {0: sums, 2: sums}, inputs), path)
    return path


def pruned(folder, key, heads=(0, 1), seed=0):
    before = SIZES._asdict()
    after = {"key_heads": len(heads), "value_heads": len(heads), "head_k_dim": len(key[0]), "head_v_dim": 4}
    cut = {"before": before, "after": after, "heads": [*heads], "key": key, "value": [[0, 1, 2, 3]] * len(heads)}
    folder.mkdir()
    Record(steps=({"inputs": {"method": "l2", "seed": seed}, "layers": {"1": cut}},)).write(folder)
    return folder


def test_calibrations(keyreduce, tmp_path):
    first = calibration(tmp_path / "a", [[4.0, 3, 2, 1], [4, 3, 2, 1]])
    second = calibration(tmp_path / "b", [[4.0, 2, 3, 1], [4, 3, 2, 1]], seed=7)
    found = keyreduce("compare", first, second, "--json").json()
    assert (found["kind"], found["is_same"], found["differing"]) == ("calibrations", False, {"seed": [0, 7]})
    assert found["overlap"] == {"key": 0.75, "value": 1, "head": 1}
    assert [row["layer"] for row in found["layers"]] == [0, 2]
    assert found["layers"][0]["key"]["correlation"] == pytest.approx((0.8 + 1) / 2)
    # Of three quarters that stay nothing differs.
    assert keyreduce("compare", first, second, "--ratio", "0.25", "--json").json()["is_same"]
    said = keyreduce("compare", first, second).out
    assert "they differ: both keep 75.0% of the keys, 100.0% of the values, 100.0% of the heads" in said
    assert "they make the same choice" in keyreduce("compare", first, first).out


def test_pruned_models(keyreduce, tmp_path):
    first = pruned(tmp_path / "a", [[0, 1], [0, 1]])
    second = pruned(tmp_path / "b", [[0, 1], [1, 2]], seed=3)
    headless = pruned(tmp_path / "c", [[1, 2]], heads=[1])
    found = keyreduce("compare", first, second, "--json").json()
    assert (found["kind"], found["overlap"]) == ("pruned models", {"key": 0.75, "value": 1, "head": 1})
    assert found["differing"] == {"seed": [0, 3]} and not found["is_same"]
    found = keyreduce("compare", second, headless, "--json").json()
    assert found["layers"] == [{"layer": 1, "key": {"overlap": 1}, "value": {"overlap": 1}, "head": {"overlap": 0.5}}]
    assert keyreduce("compare", first, first, "--json").json()["is_same"]


def test_what_cannot_be_compared_is_one_line(keyreduce, tmp_path):
    file, folder = calibration(tmp_path / "a", [[1.0] * 4] * 2), pruned(tmp_path / "b", [[0], [0]])
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    content = json.loads((folder / "keyreduce.json").read_text())
    content["steps"][0]["layers"]["1"]["before"]["head_k_dim"] = 8
    (tmp_path / "other" / "keyreduce.json").write_text(json.dumps(content))
    for other, said in {
        tmp_path / "nothing": "there is nothing at",
        folder: "one is a file and one a folder",
        folder / "keyreduce.json": "is not a valid safetensors file",
    }.items():
        done = keyreduce("compare", file, other)
        assert done.code == 2 and said in done.err and len(done.err.splitlines()) == 1, done.err
    for other, said in {"empty": "has no record of a pruning", "other": "layers have different sizes"}.items():
        done = keyreduce("compare", folder, tmp_path / other)
        assert done.code == 2 and said in done.err and len(done.err.splitlines()) == 1, done.err
