"""What fla tunes, and how often."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def tuned_once_for_any_batch() -> Iterator[None]:
    """Within the block let fla's norms keep the variant that was best at the first batch.

    They take the number of rows, in thousands, for a reason to tune anew (``NB`` in their keys), which costs a model
    some 15 seconds for each batch size that a search tries. A norm is a small part of a step.
    """
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import KernelInterface

    changed = {}
    for name, module in list(sys.modules.items()):
        kernels = vars(module).values() if name.startswith("fla.") else ()
        for kernel in [value for value in kernels if isinstance(value, KernelInterface)]:
            while not isinstance(kernel, Autotuner) and hasattr(kernel, "fn"):
                kernel = kernel.fn  # heuristics stand around it
            if isinstance(kernel, Autotuner) and "NB" in kernel.keys:
                changed[kernel] = kernel.keys
    for kernel, keys in changed.items():
        kernel.keys = [key for key in keys if key != "NB"]
    try:
        yield
    finally:
        for kernel, keys in changed.items():
            kernel.keys = keys
