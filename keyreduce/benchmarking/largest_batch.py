"""How many sequences a model can write at once, and how fast it is then: where a smaller state pays most."""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch

from keyreduce.benchmarking.steps import model_steps
from keyreduce.benchmarking.subjects import Subject, is_out_of_memory
from keyreduce.benchmarking.timing import interleave, peak_memory
from keyreduce.benchmarking.tuning import tuned_once_for_any_batch
from keyreduce.devices import available_memory

# A launch grid has an end, too.
_BEYOND_KERNELS = ("invalid argument", "invalid configuration")
# Of what seems free, this much is not asked for: allocators round up and leave gaps.
_SPARE = 0.03


class _Step(NamedTuple):
    """A decoding step that runs: what it takes, and how many sequences there is memory for by what it held."""

    seconds: float
    room: int


@torch.inference_mode()
def time_largest_batch(subjects: Sequence[Subject], *, start: int, at_most: int, rounds: int) -> list[dict]:
    """Find for each model the largest batch that runs, and time a step of it.

    A batch of another size makes fla compile some kernels anew, so few are tried: what a step holds in memory says
    which should fit, and that one says it better. Where it does not run, an eighth less is tried, then halves.
    Launched by Python; at such batches the device is what is waited for. All models stay on the device meanwhile.

    Returns:
        For each subject ``label``, ``head_k_dim``, ``batch_size`` to an eighth of what runs (0: not even ``start``),
        ``ended_by``, which is ``bound`` where that is ``at_most``, ``memory``, or ``kernel`` where a kernel takes no
        larger batch, and ``tokens_per_second`` (None for a batch of 0).
    """
    on_gpu = subjects[0].model.device.type == "cuda"
    with tuned_once_for_any_batch() if on_gpu else contextlib.nullcontext():
        return [_largest_batch(subject, start, at_most, rounds) for subject in subjects]


def _largest_batch(subject: Subject, start: int, at_most: int, rounds: int) -> dict:
    fits, fails, step, ended_by = 0, None, None, "bound"
    trial = min(start, at_most)
    while trial > fits:
        taken = _step(subject, trial, rounds)
        if isinstance(taken, str):
            ended_by = taken
            trial, fails = _smaller(fits, trial, is_first=fails is None), trial
        else:
            fits, step = trial, taken
            trial = _larger(fits, fails, step.room, at_most)
            if fails is None and trial == fits < at_most:
                ended_by = "memory"
        if fits == 0:
            break
    speed = None if step is None else fits / step.seconds
    entry = {"label": subject.label, "head_k_dim": subject.sizes.head_k_dim, "batch_size": fits}
    return entry | {"ended_by": ended_by, "tokens_per_second": speed}


def _smaller(fits: int, failed: int, *, is_first: bool) -> int:
    """Return what to try after a batch that does not run; ``fits`` where nothing else is left."""
    trial = failed - max(1, failed // 9) if is_first else fits + (failed - fits) // 2
    return trial if failed - fits > max(1, fits // 8) else fits


def _larger(fits: int, fails: int | None, room: int, at_most: int) -> int:
    """Return what to try after a batch that runs; ``fits`` where that is as large as it gets."""
    if fails is not None:
        return fits + (fails - fits) // 2 if fails - fits > max(1, fits // 8) else fits
    if room >= at_most:
        return at_most
    return room if room > fits + fits // 8 else fits


def _step(subject: Subject, batch_size: int, rounds: int) -> _Step | str:
    """Return what a decoding step takes, or why there is none."""
    device = subject.model.device
    free = available_memory(device)
    # On a CPU two states and what is computed from them; it is asked before, since the system kills whoever takes more.
    held = 4 * batch_size * subject.family.state_bytes(subject.config)
    if device.type != "cuda" and held > free:
        return "memory"
    try:
        steps = model_steps(subject, batch_size, seed=0)
        seconds = interleave({"step": steps.run}, device, rounds=rounds, warmup=4)["step"].median / steps.count
        if device.type == "cuda":
            held = free - available_memory(device) + peak_memory(steps.run, device).reserved
    except RuntimeError as error:
        if is_out_of_memory(error):
            return "memory"
        if any(words in str(error).lower() for words in _BEYOND_KERNELS):
            return "kernel"
        raise
    spare = _SPARE * free if device.type == "cuda" else 0
    return _Step(seconds, int(batch_size * (free - spare) / max(held, 1)))
