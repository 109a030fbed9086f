"""The sizes that serving engines and kernel libraries run: one table an engine, each row with how it is known.

"run" means that a model of such sizes was started or compared with another library, "compiled" that the engine's own
kernels were compiled for these sizes (``benchmarks/engine_kernels.py`` and its JSON in ``benchmarks/serving/``), and
"read" that somebody read the engine's source. What was run in vLLM by ``benchmarks/vllm_serving.py`` is in
``benchmarks/serving/vllm_serving.json``. Engines change: a row says of which version it speaks, and when.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

from keyreduce.errors import KeyreduceError

if TYPE_CHECKING:
    # Only for the types: the names of the engines appear in the help, which must not wait for more.
    from keyreduce.families import Family, MixerSizes

EngineName = Literal["fla", "transformers", "vllm", "vllm-plugin", "sglang", "mlx", "llama.cpp"]
"""The engines that a user can ask for. ``vllm-plugin`` is vLLM with keyreduce installed in its environment."""
Known = Literal["run", "compiled", "read"]
_HEADS_OF_ATTENTION = "as many heads as num_attention_heads says"
_STEP = 8  # sizes that are named to users are multiples of it where the engine runs any
_OR_WITH_PLUGIN = "; where keyreduce is installed beside vLLM, its plugin runs this cut too: `engine` vllm-plugin"


class Evidence(NamedTuple):
    """How a row is known: ``how``, of which ``version`` of the engine, ``when``, and from ``what``.

    ``when`` is a year and month, or a day; ``what`` is a file of this repository or says it in words. ``on`` names the
    model and the GPU of what was run, where the file does.
    """

    how: Known
    version: str
    when: str
    what: str
    on: str = ""


class Row(NamedTuple):
    """What an engine demands of the sizes of some architectures.

    Attributes:
        model_types: the architectures; none stands for all that no other row names.
        demand: what it demands, in words.
        is_met: whether sizes meet it.
        evidence: how that is known, the strongest first.
        heads_of_attention: whether the engine takes the number of the mixers' heads from the config's
            ``num_attention_heads``, which a cut of heads leaves as it is.
    """

    model_types: tuple[str, ...]
    demand: str
    is_met: Callable[[MixerSizes], bool]
    evidence: tuple[Evidence, ...]
    heads_of_attention: bool = False


class Engine(NamedTuple):
    """An engine's ``label``, its ``rows``, and the architectures that it ``knows``: model type -> since which version.

    ``knows`` was read in the list of classes of each release since 0.26 for vLLM, and of the release that is named for
    the others. It is None where that was not looked up, or where the engine is a library of kernels.
    """

    label: str
    rows: tuple[Row, ...]
    knows: dict[str, str] | None = None

    def row(self, model_type: str) -> Row:
        """Return the row that speaks of an architecture."""
        named = (row for row in self.rows if model_type in row.model_types)
        return next(named, self.rows[-1])


def _next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _is_power_of_two(number: int) -> bool:
    return number.bit_count() == 1


def _up_to_256(sizes: MixerSizes) -> bool:
    return max(sizes.head_k_dim, sizes.head_v_dim) <= 256


def _alike_when_padded(sizes: MixerSizes) -> bool:
    padded = {_next_power_of_two(size) for size in (sizes.head_k_dim, sizes.head_v_dim)}
    return _up_to_256(sizes) and len(padded) == 1


def _split_by_head(sizes: MixerSizes) -> bool:
    """SGLang's kernel for Qwen3-Next, which takes projections apart that are packed by key head; others use PyTorch."""
    per_key_head = sizes.value_heads // sizes.key_heads
    is_split = _is_power_of_two(sizes.head_k_dim) and _is_power_of_two(per_key_head * sizes.head_v_dim)
    return sizes.head_k_dim <= 256 and (is_split or per_key_head not in (1, 2, 4))


