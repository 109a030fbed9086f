"""Which variants of fla's kernels Triton tries. On a fresh machine to try them all takes minutes for each model."""

import math
import sys
from collections.abc import Iterator
from typing import Any

from keyreduce.errors import KeyreduceError

# A variant that is nearly as fast as the best one is near these on an NVIDIA GPU of any recent kind.
_WARPS, _STAGES, _TILE = 4, 3, 64


def tune_few_variants(count: int = 2) -> None:
    """Let Triton try ``count`` variants of each kernel of fla, for the rest of this process.

    They are those of middling size, and as the last one the smallest: in float32, or on a GPU with less shared memory,
    the others may not fit, and Triton passes over a variant that does not. It concerns the kernels of modules that were
    imported before. KeyreduceError if ``count`` is below 2.
    """
    if count < 2:
        raise KeyreduceError(f"`count` is {count}; at least two variants are tried, as the first may not fit")
    for kernel in tuned_kernels():
        nearest = sorted(kernel.configs, key=_distance)
        smallest = min(nearest, key=_size)
        kernel.configs = [*[one for one in nearest if one is not smallest][: count - 1], smallest]


def tuned_kernels() -> Iterator[Any]:
    """Yield each of fla's kernels that Triton tunes, a `triton.runtime.autotuner.Autotuner`, once."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import KernelInterface

    seen = set()
    for name, module in list(sys.modules.items()):
        kernels = list(vars(module).values()) if name.startswith("fla.") else ()
        kernel: Any
        for kernel in [value for value in kernels if isinstance(value, KernelInterface)]:
            while not isinstance(kernel, Autotuner) and hasattr(kernel, "fn"):
                kernel = kernel.fn  # heuristics wrap it
            if isinstance(kernel, Autotuner) and id(kernel) not in seen:
                seen.add(id(kernel))
                yield kernel


def _distance(variant: Any) -> float:
    far = sum(abs(tile - _TILE) / _TILE for tile in _tiles(variant))
    return far + abs(variant.num_warps - _WARPS) + abs(variant.num_stages - _STAGES) / 2


def _size(variant: Any) -> tuple[int, int]:
    """What a variant needs: shared memory, which holds the tiles of all stages, and registers."""
    return math.prod(_tiles(variant)) * max(1, variant.num_stages), variant.num_warps


def _tiles(variant: Any) -> list[int]:
    return [value for name, value in variant.kwargs.items() if isinstance(value, int) and name.startswith("B")]
