"""The pruning methods, by name: those of this folder, and those that other packages register.

A package registers a method by an entry point of the group ``keyreduce.methods`` that leads to a ``Method``.
"""

import difflib
from importlib.metadata import EntryPoint, entry_points

from keyreduce.errors import KeyreduceError, reason
from keyreduce.pruning.methods.auto import AUTO
from keyreduce.pruning.methods.energy import ENERGY, MAGNITUDE
from keyreduce.pruning.methods.method import TARGETS, LayerView, Method, Selection, all_targets, highest, ranked
from keyreduce.pruning.methods.pca import PCA
from keyreduce.pruning.methods.random import RANDOM
from keyreduce.pruning.methods.rank_norm import RANK_NORM
from keyreduce.pruning.methods.row_norm import L1, L2
from keyreduce.pruning.methods.rrqr import RRQR
from keyreduce.pruning.methods.taylor import TAYLOR
from keyreduce.pruning.methods.wanda import WANDA

_OURS = (AUTO, RRQR, WANDA, TAYLOR, PCA, L1, L2, MAGNITUDE, ENERGY, RANK_NORM, RANDOM)
METHODS = {method.name: method for method in _OURS}
ENTRY_POINT_GROUP = "keyreduce.methods"

__all__ = [
    "METHODS",
    "TARGETS",
    "LayerView",
    "Method",
    "Selection",
    "all_targets",
    "highest",
    "method_named",
    "ranked",
    "registered_elsewhere",
]


def registered_elsewhere() -> dict[str, EntryPoint]:
    """Return the methods of other packages, not loaded yet; a name of ours stays with ours."""
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP) if point.name not in METHODS}


def method_named(name: str) -> Method:
    """Return the method of that name; KeyreduceError if there is none, or one of another package does not load."""
    if name in METHODS:
        return METHODS[name]
    others = registered_elsewhere()
    if name not in others:
        names = [*METHODS, *others]
        near = difflib.get_close_matches(name.lower(), names, n=1)
        guess = f"did you mean {near[0]}?" if near else f"take one of {', '.join(names)}"
        raise KeyreduceError(f"there is no method {name!r}; {guess}")
    try:
        method = others[name].load()
    except Exception as error:
        raise KeyreduceError(f"method {name!r} ({others[name].value}) does not load: {reason(error)}") from error
    if not isinstance(method, Method):
        raise KeyreduceError(f"method {name!r} ({others[name].value}) is not a keyreduce.pruning.methods.Method")
    return method
