"""How many sequences fit into the memory of a serving engine, by the arithmetic of that engine.

Everything is computed from a config: no model, no GPU, no torch. vLLM's part follows its 0.26.0
(``vllm/platforms/interface.py``, ``vllm/v1/core/kv_cache_utils.py``) and is compared with vLLM's own cache manager by
``benchmarks/vllm_capacity.py``. SGLang's part was read in its 0.5.23
(``sglang/srt/mem_cache/kv_cache_configurator.py``) and never run.

Sizes of a whole sequence are those of all layers and all GPUs together; pages and pools are those of one GPU.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from keyreduce.errors import KeyreduceError
from keyreduce.families import Family, MixerSizes, family_of
from keyreduce.families.attention import SoftmaxLayer, softmax_layers
from keyreduce.serving.engines import KDA
from keyreduce.serving.state_formats import FORMATS

PoolEngine = Literal["vllm", "sglang"]
"""The engines that divide a pool of memory among sequences."""
CacheDtype = Literal["float32", "bfloat16", "float16", "int8", "fp8"]
"""What the recurrent state may be kept in. No engine keeps it in 8 bits today."""
ENGINE_DTYPES = ("float32", "bfloat16", "float16")
"""What vLLM and SGLang can keep it in."""

_KEPT_BYTES = 2  # keys, values and the convolution's inputs: engines compute in 16 bits

# vLLM 0.26.0.
_ALIGNMENT = 16  # tokens; what FlashAttention asks of a block
_MORE_LAYERS = 1.5  # below it the larger number of layers of one kind is the size of a group
_NULL_BLOCKS = 1  # the pool never hands out its first block

# SGLang 0.5.23.
STATE_SHARE = 0.9
"""SGLang's ``mamba_full_memory_ratio``: the memory of states over that of keys and values."""
SLOTS_OF_A_SEQUENCE = {"extra_buffer": 5, "no_buffer": 3, "off": 1}
"""SGLang's strategy for prefix caching of states -> the slots that a running sequence needs."""
_MOST_RUNNING = 4096


@dataclass(frozen=True)
class CacheLayout:
    """What a model keeps of a sequence, layer by layer.

    Attributes:
        family: the model's family.
        mixers: the sizes of each layer that holds a delta-rule state.
        taps: the tokens that a short convolution spans; 1 where there is none.
        softmax: each layer of softmax attention.
        dtype: the dtype that the config names for the weights; None where it names none.
        asked_state_dtype: what the config asks to keep states in (``mamba_ssm_dtype``); None where it asks for nothing.
    """

    family: Family
    mixers: tuple[MixerSizes, ...]
    taps: int
    softmax: tuple[SoftmaxLayer, ...]
    dtype: str | None
    asked_state_dtype: str | None

    @classmethod
    def of(cls, config: Mapping, sizes: Mapping[int, MixerSizes] | None = None) -> CacheLayout:
        """Return the layout of a model of this config (config.json as a mapping).

        ``sizes`` is layer -> what to take in the place of the sizes that the config says, as after a cut.

        Raises KeyreduceError if the config is of no known family, or does not say a size.
        """
        family = family_of(config)
        mixers = family.layer_sizes(config) | dict(sizes or {})
        text = family.language(config)
        has_convolution = bool(text.get("use_short_conv", family.switches.get("use_short_conv", True)))
        dtypes = [place.get(name) for place in (text, config) for name in ("dtype", "torch_dtype")]
        asked = [place.get("mamba_ssm_dtype") for place in (text, config)]
        return cls(
            family,
            tuple(mixers.values()),
            round(family.taps.read(text)) if has_convolution else 1,
            tuple(softmax_layers(family, config).values()),
            next((one for one in dtypes if isinstance(one, str)), None),
            next((one for one in asked if isinstance(one, str)), None),
        )

    def state_bytes(self, dtype: str) -> int:
        """Return the bytes of recurrent state of a sequence, ``W x V x K`` in each layer, scales of 8 bits included.

        A preconditioner's vector, which stays float32, is included too.
        """
        return sum(_state_bytes(sizes, dtype) + self.family.preconditioner_bytes(sizes) for sizes in self.mixers)

    @property
    def convolution_bytes(self) -> int:
        """The bytes of convolution state of a sequence: the last inputs of q, k and v, in 16 bits."""
        return sum(_convolution_bytes(sizes, self.taps) for sizes in self.mixers)

    def softmax_bytes(self, tokens: int) -> int:
        """Return the bytes of keys and values of a sequence of ``tokens`` tokens in softmax layers, in 16 bits."""
        return _KEPT_BYTES * sum(layer.numbers(tokens) for layer in self.softmax)

    def tokens_of_equal_bytes(self, dtype: str) -> int | None:
        """Return from how many tokens on the keys and values take more bytes than the state; None without such layers.

        Sliding windows are left out: they end growing.
        """
        growing = [layer.numbers_per_token for layer in self.softmax if layer.window is None]
        return math.ceil(self.state_bytes(dtype) / (_KEPT_BYTES * sum(growing))) if growing else None


