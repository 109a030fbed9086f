"""The largest batch that a model can decode, and its speed at that batch: where a smaller state gains most."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from keyreduce.benchmarking.steps import model_steps
from keyreduce.benchmarking.timed_models import TimedModel, is_out_of_memory
from keyreduce.benchmarking.timing import interleave, peak_memory
from keyreduce.devices import available_memory
from keyreduce.models.tuning import tuned_kernels

# Messages of CUDA when a launch grid is larger than it allows.
_BEYOND_KERNELS = ("invalid argument", "invalid configuration")
# The share of free memory that is left unused: allocators round up and leave gaps.
_SPARE = 0.03


class _Step(NamedTuple):
    """A step that fits: its median latency, and the batch that would fill the memory, extrapolated from this one."""

    seconds: float
    room: int


@torch.inference_mode()
def time_largest_batch(models: Sequence[TimedModel], *, start: int, at_most: int, rounds: int) -> list[dict]:
    """Find the largest batch from ``start`` to ``at_most`` that fits, to within an eighth, and time a decoding step.

    fla compiles some kernels again for each batch size, so few sizes are tried. The memory that one step used is
    extrapolated to the next batch to try. If that does not fit, a batch smaller by a ninth is tried, and then the
    search continues by bisection. Steps are launched by Python, since such large batches keep the device busy. All
    models stay on the device meanwhile.

    Returns:
        One entry for each model, with ``label``; ``head_k_dim``; ``head_v_dim``; ``batch_size``, 0 if ``start`` does
        not fit; ``ended_by``, the limit that was met: ``bound`` for ``at_most``, ``memory``, or ``kernel`` where a
        kernel takes no larger batch; and ``tokens_per_second``, None for a batch of 0.
    """
    on_gpu = models[0].device.type == "cuda"
    with tuned_once_for_any_batch() if on_gpu else contextlib.nullcontext():
        return [_largest_batch(timed, start, at_most, rounds) for timed in models]


def _largest_batch(timed: TimedModel, start: int, at_most: int, rounds: int) -> dict:
    fits, fails, step, ended_by = 0, None, None, "bound"
    trial = min(start, at_most)
    while trial > fits:
        taken = _step(timed, trial, rounds)
        if isinstance(taken, str):
            ended_by, is_first, fails = taken, fails is None, trial
            trial = fails - max(1, fails // 9) if is_first else (fits + fails) // 2
        else:
            fits, step = trial, taken
            if fails is not None:
                trial = (fits + fails) // 2
            elif max(step.room, fits) >= at_most:
                trial = at_most
            elif step.room > fits + fits // 8:
                trial = step.room
            else:
                ended_by = "memory"
                break
        if fits == 0 or (fails is not None and fails - fits <= max(1, fits // 8)):
            break
    speed = None if step is None else fits / step.seconds
    entry = {"label": timed.label, **timed.head_sizes, "batch_size": fits}
    return entry | {"ended_by": ended_by, "tokens_per_second": speed}


@contextlib.contextmanager
def tuned_once_for_any_batch() -> Iterator[None]:
    """Within the block, let fla's norms keep the kernel variant that was best for the first batch size.

    They tune again whenever the number of rows, in thousands, changes (``NB`` in their keys), which takes some 15
    seconds for each batch size that a search tries. A norm is a small part of a step.
    """
    changed = {kernel: kernel.keys for kernel in tuned_kernels() if "NB" in kernel.keys}
    for kernel, keys in changed.items():
        kernel.keys = [key for key in keys if key != "NB"]
    try:
        yield
    finally:
        for kernel, keys in changed.items():
            kernel.keys = keys


def _step(timed: TimedModel, batch_size: int, rounds: int) -> _Step | str:
    """Return a decoding step that fits, or the limit that was met: ``memory`` or ``kernel``."""
    device = timed.device
    free = available_memory(device)
    # On a CPU: two states and what is computed from them. It is checked before the step, since an operating system
    # kills a process that uses more memory than there is.
    held = 4 * batch_size * timed.family.state_bytes(timed.config)
    if device.type != "cuda" and held > free:
        return "memory"
    try:
        steps = model_steps(timed, batch_size, seed=0)
        seconds = interleave({"step": steps.run}, device, rounds=rounds, warmup=4)["step"].median / steps.count
        if device.type == "cuda":
            held = free - available_memory(device) + (peak_memory(steps.run, device).reserved or 0)
    except RuntimeError as error:
        if is_out_of_memory(error):
            return "memory"
        if any(words in str(error).lower() for words in _BEYOND_KERNELS):
            return "kernel"
        raise
    spare = _SPARE * free if device.type == "cuda" else 0
    return _Step(seconds, int(batch_size * (free - spare) / max(held, 1)))
