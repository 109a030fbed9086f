"""Where the kernel stands in for fla's, and which calls it takes.

The functions of fla that its layers and transformers' models come to in every decoding step get fla's own dispatcher
around them, if they do not have it already; there the kernel is registered. Calls that it does not
cover run in fla's own kernels.
"""

import importlib

import torch
from fla_torch.registry import TESTED_VERSIONS, UnsupportedVersionError, refuse_disabled_dispatch, replace_everywhere

from fla_decode.state import FLOATS
from fla_decode.step import MAX_KEY_CHANNELS, decode_step

_is_placed = False
_is_enabled = False
# What `decode_step` is called with, by choice of whoever enables it.
_options: dict = {}


def enable(*, inplace: bool = False, state_dtype: torch.dtype = torch.float32) -> None:
    """Let fla's models and those of transformers decode by the kernel, on CUDA, where no gradient is asked for.

    With ``inplace`` the new state is written over the old one. fla's caches drop the old one anyway; a program that
    keeps it, to go back to it, must not ask for this. Calling it again changes nothing but these choices.

    The first decoding step after a prefill reads fla's float32 state and writes one in ``state_dtype``, and so it
    stays. bfloat16 and float16 halve what caches of fla hold and what a step moves; float16 ends at 65,504. int8 nearly
    quarters it: there the cache holds an `Int8State`, and only single tokens can follow. transformers' own models copy
    each state into a float32 one, so that for them the state is rounded and nothing is saved, and int8 fails.

    Raises:
        ValueError: ``state_dtype`` is none of float32, bfloat16, float16, int8.
        UnsupportedVersionError: the installed fla lacks what the kernel needs, or its dispatch is switched off.
    """
    global _is_enabled, _is_placed
    if state_dtype not in (*FLOATS, torch.int8):
        raise ValueError(f"`state_dtype` is {state_dtype}; states are kept in float32, bfloat16, float16 or int8")
    if not _is_placed:
        _place_all()
        _is_placed = True
    _is_enabled = True
    _options.update(inplace=inplace, state_dtype=state_dtype)


def disable() -> None:
    """Leave every call to fla again."""
    global _is_enabled
    _is_enabled = False


def is_enabled() -> bool:
    """Return whether decoding steps go to the kernel."""
    return _is_enabled


def fused_recurrent_delta_rule(
    q, k, v, beta=None, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    cu_seqlens=None,
):  # fmt: skip
    """fla's function of that name, for the calls that `takes_ungated` takes."""
    _refuse_more_tokens(q, cu_seqlens)
    output, state = decode_step(
        q, k, v, beta, initial_state, scale=scale, normalize=use_qk_l2norm_in_kernel, **_options
    )
    return output.to(q.dtype), state


def fused_recurrent_gated_delta_rule(
    q, k, v, g=None, gk=None, gv=None, beta=None, scale=None, initial_state=None, output_final_state=False,
    use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, A_log=None, dt_bias=None,
    use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, state_v_first=False, cu_seqlens=None, **_,
):  # fmt: skip
    """fla's function of that name, for the calls that `takes_gated` takes."""
    _refuse_more_tokens(q, cu_seqlens)
    return decode_step(
        q, k, v, beta, initial_state,
        scale=scale, gate_B1W=g, A_log_W=A_log if use_gate_in_kernel else None,
        dt_bias_W=dt_bias if use_gate_in_kernel else None, normalize=use_qk_l2norm_in_kernel,
        beta_is_logit=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval, state_v_first=state_v_first,
        **_options,
    )  # fmt: skip


def fused_recurrent_gated_delta_rule_fwd(
    q, k, v, g=None, gk=None, gv=None, beta=None, A_log=None, dt_bias=None, scale=None, initial_state=None,
    output_final_state=False, use_qk_l2norm_in_kernel=False, use_beta_sigmoid_in_kernel=False,
    allow_neg_eigval=False, state_v_first=False, cu_seqlens=None,
):  # fmt: skip
    """fla's function of that name, for the calls that `takes_gated_fwd` takes."""
    _refuse_more_tokens(q, cu_seqlens)
    return decode_step(
        q, k, v, beta, initial_state,
        scale=scale, gate_B1W=g, A_log_W=A_log, dt_bias_W=dt_bias, normalize=use_qk_l2norm_in_kernel,
        beta_is_logit=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval, state_v_first=state_v_first,
        **_options,
    )  # fmt: skip


def takes_ungated(
    q, k, v, beta=None, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    cu_seqlens=None,
) -> tuple[bool, str | None]:  # fmt: skip
    """Tell fla's dispatcher whether the kernel takes this call, and if not, why."""
    return _answer((q, k, v, beta, initial_state), output_final_state, cu_seqlens)


