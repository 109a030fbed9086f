"""Decoding steps of a whole model, of one mixer layer, and of the delta-rule operator alone, ready to be timed.

One token of context comes before: a delta-rule layer costs the same at every position, a softmax layer of a hybrid
would not. Layers, their states and the operator's states are rotated past the cache of the device.

Shapes: B sequences, D hidden.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from inspect import signature
from typing import NamedTuple

import torch
from transformers import Cache, DynamicCache

from keyreduce.benchmarking.subjects import Subject
from keyreduce.benchmarking.timing import copies_past_cache
from keyreduce.benchmarking.work import mixer_work
from keyreduce.models.operators import replaced_operators

_TOKENS = 4


class Steps(NamedTuple):
    """Some decoding steps.

    Attributes:
        run: takes them.
        count: how many they are.
        reads: returns what holds the tensors that the next ``run`` starts from.
    """

    run: Callable[[], object]
    count: int
    reads: Callable[[], object]


@torch.inference_mode()
def model_steps(subject: Subject, batch_size: int, seed: int) -> Steps:
    """Return steps of a whole model: it reads random tokens, and its cache goes from each step to the next."""
    model, generator = subject.model, torch.Generator().manual_seed(seed)
    tokens_B1 = torch.randint(subject.vocabulary, (batch_size, 1), generator=generator).to(model.device)
    cache = model(input_ids=tokens_B1, use_cache=True).past_key_values

    @torch.inference_mode()
    def run() -> None:
        for _ in range(_TOKENS):
            model(input_ids=tokens_B1, past_key_values=cache, use_cache=True)

    return Steps(run, _TOKENS, lambda: _contents(cache))


@torch.inference_mode()
def mixer_steps(subject: Subject, batch_size: int, seed: int) -> Steps:
    """Return one step for each of several copies of the mixer, each with a cache of its own."""
    generator = torch.Generator().manual_seed(seed)
    work = mixer_work(subject.mixer, subject.hidden, subject.sizes, batch_size=batch_size, seq_len=1, cached=True)
    mixers = [copy.deepcopy(subject.mixer) for _ in range(copies_past_cache(work.bytes, subject.model.device))]
    hidden_B1D = torch.randn(batch_size, 1, subject.hidden, generator=generator)
    hidden_B1D = hidden_B1D.to(subject.model.device, subject.model.dtype)
    keyword, caches = _empty_caches(subject, len(mixers))

    @torch.inference_mode()
    def run() -> None:
        for mixer, cache in zip(mixers, caches, strict=True):
            mixer(hidden_states=hidden_B1D, use_cache=True, **{keyword: cache})

    run()
    return Steps(run, len(mixers), lambda: [_contents(cache) for cache in caches])


def _empty_caches(subject: Subject, count: int) -> tuple[str, list[Cache]]:
    """Return what a mixer takes its cache as, and caches of its kind: fla's layers and transformers' differ."""
    if "cache_params" in signature(subject.mixer.forward).parameters:
        return "cache_params", [DynamicCache(config=subject.model.config) for _ in range(count)]
    from fla.models.utils import Cache as TheirCache

    return "past_key_values", [TheirCache() for _ in range(count)]


def _contents(cache: Cache) -> list[dict]:
    """Return what each layer of a cache holds now, for a cache that lets go of it at the next step."""
    return [
        {name: dict(value) if isinstance(value, dict) else value for name, value in vars(layer).items()}
        for layer in cache.layers
    ]


@torch.inference_mode()
def operator_steps(subject: Subject, batch_size: int, seed: int) -> Steps:
    """Return one call of the delta-rule operator for each of several states, with what the mixer gives it."""
    with _last_call(subject) as calls:
        mixer_steps(subject, batch_size, seed).run()
    ((operator, operands, arguments),) = calls
    first = arguments["initial_state"]
    count = copies_past_cache(2 * first.numel() * first.element_size(), first.device, at_most=256)
    states = [first, *(first.clone() for _ in range(count - 1))]

    @torch.inference_mode()
    def run() -> list:
        # All results are kept until the end: a new state in the place of the last one would not leave the cache.
        return [operator(*operands, **arguments | {"initial_state": state}) for state in states]

    return Steps(run, count, lambda: states)


STEPS: dict[str, Callable[[Subject, int, int], Steps]] = {
    "model": model_steps,
    "mixer": mixer_steps,
    "operator": operator_steps,
}


@contextlib.contextmanager
def _last_call(subject: Subject) -> Iterator[list]:
    """Note the last operator that the block makes a mixer call, with its arguments."""
    calls: list = []

    def noting(operator):
        def call(*operands, initial_state=None, **arguments):
            # A cache may write the next state into the place of this one.
            state = None if initial_state is None else initial_state.clone()
            calls[:] = [(operator, operands, arguments | {"initial_state": state})]
            return operator(*operands, initial_state=initial_state, **arguments)

        return call

    with replaced_operators(subject.family, [subject.mixer], noting):
        yield calls