def _split_in_order(sizes: MixerSizes) -> bool:
    """That for Qwen3.5, whose values may also be taken one head at a time."""
    per_key_head = sizes.value_heads // sizes.key_heads
    are_values = _is_power_of_two(sizes.head_v_dim) or _is_power_of_two(per_key_head * sizes.head_v_dim)
    is_split = _is_power_of_two(sizes.head_k_dim) and are_values
    return sizes.head_k_dim <= 256 and (is_split or per_key_head not in (1, 2, 3, 4))


_QWEN: tuple[str, ...] = ("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text")
KDA: tuple[str, ...] = ("kimi_linear", "bailing_hybrid", "glm5_next", "glm5_next_text")
"""Architectures of Kimi Delta Attention that engines have."""
# Of Qwen3.5's mixers, which engines run with its layer.
_QWEN4: tuple[str, ...] = ("qwen4_exp", "qwen4_exp_text")
_MINICPM: tuple[str, ...] = ("minicpmv4_6", "minicpmv4_7", "minicpm_ocr")
QWEN: tuple[str, ...] = (*_QWEN, *_QWEN4, *_MINICPM)
"""Architectures that engines run with the layer of Qwen3-Next or Qwen3.5."""
_NOVEMBER = "2026-11"
_FILE = "benchmarks/serving/kernels_{}.json"
_FLA_COMPILED = Evidence("compiled", "0.6.0", _NOVEMBER, _FILE.format("fla"))
_VLLM_COMPILED = Evidence("compiled", "0.26.0", _NOVEMBER, _FILE.format("vllm"))
_VLLM_RUN = Evidence(
    *("run", "0.26.0", "2026-11-27", "benchmarks/serving/vllm_serving.json"), on="Qwen3-Next on an NVIDIA H200"
)
_SGLANG_COMPILED = Evidence("compiled", "0.5.23", _NOVEMBER, _FILE.format("sglang"))

