"""The delta-rule operators that mixers call, replaced for a while.

A mixer finds its operators by their names in the module of its ``forward``, or, with transformers up to 5.14, has them
as attributes. A function put in their place sees, and may change, what each layer gives to them and gets.
"""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from keyreduce.errors import KeyreduceError
from keyreduce.families import Family
from keyreduce.versions import tested_versions


def operands(args: Sequence, kwargs: Mapping) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q, k and v of a call of a delta-rule operator: fla's layers name them, those of transformers do not."""
    return tuple(args[:3]) if args else (kwargs["q"], kwargs["k"], kwargs["v"])


def writing_strength(args: Sequence, kwargs: Mapping) -> torch.Tensor | None:
    """Return the beta of such a call, ``[B, T, W]`` or ``[B, T, W, V]``; None where there is none, and it is 1."""
    beta = kwargs.get("beta", args[4] if len(args) > 4 else None)
    if beta is None or not kwargs.get("use_beta_sigmoid_in_kernel"):
        return beta
    return beta.sigmoid() * (2 if kwargs.get("allow_neg_eigval") else 1)


@contextlib.contextmanager
def replaced_operators(
    family: Family, mixers: Iterable[nn.Module], replace: Callable[[Callable], Callable]
) -> Iterator[None]:
    """While the block runs, ``replace(operator)`` stands in for each operator that the mixers call.

    Raises KeyreduceError if a mixer has none, by the names that the family's table gives.
    """
    mixers, places = list(mixers), {}
    for mixer in mixers:
        module = sys.modules[type(mixer).forward.__module__]
        found = [(module, name) for name in family.operators if hasattr(module, name)]
        found += [(mixer, name) for name, value in vars(mixer).items() if callable(value) and _is_held(name, family)]
        if not found:
            named = f"{type(mixer).__name__} calls none of {', '.join(family.operators)}"
            raise KeyreduceError(f"{named}; {tested_versions()}")
        places |= dict.fromkeys(found)
    with contextlib.ExitStack() as undo:
        for holder, name in places:
            original = getattr(holder, name)
            undo.callback(setattr, holder, name, original)
            setattr(holder, name, replace(original))
        yield


def _is_held(attribute: str, family: Family) -> bool:
    """Whether a mixer of transformers up to 5.14 has one of the family's operators in this attribute."""
    return any(operator.removeprefix("torch_") == attribute for operator in family.operators)


@contextlib.contextmanager
def replaced_by_layer(
    model: nn.Module, family: Family, layers: Iterable[int], replace: Callable[[Callable, Callable[[], int]], Callable]
) -> Iterator[None]:
    """The same with ``replace(operator, layer)``; ``layer()`` is the one of the layers whose mixer runs."""
    running: list[int] = []
    mixers = {layer: model.get_submodule(family.mixer.format(layer=layer)) for layer in layers}
    with contextlib.ExitStack() as undo:
        for layer, mixer in mixers.items():
            hook = mixer.register_forward_pre_hook(lambda *_, layer=layer: running.__setitem__(slice(None), [layer]))
            undo.callback(hook.remove)
        undo.enter_context(
            replaced_operators(family, mixers.values(), lambda operator: replace(operator, lambda: running[0]))
        )
        yield
