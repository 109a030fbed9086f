"""How often fla tunes its kernels."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def tuned_once_for_any_batch() -> Iterator[None]:
    """Within the block, let fla's norms keep the kernel variant that was best for the first batch size.

    They tune again whenever the number of rows, in thousands, changes (``NB`` in their keys), which takes some 15
    seconds for each batch size that a search tries. A norm is a small part of a step.
    """
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import KernelInterface

    changed: dict[Any, list[str]] = {}
    for name, module in list(sys.modules.items()):
        kernels = vars(module).values() if name.startswith("fla.") else ()
        kernel: Any
        for kernel in [value for value in kernels if isinstance(value, KernelInterface)]:
            while not isinstance(kernel, Autotuner) and hasattr(kernel, "fn"):
                kernel = kernel.fn  # heuristics wrap it
            if isinstance(kernel, Autotuner) and "NB" in kernel.keys:
                changed[kernel] = kernel.keys
    for kernel, keys in changed.items():
        kernel.keys = [key for key in keys if key != "NB"]
    try:
        yield
    finally:
        for kernel, keys in changed.items():
            kernel.keys = keys
