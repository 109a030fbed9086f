"""How fast a delta-rule mixer layer is, and what it needs, in one model against others.

Shapes: B sequences, T tokens, D hidden.
"""

from collections.abc import Callable, Sequence

import torch

from keyreduce.benchmarking.ceilings import Ceilings
from keyreduce.benchmarking.figures import compare, figures
from keyreduce.benchmarking.subjects import Subject, refuse_beyond_memory
from keyreduce.benchmarking.timing import copies_past_cache, interleave, peak_memory, rotated
from keyreduce.benchmarking.work import mixer_work


@torch.inference_mode()
def time_mixers(
    subjects: Sequence[Subject],
    ceilings: Ceilings,
    *,
    batch_size: int,
    seq_len: int,
    rounds: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> list[dict]:
    """Time the first delta-rule mixer layer of each model on the same random hidden states, in turns.

    Args:
        subjects: the models, of one hidden size; the first is the one that the others are compared with.
        ceilings: what the device can do.
        batch_size: B.
        seq_len: T.
        rounds: timed calls of each mixer.
        seed: of the hidden states.
        progress: called with 1 after each round.

    Returns:
        One entry for each subject (:mod:`keyreduce.benchmarking.figures`).
    """
    model = subjects[0].model
    size = batch_size * seq_len * subjects[0].hidden * model.dtype.itemsize
    # The input, q, k, v and the output are there at once.
    refuse_beyond_memory(5 * size, model.device, f"a batch of {batch_size} x {seq_len} tokens")
    generator = torch.Generator().manual_seed(seed)
    inputs = [
        torch.randn(batch_size, seq_len, subjects[0].hidden, generator=generator).to(model.device, model.dtype)
        for _ in range(copies_past_cache(size, model.device, at_most=8))
    ]
    calls = {
        subject.label: rotated(lambda hidden_BTD, mixer=subject.mixer: mixer(hidden_states=hidden_BTD), inputs)
        for subject in subjects
    }
    timings = interleave(calls, model.device, rounds=rounds, progress=progress)
    entries = []
    for subject in subjects:
        work = mixer_work(
            subject.mixer, subject.hidden, subject.sizes, batch_size=batch_size, seq_len=seq_len, cached=False
        )
        shape = {"label": subject.label, "head_k_dim": subject.sizes.head_k_dim}
        shape |= {"batch_size": batch_size, "seq_len": seq_len}
        memory = peak_memory(calls[subject.label], model.device)
        measured = figures(timings[subject.label], work, ceilings, tokens=batch_size * seq_len, memory=memory)
        entries.append(shape | measured)
    compare(entries, list(timings.values()))
    return entries
