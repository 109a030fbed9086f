"""Time per token of one mixer layer of several sizes: in a prefill, and per decoding step."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from keyreduce.benchmarking.decode import NotRecordedError, capture, check_states
from keyreduce.benchmarking.forward import mixer_pass
from keyreduce.benchmarking.steps import DecodeSteps, mixer_steps
from keyreduce.benchmarking.timed_models import TimedModel, explained_out_of_memory, random_models
from keyreduce.benchmarking.timing import RoundTimes, interleave
from keyreduce.families.table import MixerSizes


class TokenTimes(NamedTuple):
    """The times of one mixer layer, round by round; :func:`keyreduce.benchmarking.timing.ratio` compares two of them.

    Attributes:
        prefill: seconds per token of the input.
        decode: seconds per step, which gives one token to each of the sequences.
    """

    prefill: RoundTimes
    decode: RoundTimes


def time_per_token(
    config: Mapping,
    sizes: Sequence[MixerSizes],
    device: torch.device,
    dtype: torch.dtype,
    *,
    seq_len: int = 512,
    decode_batch_size: int = 8,
    rounds: int = 7,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[TokenTimes]:
    """Time one mixer layer with random weights for each of ``sizes``, all in turns, on the same random inputs.

    Nothing else of the model is built, and random numbers of the program stay as they are. The backend becomes what
    :func:`keyreduce.models.loading.prepare_backend` chooses for a model without gradients. On CUDA decoding is timed
    as a CUDA graph, where the mixer can be recorded as one; fla's kernels are compiled and tuned first, which takes
    seconds to minutes for each new size.

    Args:
        config: the content of a config.json, which says all that ``sizes`` do not.
        sizes: what the layer has instead of the config's sizes; the same may be there twice.
        dtype: of weights and inputs. fla's kernels for whole sequences refuse float32 on a GPU.
        seq_len: tokens of the one sequence of a prefill; up to 64 take fla's path for short sequences.
        decode_batch_size: sequences that are decoded at once.
        rounds: timed calls for each of the sizes; ``progress`` is called with 1 after each round.
        seed: of weights and inputs.

    Returns:
        The times for each of ``sizes``, in their order.

    Raises:
        KeyreduceError: the config cannot express such sizes, or there is not enough memory.
    """
    if not sizes:
        return []
    untouched = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with untouched, torch.inference_mode(), explained_out_of_memory("timing the mixer"):
        models = random_models(config, sizes, device, dtype, whole=False, seed=seed)
        check_states(models, "mixer", decode_batch_size)
        return _token_times(models, seq_len, decode_batch_size, rounds, seed, progress)


def _token_times(
    models: Sequence[TimedModel],
    seq_len: int,
    decode_batch_size: int,
    rounds: int,
    seed: int,
    progress: Callable[[int], None] | None,
) -> list[TokenTimes]:
    device, dtype, hidden = models[0].device, models[0].dtype, models[0].hidden
    generator = torch.Generator().manual_seed(seed)
    hidden_BTD = torch.randn(1, seq_len, hidden, generator=generator).to(device, dtype)
    steps = [mixer_steps(timed, decode_batch_size, seed) for timed in models]
    calls: dict[str, Callable[[], object]] = {}
    for number, (timed, decode) in enumerate(zip(models, _launches(steps, device), strict=True)):
        prefill = mixer_pass(timed)
        calls |= {f"prefill {number}": lambda prefill=prefill: prefill(hidden_BTD), f"decode {number}": decode}
    timings = interleave(calls, device, rounds=rounds, progress=progress)
    return [
        TokenTimes(timings[f"prefill {number}"].divided(seq_len), timings[f"decode {number}"].divided(step.count))
        for number, step in enumerate(steps)
    ]


def _launches(steps: Sequence[DecodeSteps], device: torch.device) -> list[Callable[[], object]]:
    """Return how the steps are run: all as CUDA graphs, or all launched by Python."""
    try:
        return [capture(step.run, device, step.reads()) for step in steps]
    except NotRecordedError:
        return [step.run for step in steps]


def token_entries(models: Sequence[TimedModel], passes: Sequence[dict], steps: Sequence[dict]) -> list[dict]:
    """Return one entry for each model, put together from what was measured of its mixer layer.

    Args:
        passes: what :func:`keyreduce.benchmarking.forward.time_passes` returned for mixers.
        steps: what :func:`keyreduce.benchmarking.decode.time_decoding` returned for mixers.

    Returns:
        Entries with ``label``, ``head_k_dim``, ``head_v_dim``; ``state_bytes_per_sequence``, of all layers in float32;
        ``prefill``, a list with ``batch_size``, ``seq_len`` and ``seconds_per_token``; ``decode``, a list with
        ``batch_size`` and ``seconds_per_step``, of the CUDA graph where there is one. Times are the median and its 95%
        interval.
    """
    entries = []
    for timed in models:
        entry: dict = {"label": timed.label, **timed.head_sizes}
        entry["state_bytes_per_sequence"] = timed.family.state_bytes(timed.config)
        entry["prefill"] = [_prefill_entry(one) for one in passes if one["label"] == timed.label]
        entry["decode"] = [_decode_entry(one) for one in steps if one["label"] == timed.label]
        entries.append(entry)
    return entries


def _prefill_entry(measured: Mapping) -> dict:
    tokens = measured["batch_size"] * measured["seq_len"]
    seconds = {name: value / tokens for name, value in measured["latency_seconds"].items()}
    return {"batch_size": measured["batch_size"], "seq_len": measured["seq_len"], "seconds_per_token": seconds}


def _decode_entry(measured: Mapping) -> dict:
    seconds = (measured["graph"] or measured["eager"])["latency_seconds"]
    return {"batch_size": measured["batch_size"], "seconds_per_step": seconds}