FURTHER_CACHES = {
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), "keys of its indexers and inputs of its n-gram embeddings"),
    **dict.fromkeys(("glm5_next", "glm5_next_text"), "keys of its indexers"),
}
"""Model type -> what engines keep of each sequence that this arithmetic leaves out, so that it counts too many."""


class VllmPool(NamedTuple):
    """How vLLM divides the memory of one GPU.

    Every block, ``block_tokens`` tokens of keys and values or one state, is a page of ``page_bytes`` in each of
    ``layers_per_block`` layers. ``padding`` is the share of a page that a state leaves empty, and ``sequences`` is how
    many of them the ``blocks`` hold.
    """

    block_tokens: int
    page_bytes: int
    padding: float
    layers_per_block: int
    blocks: int
    blocks_per_sequence: int
    sequences: int


class SglangPool(NamedTuple):
    """How SGLang divides the memory of one GPU: ``slots`` for states, and room for the keys and values of ``tokens``.

    ``sequences`` is the smaller of what both allow. ``by_slots`` says whether that is the slots, and ``even_share`` is
    the ``mamba_full_memory_ratio`` at which both would allow as many.
    """

    slots: int
    tokens: int
    slots_per_sequence: int
    sequences: int
    by_slots: bool
    even_share: float | None


def state_dtype(layout: CacheLayout, engine: PoolEngine, asked: str | None = None) -> str:
    """Return the dtype in which an engine keeps the recurrent state: ``float32``, ``bfloat16`` or ``float16``.

    vLLM takes what is ``asked`` of it, then ``mamba_ssm_dtype`` of a Qwen3.5 or Qwen4 config, then the model's dtype (a
    float32 model is served in bfloat16); of Kimi Delta Attention it keeps float32. SGLang takes what is asked, then
    ``mamba_ssm_dtype`` of any config, then float32.

    Raises KeyreduceError if the engine cannot keep a state in what is asked.
    """
    if asked is not None and asked not in ENGINE_DTYPES:
        raise KeyreduceError(
            f"`state_dtype` {asked}: {engine} keeps states in {', '.join(ENGINE_DTYPES)}; with the others only the "
            "bytes can be told, without `gpu_memory`"
        )
    if engine == "sglang":
        return asked or (layout.asked_state_dtype if layout.asked_state_dtype in ENGINE_DTYPES else "float32")
    if layout.family.model_type in KDA:
        return "float32"
    if asked is not None:
        return asked
    if layout.family.model_type.startswith(("qwen3_5", "qwen4_exp")) and layout.asked_state_dtype in ENGINE_DTYPES:
        return layout.asked_state_dtype
    return "float16" if layout.dtype == "float16" else "bfloat16"


