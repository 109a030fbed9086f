"""Which variants of fla's kernels Triton tries. On a fresh machine to try them all takes minutes for each model."""

import sys
from collections.abc import Iterator
from typing import Any

# A variant that is nearly as fast as the best one is near these on an NVIDIA GPU of any recent kind.
_WARPS, _STAGES, _TILE = 4, 3, 64


def tune_few_variants(count: int = 2) -> None:
    """Let Triton try ``count`` variants of each kernel of fla, those of middling size, for the rest of this process.

    It concerns the kernels of modules that were imported before.
    """
    for kernel in tuned_kernels():
        kernel.configs = sorted(kernel.configs, key=_distance)[:count]


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
    tiles = [value for name, value in variant.kwargs.items() if isinstance(value, int) and name.startswith("B")]
    far = sum(abs(tile - _TILE) / _TILE for tile in tiles)
    return far + abs(variant.num_warps - _WARPS) + abs(variant.num_stages - _STAGES) / 2