def takes_gated(
    q, k, v, g=None, gk=None, gv=None, beta=None, scale=None, initial_state=None, output_final_state=False,
    use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, A_log=None, dt_bias=None,
    use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, state_v_first=False, cu_seqlens=None, **others,
) -> tuple[bool, str | None]:  # fmt: skip
    """The same for the gated rule as fla's layers call it."""
    lacks_gate = use_gate_in_kernel and (g is None or A_log is None)
    if lacks_gate or (allow_neg_eigval and not use_beta_sigmoid_in_kernel):
        return False, "arguments that fla refuses"
    if "transpose_state_layout" in others:
        return False, "an argument that fla has renamed"
    gates = (g, A_log, dt_bias) if use_gate_in_kernel else (g,)
    return _answer((q, k, v, beta, initial_state), output_final_state, cu_seqlens, gates, (gk, gv))


def takes_gated_fwd(
    q, k, v, g=None, gk=None, gv=None, beta=None, A_log=None, dt_bias=None, scale=None, initial_state=None,
    output_final_state=False, use_qk_l2norm_in_kernel=False, use_beta_sigmoid_in_kernel=False,
    allow_neg_eigval=False, state_v_first=False, cu_seqlens=None,
) -> tuple[bool, str | None]:  # fmt: skip
    """The same for the gated rule inside that function, within autograd."""
    return _answer((q, k, v, beta, initial_state), output_final_state, cu_seqlens, (g, A_log, dt_bias), (gk, gv))


def _answer(*call) -> tuple[bool, str | None]:
    inputs, *others = call
    reason = _refusal(inputs, *others)
    # fla cannot read int8: such a call comes to ours, which says so where it cannot be taken.
    return reason is None or isinstance(inputs[-1], tuple), reason


def _refuse_more_tokens(q: torch.Tensor, cu_seqlens: torch.Tensor | None) -> None:
    if q.shape[1] != 1 or cu_seqlens is not None:
        raise ValueError(
            "after a state in int8 only single tokens can follow: decode without packed sequences, one token at a "
            "time, or keep the state in bfloat16 (fla_decode.enable(state_dtype=torch.bfloat16))"
        )


def _refusal(inputs, output_final_state, cu_seqlens, gates=(), channel_gates=()) -> str | None:
    """Return why a call is left to fla; None if it is not."""
    q, k, v, beta, initial_state = inputs
    if not _is_enabled:
        return "the decode kernel is switched off"
    if not q.is_cuda:
        return f"tensors are on {q.device.type}"
    if q.shape[1] != 1 or cu_seqlens is not None:
        return "more than one token, or packed sequences"
    if initial_state is None or not output_final_state:
        return "no state to read, or none to write"
    if beta is None or beta.ndim != 3 or any(gate is not None for gate in channel_gates):
        return "beta is absent, or beta or the decay per channel"
    if k.shape[-1] > MAX_KEY_CHANNELS or v.shape[2] % k.shape[2]:
        return f"more than {MAX_KEY_CHANNELS} key channels, or value heads that key heads do not divide"
    states = () if isinstance(initial_state, tuple) else (initial_state,)
    tensors = [tensor for tensor in (q, k, v, beta, *states, *gates) if tensor is not None]
    if any(tensor.dtype not in FLOATS for tensor in tensors):
        return "a dtype that is not one of float32, bfloat16, float16"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "a gradient is asked for"
    return None


# (fla's module, its function, ours, which calls ours takes). Layers hold the first two by name. The third is looked up
# at each call, so that models of transformers that took hold of the second before `enable()` find ours too.
GATED = "fla.ops.gated_delta_rule.fused_recurrent"
PLACES = (
    ("fla.ops.delta_rule.fused_recurrent", "fused_recurrent_delta_rule", fused_recurrent_delta_rule, takes_ungated),
    (GATED, "fused_recurrent_gated_delta_rule", fused_recurrent_gated_delta_rule, takes_gated),
    (GATED, "fused_recurrent_gated_delta_rule_fwd", fused_recurrent_gated_delta_rule_fwd, takes_gated_fwd),
)


def _place_all() -> None:
    try:
        from fla.backends import BaseBackend, dispatch, register

        originals = [getattr(importlib.import_module(module), name) for module, name, *_ in PLACES]
    except (ImportError, AttributeError) as error:
        raise UnsupportedVersionError(
            f"the decode kernel works with flash-linear-attention {TESTED_VERSIONS}; the installed one lacks "
            f"something it needs ({error}): pip install flash-linear-attention=={TESTED_VERSIONS}"
        ) from error
    refuse_disabled_dispatch("the decode kernel")

    class DecodeBackend(BaseBackend):
        backend_type = "decode"
        # After fla_torch, which takes a call on CUDA only where it was asked to.
        priority = 0

    for original, (*_, implementation, verifier) in zip(originals, PLACES, strict=True):
        place = {"backend": DecodeBackend, "verifier": verifier}
        try:
            register(original, **place)(implementation)
        except KeyError:
            # Nobody has dispatched it yet.
            replace_everywhere(original, dispatch(original))
            register(original, **place)(implementation)
