"""fla's operators of the preconditioned delta rules (arXiv:2604.21100), gated and with a decay for each key channel.

A second state ``A``, one number for each key channel, follows the squares of the normalised keys. A key is written with
each channel divided by about the square root of it, and read as it is::

    A_t = exp(g_atk_t) A_{t-1} + beta_atk_t k_t^2
    r_t = log(A_t + eps) - log_atk_scale
    w_t = k_t x^(-r_t / (1 + |r_t|))
    S_t = a_t S_{t-1} + w_t (beta_t (v_t - a_t S_{t-1}^T k_t))^T

They run token by token, whatever fla calls them. Shapes as in ``delta_rule.py``; fla's own docstrings describe the
arguments: https://github.com/fla-org/flash-linear-attention.
"""

import math

import torch

from fla_torch.delta_rule import recurrent_delta_rule
from fla_torch.kda import activate_channel_gate
from fla_torch.normalization import l2_normalize
from fla_torch.numerics import widen
from fla_torch.sequences import pack, unpack

_DEFAULT_CENTER = -0.2


def precond_gated_delta_rule(
    q, k, v, g=None, gk=None, gv=None, beta=None, g_atk=None, beta_atk=None, scale=None, initial_state=None,
    initial_A_state=None, output_final_state=False, use_qk_l2norm_in_kernel=True, cu_seqlens=None, cu_seqlens_cpu=None,
    cp_context=None, transpose_state_layout=False, x=1.5, eps=1e-6, log_atk_scale=None,
):  # fmt: skip
    """The gated rule; ``g`` is a log decay for each value head. It returns the output and both final states."""
    decays = [None if g is None else g[..., None, None], None if gk is None else gk[..., None]]
    decays.append(None if gv is None else gv[..., None, :])
    return _preconditioned(
        q, k, v, torch.ones_like(v[..., 0]) if beta is None else beta, [one for one in decays if one is not None],
        g_atk, beta_atk, scale=scale, states=(initial_state, initial_A_state), output_final_state=output_final_state,
        normalize=use_qk_l2norm_in_kernel, cu_seqlens=cu_seqlens, cp_context=cp_context,
        state_v_first=transpose_state_layout, squash=(x, eps, log_atk_scale),
    )  # fmt: skip


def precond_kda(
    q, k, v, g, g_atk, beta_atk, beta, scale=None, initial_state=None, initial_A_state=None, output_final_state=False,
    use_gate_in_kernel=False, safe_gate=False, lower_bound=None, cu_seqlens=None, cu_seqlens_cpu=None,
    chunk_indices=None, cp_context=None, transpose_state_layout=False, x=1.5, eps=1e-6, log_atk_scale=None,
    solve_tril_precision=None, disable_recompute=False, return_intermediate_states=False,
    use_qk_l2norm_in_kernel=False, A_log=None, dt_bias=None, **kwargs,
):  # fmt: skip
    """The rule with a decay for each key channel; ``g`` as in :func:`fla_torch.kda.chunk_kda`."""
    if return_intermediate_states:
        raise ValueError("the PyTorch backend of fla keeps no states: use fla's Triton kernels for them")
    if use_gate_in_kernel:
        g = activate_channel_gate(g, A_log, dt_bias, lower_bound)
    return _preconditioned(
        q, k, v, beta, [g[..., None]], g_atk, beta_atk, scale=scale, states=(initial_state, initial_A_state),
        output_final_state=output_final_state, normalize=use_qk_l2norm_in_kernel, cu_seqlens=cu_seqlens,
        cp_context=cp_context, state_v_first=transpose_state_layout, squash=(x, eps, log_atk_scale),
    )  # fmt: skip


def fused_recurrent_precond_kda(*arguments, use_qk_l2norm_in_kernel=True, **others):
    """Decoding and short sequences, which fla normalises unless it is asked not to."""
    names = ("q", "k", "v", "g", "g_atk", "beta_atk", "beta", "A_log", "dt_bias", "scale")
    named = dict(zip(names, arguments, strict=False))
    return precond_kda(**named, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, **others)


def fused_kda_gate(g, A_log=None, dt_bias=None, lower_bound=None, output_dtype=torch.float32):
    """The log decay of each key channel; ``dt_bias`` has an entry for each channel of each head."""
    return activate_channel_gate(g, A_log, dt_bias, lower_bound).to(output_dtype)


def _preconditioned(
    query, key, value, beta, decays, key_decay, key_beta, *, scale, states, output_final_state, normalize, cu_seqlens,
    cp_context, state_v_first, squash,
):  # fmt: skip
    """What the operators share: precision, normalisation, packing, the state's layout, and the key that is written."""
    if cp_context is not None:
        raise ValueError("the PyTorch backend of fla has no context parallelism: use fla's Triton kernels for it")
    output_dtype, scale = value.dtype, key.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(query.device.type, enabled=False):
        arguments = [widen(tensor) for tensor in (query, key, value, beta, key_decay, key_beta, *decays)]
        if normalize:
            arguments[:2] = l2_normalize(arguments[0]), l2_normalize(arguments[1])
        if cu_seqlens is not None:
            # Behind a sequence's end beta is 0 and the log decay 0: both states stay as they are.
            arguments = [unpack(argument, cu_seqlens) for argument in arguments]
        query, key, value, beta, key_decay, key_beta, *decays = arguments
        state, squares = (None if one is None else widen(one).to(value.dtype) for one in states)
        written, squares = _written_keys(key, key_decay, key_beta, squares, *squash)
        output, state = recurrent_delta_rule(
            query, key, value, beta, sum(decays) if decays else None, scale=scale, written_BTHK=written,
            initial_state_BWKV=state.mT if state is not None and state_v_first else state,
        )  # fmt: skip
        if cu_seqlens is not None:
            output = pack(output, cu_seqlens)
    if not output_final_state:
        return output.to(output_dtype), None, None
    return output.to(output_dtype), (state.mT if state_v_first else state).contiguous(), squares


def _written_keys(
    key_BTHK: torch.Tensor,
    log_decay_BTH: torch.Tensor,
    beta_BTH: torch.Tensor,
    squares_BHK: torch.Tensor | None,
    base: float,
    eps: float,
    center: torch.Tensor | float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys that are written, ``[B, T, H, K]``, and the state of their squares after the last token."""
    center = _DEFAULT_CENTER if center is None else center
    center_H1 = widen(center)[:, None] if isinstance(center, torch.Tensor) else center
    squares_BHK = torch.zeros_like(key_BTHK[:, 0]) if squares_BHK is None else squares_BHK
    written = []
    for t in range(key_BTHK.shape[1]):
        key_BHK = key_BTHK[:, t]
        squares_BHK = log_decay_BTH[:, t, :, None].exp() * squares_BHK + beta_BTH[:, t, :, None] * key_BHK.square()
        away_BHK = torch.log(squares_BHK + eps) - center_H1
        written.append(key_BHK * torch.exp(-math.log(base) * away_BHK / (1 + away_BHK.abs())))
    return torch.stack(written, dim=1), squares_BHK
