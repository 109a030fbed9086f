"""Latency and peak memory of decoding: one token at a time, through the cache.

Each scope of :mod:`keyreduce.benchmarking.steps` is timed when Python launches its kernels (``eager``) and, on CUDA,
when a CUDA graph replays them (``graph``): Python may need more time to launch a step than the GPU needs to run it.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from keyreduce.benchmarking.metrics import Roofline, compare, metrics
from keyreduce.benchmarking.steps import STEPS
from keyreduce.benchmarking.timed_models import TimedModel, check_memory
from keyreduce.benchmarking.timing import RoundTimes, interleave, peak_memory
from keyreduce.errors import reason


class NotRecordedError(Exception):
    """A function cannot be recorded as a CUDA graph; the message says why."""


@torch.inference_mode()
def time_decoding(
    models: Sequence[TimedModel],
    roofline: Roofline,
    scope: str,
    *,
    batch_size: int,
    rounds: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> list[dict]:
    """Time a decoding step of each model, in turns, for a scope of :data:`keyreduce.benchmarking.steps.STEPS`.

    ``progress`` is called with 1 after each round: ``rounds`` times, on CUDA twice as often.

    Returns:
        One entry for each model, with ``scope``, ``label``, ``head_k_dim``, ``head_v_dim``, ``batch_size``;
        ``floor_seconds``, the time in which a copy moves the bytes of a step; ``peak_memory_bytes`` and
        ``peak_reserved_bytes``, beyond weights and states; ``eager`` and ``graph``, the metrics of one step
        (:mod:`keyreduce.benchmarking.metrics`) with ``times_floor``, the latency divided by ``floor_seconds``.
        ``graph`` is None on a CPU, and where a step cannot be recorded; ``graph_note`` says why.
    """
    check_states(models, scope, batch_size)
    device = models[0].device
    steps = {timed.label: STEPS[scope](timed, batch_size, seed) for timed in models}

    def times_of_one_step(functions: Mapping[str, Callable[[], object]]) -> dict[str, RoundTimes]:
        timings = interleave(functions, device, rounds=rounds, progress=progress)
        return {label: timing.divided(steps[label].count) for label, timing in timings.items()}

    ways = {"eager": times_of_one_step({label: step.run for label, step in steps.items()})}
    memory = {label: peak_memory(step.run, device) for label, step in steps.items()}
    graph_note = None
    try:
        graphs = {label: capture(step.run, device, step.reads()) for label, step in steps.items()}
    except NotRecordedError as error:
        graph_note = str(error)
    else:
        ways["graph"] = times_of_one_step(graphs)
    entries = []
    for timed in models:
        work = steps[timed.label].work
        floor = work.bytes / roofline.bytes_per_second
        entry = {"scope": scope, "label": timed.label, **timed.head_sizes}
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


def check_states(models: Sequence[TimedModel], scope: str, batch_size: int) -> None:
    """Raise a KeyreduceError where there is no memory for the states of a scope, and for what is computed from them."""
    needed = sum(
        timed.family.state_bytes(timed.config) if scope == "model" else timed.family.layer_state_bytes(timed.sizes)
        for timed in models
    )
    check_memory(3 * batch_size * needed, models[0].device, f"decoding {batch_size} sequences")


def capture(function: Callable[[], object], device: torch.device, reads: object = None) -> Callable[[], None]:
    """Record the kernels that a function launches as a CUDA graph, and return a function that launches them all.

    A cache replaces its tensors at every step. So each step of a recorded chain reads what the step before it wrote,
    and every replay starts from the same tensors: nothing needs to be copied back.

    The function must have run before, so that all kernels are compiled and tuned. ``reads`` holds the tensors that it
    starts from. A replay reads them at their present addresses, so they are kept as long as the recording, also where
    the function drops them.

    Raises:
        NotRecordedError: the function does what a graph cannot hold, such as waiting for the device; or it is a CPU.
        torch.OutOfMemoryError: there is no memory for a second set of the tensors that the function makes.
    """
    if device.type != "cuda":
        raise NotRecordedError("CUDA graphs are for a GPU")
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.inference_mode(), torch.cuda.graph(graph):
            kept = (reads, function())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # Operators raise all kinds of errors here; if it is the device that has failed, this raises again.
        torch.cuda.synchronize(device)
        raise NotRecordedError(reason(error)) from error

    def replay(kept: object = kept) -> None:
        graph.replay()

    return replay
