"""Decoding steps of a whole model, of one mixer layer, and of the delta-rule operator alone, ready to be timed.

The context is one token: a delta-rule layer takes as long at any position, but the softmax layers of a hybrid do not.
A mixer and the operator are timed on several copies of their weights and states in turn, so many that no copy is still
in the cache of the device when its turn comes.

Shapes: B sequences, D hidden.
"""

import copy
import sys
from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache

from keyreduce.benchmarking.timed_models import TimedModel
from keyreduce.benchmarking.timing import copies_past_cache
from keyreduce.benchmarking.work import Work, mixer_work, model_work, operator_work
from keyreduce.models.operators import replaced_operators

_TOKENS = 4
# Of transformers since 5.24, of its mixers before that, and of its models before that and of fla.
_CACHE_NAMES = ("cache", "cache_params", "past_key_values")


class DecodeSteps(NamedTuple):
    """One or several decoding steps.

    Attributes:
        run: a function that runs ``count`` steps.
        reads: a function that returns an object with the tensors that the next ``run`` starts from.
        work: the operations and bytes of one step.
    """

    run: Callable[[], object]
    count: int
    reads: Callable[[], object]
    work: Work


@torch.inference_mode()
def model_steps(timed: TimedModel, batch_size: int, seed: int) -> DecodeSteps:
    """Return steps of a whole model on random tokens, in which the cache passes from each step to the next."""
    model, generator = timed.model, torch.Generator().manual_seed(seed)
    tokens_B1 = torch.randint(timed.vocabulary, (batch_size, 1), generator=generator).to(model.device)
    outputs, keyword = model(input_ids=tokens_B1, use_cache=True), _cache_keyword(model)
    cache = outputs["cache" if "cache" in outputs else "past_key_values"]

    @torch.inference_mode()
    def run() -> None:
        for _ in range(_TOKENS):
            model(input_ids=tokens_B1, use_cache=True, **{keyword: cache})

    work = model_work(timed, batch_size=batch_size, seq_len=1, cached=True)
    return DecodeSteps(run, _TOKENS, lambda: _contents(cache), work)


@torch.inference_mode()
def mixer_steps(timed: TimedModel, batch_size: int, seed: int) -> DecodeSteps:
    """Return one step for each of several copies of the mixer, each with a cache of its own."""
    generator = torch.Generator().manual_seed(seed)
    work = mixer_work(timed, batch_size=batch_size, seq_len=1, cached=True)
    mixers = [copy.deepcopy(timed.mixer) for _ in range(copies_past_cache(work.bytes, timed.device))]
    hidden_B1D = torch.randn(batch_size, 1, timed.hidden, generator=generator).to(timed.device, timed.dtype)
    keyword, caches = _cache_keyword(timed.mixer), [_new_cache(timed) for _ in mixers]
    # Mixers of transformers return the state whenever they are given a cache, others are asked.
    options = {"use_cache": True} if "use_cache" in signature(timed.mixer.forward).parameters else {}

    @torch.inference_mode()
    def run() -> None:
        for mixer, cache in zip(mixers, caches, strict=True):
            mixer(hidden_states=hidden_B1D, **options, **{keyword: cache})

    run()
    return DecodeSteps(run, len(mixers), lambda: [_contents(cache) for cache in caches], work)


def _cache_keyword(module: nn.Module) -> str:
    """Return by what name a model or a mixer takes its cache: fla and transformers differ, and releases of it too."""
    return next(name for name in _CACHE_NAMES if name in signature(module.forward).parameters)


def _new_cache(timed: TimedModel) -> Any:
    """Return an empty cache such as the model makes itself."""
    if timed.family.shipped_by != "transformers":
        from fla.models.utils import Cache as FlaCache

        return FlaCache()
    # Up to transformers 5.14 this model has a class of its own for it.
    module = sys.modules[type(timed.mixer).__module__]
    return getattr(module, "OlmoHybridDynamicCache", DynamicCache)(config=timed.model.config)


def _contents(cache: Any) -> list[dict]:
    """Return what each layer of a cache holds now; the cache may drop it at the next step."""
    return [
        {name: copy.copy(value) if isinstance(value, dict | list) else value for name, value in vars(layer).items()}
        for layer in getattr(cache, "layers", [cache])
    ]


@torch.inference_mode()
def operator_steps(timed: TimedModel, batch_size: int, seed: int) -> DecodeSteps:
    """Return one call of the delta-rule operator for each of several states, with the arguments of the mixer."""
    last_call: list = []

    def noting(operator):
        def call(*operands, initial_state=None, **arguments):
            # A cache may write the next state over this one.
            state = None if initial_state is None else initial_state.clone()
            last_call[:] = operator, operands, arguments | {"initial_state": state}
            return operator(*operands, initial_state=initial_state, **arguments)

        return call

    with replaced_operators(timed.family, [timed.mixer], noting):
        mixer_steps(timed, batch_size, seed).run()
    operator, operands, arguments = last_call
    first = arguments["initial_state"]
    count = copies_past_cache(2 * first.numel() * first.element_size(), first.device, at_most=256)
    states = [first, *(first.clone() for _ in range(count - 1))]

    @torch.inference_mode()
    def run() -> list:
        # All results are kept until the end: a new state at the address of the last one would stay in the cache.
        return [operator(*operands, **arguments | {"initial_state": state}) for state in states]

    work = operator_work(timed.sizes, batch_size=batch_size, item=timed.dtype.itemsize)
    return DecodeSteps(run, count, lambda: states, work)


STEPS = {"model": model_steps, "mixer": mixer_steps, "operator": operator_steps}
