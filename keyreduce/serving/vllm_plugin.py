"""What vLLM loads of keyreduce where both are installed, so that pruned Qwen3-Next and Qwen3.5 models start there.

vLLM calls :func:`register` in every process (entry point ``vllm.general_plugins``). Two functions of vLLM are then
replaced, as soon as vLLM itself loads the modules that they are in. Both hand on to vLLM's own where the sizes of a
model's heads do not need them:

- ``fused_post_conv_prep`` prepares a prefill. vLLM's kernel does not compile where the next powers of two of the key
  and value channels of a head differ (docs/vllm-fault.md); ours does (:mod:`keyreduce.serving.vllm_preparation`).
- ``_resolve_gdn_prefill_backend`` chooses the kernels of a prefill. On an H100 it chooses FlashInfer's without asking
  for the sizes, and these take heads of 128 x 128 alone; for others vLLM's Triton kernels are taken.

Where a function is missing or takes other arguments than those of 0.26 to 0.33, vLLM is left as it is, with a warning.
``KEYREDUCE_VLLM_PLUGIN=0`` switches all this off.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

SWITCH = "KEYREDUCE_VLLM_PLUGIN"
_FLASHINFER_SIZES = (128, 128)
# vLLM prints what its own loggers say.
_logger = logging.getLogger("vllm.keyreduce")
_has_warned = False


class _Replacement(NamedTuple):
    """A function of vLLM: the names of its arguments, and what makes ours from it."""

    name: str
    arguments: tuple[str, ...]
    around: Callable[[Callable], Callable]


def register() -> None:
    """Replace the functions in the modules that are loaded, and have the others replaced as they are loaded."""
    if os.environ.get(SWITCH, "1") == "0" or any(isinstance(finder, _Watch) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Watch())
    for name in _REPLACEMENTS:
        if name in sys.modules:
            _replace(sys.modules[name])


def needs_own_preparation(head_k_dim: int, head_v_dim: int) -> bool:
    """Return whether vLLM's own kernel does not prepare a prefill of heads of these sizes."""
    return (head_k_dim - 1).bit_length() != (head_v_dim - 1).bit_length()


def _around_preparation(own: Callable) -> Callable:
    def fused_post_conv_prep(
        conv_output: Any,
        a: Any,
        b: Any,
        A_log: Any,
        dt_bias: Any,
        num_k_heads: int,
        head_k_dim: int,
        head_v_dim: int,
        apply_l2norm: bool = True,
        output_g_exp: bool = False,
    ) -> Any:
        if not needs_own_preparation(head_k_dim, head_v_dim):
            return own(
                conv_output, a, b, A_log, dt_bias, num_k_heads, head_k_dim, head_v_dim, apply_l2norm, output_g_exp
            )
        from keyreduce.serving.vllm_preparation import prepare

        return prepare(
            *(conv_output, a, b, A_log, dt_bias),
            key_heads=num_k_heads,
            head_k_dim=head_k_dim,
            head_v_dim=head_v_dim,
            normalize=apply_l2norm,
            exponentiate=output_g_exp,
        )

    return fused_post_conv_prep


def _around_choice(own: Callable) -> Callable:
    def _resolve_gdn_prefill_backend(vllm_config: Any) -> tuple[str, str]:
        asked, chosen = own(vllm_config)
        text = vllm_config.model_config.hf_text_config
        sizes = tuple(getattr(text, f"linear_{part}_head_dim", None) for part in ("key", "value"))
        # OLMo-Hybrid has a class of its own, which runs Triton whatever is chosen here; other models have no such
        # sizes.
        is_qwen = None not in sizes and getattr(text, "model_type", "") != "olmo_hybrid"
        if chosen == "flashinfer" and is_qwen and sizes != _FLASHINFER_SIZES:
            return asked, "triton"
        return asked, chosen

    return _resolve_gdn_prefill_backend


_REPLACEMENTS = {
    "vllm.third_party.flash_linear_attention.ops.fused_gdn_prefill_post_conv": _Replacement(
        "fused_post_conv_prep",
        (
            *("conv_output", "a", "b", "A_log", "dt_bias", "num_k_heads", "head_k_dim", "head_v_dim"),
            *("apply_l2norm", "output_g_exp"),
        ),
        _around_preparation,
    ),
    "vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn": _Replacement(
        "_resolve_gdn_prefill_backend", ("vllm_config",), _around_choice
    ),
}
"""Module of vLLM -> what is replaced in it. Others take both names from there when they are loaded, or later."""


def _replace(module: ModuleType) -> None:
    """Replace a module's function, here and wherever it was taken to already; or warn that it is not the known one."""
    name, arguments, around = _REPLACEMENTS[module.__name__]
    own = getattr(module, name, None)
    if not callable(own) or tuple(inspect.signature(own).parameters) != arguments:
        _warn(f"{module.__name__}.{name}")
        return
    ours = around(own)
    for holder in [one for key, one in sys.modules.items() if key.startswith("vllm.")]:
        if getattr(holder, "__dict__", {}).get(name) is own:
            setattr(holder, name, ours)


def _warn(function: str) -> None:
    """Say once in this process that vLLM's functions are not those that were known."""
    global _has_warned
    if not _has_warned:
        _logger.warning(
            "keyreduce's plugin does not know this version of vLLM and leaves it as it is: %s is missing or takes "
            "other arguments. A pruned Qwen model may not start, if its sizes need the plugin. %s=0 switches the "
            "plugin off.",
            *(function, SWITCH),
        )
    _has_warned = True


class _Watch(importlib.abc.MetaPathFinder):
    """Has the functions of a module replaced as soon as it is loaded, before another module can take them."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in _REPLACEMENTS:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_replace(module: ModuleType) -> None:
                execute(module)
                _replace(module)

            spec.loader.exec_module = execute_and_replace
        return spec
