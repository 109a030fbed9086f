"""Which function of fla each of ours stands in for, and how it takes its place.

fla dispatches most of its kernels through ``fla.backends``; there our functions are registered. The three
operators that it does not dispatch get fla's own dispatcher put around them, at every name under which a
loaded module looks them up. Softmax attention, which hybrid models take from the package flash-attn, gets it in
fla's layer alone. Each way the choice is made call by call: ours where the tensors lie on a CPU, or everywhere when
asked for; fla's or flash-attn's kernel otherwise. Without flash-attn ours serves on every device: there is no other.
"""

import importlib
import inspect
import sys
from collections.abc import Collection
from functools import partial

import torch

from fla_torch import (
    activations,
    attention,
    convolution,
    cross_entropy,
    kda,
    normalization,
    operators,
    preconditioned,
    rotary,
)
from fla_torch.generation import accept_cache

TESTED_VERSIONS = "0.6.0"

# fla module -> (our module, functions that fla dispatches there)
DISPATCHED = {
    "fla.modules.causal_conv1d.ops": (
        convolution,
        ("causal_conv1d_fwd", "causal_conv1d_bwd", "causal_conv1d_update", "causal_conv1d_update_states",
         "compute_dh0_triton"),
    ),
    "fla.modules.norm.layernorm": (normalization, ("layer_norm_fwd", "layer_norm_bwd")),
    "fla.modules.norm.fused_norm_gate": (normalization, ("layer_norm_gated_fwd", "layer_norm_gated_bwd")),
    "fla.modules.norm.l2norm": (normalization, ("l2norm_fwd", "l2norm_bwd")),
    "fla.modules.activations.ops": (
        activations,
        ("sigmoid_fwd", "sigmoid_bwd", "logsigmoid_fwd", "logsigmoid_bwd", "swish_fwd", "swish_bwd", "swiglu_fwd",
         "swiglu_fwdbwd"),
    ),
    "fla.modules.fused_cross_entropy.ops": (cross_entropy, ("cross_entropy_fwd", "cross_entropy_bwd")),
    "fla.modules.fused_linear_cross_entropy.ops": (cross_entropy, ("fused_linear_cross_entropy_bwd",)),
    "fla.modules.rotary.ops": (rotary, ("rotary_embedding_fwdbwd",)),
    "fla.ops.kda.chunk": (kda, ("chunk_kda",)),
}  # fmt: skip

# Dispatched by fla under the name of an operation, where a backend is a class with a method for each function.
DISPATCHED_OPERATIONS = {"gated_delta_rule": operators.chunk_gated_delta_rule, "kda": kda.fused_recurrent_kda_fwd}

# fla module -> (what it does not dispatch, ours). Most are held by name in the modules of layers. The third and the
# loss are looked up at each call, by the module itself and through the class, so that models of transformers that took
# hold of fla's public functions before `enable()` find ours too.
UNDISPATCHED = {
    "fla.ops.delta_rule.chunk": ("chunk_delta_rule", operators.chunk_delta_rule),
    "fla.ops.delta_rule.fused_recurrent": ("fused_recurrent_delta_rule", operators.fused_recurrent_delta_rule),
    "fla.ops.gated_delta_rule.fused_recurrent": (
        "fused_recurrent_gated_delta_rule_fwd",
        operators.fused_recurrent_gated_delta_rule_fwd,
    ),
    "fla.modules.fused_cross_entropy.ops": ("FusedCrossEntropyLoss.forward", cross_entropy.cross_entropy_loss_forward),
    "fla.ops.precond_gated_delta_rule.chunk": (
        "chunk_precond_gated_delta_rule",
        preconditioned.precond_gated_delta_rule,
    ),
    "fla.ops.precond_gated_delta_rule.fused_recurrent": (
        "fused_recurrent_precond_gated_delta_rule",
        preconditioned.precond_gated_delta_rule,
    ),
    "fla.ops.precond_kda.chunk": ("chunk_precond_kda", preconditioned.precond_kda),
    "fla.ops.precond_kda.fused_recurrent": ("fused_recurrent_precond_kda", preconditioned.fused_recurrent_precond_kda),
    "fla.ops.kda.gate": ("fused_kda_gate", preconditioned.fused_kda_gate),
}

# Where the package flash-attn is missing, the first of its functions is None in fla's module, the second not there.
SOFTMAX_MODULE = "fla.layers.attn"
SOFTMAX = {"flash_attn_func": attention.flash_attn_func, "flash_attn_varlen_func": attention.flash_attn_varlen_func}

_on_cuda: bool | frozenset[str] = False  # on CUDA everything, or the operations of these names
_is_enabled = False


class UnsupportedVersionError(ImportError):
    """The installed fla lacks a function or a hook that is needed, or its dispatch is switched off."""


def mend() -> None:
    """Let fla's models decode with the installed transformers, and be built where flash-attn is not installed.

    That changes no kernel: what :func:`enable` does beyond this is not needed on a GPU. Calling it again changes
    nothing.
    """
    accept_cache()
    module = importlib.import_module(SOFTMAX_MODULE)
    for name, implementation in SOFTMAX.items():
        if getattr(module, name, None) is None:
            setattr(module, name, implementation)


