"""Which serving engines a pruned size suits. The facts are of late 2026; engines change."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from keyreduce.families import Family, MixerSizes


class Engine(NamedTuple):
    """An engine's demand on the mixer's sizes."""

    name: str
    demand: str
    is_met: Callable[[MixerSizes], bool]


ENGINES = (
    Engine("fla", "head_k_dim at most 256", lambda s: s.head_k_dim <= 256),
    Engine("fla, 16-bit training", "an even head_k_dim", lambda s: s.head_k_dim <= 256 and s.head_k_dim % 2 == 0),
    Engine("vLLM (Triton)", "head_k_dim at most 256", lambda s: s.head_k_dim <= 256),
    Engine(
        "SGLang",
        "head_k_dim and the value channels of a key head powers of two",
        lambda s: s.head_k_dim.bit_count() == (s.value_heads // s.key_heads * s.head_v_dim).bit_count() == 1,
    ),
    Engine("MLX (Metal)", "head_k_dim a multiple of 32", lambda s: s.head_k_dim % 32 == 0),
    Engine(
        "llama.cpp",
        "head_k_dim of 16, 32, 64 or 128, equal to head_v_dim",
        lambda s: s.head_k_dim in (16, 32, 64, 128) and s.head_k_dim == s.head_v_dim,
    ),
    Engine(
        "FlashInfer, FlashQLA, CuteDSL",
        "head_k_dim and head_v_dim 128",
        lambda s: s.head_k_dim == s.head_v_dim == 128,
    ),
)


def suited_engines(family: Family, layers: Iterable[MixerSizes]) -> tuple[list[str], list[str]]:
    """Return the names of the engines that layers of these sizes suit, and of those they do not, with their demand.

    An engine must also know the architecture; those that fla does not ship, none of them does.
    """
    if family.shipped_by != "fla":
        return [], [f"serving engines (none knows {family.model_type})"]
    layers = list(layers)
    suited = {engine: all(engine.is_met(sizes) for sizes in layers) for engine in ENGINES}
    return (
        [engine.name for engine, is_met in suited.items() if is_met],
        [f"{engine.name} ({engine.demand})" for engine, is_met in suited.items() if not is_met],
    )
