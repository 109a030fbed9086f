"""Which serving engines a pruned size suits. The facts are of late 2026; engines change."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from keyreduce.errors import KeyreduceError
from keyreduce.families import Family, MixerSizes, family_of
from keyreduce.pruning.budget import sizes_after


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

# transformers' own operators are plain PyTorch, and take any size.
_ANY = Engine("transformers", "any size", lambda s: True)
CHOICES = {
    "fla": ENGINES[0],
    "vllm": ENGINES[2],
    "sglang": ENGINES[3],
    "mlx": ENGINES[4],
    "llama.cpp": ENGINES[5],
    "transformers": _ANY,
}
"""What ``engine`` calls them."""


def suited_engines(family: Family, layers: Iterable[MixerSizes]) -> tuple[list[str], list[str]]:
    """Return the names of the engines that layers of these sizes suit, and of those they do not, with their demand.

    An engine must also know the architecture; those that keyreduce ships, none of them does.
    """
    if family.shipped_by == "keyreduce":
        return [], [f"serving engines (none knows {family.model_type})"]
    layers = list(layers)
    engines = (_ANY, *ENGINES) if family.shipped_by == "transformers" else ENGINES
    suited = {engine: all(engine.is_met(sizes) for sizes in layers) for engine in engines}
    return (
        [engine.name for engine, is_met in suited.items() if is_met],
        [f"{engine.name} ({engine.demand})" for engine, is_met in suited.items() if not is_met],
    )


def check_engine(name: str, config: Mapping, keep: Mapping[str, Mapping[int, int]]) -> None:
    """Refuse sizes that an engine does not run, and name those near them that it does.

    Args:
        name: one of :data:`CHOICES`.
        config: of the model that is to be cut.
        keep: target -> layer -> how many are to stay.

    Raises:
        KeyreduceError: there is no such engine, it knows no such architecture, or it does not run such sizes.
    """
    if name not in CHOICES:
        raise KeyreduceError(f"`engine` is {name!r}; take one of {', '.join(CHOICES)}")
    engine, family = CHOICES[name], family_of(config)
    if family.shipped_by == "keyreduce":
        raise KeyreduceError(f"`engine` {name}: it does not know {family.model_type}, which keyreduce alone ships")
    for layer, before in family.layer_sizes(config).items():
        after = sizes_after(before, {target: number_of[layer] for target, number_of in keep.items()})
        if engine.is_met(after):
            continue
        raise KeyreduceError(
            f"`engine` {name} wants {engine.demand}, and the cut leaves {after.head_k_dim} key and {after.head_v_dim} "
            f"value channels a head; {_fitting(engine, before, after)}"
        )


def _fitting(engine: Engine, before: MixerSizes, after: MixerSizes) -> str:
    """What to ask for instead: key sizes with the same value size, or else pairs of the two."""
    keys = [key for key in range(1, before.head_k_dim + 1) if engine.is_met(after._replace(head_k_dim=key))]
    if keys:
        listed = ", ".join(map(str, keys)) if len(keys) < 12 else f"{keys[0]} to {keys[-1]}"
        return f"with `target` key, `keep` one of {listed}"
    pairs = [
        f"{key},{value}"
        for value in range(before.head_v_dim, 0, -1)
        for key in range(before.head_k_dim, 0, -1)
        if engine.is_met(after._replace(head_k_dim=key, head_v_dim=value))
    ]
    return f"with `target` key,value, `keep` one of {' '.join(pairs[:8])}" if pairs else "no cut of this model fits"
