"""fla's delta-rule operators, with fla's names, arguments and results, computed by ``delta_rule.py``.

Shapes as there; N sequences, which are the batch, or lie packed in one row where ``cu_seqlens`` is given.
fla's own docstrings describe the arguments: https://github.com/fla-org/flash-linear-attention. One is ours alone: the
``recurrence`` of the operators for prefill, which runs in place of those of ``delta_rule.py`` (:func:`_delta_rule`).
"""

import torch
import torch.nn.functional as F

from fla_torch.delta_rule import CHUNK_SIZE, chunked_delta_rule, recurrent_delta_rule
from fla_torch.normalization import l2_normalize
from fla_torch.numerics import widen
from fla_torch.sequences import pack, unpack


def chunk_delta_rule(
    q, k, v, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    cu_seqlens=None, cu_seqlens_cpu=None, **kwargs,
):  # fmt: skip
    """The ungated delta rule; unlike fla's kernel it takes float32 and float64 too."""
    return _delta_rule(
        q, k, v, beta, None,
        scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        normalize=use_qk_l2norm_in_kernel, cu_seqlens=cu_seqlens, chunk_size=kwargs.get("chunk_size", CHUNK_SIZE),
        recurrence=kwargs.get("recurrence"),
    )  # fmt: skip


def fused_recurrent_delta_rule(
    q, k, v, beta=None, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    cu_seqlens=None,
):  # fmt: skip
    """The ungated delta rule as fla's layers call it for decoding and for short sequences."""
    beta = torch.ones_like(v[..., 0]) if beta is None else beta
    return _delta_rule(
        q, k, v, beta, None,
        scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        normalize=use_qk_l2norm_in_kernel, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def chunk_gated_delta_rule(
    q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, state_v_first=False, cu_seqlens=None,
    cu_seqlens_cpu=None, chunk_indices=None, cp_context=None, *, use_gate_in_kernel=False, A_log=None, dt_bias=None,
    chunk_size=CHUNK_SIZE, transpose_state_layout=False, recurrence=None,
):  # fmt: skip
    """The gated delta rule; ``g`` is a log decay, or with ``use_gate_in_kernel`` what precedes the gate."""
    if cp_context is not None:
        raise ValueError("the PyTorch backend of fla has no context parallelism: use fla's Triton kernels for it")
    return _delta_rule(
        q, k, v, activate_beta(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval),
        activate_gate(g, A_log, dt_bias) if use_gate_in_kernel else widen(g),
        scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        normalize=use_qk_l2norm_in_kernel, cu_seqlens=cu_seqlens, chunk_size=chunk_size,
        state_v_first=state_v_first or transpose_state_layout, recurrence=recurrence,
    )  # fmt: skip


def fused_recurrent_gated_delta_rule_fwd(
    q, k, v, g=None, gk=None, gv=None, beta=None, A_log=None, dt_bias=None, scale=None, initial_state=None,
    output_final_state=False, use_qk_l2norm_in_kernel=False, use_beta_sigmoid_in_kernel=False,
    allow_neg_eigval=False, state_v_first=False, cu_seqlens=None,
):  # fmt: skip
    """The gated rule for decoding. As in fla the gate is computed inside exactly when ``A_log`` is given."""
    if A_log is not None:
        g = activate_gate(g, A_log, dt_bias)
    return _delta_rule(
        q, k, v, activate_beta(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval), None if g is None else widen(g),
        key_log_decay=gk, value_log_decay=gv,
        scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        normalize=use_qk_l2norm_in_kernel, cu_seqlens=cu_seqlens, state_v_first=state_v_first,
    )  # fmt: skip


def activate_gate(gate_BTW: torch.Tensor, A_log_W: torch.Tensor, dt_bias_W: torch.Tensor | None) -> torch.Tensor:
    """Return the log decay ``-exp(A_log) softplus(gate + dt_bias)`` (arXiv:2412.06464), float32 or float64."""
    gate_BTW = widen(gate_BTW)
    if dt_bias_W is not None:
        gate_BTW = gate_BTW + widen(dt_bias_W)
    return -widen(A_log_W).exp() * F.softplus(gate_BTW)


def activate_beta(beta: torch.Tensor, use_sigmoid: bool, allow_neg_eigval: bool) -> torch.Tensor:
    """Return the writing strength: beta itself, or its sigmoid, doubled where negative eigenvalues are allowed.

    Raises:
        ValueError: ``allow_neg_eigval`` without ``use_sigmoid``, which fla refuses too.
    """
    if allow_neg_eigval and not use_sigmoid:
        raise ValueError("allow_neg_eigval doubles the sigmoid of beta: pass use_beta_sigmoid_in_kernel too")
    beta = widen(beta)
    if use_sigmoid:
        beta = beta.sigmoid()
    return beta * 2 if allow_neg_eigval else beta


def _delta_rule(
    query, key, value, beta, log_decay, *, scale, initial_state, output_final_state, normalize, cu_seqlens,
    key_log_decay=None, value_log_decay=None, chunk_size=CHUNK_SIZE, state_v_first=False, recurrence=None,
):  # fmt: skip
    """What the operators share: precision, normalisation, packing, the state's layout, and which form runs.

    Where there is a ``recurrence``, that runs: it takes and returns what ``recurrent_delta_rule`` does.
    """
    output_dtype = value.dtype
    scale = key.shape[-1] ** -0.5 if scale is None else scale
    # autocast would lower the matrix products to 16 bits; fla's kernels keep the state in float32, and so do we.
    with torch.autocast(query.device.type, enabled=False):
        is_per_channel = key_log_decay is not None or value_log_decay is not None or beta.ndim == value.ndim
        is_recurrent = recurrence is not None or key.shape[1] <= 1 or is_per_channel
        arguments = [query, key, value, widen(beta), log_decay, key_log_decay, value_log_decay]
        if is_recurrent:  # chunks are widened as they are laid out
            arguments[:3] = widen(query), widen(key), widen(value)
        if normalize:
            arguments[:2] = l2_normalize(arguments[0]), l2_normalize(arguments[1])
        if cu_seqlens is not None:
            # Behind a sequence's end beta is 0 and the log decay 0: the state stays as it is.
            arguments = [None if argument is None else unpack(argument, cu_seqlens) for argument in arguments]
        query, key, value, beta, log_decay, key_log_decay, value_log_decay = arguments
        state = None
        if initial_state is not None:
            if len(initial_state) != len(query):
                raise ValueError(f"{len(query)} sequences need as many initial states, not {len(initial_state)}")
            state = widen(initial_state).to(widen(value[:0]).dtype)
            state = state.mT if state_v_first else state
        if is_recurrent:
            decays = [
                None if log_decay is None else log_decay[..., None, None],
                None if key_log_decay is None else widen(key_log_decay)[..., None],
                None if value_log_decay is None else widen(value_log_decay)[..., None, :],
            ]
            decays = [decay for decay in decays if decay is not None]
            output, state = (recurrence or recurrent_delta_rule)(
                query, key, value, beta, sum(decays) if decays else None, scale=scale, initial_state_BWKV=state
            )
        else:
            output, state = chunked_delta_rule(
                query, key, value, beta, log_decay, scale=scale, initial_state_BWKV=state, chunk_size=chunk_size
            )
        if cu_seqlens is not None:
            output = pack(output, cu_seqlens)
        final_state = None
        if output_final_state:
            final_state = (state.mT if state_v_first else state).contiguous()
    return output.to(output_dtype), final_state
