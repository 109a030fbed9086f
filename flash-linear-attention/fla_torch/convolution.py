"""The short causal convolution of fla's layers: depthwise, a few taps, with a cache of the last inputs.

``y_t = act(sum_w weight_w x_{t - W + 1 + w} + bias) + residual_t``

Shapes: B batch, N sequences (the batch, or packed in one row where ``cu_seqlens`` is given), T tokens,
D channels, W taps. The cache holds the last W inputs, of which a step needs W - 1.
"""

import torch
import torch.nn.functional as F

from fla_torch.numerics import pull_back, widen
from fla_torch.sequences import pack, unpack


def causal_conv1d_fwd(
    x, weight, bias, residual, initial_state=None, output_final_state=False, activation=None, cu_seqlens=None, **_,
):  # fmt: skip
    """Return the output in the shape and dtype of ``x``, and the last W inputs ``[N, D, W]`` or None."""
    output = _convolve(x, weight, bias, residual, initial_state, activation, cu_seqlens).to(x.dtype)
    final_state = None
    if output_final_state:
        final_state = causal_conv1d_update_states(
            _flatten_channels(x, weight), weight.shape[1], initial_state, cu_seqlens
        )
    return output, final_state


def causal_conv1d_bwd(
    x, dy, dht, weight=None, bias=None, residual=None, initial_state=None, activation=None, cu_seqlens=None, **_,
):  # fmt: skip
    """Return the gradients of x, weight, bias, residual and initial state; None for what is absent."""

    def forward(x, weight, bias, residual, initial_state):
        output = _convolve(x, weight, bias, residual, initial_state, activation, cu_seqlens)
        if dht is None:
            return output
        state = causal_conv1d_update_states(_flatten_channels(x, weight), weight.shape[1], initial_state, cu_seqlens)
        return output, state

    output_gradients = [dy] if dht is None else [dy, dht]
    return tuple(pull_back(forward, [x, weight, bias, residual, initial_state], output_gradients))


def compute_dh0_triton(dy, y, weight, initial_state, activation, cu_seqlens, dht=None):
    """Return the gradient of the initial state alone; ``y`` is the output before the activation.

    The output is linear in the initial state up to the activation, whose derivative ``y`` fixes.
    """
    if activation is not None:
        (dy,) = pull_back(F.silu, [widen(y)], [dy])
    no_input = torch.zeros_like(dy)
    return causal_conv1d_bwd(
        no_input, dy, dht, weight, initial_state=initial_state, cu_seqlens=cu_seqlens
    )[-1]  # fmt: skip


def causal_conv1d_update_states(x, state_len, initial_state=None, cu_seqlens=None):
    """Return the last ``state_len`` inputs of each sequence ``[N, D, W]``; what precedes the first is 0."""
    if x.dim() == 2:
        x = x[None]
    sequences = x if cu_seqlens is None else x[0].split(cu_seqlens.diff().tolist())
    states = []
    for n, sequence_TD in enumerate(sequences):
        before_DW = x.new_zeros(x.shape[-1], state_len) if initial_state is None else initial_state[n].to(x.dtype)
        states.append(torch.cat([before_DW, sequence_TD[-state_len:].mT], dim=1)[:, -state_len:])
    return torch.stack(states)


def causal_conv1d_update(x, cache, residual=None, weight=None, bias=None, activation=None):
    """Take one token per sequence, ``[N, D]``, ``[N, 1, D]`` or ``[1, N, D]``, and shift it into ``cache`` in place."""
    latest_ND = x.reshape(-1, weight.shape[0])
    cache.copy_(torch.cat([cache[:, :, 1:], latest_ND[:, :, None].to(cache.dtype)], dim=2))
    output_ND = (widen(cache) * widen(weight)).sum(dim=-1)
    output_ND = _activate(output_ND if bias is None else output_ND + widen(bias), activation)
    output = output_ND.view(x.shape)
    if residual is not None:
        output = output + residual.view(x.shape)
    return output.to(x.dtype), cache


def _convolve(x, weight_DW, bias_D, residual, initial_state_NDW, activation, cu_seqlens):
    """The convolution as a sum of W shifted products, in float32 or float64, in the shape of ``x``."""
    rows_NTD = widen(_flatten_channels(x, weight_DW))
    if cu_seqlens is not None:
        rows_NTD = unpack(rows_NTD, cu_seqlens)
    T, W = rows_NTD.shape[1], weight_DW.shape[1]
    if initial_state_NDW is None:
        padded_NTD = F.pad(rows_NTD, (0, 0, W - 1, 0))
    else:
        before_NWD = widen(initial_state_NDW).to(rows_NTD.dtype)[:, :, 1:].mT
        padded_NTD = torch.cat([before_NWD, rows_NTD], dim=1)
    taps_WD = widen(weight_DW).to(rows_NTD.dtype).mT
    output_NTD = padded_NTD[:, W - 1 :] * taps_WD[-1]
    for w in range(W - 1):
        output_NTD = torch.addcmul(output_NTD, padded_NTD[:, w : w + T], taps_WD[w])
    if bias_D is not None:
        output_NTD = output_NTD + widen(bias_D)
    output_NTD = _activate(output_NTD, activation)
    if cu_seqlens is not None:
        output_NTD = pack(output_NTD, cu_seqlens)
    output = output_NTD.reshape(x.shape)
    return output if residual is None else output + residual


def _flatten_channels(x, weight_DW):
    return x if x.shape[-1] == weight_DW.shape[0] else x.flatten(start_dim=2)


def _activate(x, activation):
    return x if activation is None else F.silu(x)