_FLA = Engine(
    "fla",
    (
        Row(
            (),
            "head_k_dim at most 256",
            lambda sizes: sizes.head_k_dim <= 256,
            (Evidence("run", "0.6.0", _NOVEMBER, "decode and prefill on an H100"), _FLA_COMPILED),
        ),
    ),
)
_TRAINING = Engine(
    "fla, 16-bit training",
    (
        Row(
            (),
            "an even head_k_dim",
            lambda sizes: sizes.head_k_dim <= 256 and sizes.head_k_dim % 2 == 0,
            (Evidence("run", "0.6.0", _NOVEMBER, "training on an H100"),),
        ),
    ),
)
# One kernel of vLLM, which prepares a prefill, gives one variable a shape of padded keys in one branch and a shape of
# padded values in the other. Triton refuses that unless both are alike.
_VLLM = Engine(
    "vLLM (Triton)",
    (
        Row(("olmo_hybrid",), "head_k_dim and head_v_dim at most 256", _up_to_256, (_VLLM_COMPILED,)),
        Row(
            ("kimi_linear",),
            "as many key as value channels, at most 128",
            lambda sizes: sizes.head_k_dim == sizes.head_v_dim <= 128,
            (_VLLM_COMPILED,),
        ),
        Row(
            KDA[2:],
            "as many key as value channels, at most 128",
            lambda sizes: sizes.head_k_dim == sizes.head_v_dim <= 128,
            (Evidence("read", "0.33.0", _NOVEMBER, "their layers and kernels, which are nearly Kimi Linear's"),),
        ),
        Row(
            ("bailing_hybrid",),
            f"as many key as value channels, at most 128, and {_HEADS_OF_ATTENTION}",
            lambda sizes: sizes.head_k_dim == sizes.head_v_dim <= 128,
            (Evidence("read", "0.33.0", _NOVEMBER, "its layer and kernels, which are nearly Kimi Linear's"),),
            heads_of_attention=True,
        ),
        Row(
            (*_QWEN4, *_MINICPM),
            "head_k_dim and head_v_dim at most 256, with the same next power of two",
            _alike_when_padded,
            (Evidence("read", "0.33.0", _NOVEMBER, "they run the layer of Qwen3.5"),),
        ),
        Row(
            (),
            "head_k_dim and head_v_dim at most 256, with the same next power of two",
            _alike_when_padded,
            (
                _VLLM_RUN,
                Evidence(
                    *("run", "0.26.0", _NOVEMBER),
                    "an H100: 128 x 128, 96 x 128, 72 x 128 and 64 x 64 start, 64 x 128 does not",
                ),
                _VLLM_COMPILED,
                Evidence("compiled", "0.33.0", _NOVEMBER, _FILE.format("vllm_0_33")),
            ),
        ),
    ),
    dict.fromkeys([*_QWEN, "olmo_hybrid", "kimi_linear"], "0.26")
    | dict.fromkeys(_QWEN[3:], "0.27")
    | dict.fromkeys(_QWEN4, "0.29")
    | {"bailing_hybrid": "0.28", "glm5_next": "0.30", "glm5_next_text": "0.30"}
    | {"minicpmv4_6": "0.26", "minicpmv4_7": "0.32", "minicpm_ocr": "0.33"},
)
_VLLM_PLUGIN = Engine(
    "vLLM with keyreduce's plugin",
    (
        *_VLLM.rows[:-1],  # in these vLLM is left as it is
        Row(
            (),
            "head_k_dim and head_v_dim at most 256",
            _up_to_256,
            (
                _VLLM_RUN,
                Evidence("compiled", "0.26.0", _NOVEMBER, _FILE.format("vllm_plugin")),
                Evidence("compiled", "0.33.0", _NOVEMBER, _FILE.format("vllm_plugin_0_33")),
            ),
        ),
    ),
    _VLLM.knows,
)
_SGLANG = Engine(
    "SGLang",
    (
        Row(
            ("kimi_linear",),
            "as many key as value channels, at most 128",
            lambda sizes: sizes.head_k_dim == sizes.head_v_dim <= 128,
            (_SGLANG_COMPILED,),
        ),
        Row(
            KDA[2:],
            "as many key as value channels, at most 128",
            lambda sizes: sizes.head_k_dim == sizes.head_v_dim <= 128,
            (Evidence("read", "0.5.23", _NOVEMBER, "Kimi Linear's kernels; on a B200 prefill is FlashInfer's"),),
        ),
        Row(
            ("bailing_hybrid",),
            f"128 key and 128 value channels, which it takes from softmax attention, and {_HEADS_OF_ATTENTION}",
            lambda sizes: sizes[2:] == (128, 128),
            (Evidence("read", "0.5.23", _NOVEMBER, "its layer"),),
            heads_of_attention=True,
        ),
        Row(_QWEN[1:], "head_k_dim, at most 256, and head_v_dim powers of two", _split_in_order, (_SGLANG_COMPILED,)),
        Row(
            (*_QWEN4, *_MINICPM),
            "head_k_dim, at most 256, and head_v_dim powers of two",
            _split_in_order,
            (Evidence("read", "0.5.23", _NOVEMBER, "they run the layer of Qwen3.5"),),
        ),
        Row(
            (),
            "head_k_dim, at most 256, and the value channels of a key head powers of two",
            _split_by_head,
            (_SGLANG_COMPILED,),
        ),
    ),
    dict.fromkeys([*_QWEN, "qwen4_exp", *_MINICPM[:2], *KDA[:3]], "0.5.23"),
)
_MLX = Engine(
    "MLX (Metal)",
    (
        Row(
            ("bailing_hybrid",),
            f"head_k_dim a multiple of 32, and {_HEADS_OF_ATTENTION}",
            lambda sizes: sizes.head_k_dim % 32 == 0,
            (Evidence("read", "mlx-lm 0.32.2", _NOVEMBER, "its layer, and its kernel for Metal"),),
            heads_of_attention=True,
        ),
        Row(
            (),
            "head_k_dim a multiple of 32",
            lambda sizes: sizes.head_k_dim % 32 == 0,
            (Evidence("read", "mlx-lm 0.32.2", _NOVEMBER, "its kernel for Metal; its code for a CPU was run"),),
        ),
    ),
    dict.fromkeys([*_QWEN, "olmo_hybrid", "kimi_linear", "bailing_hybrid"], "0.32.2"),
)
_LLAMA_CPP = Engine(
    "llama.cpp",
    (
        Row(
            (),
            "head_k_dim of 16, 32, 64 or 128, equal to head_v_dim",
            lambda sizes: sizes.head_k_dim in (16, 32, 64, 128) and sizes.head_k_dim == sizes.head_v_dim,
            (Evidence("read", "late 2026", _NOVEMBER, "its kernels"),),
        ),
    ),
    dict.fromkeys([*_QWEN, "kimi_linear"], "late 2026"),
)
_TRANSFORMERS = Engine(
    "transformers",
    (
        Row(
            (),
            "any size",
            lambda sizes: True,
            (Evidence("run", "5.6 to 5.23", _NOVEMBER, "plain PyTorch; tests/pruning/test_plain_transformers.py"),),
        ),
    ),
)
_FLASH = Engine(
    "FlashInfer, FlashQLA, CuteDSL",
    (
        Row(
            (),
            "head_k_dim and head_v_dim 128",
            lambda sizes: sizes[2:] == (128, 128),
            (Evidence("read", "late 2026", _NOVEMBER, "their kernels"),),
        ),
    ),
)
ENGINES = (_FLA, _TRAINING, _VLLM, _SGLANG, _MLX, _LLAMA_CPP, _FLASH)
"""The tables, in the order in which they are shown. That of transformers stands apart, as it runs only its own, and so
does that of vLLM with the plugin, which counts where vLLM alone does not do."""
NAMED: Mapping[EngineName, Engine] = {
    **{"fla": _FLA, "transformers": _TRANSFORMERS, "vllm": _VLLM, "vllm-plugin": _VLLM_PLUGIN, "sglang": _SGLANG},
    **{"mlx": _MLX, "llama.cpp": _LLAMA_CPP},
}
"""The engines that a user can ask for, by name."""


