"""All measurements of a benchmark, in one JSON object."""

import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

import keyreduce
from keyreduce.benchmarking.decode import time_decoding
from keyreduce.benchmarking.forward import time_passes
from keyreduce.benchmarking.largest_batch import time_largest_batch
from keyreduce.benchmarking.metrics import Roofline, measure_roofline
from keyreduce.benchmarking.per_token import token_entries
from keyreduce.benchmarking.timed_models import TimedModel, explained_out_of_memory
from keyreduce.devices import device_name
from keyreduce.models.miscompiled import refuse_wrong_gradients

_ORDER = ("mixer", "forward", "decode", "per_token", "train_step")
_LARGEST_BATCH_ROUNDS = 5


def benchmark_report(
    models: Sequence[TimedModel],
    *,
    kinds: Sequence[str],
    batch_size: int,
    seq_lens: Sequence[int],
    decode_batch_sizes: Sequence[int],
    max_batch_size: int,
    scopes: Sequence[str],
    rounds: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> dict:
    """Run the measurements. A training step changes the weights, so it comes last.

    Args:
        models: the first is the one that the others are compared with.
        kinds: of ``mixer``, ``forward``, ``decode`` and ``train_step``; beside ``mixer`` also ``per_token``, which puts
            together what was measured of the mixer layer, and times a decoding step of it where ``decode`` did not.
        batch_size: sequences in the input of all kinds but ``decode``.
        seq_lens: tokens in a sequence; each length is a measurement.
        decode_batch_sizes: sequences that are decoded at once; each number is a measurement.
        max_batch_size: where the search for the largest batch that can be decoded ends; 0 for no search.
        scopes: what is timed when decoding, of ``model``, ``mixer`` and ``operator``.
        rounds: timed calls of each model; ``progress`` is called with 1 after each round.
        seed: of the random inputs.

    Returns:
        A JSON object: ``settings``, which hardware, versions and inputs; ``ceilings``, the roofline of the device;
        ``models``, their sizes; for each kind a list of entries (:mod:`keyreduce.benchmarking.metrics`,
        ``per_token``: :func:`keyreduce.benchmarking.per_token.token_entries`), with ``largest_batch`` beside
        ``decode``; and ``warmup_seconds``, the time of all warming up together.

    Raises:
        KeyreduceError: a measurement needs more memory than there is, or fla's kernels cannot train a model here.
    """
    device, dtype = models[0].device, models[0].dtype
    if "train_step" in kinds:
        for timed in models:
            refuse_wrong_gradients(timed.family, timed.config, device, ", or leave `train_step` out")
    inputs = {"kinds": list(kinds), "batch_size": batch_size, "seq_len": list(seq_lens)}
    inputs |= {"decode_batch_sizes": list(decode_batch_sizes), "rounds": rounds, "seed": seed}
    with explained_out_of_memory("measuring what the device can do"):
        roofline = measure_roofline(device, dtype)
    report: dict = {"settings": _environment(device, dtype) | inputs}
    report |= {"ceilings": roofline._asdict(), "models": _descriptions(models)}
    common: dict[str, Any] = {"rounds": rounds, "seed": seed, "progress": progress}
    measured: list[dict] = []
    for kind in (kind for kind in _ORDER if kind in kinds):
        report[kind] = entries = []
        if kind == "decode":
            entries += _decoding(models, roofline, decode_batch_sizes, scopes, common)
        elif kind == "per_token":
            steps = [entry for entry in report.get("decode", ()) if entry["scope"] == "mixer"]
            if not steps:
                steps = _decoding(models, roofline, decode_batch_sizes, ("mixer",), common)
                measured += steps
            report[kind] = token_entries(models, report["mixer"], steps)
        else:
            for seq_len in seq_lens:
                with explained_out_of_memory(f"a batch of {batch_size} x {seq_len} tokens"):
                    entries += time_passes(models, roofline, kind, batch_size=batch_size, seq_len=seq_len, **common)
        measured += entries
    if "decode" in kinds and max_batch_size:
        few, start = min(rounds, _LARGEST_BATCH_ROUNDS), max(decode_batch_sizes)
        report["largest_batch"] = time_largest_batch(models, start=start, at_most=max_batch_size, rounds=few)
    report["warmup_seconds"] = sum(map(_warmup_seconds, measured))
    return report


def _decoding(
    models: Sequence[TimedModel],
    roofline: Roofline,
    batch_sizes: Sequence[int],
    scopes: Sequence[str],
    settings: Mapping[str, Any],
) -> list[dict]:
    entries = []
    for number in batch_sizes:
        with explained_out_of_memory(f"decoding {number} sequences"):
            for scope in scopes:
                entries += time_decoding(models, roofline, scope, batch_size=number, **settings)
    return entries


def total_rounds(
    *,
    kinds: Sequence[str],
    seq_lens: Sequence[int],
    decode_batch_sizes: Sequence[int],
    scopes: Sequence[str],
    rounds: int,
    device: torch.device,
) -> int:
    """Return how often ``progress`` of :func:`benchmark_report` is called, at most."""
    ways = 2 if device.type == "cuda" else 1
    of_a_scope = len(decode_batch_sizes) * ways
    has_steps = "decode" in kinds and "mixer" in scopes
    amounts = {"decode": of_a_scope * len(scopes), "per_token": 0 if has_steps else of_a_scope}
    return rounds * sum(amounts.get(kind, len(seq_lens)) for kind in kinds)


def _descriptions(models: Sequence[TimedModel]) -> list[dict]:
    """Return the sizes of the models; of all but the first also the state's size, as a factor of reduction."""
    dense, *others = (timed.describe() for timed in models)
    name = "state_bytes_per_sequence"
    return [dense, *(one | {"state_ratio": dense[name] / one[name]} for one in others)]


def _warmup_seconds(entry: dict) -> float:
    launches = [entry] if "warmup_seconds" in entry else [entry["eager"], entry["graph"]]
    return sum(launch["warmup_seconds"] for launch in launches if launch)


def _environment(device: torch.device, dtype: torch.dtype) -> dict:
    versions = {"keyreduce": keyreduce.__version__, "python": platform.python_version()}
    versions |= {library: version(library) for library in ("torch", "transformers", "flash-linear-attention")}
    dtype_name = str(dtype).removeprefix("torch.")
    return {"device": device_name(device), "device_type": device.type, "dtype": dtype_name, "versions": versions}
