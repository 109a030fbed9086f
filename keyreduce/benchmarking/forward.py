"""How fast one mixer layer is, how fast a whole model reads a prompt, and how fast it takes a step of training.

Shapes: B sequences, T tokens, D hidden.
"""

from collections.abc import Callable, Sequence

import torch

from keyreduce.benchmarking.ceilings import Ceilings
from keyreduce.benchmarking.figures import compare, figures
from keyreduce.benchmarking.subjects import Subject, refuse_beyond_memory
from keyreduce.benchmarking.timing import copies_past_cache, interleave, peak_memory, rotated
from keyreduce.benchmarking.work import Work, mixer_work, model_work

_INPUTS = 4


def time_passes(
    subjects: Sequence[Subject],
    ceilings: Ceilings,
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
        subjects: the models, of one hidden size; the first is the one that the others are compared with.
        ceilings: what the device can do.
        kind: "mixer" is a forward pass of the first delta-rule mixer layer on hidden states; "forward" is a prefill of
            the model that fills a cache; "train_step" is forward, backward and AdamW, whose memory is the model's
            twice. It changes the weights.
        batch_size: B.
        seq_len: T.
        rounds: timed calls of each model.
        seed: the seed of the inputs.
        progress: called with 1 after each round.

    Returns:
        One entry for each subject (:mod:`keyreduce.benchmarking.figures`). A step of training counts three times the
        operations of a forward pass with all logits, and three times its bytes.
    """
    first, tokens = subjects[0], batch_size * seq_len
    device, dtype = first.model.device, first.model.dtype
    # A mixer's input, q, k, v and output are in memory at once, and in training all logits.
    width = 5 * first.hidden + (first.vocabulary if kind == "train_step" else 0)
    refuse_beyond_memory(tokens * width * dtype.itemsize, device, f"a batch of {batch_size} x {seq_len} tokens")
    generator = torch.Generator().manual_seed(seed)
    if kind == "mixer":
        count = copies_past_cache(tokens * first.hidden * dtype.itemsize, device, at_most=8)
        shape = (batch_size, seq_len, first.hidden)
        inputs = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(count)]
    else:
        shape = (batch_size, seq_len)
        inputs = [torch.randint(first.vocabulary, shape, generator=generator).to(device) for _ in range(_INPUTS)]
    make = {"mixer": _mixer_pass, "forward": _prefill, "train_step": _training}[kind]
    calls = {subject.label: rotated(make(subject), inputs) for subject in subjects}
    timings = interleave(calls, device, rounds=rounds, progress=progress)
    entries = []
    for subject in subjects:
        entry = {"label": subject.label, "head_k_dim": subject.sizes.head_k_dim}
        entry |= {"batch_size": batch_size, "seq_len": seq_len}
        memory, work = peak_memory(calls[subject.label], device), _work(subject, kind, batch_size, seq_len)
        entries.append(entry | figures(timings[subject.label], work, ceilings, tokens=tokens, memory=memory))
        subject.model.eval()
    compare(entries, list(timings.values()))
    return entries


def _work(subject: Subject, kind: str, batch_size: int, seq_len: int) -> Work:
    shape = {"batch_size": batch_size, "seq_len": seq_len}
    if kind == "mixer":
        return mixer_work(subject.mixer, subject.hidden, subject.sizes, cached=False, **shape)
    work = model_work(subject.model, subject.family, cached=False, **shape)
    if kind == "forward":
        return work
    head = 2 * batch_size * (seq_len - 1) * subject.model.get_output_embeddings().weight.numel()
    return Work(3 * (work.flops + head), 3 * work.bytes)


def _mixer_pass(subject: Subject) -> Callable[[torch.Tensor], object]:
    @torch.inference_mode()
    def call(hidden_BTD: torch.Tensor) -> object:
        return subject.mixer(hidden_states=hidden_BTD)

    return call


def _prefill(subject: Subject) -> Callable[[torch.Tensor], object]:
    @torch.inference_mode()
    def call(tokens_BT: torch.Tensor) -> object:
        return subject.model(input_ids=tokens_BT, use_cache=True, logits_to_keep=1)

    return call


def _training(subject: Subject) -> Callable[[torch.Tensor], object]:
    model = subject.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    model.train()

    def call(tokens_BT: torch.Tensor) -> None:
        model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return call
