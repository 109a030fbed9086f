"""How fast models write: one token at a time through fla's cache.

Each scope of :mod:`keyreduce.benchmarking.steps` is timed as Python launches it (``eager``) and, on CUDA, as a CUDA
graph replays it (``graph``): a step may take the GPU less time than it takes Python to start.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from keyreduce.benchmarking.ceilings import Ceilings
from keyreduce.benchmarking.figures import compare, figures
from keyreduce.benchmarking.graphs import NotRecordedError, capture
from keyreduce.benchmarking.steps import STEPS, Steps
from keyreduce.benchmarking.subjects import Subject, refuse_beyond_memory
from keyreduce.benchmarking.timing import Timing, interleave, peak_memory
from keyreduce.benchmarking.work import Work, mixer_work, model_work, operator_work

SCOPES = tuple(STEPS)


@torch.inference_mode()
def time_decoding(
    subjects: Sequence[Subject],
    ceilings: Ceilings,
    *,
    batch_size: int,
    scopes: Sequence[str],
    rounds: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> list[dict]:
    """Time a decoding step of each model, in turns.

    Args:
        subjects: the models; the first is the one that the others are compared with.
        ceilings: what the device can do.
        batch_size: sequences that are written at once.
        scopes: which of `SCOPES` to time.
        rounds: timed calls of each, eager and graph.
        seed: of the inputs.
        progress: called with 1 after each round, ``len(scopes)`` times ``rounds``, twice that on CUDA.

    Returns:
        One entry for each scope and subject, with ``scope``, ``label``, ``head_k_dim``, ``batch_size``;
        ``floor_seconds``, what the bytes of a step take at the speed of a copy; ``peak_memory_bytes`` and
        ``peak_reserved_bytes``, above weights and states; ``eager`` and ``graph`` (None on a CPU and where steps do not
        record; ``graph_note`` says why), each as :mod:`keyreduce.benchmarking.figures` has it, of one step, with
        ``times_floor``, the latency as a multiple of ``floor_seconds``.
    """
    needed = sum(3 * subject.family.state_bytes(subject.config) for subject in subjects)
    refuse_beyond_memory(batch_size * needed, subjects[0].model.device, f"decoding {batch_size} sequences")
    settings = {"batch_size": batch_size, "rounds": rounds, "seed": seed, "progress": progress}
    return [entry for scope in scopes for entry in _time_scope(subjects, ceilings, scope, **settings)]


def _time_scope(
    subjects: Sequence[Subject],
    ceilings: Ceilings,
    scope: str,
    *,
    batch_size: int,
    rounds: int,
    seed: int,
    progress: Callable[[int], None] | None,
) -> list[dict]:
    device = subjects[0].model.device
    steps = {subject.label: STEPS[scope](subject, batch_size, seed) for subject in subjects}
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
    for subject in subjects:
        work = _work(subject, scope, batch_size)
        floor = work.bytes / ceilings.bytes_per_second
        entry = {"scope": scope, "label": subject.label, "head_k_dim": subject.sizes.head_k_dim}
        entry |= {"batch_size": batch_size, "floor_seconds": floor}
        entry |= {"peak_memory_bytes": memory[subject.label].allocated}
        entry |= {"peak_reserved_bytes": memory[subject.label].reserved, "graph_note": graph_note, "graph": None}
        for way, timings in ways.items():
            timing = timings[subject.label]
            entry[way] = figures(timing, work, ceilings, tokens=batch_size) | {"times_floor": timing.median / floor}
        entries.append(entry)
    for way, timings in ways.items():
        compare([entry[way] for entry in entries], list(timings.values()))
    return entries


def _of_one_step(timings: Mapping[str, Timing], steps: Mapping[str, Steps]) -> dict[str, Timing]:
    return {label: timing.divided(steps[label].count) for label, timing in timings.items()}


def _work(subject: Subject, scope: str, batch_size: int) -> Work:
    if scope == "model":
        return model_work(subject.model, subject.family, batch_size=batch_size, seq_len=1, cached=True)
    if scope == "mixer":
        return mixer_work(subject.mixer, subject.hidden, subject.sizes, batch_size=batch_size, seq_len=1, cached=True)
    return operator_work(subject.sizes, batch_size=batch_size, item=subject.model.dtype.itemsize)
