"""keyreduce: structured pruning of DeltaNet-family language models.

The Python API is ``calibrate``, ``prune``, ``recover`` and ``evaluate`` (:mod:`keyreduce.api.functions`), for folders
and for modules in memory, and ``inspect``, which reads config and headers alone; a module of :mod:`keyreduce.api` for
each verb has its request and ``run``. Nothing heavy is imported here: what is named is loaded when it is first touched,
so that the command line's help answers at once.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keyreduce.api.functions import calibrate, evaluate, prune, recover
    from keyreduce.api.inspect import inspect
    from keyreduce.errors import KeyreduceError

__version__ = "0.2.0"
__all__ = ["KeyreduceError", "__version__", "calibrate", "evaluate", "inspect", "prune", "recover"]


def __getattr__(name: str) -> Any:
    if name in ("calibrate", "evaluate", "prune", "recover"):
        from keyreduce.api import functions

        return getattr(functions, name)
    if name == "inspect":
        from keyreduce.api.inspect import inspect

        return inspect
    if name == "KeyreduceError":
        from keyreduce.errors import KeyreduceError

        return KeyreduceError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
