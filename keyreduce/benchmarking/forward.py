"""Latency and peak memory of one mixer layer, of a whole model's prefill, and of its training step.

Shapes: B sequences, T tokens, D hidden.
"""

from collections.abc import Callable, Sequence

import torch

from keyreduce.benchmarking.metrics import compare, metrics
from keyreduce.benchmarking.roofline import Roofline
from keyreduce.benchmarking.timed_models import TimedModel, check_memory
from keyreduce.benchmarking.timing import copies_past_cache, interleave, peak_memory, rotated
from keyreduce.benchmarking.work import Work, mixer_work, model_work, training_work

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
    """Time all models on the same random inputs, in turns.

    Args:
        models: the models, of one hidden size; the first is the one that the others are compared with.
        roofline: the peak performance of the device.
        kind: "mixer" is a forward pass of the first delta-rule mixer layer on hidden states; "forward" is a prefill of
            the model that fills a cache; "train_step" is forward, backward and AdamW, whose state is twice as large as
            the model. It changes the weights.
        batch_size: B.
        seq_len: T.
        rounds: timed calls of each model.
        seed: the seed of the inputs.
        progress: called with 1 after each round.

    Returns:
        One entry for each model (:mod:`keyreduce.benchmarking.metrics`). The operations of a training step are counted
        as three times those of a forward pass with all logits, and so are its bytes.
    """
    first, tokens = models[0], batch_size * seq_len
    device, dtype = first.model.device, first.model.dtype
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
    make = {"mixer": _mixer_pass, "forward": _prefill, "train_step": _training}[kind]
    calls = {timed.label: rotated(make(timed), inputs) for timed in models}
    timings = interleave(calls, device, rounds=rounds, progress=progress)
    entries = []
    for timed in models:
        entry = {"label": timed.label, "head_k_dim": timed.sizes.head_k_dim}
        entry |= {"batch_size": batch_size, "seq_len": seq_len}
        memory, work = peak_memory(calls[timed.label], device), _work(timed, kind, batch_size, seq_len)
        entries.append(entry | metrics(timings[timed.label], work, roofline, tokens=tokens, memory=memory))
        timed.model.eval()
    compare(entries, list(timings.values()))
    return entries


def _work(timed: TimedModel, kind: str, batch_size: int, seq_len: int) -> Work:
    shape: dict[str, int] = {"batch_size": batch_size, "seq_len": seq_len}
    if kind == "mixer":
        return mixer_work(timed.mixer, timed.hidden, timed.sizes, cached=False, **shape)
    if kind == "forward":
        return model_work(timed.model, timed.family, cached=False, **shape)
    return training_work(timed.model, timed.family, **shape)


def _mixer_pass(timed: TimedModel) -> Callable[[torch.Tensor], object]:
    @torch.inference_mode()
    def call(hidden_BTD: torch.Tensor) -> object:
        return timed.mixer(hidden_states=hidden_BTD)

    return call


def _prefill(timed: TimedModel) -> Callable[[torch.Tensor], object]:
    @torch.inference_mode()
    def call(tokens_BT: torch.Tensor) -> object:
        return timed.model(input_ids=tokens_BT, use_cache=True, logits_to_keep=1)

    return call


def _training(timed: TimedModel) -> Callable[[torch.Tensor], object]:
    model = timed.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    model.train()

    def call(tokens_BT: torch.Tensor) -> None:
        model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return call
