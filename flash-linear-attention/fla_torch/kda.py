"""fla's operators of Kimi Delta Attention (arXiv:2510.26692): the gated delta rule with a decay for each key channel.

They run token by token, whatever fla calls them. Shapes as in ``delta_rule.py``; fla's own docstrings describe the
arguments: https://github.com/fla-org/flash-linear-attention.
"""

import torch
import torch.nn.functional as F

from fla_torch.numerics import widen
from fla_torch.operators import _delta_rule, activate_beta


def chunk_kda(
    q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, safe_gate=False,
    lower_bound=None, disable_recompute=False, return_intermediate_states=False, state_v_first=False, cu_seqlens=None,
    cu_seqlens_cpu=None, cp_context=None, use_graph=False, max_num_seqs=None, **kwargs,
):  # fmt: skip
    """Training and prefill; ``g`` is a log decay, or with ``use_gate_in_kernel`` what precedes the gate."""
    if cp_context is not None or return_intermediate_states:
        raise ValueError(
            "the PyTorch backend of fla has no context parallelism and keeps no states: use fla's Triton kernels"
        )
    if use_gate_in_kernel:
        g = activate_channel_gate(g, kwargs.get("A_log"), kwargs.get("dt_bias"), lower_bound)
    return _delta_rule(
        q, k, v, activate_beta(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval), None, key_log_decay=g,
        scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        normalize=use_qk_l2norm_in_kernel, cu_seqlens=cu_seqlens,
        state_v_first=state_v_first or kwargs.get("transpose_state_layout", False), recurrence=kwargs.get("recurrence"),
    )  # fmt: skip


def fused_recurrent_kda_fwd(
    q, k, v, g, beta, A_log=None, dt_bias=None, initial_state=None, scale=None, output_final_state=False,
    inplace_final_state=True, state_v_first=False, cu_seqlens=None, ssm_state_indices=None, num_accepted_tokens=None,
    use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False,
    lower_bound=None, out=None, **kwargs,
):  # fmt: skip
    """Decoding and short sequences, as :func:`chunk_kda`."""
    if ssm_state_indices is not None or num_accepted_tokens is not None or out is not None:
        raise ValueError("the PyTorch backend of fla has no paged states: use fla's Triton kernels for them")
    return chunk_kda(
        q, k, v, g, beta, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, use_gate_in_kernel=use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval,
        lower_bound=lower_bound, state_v_first=state_v_first, cu_seqlens=cu_seqlens, A_log=A_log, dt_bias=dt_bias,
    )  # fmt: skip


def activate_channel_gate(
    gate_BTWK: torch.Tensor,
    A_log_W: torch.Tensor | None,
    dt_bias_N: torch.Tensor | None,
    lower_bound: float | None = None,
) -> torch.Tensor:
    """Return the log decay of each key channel, float32 or float64.

    It is ``-exp(A_log) softplus(gate + dt_bias)``, or with a lower bound ``lower_bound sigmoid(exp(A_log) (gate +
    dt_bias))``, in which ``A_log`` may be missing; ``dt_bias`` has an entry for each channel of each head.
    """
    gate_BTWK = widen(gate_BTWK)
    if dt_bias_N is not None:
        gate_BTWK = gate_BTWK + widen(dt_bias_N).view(gate_BTWK.shape[-2:])
    rate_W1 = 1 if A_log_W is None else widen(A_log_W).flatten()[:, None].exp()
    if lower_bound is not None:
        return lower_bound * torch.sigmoid(rate_W1 * gate_BTWK)
    return -rate_W1 * F.softplus(gate_BTWK)
