"""How fast a whole model reads a prompt, and how fast it takes a step of training.

Shapes: B sequences, T tokens.
"""

from collections.abc import Callable, Sequence

import torch

from keyreduce.benchmarking.ceilings import Ceilings
from keyreduce.benchmarking.figures import compare, figures
from keyreduce.benchmarking.subjects import Subject, refuse_beyond_memory
from keyreduce.benchmarking.timing import interleave, peak_memory, rotated
from keyreduce.benchmarking.work import Work, model_work

_INPUTS = 4


def time_models(
    subjects: Sequence[Subject],
    ceilings: Ceilings,
    *,
    batch_size: int,
    seq_len: int,
    rounds: int,
    seed: int,
    train: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[dict]:
    """Time whole models on the same random tokens, in turns: a prefill that fills a cache, or a step of training.

    A step of training is forward, backward, and AdamW, whose memory is the model's twice: it changes the weights.

    Args:
        subjects: the models; the first is the one that the others are compared with.
        ceilings: what the device can do.
        batch_size: B.
        seq_len: T.
        rounds: timed calls of each model.
        seed: of the tokens.
        train: a step of training, and not a prefill.
        progress: called with 1 after each round.

    Returns:
        One entry for each subject (:mod:`keyreduce.benchmarking.figures`). A step of training counts three times the
        operations of a forward pass with all logits, and three times its bytes.
    """
    device = subjects[0].model.device
    vocabulary = subjects[0].vocabulary
    width = 5 * subjects[0].hidden + (vocabulary if train else 0)
    size = batch_size * seq_len * width * subjects[0].model.dtype.itemsize
    refuse_beyond_memory(size, device, f"a batch of {batch_size} x {seq_len} tokens")
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randint(vocabulary, (batch_size, seq_len), generator=generator).to(device) for _ in range(_INPUTS)]
    make = _training if train else _prefill
    calls = {subject.label: rotated(make(subject.model), inputs) for subject in subjects}
    timings = interleave(calls, device, rounds=rounds, progress=progress)
    entries = []
    for subject in subjects:
        work = model_work(subject.model, subject.family, batch_size=batch_size, seq_len=seq_len, cached=False)
        if train:
            head = 2 * (batch_size * seq_len - batch_size) * subject.model.get_output_embeddings().weight.numel()
            work = Work(3 * (work.flops + head), 3 * work.bytes)
        shape = {"label": subject.label, "head_k_dim": subject.sizes.head_k_dim}
        shape |= {"batch_size": batch_size, "seq_len": seq_len}
        memory = peak_memory(calls[subject.label], device)
        measured = figures(timings[subject.label], work, ceilings, tokens=batch_size * seq_len, memory=memory)
        entries.append(shape | measured)
        subject.model.eval()
    compare(entries, list(timings.values()))
    return entries


def _prefill(model: torch.nn.Module) -> Callable[[torch.Tensor], object]:
    @torch.inference_mode()
    def call(tokens_BT: torch.Tensor) -> object:
        return model(input_ids=tokens_BT, use_cache=True, logits_to_keep=1)

    return call


def _training(model: torch.nn.Module) -> Callable[[torch.Tensor], object]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    model.train()

    def call(tokens_BT: torch.Tensor) -> None:
        model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return call
