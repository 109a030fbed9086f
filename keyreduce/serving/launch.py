"""The settings with which an engine serves a model, and the command that starts it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

from keyreduce.serving.capacity import STATE_SHARE, CacheLayout, PoolEngine, sglang_pool, vllm_pool
from keyreduce.serving.engines import KDA, QWEN

# Read in vLLM 0.26.0: above so many sequences in a step it runs without CUDA graphs, unless told to capture more.
_CAPTURED = 512
_CAPTURE_STEP = 16
_FLASH_SIZES = (128, 128)


class Launch(NamedTuple):
    """How to serve a model: settings by their names (without value where that is None), and the whole command line.

    ``sequences`` is how many run at once with these settings, ``by_default`` how many would with the engine's own
    division of memory and without prefix caching.
    """

    engine: PoolEngine
    settings: Mapping[str, str | None]
    command: str
    sequences: int
    by_default: int
    with_prefix_caching: int


def launch(
    engine: PoolEngine,
    model: str,
    layout: CacheLayout,
    memory_bytes: int,
    tokens: int,
    *,
    dtype: str | None = None,
    gpus: int = 1,
    prefix_caching: bool = False,
) -> Launch:
    """Return how an engine serves a model.

    Args:
        engine: ``vllm`` or ``sglang``.
        model: a folder or a name on the hub.
        layout: what the model keeps of a sequence.
        memory_bytes: what one GPU has for caches; see :func:`keyreduce.serving.capacity.cache_memory`.
        tokens: the longest sequence, prompt and answer.
        dtype: what to keep the recurrent state in; None leaves that to the engine.
        gpus: the number of GPUs that share each layer.
        prefix_caching: whether what sequences have in common is kept, which takes more states a sequence.

    Raises KeyreduceError if the engine cannot divide the heads, or keeps no state in ``dtype``.
    """
    given = (layout, memory_bytes, tokens)
    more: dict[str, Any] = {"dtype": dtype, "gpus": gpus}
    if engine == "vllm":
        plain, cached = (vllm_pool(*given, **more, prefix_caching=caching).sequences for caching in (False, True))
        found = cached if prefix_caching else plain
        settings = _vllm_settings(layout, tokens, found, dtype, gpus, prefix_caching)
        start = ["vllm", "serve", model]
    else:
        pools = [sglang_pool(*given, **more, prefix_caching=caching) for caching in (False, True)]
        plain, cached = (pool.sequences for pool in pools)
        share = pools[prefix_caching].even_share
        share = None if share is None else max(0.01, round(share, 2))
        chosen = sglang_pool(*given, **more, prefix_caching=prefix_caching, share=share or STATE_SHARE)
        found = chosen.sequences
        settings = _sglang_settings(tokens, found, dtype, gpus, prefix_caching, share)
        settings = {"model-path": model, **settings}
        start = ["python", "-m", "sglang.launch_server"]
    words = [word for name, value in settings.items() for word in (f"--{name}", value) if word is not None]
    return Launch(engine, settings, shlex.join([*start, *words]), found, plain, cached)


def _vllm_settings(
    layout: CacheLayout, tokens: int, sequences: int, dtype: str | None, gpus: int, prefix_caching: bool
) -> dict[str, str | None]:
    settings: dict[str, str | None] = {"max-model-len": str(tokens), "max-num-seqs": str(max(1, sequences))}
    if sequences > _CAPTURED:
        settings["max-cudagraph-capture-size"] = str(-(-sequences // _CAPTURE_STEP) * _CAPTURE_STEP)
    if gpus > 1:
        settings["tensor-parallel-size"] = str(gpus)
    if dtype is not None and layout.family.model_type not in KDA:
        settings["mamba-ssm-cache-dtype"] = dtype
    is_qwen = layout.family.model_type in QWEN
    if is_qwen and any(sizes[2:] != _FLASH_SIZES for sizes in layout.mixers):
        # On an H100 vLLM hands every prefill to FlashInfer, which takes no other size, and does not ask it first.
        settings["gdn-prefill-backend"] = "triton"
    # Off by default in 0.26 and on in 0.33.
    settings["enable-prefix-caching" if prefix_caching else "no-enable-prefix-caching"] = None
    return settings


def _sglang_settings(
    tokens: int, sequences: int, dtype: str | None, gpus: int, prefix_caching: bool, share: float | None
) -> dict[str, str | None]:
    settings: dict[str, str | None] = {"context-length": str(tokens), "max-running-requests": str(max(1, sequences))}
    if gpus > 1:
        settings["tp-size"] = str(gpus)
    if dtype is not None:
        settings["mamba-ssm-dtype"] = dtype
    if prefix_caching and share is not None:
        settings["mamba-full-memory-ratio"] = f"{share:g}"
    if not prefix_caching:
        # It then gives as many states as requests are allowed, and the rest of the memory to keys and values.
        settings["disable-radix-cache"] = None
    return settings
