"""The calibration file: statistics as safetensors, and what they were made from in its header."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from keyreduce.calibration.statistics import TAYLOR, LayerStatistics, Statistics
from keyreduce.checkpoint.shards import ShardPlan, make_spec, read_header
from keyreduce.checkpoint.writing import write_shard
from keyreduce.errors import KeyreduceError
from keyreduce.outputs import appearing, dangling_link

_KEY = "keyreduce"
_UNUSED = {"query_sum_HK", "key_sum_HK", "unit_query_sum_HK", "unit_key_sum_HK", "value_gram_WVV"}
"""Statistics that version 0.1 wrote and no method reads."""


def write_statistics(statistics: Statistics, path: Path, *, overwrite: bool = False) -> None:
    """Write a calibration file, whole or not at all; KeyreduceError if it is there already, or cannot be written."""
    record = {"model": statistics.model, "tokens": statistics.tokens, "inputs": statistics.inputs}
    layers = statistics.layers.items()
    tensors = {f"layers.{layer}.{name}": one for layer, sums in layers for name, one in sums.tensors().items()}
    specs = [make_spec(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    with appearing(path, folder=False, overwrite=overwrite) as temporary:
        write_shard(temporary, ShardPlan(specs, {_KEY: json.dumps(record)}), tensors.__getitem__)


def read_record(path: Path) -> dict:
    """Return model identity, tokens and inputs of a calibration file, without reading the statistics.

    Raises:
        KeyreduceError: the file is missing, damaged, or not a calibration file.
    """
    if not Path(path).exists():
        what = dangling_link(path) or f"there is no calibration file {path}"
        raise KeyreduceError(f"{what}; make it with keyreduce calibrate")
    try:
        record = json.loads(read_header(path)[0].metadata.get(_KEY, "null"))
    except json.JSONDecodeError:
        record = None
    if not isinstance(record, dict) or not {"model", "tokens", "inputs"} <= record.keys():
        raise KeyreduceError(f"{path} is not a calibration file; make one with keyreduce calibrate")
    return record


def read_statistics(path: Path) -> Statistics:
    """Read a calibration file; tensors are mapped into memory, and read from the file when they are first used.

    Raises KeyreduceError as :func:`read_record` does.
    """
    record = read_record(path)
    tensors: dict[int, dict[str, torch.Tensor]] = {}
    try:
        with safe_open(str(path), framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  (no mapping)
                _, layer, name = key.split(".", 2)
                if name not in _UNUSED:
                    tensors.setdefault(int(layer), {})[name] = opened.get_tensor(key)
    except (SafetensorError, ValueError) as error:
        raise KeyreduceError(f"{path} cannot be read: {error}") from error
    gradients = any(name.startswith(TAYLOR) for names in tensors.values() for name in names)
    expected = LayerStatistics.names(gradients=gradients)
    for layer, found in tensors.items():
        if wrong := ", ".join(sorted(found.keys() ^ expected)):
            raise KeyreduceError(
                f"{path} was made by another version of keyreduce (layer {layer} differs in {wrong}); "
                "calibrate again with `overwrite`"
            )
    layers = {layer: LayerStatistics.of_tensors(tensors[layer]) for layer in sorted(tensors)}
    return Statistics(record["model"], record["tokens"], layers, record["inputs"])
