"""The pruning methods, by name."""

import difflib

from keyreduce.errors import KeyreduceError
from keyreduce.pruning.methods.magnitude import MAGNITUDE
from keyreduce.pruning.methods.method import LayerView, Method
from keyreduce.pruning.methods.random import RANDOM
from keyreduce.pruning.methods.row_norm import L1, L2
from keyreduce.pruning.methods.wanda import WANDA

METHODS = {method.name: method for method in (WANDA, L1, L2, MAGNITUDE, RANDOM)}

__all__ = ["METHODS", "LayerView", "Method", "method_named"]


def method_named(name: str) -> Method:
    """Return the method of that name.

    Raises:
        KeyreduceError: there is none; the nearest name is suggested.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name.lower(), METHODS, n=1)
        guess = f"did you mean {near[0]}?" if near else f"take one of {', '.join(METHODS)}"
        raise KeyreduceError(f"there is no method {name!r}; {guess}")
    return METHODS[name]
