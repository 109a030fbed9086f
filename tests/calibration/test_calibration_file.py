"""The calibration file: what is written is read, and anything else is refused in one line."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from keyreduce.calibration.file import read_record, read_statistics, write_statistics
from keyreduce.calibration.statistics import LayerStatistics, Statistics, TaylorStatistics
from keyreduce.errors import KeyreduceError
from keyreduce.families import MixerSizes

CPU = torch.device("cpu")
INPUTS = {"text": {"kind": "files", "paths": ["a"]}, "seed": 0, "dtype": "float32"}


def random_layer(seed: int, *, gradients: bool) -> LayerStatistics:
    sizes = MixerSizes(key_heads=2, value_heads=4, head_k_dim=3, head_v_dim=5)
    statistics = LayerStatistics.zeros(4, sizes, CPU)
    statistics.taylor = TaylorStatistics.zeros(sizes, CPU) if gradients else None
    generator = torch.Generator().manual_seed(seed)
    for tensor in statistics.tensors().values():
        tensor.normal_(generator=generator)
    return statistics


@pytest.fixture(params=[False, True], ids=["without gradients", "with gradients"])
def statistics(request) -> Statistics:
    layers = {layer: random_layer(layer, gradients=request.param) for layer in (0, 11)}
    return Statistics("an identity", 12, layers, INPUTS)


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
        assert found.layers[layer].tensors().keys() == sums.tensors().keys()
        assert (found.layers[layer].taylor is None) == (sums.taylor is None)
        for name, tensor in sums.tensors().items():
            assert tensor.any()
            assert torch.equal(found.layers[layer].tensors()[name], tensor)
            assert found.layers[layer].tensors()[name].dtype == torch.float64
    assert read_record(written) == {"model": "an identity", "tokens": 12, "inputs": INPUTS}


def test_statistics_that_version_0_1_wrote_besides_are_ignored(statistics, written):
    more = {f"{name}_sum_HK": torch.ones(2, 3) for name in ("query", "key", "unit_query", "unit_key")}
    more["value_gram_WVV"] = torch.ones(4, 5, 5)
    size = written.stat().st_size
    added = {f"layers.{layer}.{name}": tensor.double() for layer in (0, 11) for name, tensor in more.items()}
    rewritten(written, lambda tensors: tensors.update(added))
    assert written.stat().st_size > size + 2 * 8 * (4 * 6 + 100)
    found = read_statistics(written)
    for layer, sums in statistics.layers.items():
        tensors = found.layers[layer].tensors()
        assert tensors.keys() == sums.tensors().keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in sums.tensors().items())
    write_statistics(found, written, overwrite=True)
    assert written.stat().st_size == size


def test_others_may_read_the_file_as_any_new_one(written, tmp_path):
    (tmp_path / "new").touch()
    assert written.stat().st_mode == (tmp_path / "new").stat().st_mode


def test_an_existing_file_is_replaced_only_if_asked(statistics, written):
    before = written.read_bytes()
    statistics.tokens = 13
    with pytest.raises(KeyreduceError, match="`overwrite`"):
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


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        (["layers.11.key_gram_HKK"], "layer 11 differs in key_gram_HKK"),
        (
            [f"layers.{n}.{s}" for n in (0, 11) for s in ("output_gram_WVV", "output_energy_W")],
            "layer 0 differs in output_energy_W, output_gram_WVV",
        ),
    ],
)
def test_sums_of_another_version_are_refused(written, missing, told):
    rewritten(written, lambda tensors: [tensors.pop(name) for name in missing])
    told = f"another version of keyreduce .{told}.; calibrate again with `overwrite`"
    with pytest.raises(KeyreduceError, match=told):
        read_statistics(written)


@pytest.mark.parametrize("statistics", [True], indirect=True)
@pytest.mark.parametrize("change", [dict.pop, lambda tensors, name: tensors.update({name + "X": torch.ones(1)})])
def test_gradients_of_another_version_are_refused(written, change):
    rewritten(written, lambda tensors: change(tensors, "layers.11.taylor.squared_key_HK"))
    with pytest.raises(KeyreduceError, match="another version of keyreduce .layer 11 differs in taylor.squared_key_HK"):
        read_statistics(written)


@pytest.mark.parametrize("statistics", [True], indirect=True)
def test_taylor_sums_by_form_and_part(statistics):
    taylor = statistics.layers[0].taylor
    for form in ("signed", "squared", "element"):
        for part, shape in (("query", "HK"), ("key", "HK"), ("value", "WV"), ("output", "WV")):
            assert taylor.of(form, part) is getattr(taylor, f"{form}_{part}_{shape}")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sums_that_are_not_finite_name_their_layer(statistics, value):
    statistics.check_finite()
    statistics.layers[11].unit_key_gram_HKK[1, 2, 0] = value
    with pytest.raises(KeyreduceError, match="activations of layer 11 hold NaN or inf .unit_key_gram"):
        statistics.check_finite()
    statistics.layers[0] = random_layer(0, gradients=True)
    statistics.layers[0].taylor.signed_value_WV[3, 4] = value
    with pytest.raises(KeyreduceError, match="gradients of layer 0 hold NaN or inf .taylor.signed_value"):
        statistics.check_finite()