def runs(engine: EngineName, family: Family, sizes: MixerSizes, config: Mapping | None = None) -> bool:
    """Return whether an engine's kernels run a mixer of these sizes, of this architecture.

    Where the model's ``config`` is given, before a cut or after it, the engine must also read the mixers' heads from it
    as they are. That the engine has a class for the architecture is another question: see :class:`Engine`. Pure and
    quick, so that a grid of sizes can be filtered with it.
    """
    row = NAMED[engine].row(family.model_type)
    return family.shipped_by != "keyreduce" and row.is_met(sizes) and not _misreads_heads(row, family, sizes, config)


def _misreads_heads(row: Row, family: Family, sizes: MixerSizes, config: Mapping | None) -> bool:
    from keyreduce.families.attention import attention_heads

    if config is None or not row.heads_of_attention:
        return False
    return attention_heads(family, config) != sizes.value_heads


def needs_plugin(family: Family, sizes: MixerSizes) -> bool:
    """Return whether vLLM runs a mixer of these sizes with keyreduce's plugin alone."""
    return runs("vllm-plugin", family, sizes) and not runs("vllm", family, sizes)


def suited_engines(
    family: Family, layers: Iterable[MixerSizes], config: Mapping | None = None
) -> tuple[list[str], list[str]]:
    """Return the names of the engines that run layers of these sizes, and of those that do not, with their demand.

    For ``config`` see :func:`runs`. An engine must also know the architecture; no engine knows those that keyreduce
    ships.
    """
    if family.shipped_by == "keyreduce":
        return [], [f"serving engines (none knows {family.model_type})"]
    sizes = list(layers)
    engines = (_TRANSFORMERS, *ENGINES) if family.shipped_by == "transformers" else ENGINES
    rows = {engine.label: engine.row(family.model_type) for engine in engines}
    suited = {
        label: all(row.is_met(layer) and not _misreads_heads(row, family, layer, config) for layer in sizes)
        for label, row in rows.items()
    }
    if not suited[_VLLM.label] and all(runs("vllm-plugin", family, layer, config) for layer in sizes):
        suited[_VLLM_PLUGIN.label] = True
    return (
        [label for label, is_met in suited.items() if is_met],
        [f"{label} ({rows[label].demand})" for label, is_met in suited.items() if not is_met],
    )


