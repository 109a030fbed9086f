"""The calibration file: what is written is read, and anything else is refused in one line."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from keyreduce.calibration.file import read_record, read_statistics, write_statistics
from keyreduce.calibration.statistics import LayerStatistics, Statistics
from keyreduce.errors import KeyreduceError

INPUTS = {"text": {"kind": "files", "paths": ["a"]}, "seed": 0, "dtype": "float32"}


def random_layer(seed: int) -> LayerStatistics:
    zeros = LayerStatistics.zeros(4, 2, 3, torch.device("cpu")).tensors()
    generator = torch.Generator().manual_seed(seed)
    return LayerStatistics(**{name: torch.randn(t.shape, generator=generator).double() for name, t in zeros.items()})


@pytest.fixture
def statistics() -> Statistics:
    return Statistics("an identity", 12, {0: random_layer(0), 11: random_layer(1)}, INPUTS)


@pytest.fixture
def written(statistics, tmp_path):
    path = tmp_path / "made" / "calibration.safetensors"
    write_statistics(statistics, path)
    return path


def rewritten(path, change=lambda tensors: None, **metadata):
    """The file again, with changes."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as opened:
        metadata = {**opened.metadata(), **metadata}
    change(tensors)
    save_file(tensors, path, metadata=metadata)
    return path


def test_what_is_written_is_read(statistics, written):
    found = read_statistics(written)
    assert (found.model, found.tokens, found.inputs) == ("an identity", 12, INPUTS)
    assert list(found.layers) == [0, 11]
    for layer, sums in statistics.layers.items():
        for name, tensor in sums.tensors().items():
            assert torch.equal(found.layers[layer].tensors()[name], tensor)
            assert found.layers[layer].tensors()[name].dtype == torch.float64
    assert read_record(written) == {"model": "an identity", "tokens": 12, "inputs": INPUTS}


def test_others_may_read_the_file_as_any_new_one(written, tmp_path):
    (tmp_path / "new").touch()
    assert written.stat().st_mode == (tmp_path / "new").stat().st_mode


def test_an_existing_file_is_replaced_only_if_asked(statistics, written):
    before = written.read_bytes()
    statistics.tokens = 13
    with pytest.raises(KeyreduceError, match="--overwrite"):
        write_statistics(statistics, written)
    assert written.read_bytes() == before
    write_statistics(statistics, written, overwrite=True)
    assert read_statistics(written).tokens == 13


@pytest.mark.parametrize("kept", [0, 5, 100, -8, -1])
def test_a_truncated_file_is_refused(written, kept):
    written.write_bytes(written.read_bytes()[:kept])
    with pytest.raises(KeyreduceError, match=r"calibration\.safetensors is not a valid .* file: it may be truncated"):
        read_statistics(written)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(KeyreduceError, match="there is no calibration file .*; make it with keyreduce calibrate"):
        read_statistics(tmp_path / "none")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(KeyreduceError, match="cannot be read"):
        read_statistics(tmp_path)


@pytest.mark.parametrize("record", ["{", "[]", "{}", json.dumps({"model": "x", "tokens": 3})])
def test_a_record_that_is_none_is_refused(written, record):
    with pytest.raises(KeyreduceError, match="is not a calibration file"):
        read_statistics(rewritten(written, keyreduce=record))


def test_other_safetensors_files_are_refused(tmp_path):
    save_file({"layers.0.key_sum_HK": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(KeyreduceError, match="is not a calibration file"):
        read_statistics(tmp_path / "other")


def test_sums_of_another_version_are_refused(written):
    rewritten(written, lambda tensors: tensors.pop("layers.11.key_sum_HK"))
    with pytest.raises(KeyreduceError, match="another version of keyreduce .layer 11 differs in key_sum_HK"):
        read_statistics(written)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sums_that_are_not_finite_name_their_layer(statistics, value):
    statistics.check_finite()
    statistics.layers[11].unit_key_gram_HKK[1, 2, 0] = value
    with pytest.raises(KeyreduceError, match="activations of layer 11 hold NaN or inf .unit_key_gram"):
        statistics.check_finite()
