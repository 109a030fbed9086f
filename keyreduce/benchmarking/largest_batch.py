"""How many sequences a model can write at once, and how fast it is then: where a smaller state pays most."""

from collections.abc import Sequence

import torch

from keyreduce.benchmarking.steps import model_steps
from keyreduce.benchmarking.subjects import Subject, available_memory, is_out_of_memory
from keyreduce.benchmarking.timing import interleave

# A launch grid has an end, too.
_BEYOND_KERNELS = ("invalid argument", "invalid configuration")


@torch.inference_mode()
def time_largest_batch(subjects: Sequence[Subject], *, start: int, at_most: int, rounds: int) -> list[dict]:
    """Double the batch of each model until it no longer runs or ``at_most``, go back by halves, and time a step.

    Launched by Python; at such batches the device is what is waited for. All models stay on the device meanwhile.

    Returns:
        For each subject ``label``, ``head_k_dim``, ``batch_size`` to an eighth of what runs (0: not even ``start``),
        ``ended_by``, which is ``bound`` where that is ``at_most``, ``memory``, or ``kernel`` where a kernel takes no
        larger batch, and ``tokens_per_second`` (None for a batch of 0).
    """
    entries = []
    for subject in subjects:
        fits, fails, seconds, ended_by = 0, None, None, "bound"
        trial = min(start, at_most)
        while trial > fits:
            taken = _step_seconds(subject, trial, rounds)
            if isinstance(taken, str):
                fails, ended_by = trial, taken
            else:
                fits, seconds = trial, taken
            if fits == 0 or (fails is not None and fails - fits <= max(1, fits // 8)):
                break
            trial = min(2 * fits, at_most) if fails is None else fits + (fails - fits) // 2
        speed = None if seconds is None else fits / seconds
        entry = {"label": subject.label, "head_k_dim": subject.sizes.head_k_dim, "batch_size": fits}
        entries.append(entry | {"ended_by": ended_by, "tokens_per_second": speed})
    return entries


def _step_seconds(subject: Subject, batch_size: int, rounds: int) -> float | str:
    """Return how long a decoding step takes, or why there is none."""
    device = subject.model.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif 4 * batch_size * subject.family.state_bytes(subject.config) > available_memory(device):
        return "memory"
    try:
        steps = model_steps(subject, batch_size, seed=0)
        return interleave({"step": steps.run}, device, rounds=rounds, warmup=4)["step"].median / steps.count
    except RuntimeError as error:
        if is_out_of_memory(error):
            return "memory"
        if any(words in str(error).lower() for words in _BEYOND_KERNELS):
            return "kernel"
        raise