def enable(*, cuda: bool | Collection[str] = False) -> None:
    """Let fla's models run in PyTorch where no Triton kernel can: on a CPU, and on CUDA if asked for.

    It does what :func:`mend` does, too.

    On CUDA fla's own kernels run, unless ``cuda`` is true: PyTorch needs no autotuning, which on a fresh
    machine takes minutes. Where ``cuda`` names operations of fla (``gated_delta_rule``, ``kda``: the chunked rules),
    these alone run in PyTorch there. Calling it again changes nothing but this choice. Call it before or after models
    are built.

    Raises:
        ValueError: there is no such operation.
        UnsupportedVersionError: the installed fla lacks what the backend needs, or its dispatch is switched off.
    """
    global _is_enabled, _on_cuda
    if not isinstance(cuda, bool) and (unknown := set(cuda) - DISPATCHED_OPERATIONS.keys()):
        raise ValueError(f"no operation {', '.join(unknown)}; there are {', '.join(DISPATCHED_OPERATIONS)}")
    if not _is_enabled:
        _check_version()
        _register()
        mend()
        _is_enabled = True
    _on_cuda = cuda if isinstance(cuda, bool) else frozenset(cuda)


def is_enabled() -> bool:
    """Return whether :func:`enable` was called in this process."""
    return _is_enabled


def is_taken(*args, operation: str | None = None, **kwargs) -> tuple[bool, str | None]:
    """Tell fla's dispatcher whether our backend takes a call with these arguments, and if not, why."""
    if _on_cuda is True or (_on_cuda and operation in _on_cuda):
        return True, None
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, torch.Tensor):
            return argument.device.type == "cpu", f"tensors are on {argument.device.type}"
    return False, "no tensor among the arguments"


def _check_version() -> None:
    try:
        backends = importlib.import_module("fla.backends")
        missing = [name for name in ("BaseBackend", "dispatch", "register") if not hasattr(backends, name)]
        wanted = [(module, name) for module, (_, names) in DISPATCHED.items() for name in names]
        wanted += [(module, name.split(".")[0]) for module, (name, _) in UNDISPATCHED.items()]
        wanted.append(("fla.ops.gated_delta_rule.chunk", "chunk_gated_delta_rule"))
        wanted.append(("fla.ops.kda.fused_recurrent", "fused_recurrent_kda_fwd"))
        wanted.append((SOFTMAX_MODULE, "flash_attn_func"))
        missing += [f"{module}.{name}" for module, name in wanted if not hasattr(importlib.import_module(module), name)]
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] != "fla":
            raise UnsupportedVersionError(
                f"flash-linear-attention needs {error.name}: pip install {error.name}"
            ) from error
        missing = [error.name or str(error)]
    except ImportError as error:
        missing = [str(error)]
    if missing:
        raise UnsupportedVersionError(
            f"the PyTorch backend works with flash-linear-attention {TESTED_VERSIONS}; the installed one lacks "
            f"{', '.join(missing)}: pip install flash-linear-attention=={TESTED_VERSIONS}"
        )
    refuse_disabled_dispatch("the PyTorch backend")


def refuse_disabled_dispatch(user: str) -> None:
    """Raise UnsupportedVersionError if fla's registry of backends, which ``user`` needs, is switched off."""
    if getattr(importlib.import_module("fla.backends"), "_DISPATCH_DISABLED", False):
        raise UnsupportedVersionError(
            f"FLA_DISABLE_BACKEND_DISPATCH=1 switches off the registry that {user} needs: unset it"
        )


def replace_everywhere(original, dispatched) -> None:
    """Put the dispatched function at every name under which a loaded module holds the original."""
    for module in list(sys.modules.values()):
        for attribute, value in list(getattr(module, "__dict__", {}).items()):
            if value is original:
                setattr(module, attribute, dispatched)


def _register() -> None:
    from fla.backends import BaseBackend, dispatch, register

    class TorchBackend(BaseBackend):
        backend_type = "torch"
        priority = -1

    def place(entry_point, implementation):
        # Registries are keyed by the plain function, and find ours by the arguments that a call names.
        register(entry_point, backend=TorchBackend, verifier=is_taken)(implementation)

    for module_name, (ours, names) in DISPATCHED.items():
        module = importlib.import_module(module_name)
        for name in names:
            place(inspect.unwrap(getattr(module, name)), getattr(ours, name))

    for operation, implementation in DISPATCHED_OPERATIONS.items():
        methods = {implementation.__name__: staticmethod(implementation)}
        backend = type("TorchOperation", (TorchBackend,), methods)
        register(operation, verifier=partial(is_taken, operation=operation))(backend)

    for module_name, (path, implementation) in UNDISPATCHED.items():
        module = importlib.import_module(module_name)
        *owner, name = path.split(".")
        holder = getattr(module, owner[0]) if owner else module
        original = getattr(holder, name)
        dispatched = dispatch(original)
        place(original, implementation)
        setattr(holder, name, dispatched)
        replace_everywhere(original, dispatched)

    module = importlib.import_module(SOFTMAX_MODULE)
    for name, implementation in SOFTMAX.items():
        # What is not there, mend() puts there.
        original = getattr(module, name, None)
        if original is not None and original is not implementation:
            setattr(module, name, dispatch(original))
            place(original, implementation)
