"""The sizes that serving engines and kernel libraries run. The facts are of late 2026; engines change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

from keyreduce.errors import KeyreduceError

if TYPE_CHECKING:
    # Only for the types: the names of the engines appear in the help, which must not wait for torch.
    from keyreduce.families import Family, MixerSizes

EngineName = Literal["fla", "transformers", "vllm", "sglang", "mlx", "llama.cpp"]


class Engine(NamedTuple):
    """What an engine demands of a mixer's sizes."""

    name: str
    demand: str
    is_met: Callable[[MixerSizes], bool]


def _next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


_FLA = Engine("fla", "head_k_dim at most 256", lambda s: s.head_k_dim <= 256)
# vLLM 0.20 to 0.33 pads both sizes to powers of two in one kernel after the convolution, which must then be alike:
# 64 x 128 does not start (run on an H100 with 0.26.0: 96 x 128, 72 x 128 and 64 x 64 do).
_VLLM = Engine(
    "vLLM (Triton)",
    "head_k_dim and head_v_dim at most 256, with the same next power of two",
    lambda s: (
        max(s.head_k_dim, s.head_v_dim) <= 256 and _next_power_of_two(s.head_k_dim) == _next_power_of_two(s.head_v_dim)
    ),
)
_SGLANG = Engine(
    "SGLang",
    "head_k_dim and the value channels of a key head powers of two",
    lambda s: s.head_k_dim.bit_count() == (s.value_heads // s.key_heads * s.head_v_dim).bit_count() == 1,
)
_MLX = Engine("MLX (Metal)", "head_k_dim a multiple of 32", lambda s: s.head_k_dim % 32 == 0)
_LLAMA_CPP = Engine(
    "llama.cpp",
    "head_k_dim of 16, 32, 64 or 128, equal to head_v_dim",
    lambda s: s.head_k_dim in (16, 32, 64, 128) and s.head_k_dim == s.head_v_dim,
)
# The operators of transformers are plain PyTorch, and take any size.
_TRANSFORMERS = Engine("transformers", "any size", lambda s: True)
_TRAINING = Engine(
    "fla, 16-bit training", "an even head_k_dim", lambda s: s.head_k_dim <= 256 and s.head_k_dim % 2 == 0
)
_FLASH = Engine("FlashInfer, FlashQLA, CuteDSL", "head_k_dim and head_v_dim 128", lambda s: s[2:] == (128, 128))
ENGINES = (_FLA, _TRAINING, _VLLM, _SGLANG, _MLX, _LLAMA_CPP, _FLASH)
# vLLM runs OLMo-Hybrid by a class of its own, whose kernels compile for 32 to 96 x 192.
_VLLM_OLMO = _VLLM._replace(demand=_FLA.demand, is_met=_FLA.is_met)
_NAMED: dict[EngineName, Engine] = {"fla": _FLA, "vllm": _VLLM, "sglang": _SGLANG, "mlx": _MLX, "llama.cpp": _LLAMA_CPP}
_NAMED["transformers"] = _TRANSFORMERS


def suited_engines(family: Family, layers: Iterable[MixerSizes]) -> tuple[list[str], list[str]]:
    """Return the names of the engines that run layers of these sizes, and of those that do not, with their demand.

    An engine must also know the architecture; no engine knows those that keyreduce ships.
    """
    if family.shipped_by == "keyreduce":
        return [], [f"serving engines (none knows {family.model_type})"]
    sizes = list(layers)
    engines = (_TRANSFORMERS, *ENGINES) if family.shipped_by == "transformers" else ENGINES
    suited = {engine: all(engine.is_met(layer) for layer in sizes) for engine in map(_for(family), engines)}
    return (
        [engine.name for engine, is_met in suited.items() if is_met],
        [f"{engine.name} ({engine.demand})" for engine, is_met in suited.items() if not is_met],
    )


def check_engine(
    name: EngineName, family: Family, before: Mapping[int, MixerSizes], after: Mapping[int, MixerSizes]
) -> None:
    """Refuse sizes that an engine does not run, and name those near them that it does.

    ``before`` and ``after`` are layer -> its sizes before and after the cut.

    Raises KeyreduceError if the engine does not know the architecture, or does not run the sizes.
    """
    if family.shipped_by == "keyreduce":
        raise KeyreduceError(f"`engine` {name}: it does not know {family.model_type}, which keyreduce alone ships")
    engine = _for(family)(_NAMED[name])
    for layer, sizes in after.items():
        if not engine.is_met(sizes):
            raise KeyreduceError(
                f"`engine` {name} wants {engine.demand}, and the cut leaves {sizes.head_k_dim} key and "
                f"{sizes.head_v_dim} value channels a head; {_fitting(engine, before[layer], sizes)}"
            )


def _for(family: Family) -> Callable[[Engine], Engine]:
    return lambda engine: _VLLM_OLMO if engine is _VLLM and family.model_type == "olmo_hybrid" else engine


def _fitting(engine: Engine, before: MixerSizes, after: MixerSizes) -> str:
    """Return what to ask for instead: key sizes with the same value size, or else pairs of the two."""
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
