"""Latency and peak memory of one mixer layer, of a whole model's prefill, and of its training step.

Shapes: B sequences, T tokens, D hidden.
"""

from collections.abc import Callable, Sequence

import torch

from keyreduce.benchmarking.metrics import Roofline, compare, metrics
from keyreduce.benchmarking.timed_models import TimedModel, check_memory
from keyreduce.benchmarking.timing import copies_past_cache, interleave, peak_memory, rotated
from keyreduce.benchmarking.work import mixer_work, model_work, training_work

_INPUTS = 4


def time_passes(
    models: Sequence[TimedModel],
    roofline: Roofline,
    kind: str,
    *,
    batch_size: int,
    seq_len: int,
    rounds: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> list[dict]:
    """Time all models, which have one hidden size, on the same random inputs, in turns.

    The kind "mixer" is a forward pass of the first delta-rule mixer layer on hidden states; "forward" is a prefill of
    the model that fills a cache; "train_step" is forward, backward and AdamW, whose state is twice as large as the
    model. It changes the weights. Returned is one entry for each model (:mod:`keyreduce.benchmarking.metrics`);
    ``progress`` is called with 1 after each round.
    """
    first, tokens = models[0], batch_size * seq_len
    device, dtype = first.device, first.dtype
    # A mixer's input, q, k, v and output are in memory at once, and in training all logits.
    width = 5 * first.hidden + (first.vocabulary if kind == "train_step" else 0)
    check_memory(tokens * width * dtype.itemsize, device, f"a batch of {batch_size} x {seq_len} tokens")
    generator = torch.Generator().manual_seed(seed)
    if kind == "mixer":
        count = copies_past_cache(tokens * first.hidden * dtype.itemsize, device, at_most=8)
        shape = (batch_size, seq_len, first.hidden)
        inputs = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(count)]
    else:
        shape = (batch_size, seq_len)
        inputs = [torch.randint(first.vocabulary, shape, generator=generator).to(device) for _ in range(_INPUTS)]
    make, work_of = _KINDS[kind]
    calls = {timed.label: rotated(make(timed), inputs) for timed in models}
    timings = interleave(calls, device, rounds=rounds, progress=progress)
    entries = []
    for timed in models:
        entry = {"label": timed.label, **timed.head_sizes}
        entry |= {"batch_size": batch_size, "seq_len": seq_len}
        memory = peak_memory(calls[timed.label], device)
        work = work_of(timed, batch_size=batch_size, seq_len=seq_len)
        entries.append(entry | metrics(timings[timed.label], work, roofline, tokens=tokens, memory=memory))
        timed.model.eval()
    compare(entries, list(timings.values()))
    return entries


def mixer_pass(timed: TimedModel) -> Callable[[torch.Tensor], object]:
    """Return a function that runs the first delta-rule mixer layer on hidden states ``[B, T, D]``."""
    return torch.inference_mode()(lambda hidden_BTD: timed.mixer(hidden_states=hidden_BTD))


def _prefill(timed: TimedModel) -> Callable[[torch.Tensor], object]:
    return torch.inference_mode()(lambda tokens_BT: timed.model(input_ids=tokens_BT, use_cache=True, logits_to_keep=1))


def _training(timed: TimedModel) -> Callable[[torch.Tensor], object]:
    model = timed.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    model.train()

    def call(tokens_BT: torch.Tensor) -> None:
        model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return call


_KINDS = {
    "mixer": (mixer_pass, mixer_work),
    "forward": (_prefill, model_work),
    "train_step": (_training, training_work),
}