def check_engine(name: EngineName, config: Mapping, after: Mapping[int, MixerSizes]) -> None:
    """Refuse sizes that an engine does not run, and name those near them that it does.

    ``config`` is the model's before the cut, and ``after`` is layer -> its sizes after it.

    Raises KeyreduceError if the engine does not know the architecture, or does not run the sizes.
    """
    from keyreduce.families import family_of
    from keyreduce.families.attention import attention_heads

    family = family_of(config)
    if family.shipped_by == "keyreduce":
        raise KeyreduceError(f"`engine` {name}: it does not know {family.model_type}, which keyreduce alone ships")
    row, before = NAMED[name].row(family.model_type), family.layer_sizes(config)
    for layer, sizes in after.items():
        if _misreads_heads(row, family, sizes, config):
            raise KeyreduceError(
                f"`engine` {name} takes the number of heads of {family.model_type}'s mixers from num_attention_heads, "
                f"which is that of its softmax attention and stays {attention_heads(family, config)}; it cannot run "
                f"mixers of {sizes.value_heads}: cut channels, and leave the heads"
            )
        if not row.is_met(sizes):
            found = near_sizes(name, family, before[layer], sizes)
            told = [f"{key} x {value} (`target` {_targets(before[layer], key, value)})" for key, value in found]
            raise KeyreduceError(
                f"`engine` {name} wants {row.demand}, and the cut leaves {sizes.head_k_dim} x {sizes.head_v_dim} "
                f"channels a head; {'near it run ' + ', '.join(told) if told else 'no cut of this model fits'}"
                f"{_OR_WITH_PLUGIN if name == 'vllm' and needs_plugin(family, sizes) else ''}"
            )


def near_sizes(engine: EngineName, family: Family, before: MixerSizes, after: MixerSizes) -> list[tuple[int, int]]:
    """Return up to three pairs of key and value channels that an engine runs, near those that a cut leaves.

    They are: keys and values cut to about the same state, the keys about twice as much (what loses least where both
    were tried); the same value channels with other keys; the same keys with other value channels.
    """
    row = NAMED[engine].row(family.model_type)

    def running(step: int) -> list[tuple[int, int]]:
        return [
            (key, value)
            for key in range(step, before.head_k_dim + 1, step)
            for value in range(step, before.head_v_dim + 1, step)
            if key * value < before.head_k_dim * before.head_v_dim and (key == value or not family.tied)
            if row.is_met(after._replace(head_k_dim=key, head_v_dim=value))
        ]

    neat = running(_STEP) or running(1)

    def distance(pair: tuple[int, int]) -> float:
        key, value = pair
        state = math.log(key * value / (after.head_k_dim * after.head_v_dim))
        lopsided = math.log(key / before.head_k_dim) - 2 * math.log(value / before.head_v_dim)
        return abs(state) + abs(lopsided) / 10

    wanted = [
        min(neat, key=distance, default=None),
        min((one for one in neat if one[1] == after.head_v_dim), key=distance, default=None),
        min((one for one in neat if one[0] == after.head_k_dim), key=distance, default=None),
    ]
    return list(dict.fromkeys(one for one in wanted if one is not None))


def _targets(before: MixerSizes, key: int, value: int) -> str:
    if value == before.head_v_dim:
        return f"key, `keep` {key}"
    if key == before.head_k_dim:
        return f"value, `keep` {value}"
    return f"key,value, `keep` {key},{value}"