def vllm_pool(
    layout: CacheLayout,
    memory_bytes: int,
    tokens: int,
    *,
    dtype: str | None = None,
    gpus: int = 1,
    prefix_caching: bool = False,
) -> VllmPool:
    """Return how vLLM 0.26.0 divides ``memory_bytes``, what one GPU has left for its caches, among sequences.

    Args:
        layout: the model.
        memory_bytes: what vLLM reports as available for the KV cache, of one GPU.
        tokens: the length of each sequence, prompt and answer.
        dtype: what ``mamba_ssm_cache_dtype`` says; by default vLLM's own choice, see :func:`state_dtype`.
        gpus: the number of GPUs that share each layer (tensor parallelism).
        prefix_caching: whether it is on; then a sequence holds two states. 0.26 has it off for hybrids, 0.33 on.

    Raises:
        KeyreduceError: the heads cannot be divided among so many GPUs, or vLLM does not keep states in ``dtype``.
    """
    chosen = state_dtype(layout, "vllm", dtype)
    check_gpus(layout, gpus)
    return _divided(layout, _vllm_state_page(layout, chosen, gpus), memory_bytes, tokens, gpus, prefix_caching)


def sglang_pool(
    layout: CacheLayout,
    memory_bytes: int,
    tokens: int,
    *,
    dtype: str | None = None,
    gpus: int = 1,
    prefix_caching: bool = True,
    share: float = STATE_SHARE,
) -> SglangPool:
    """Return how SGLang 0.5.23 divides ``memory_bytes``, what one GPU has left beside the weights, among sequences.

    States get ``share / (1 + share)`` of it. With the radix cache a running sequence needs five slots (three where its
    overlapping schedule is off), without it one.

    Args, errors: as of :func:`vllm_pool`. ``share`` is ``mamba_full_memory_ratio``.
    """
    chosen = state_dtype(layout, "sglang", dtype)
    check_gpus(layout, gpus)
    state = (layout.state_bytes(chosen) + layout.convolution_bytes) // gpus
    slots = max(0, int((memory_bytes * share / (1 + share) - state) // state))
    per_token = sum(_token_bytes(layer, gpus) for layer in layout.softmax)
    room = max(0, memory_bytes - (slots + 1) * state)
    per_sequence = SLOTS_OF_A_SEQUENCE["extra_buffer" if prefix_caching else "off"]
    by_slots = slots // per_sequence
    capacity = room // per_token if per_token else _MOST_RUNNING * tokens
    by_tokens = capacity // tokens
    even = per_sequence * state / (per_token * tokens) if per_token else None
    sequences = min(by_slots, by_tokens, _MOST_RUNNING)
    return SglangPool(slots, capacity, per_sequence, sequences, by_slots <= by_tokens, even)


def sequences_that_fit(
    config: Mapping,
    memory_bytes: int,
    tokens: int,
    engine: PoolEngine = "vllm",
    *,
    sizes: Mapping[int, MixerSizes] | None = None,
    dtype: str | None = None,
    gpus: int = 1,
    prefix_caching: bool | None = None,
) -> int:
    """Return how many sequences of ``tokens`` tokens an engine holds at once.

    Args:
        config: config.json as a mapping.
        memory_bytes: what one GPU has for caches; :func:`cache_memory` says how much that is.
        tokens: the length of each sequence, prompt and answer.
        engine: ``vllm`` or ``sglang``.
        sizes: layer -> sizes of its mixer, to ask about a cut before it is made; by default those of the config.
        dtype: what the recurrent state is kept in; by default the engine's choice, see :func:`state_dtype`.
        gpus: the number of GPUs that share each layer.
        prefix_caching: whether it is on; by default what the engine does: off in vLLM, on in SGLang.

    Raises:
        KeyreduceError: see :meth:`CacheLayout.of` and :func:`vllm_pool`.
    """
    layout = CacheLayout.of(config, sizes)
    if engine == "sglang":
        caching = prefix_caching is not False
        return sglang_pool(layout, memory_bytes, tokens, dtype=dtype, gpus=gpus, prefix_caching=caching).sequences
    caching = bool(prefix_caching)
    return vllm_pool(layout, memory_bytes, tokens, dtype=dtype, gpus=gpus, prefix_caching=caching).sequences


def state_bytes_that_fit(
    config: Mapping,
    memory_bytes: int,
    tokens: int,
    sequences: int,
    engine: PoolEngine = "vllm",
    *,
    dtype: str | None = None,
    gpus: int = 1,
    prefix_caching: bool | None = None,
) -> int:
    """Return the most bytes of recurrent state that a sequence may have for ``sequences`` of them to fit.

    The bytes are those of all layers and GPUs together, in the dtype that the engine keeps, as
    :meth:`CacheLayout.state_bytes` counts them for the dtype of :func:`state_dtype`. They are 0 where not even
    sequences without a state fit, because the keys and values of softmax layers take too much.

    The convolution's state is taken as large as the config has it; a cut makes it smaller, so that slightly more may
    fit. vLLM counts in whole blocks: a state that is smaller by little may need one more block of tokens and not fit,
    so :func:`sequences_that_fit` of the sizes that were chosen has the last word.

    Args, errors: as of :func:`sequences_that_fit`.
    """
    layout = CacheLayout.of(config)
    chosen = state_dtype(layout, engine, dtype)
    check_gpus(layout, gpus)
    convolution = layout.convolution_bytes // gpus
    if engine == "sglang":
        slots = sequences * SLOTS_OF_A_SEQUENCE["off" if prefix_caching is False else "extra_buffer"]
        state = int(memory_bytes * STATE_SHARE / (1 + STATE_SHARE) // (slots + 1))
        room = memory_bytes - (slots + 1) * state
        needed = sum(_token_bytes(layer, gpus) for layer in layout.softmax) * tokens * sequences
        return max(0, state - convolution) * gpus if needed <= room else 0
    per_layer = _largest_page(layout, memory_bytes, tokens, sequences, gpus, bool(prefix_caching))
    found = (per_layer - convolution // len(layout.mixers)) * len(layout.mixers) * gpus
    # Heads are whole numbers of the dtype; nobody can use the rest.
    size = FORMATS[chosen].bits // 8
    return max(0, found // size * size)


def cache_memory(gpu_bytes: int, weight_bytes: int, engine: PoolEngine, *, gpus: int, reserve_bytes: int) -> int:
    """Return what one GPU has for caches, after weights, activations and CUDA graphs; 0 where the weights do not fit.

    vLLM leaves 8% of the memory alone (``gpu_memory_utilization`` 0.92) and measures at its start what activations and
    CUDA graphs take: ``reserve_bytes`` stands for that. SGLang keeps at least 10 GiB of a GPU of more than 60 GiB
    (``mem_fraction_static``); ``reserve_bytes`` counts where it is more.

    ``weight_bytes`` are those of the whole model, and are divided evenly among the GPUs.
    """
    if engine == "vllm":
        usable = VLLM_UTILIZATION * gpu_bytes - reserve_bytes
    else:
        usable = gpu_bytes - max(reserve_bytes, 10 * 2**30 if gpu_bytes > 60 * 2**30 else 0)
    return max(0, int(usable - weight_bytes / gpus))


VLLM_UTILIZATION = 0.92
"""vLLM's ``gpu_memory_utilization``."""


def parse_memory(text: str, field: str) -> int:
    """Return the bytes that a text such as ``80GB``, ``79.6GiB`` or ``500MB`` says.

    ``field`` is the field of a request that the text is from. Raises KeyreduceError if it is no such text.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?) *([KMGT])(I?)B?", text.strip().upper())
    size = round(float(match[1]) * (1024 if match[3] else 1000) ** (" KMGT".index(match[2]))) if match else 0
    if size < 1:
        raise KeyreduceError(f"`{field}` is {text!r}; give an amount of memory such as 80GB or 79.6GiB")
    return size


def check_gpus(layout: CacheLayout, gpus: int) -> None:
    """Raise KeyreduceError if the heads of a mixer cannot be divided evenly among so many GPUs."""
    for sizes in layout.mixers:
        if sizes.key_heads % gpus or sizes.value_heads % gpus:
            raise KeyreduceError(
                f"`gpus` is {gpus}, which does not divide {sizes.key_heads} key and {sizes.value_heads} value heads"
            )


def _state_bytes(sizes: MixerSizes, dtype: str) -> int:
    return sizes.value_heads * FORMATS[dtype].bytes(sizes.head_k_dim, sizes.head_v_dim)


def _convolution_bytes(sizes: MixerSizes, taps: int) -> int:
    channels = 2 * sizes.key_heads * sizes.head_k_dim + sizes.value_heads * sizes.head_v_dim
    return _KEPT_BYTES * (taps - 1) * channels


def _token_bytes(layer: SoftmaxLayer, gpus: int) -> int:
    """The bytes that one GPU keeps of a token in a softmax layer: a head at least, and all of a latent vector."""
    numbers = layer.head_dim if layer.is_latent else 2 * layer.head_dim * max(1, layer.heads // gpus)
    return _KEPT_BYTES * numbers


def _vllm_state_page(layout: CacheLayout, dtype: str, gpus: int) -> int:
    """The bytes of one layer's state on one GPU, convolution included."""
    return max((_state_bytes(one, dtype) + _convolution_bytes(one, layout.taps)) // gpus for one in layout.mixers)


def _divided(
    layout: CacheLayout, state_page: int, memory_bytes: int, tokens: int, gpus: int, prefix_caching: bool
) -> VllmPool:
    """Divide the memory into blocks for states of so many bytes a layer, and the blocks among sequences."""
    per_token = max((_token_bytes(layer, gpus) for layer in layout.softmax), default=0)
    if per_token:
        block_tokens = _ALIGNMENT * math.ceil(state_page / (_ALIGNMENT * per_token))
        page = block_tokens * per_token
    else:
        block_tokens, page = tokens, state_page
    layers, state_groups, softmax_groups = _groups(layout)
    blocks = memory_bytes // page // layers
    per_sequence = state_groups * (2 if prefix_caching else 1) + softmax_groups * math.ceil(tokens / block_tokens)
    sequences = max(0, blocks - _NULL_BLOCKS) // per_sequence
    return VllmPool(block_tokens, page, 1 - state_page / page, layers, blocks, per_sequence, sequences)


def _groups(layout: CacheLayout) -> tuple[int, int, int]:
    """The layers that share a block, and the groups of layers with a state and of softmax layers.

    A block serves one layer of each group, so vLLM makes all groups as large as the rarer kind of layer is frequent;
    or as the more frequent one, where both are nearly as frequent.
    """
    mixers, softmax = len(layout.mixers), len(layout.softmax)
    if not softmax:
        return mixers, 1, 0
    fewer, more = sorted((mixers, softmax))
    size = more if more < _MORE_LAYERS * fewer else fewer
    return size, math.ceil(mixers / size), math.ceil(softmax / size)


def _largest_page(
    layout: CacheLayout, memory_bytes: int, tokens: int, sequences: int, gpus: int, prefix_caching: bool
) -> int:
    """The largest state of a layer, convolution included, with which so many sequences fit; 0 if there is none."""
    layers, state_groups, softmax_groups = _groups(layout)
    fewest = state_groups * (2 if prefix_caching else 1) + softmax_groups
    most_bytes = memory_bytes // layers // (sequences * fewest + _NULL_BLOCKS)
    per_token = max((_token_bytes(layer, gpus) for layer in layout.softmax), default=0)
    if not per_token:
        return most_bytes
    step = _ALIGNMENT * per_token
    for page in range(most_bytes // step * step, 0, -step):
        if _divided(layout, page, memory_bytes, tokens, gpus, prefix_caching).sequences >= sequences:
            return page
    return 0
