"""Latency and peak memory of decoding: one token at a time, through the cache.

Each scope of :mod:`keyreduce.benchmarking.steps` is timed when Python launches its kernels (``eager``) and, on CUDA,
when a CUDA graph replays them (``graph``): Python may need more time to launch a step than the GPU needs to run it.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from keyreduce.benchmarking.graphs import NotRecordedError, capture
from keyreduce.benchmarking.metrics import compare, metrics
from keyreduce.benchmarking.roofline import Roofline
from keyreduce.benchmarking.steps import STEPS, DecodeSteps
from keyreduce.benchmarking.timed_models import TimedModel, check_memory
from keyreduce.benchmarking.timing import RoundTimes, interleave, peak_memory
from keyreduce.benchmarking.work import Work, mixer_work, model_work, operator_work


@torch.inference_mode()
def time_decoding(
    models: Sequence[TimedModel],
    roofline: Roofline,
    *,
    batch_size: int,
    scopes: Sequence[str],
    rounds: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> list[dict]:
    """Time a decoding step of each model, in turns.

    Args:
        models: the models; the first is the one that the others are compared with.
        roofline: the peak performance of the device.
        batch_size: sequences that are decoded at once.
        scopes: which of :data:`keyreduce.benchmarking.steps.STEPS` to time.
        rounds: timed calls of each, eager and graph.
        seed: of the inputs.
        progress: called with 1 after each round: ``len(scopes) * rounds`` times, on CUDA twice as often.

    Returns:
        One entry for each scope and model, with ``scope``, ``label``, ``head_k_dim``, ``batch_size``;
        ``floor_seconds``, the time in which a copy moves the bytes of a step; ``peak_memory_bytes`` and
        ``peak_reserved_bytes``, beyond weights and states; ``eager`` and ``graph``, the metrics of one step
        (:mod:`keyreduce.benchmarking.metrics`) with ``times_floor``, the latency divided by ``floor_seconds``.
        ``graph`` is None on a CPU, and where a step cannot be recorded; ``graph_note`` says why.
    """
    needed = sum(3 * timed.family.state_bytes(timed.config) for timed in models)
    check_memory(batch_size * needed, models[0].model.device, f"decoding {batch_size} sequences")
    settings = {"batch_size": batch_size, "rounds": rounds, "seed": seed, "progress": progress}
    return [entry for scope in scopes for entry in _time_scope(models, roofline, scope, **settings)]


def _time_scope(
    models: Sequence[TimedModel],
    roofline: Roofline,
    scope: str,
    *,
    batch_size: int,
    rounds: int,
    seed: int,
    progress: Callable[[int], None] | None,
) -> list[dict]:
    device = models[0].model.device
    steps = {timed.label: STEPS[scope](timed, batch_size, seed) for timed in models}
    runs = {label: step.run for label, step in steps.items()}
    ways = {"eager": _of_one_step(interleave(runs, device, rounds=rounds, progress=progress), steps)}
    memory = {label: peak_memory(run, device) for label, run in runs.items()}
    graph_note = None
    try:
        graphs = {label: capture(step.run, device, step.reads()) for label, step in steps.items()}
    except NotRecordedError as error:
        graph_note = str(error)
    else:
        ways["graph"] = _of_one_step(interleave(graphs, device, rounds=rounds, progress=progress), steps)
    entries = []
    for timed in models:
        work = _work(timed, scope, batch_size)
        floor = work.bytes / roofline.bytes_per_second
        entry = {"scope": scope, "label": timed.label, "head_k_dim": timed.sizes.head_k_dim}
        entry |= {"batch_size": batch_size, "floor_seconds": floor}
        entry |= {"peak_memory_bytes": memory[timed.label].allocated}
        entry |= {"peak_reserved_bytes": memory[timed.label].reserved, "graph_note": graph_note, "graph": None}
        for way, timings in ways.items():
            timing = timings[timed.label]
            entry[way] = metrics(timing, work, roofline, tokens=batch_size) | {"times_floor": timing.median / floor}
        entries.append(entry)
    for way, timings in ways.items():
        compare([entry[way] for entry in entries], list(timings.values()))
    return entries


def _of_one_step(timings: Mapping[str, RoundTimes], steps: Mapping[str, DecodeSteps]) -> dict[str, RoundTimes]:
    return {label: timing.divided(steps[label].count) for label, timing in timings.items()}


def _work(timed: TimedModel, scope: str, batch_size: int) -> Work:
    if scope == "model":
        return model_work(timed.model, timed.family, batch_size=batch_size, seq_len=1, cached=True)
    if scope == "mixer":
        return mixer_work(timed.mixer, timed.hidden, timed.sizes, batch_size=batch_size, seq_len=1, cached=True)
    return operator_work(timed.sizes, batch_size=batch_size, item=timed.model.dtype.itemsize)
