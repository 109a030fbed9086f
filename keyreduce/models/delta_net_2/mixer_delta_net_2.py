"""The mixer of DeltaNet2: the delta rule behind short convolutions whose kernels channels share.

Per head, with ``conv`` the short convolution, ``act`` the activation and ``norm`` the normalisation of the config::

    q_t = norm(act(conv_q(W_q x)_t)),  k_t = norm(act(conv_k(W_k x)_t)),  v_t = silu(conv_v(W_v x)_t)
    S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T,  beta_t = sigmoid(W_b x_t)
    o_t = S_t^T q_t / sqrt(K)

and the output is ``W_o`` of the normalised ``o``. In DeltaNet (Yang et al., arXiv:2406.06484) each channel has a
convolution kernel of its own. Here all channels of a head have the same: with ``act`` the identity and ``norm`` l2, a
rotation of the key channels of a head, in W_q and W_k alike, leaves the output as it is, so that a projection on fewer
channels may start from any basis (the reduction of Nazari & Rusch, arXiv:2602.04852).

Shapes: B batch, T tokens, N sequences (the batch, or packed in one row where ``cu_seqlens`` is given), D channels,
G kernels (one for each head, or one for all), W taps.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from fla.layers.delta_net import DeltaNet
from fla.modules.causal_conv1d import causal_conv1d, causal_conv1d_update
from torch import nn


class SharedShortConvolution(nn.Module):
    """A causal convolution over tokens that all channels of a head, or of all heads, have in common.

    One of three, for each channel d of kernel g; x before the first token is 0::

        learned kernel   y_td = sum_w weight_g0w x_{t-W+1+w,d}     weight [G, 1, W]
        shift            y_td = x_{t-1,d}                          no parameter
        scaled shift     y_td = x_td + scale_g x_{t-1,d}           scale [G]

    The channels of x are split evenly and in order among the kernels, however many channels there are. Kernels are
    spread over their channels when x comes, so fla's operators for one kernel per channel do the work; the gradient of
    a kernel is the sum over its channels. Without a scale the shift delays by one token: what a token says is read
    and written one token later. Weights start as those of PyTorch's convolutions do, scales at 1: both tokens alike.

    Args:
        num_kernels: G, the number of heads, or 1.
        kernel_size: W of a learned kernel; a shift has two taps.
        shift_only: shift in place of a learned kernel.
        scaled_shift: learn the scale of the shift, and add it to what is shifted.
        activation: ``"silu"``, or None for none.
    """

    weight: nn.Parameter | None
    scale: nn.Parameter | None

    def __init__(
        self,
        num_kernels: int,
        kernel_size: int,
        shift_only: bool = False,
        scaled_shift: bool = False,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        weight_G1W = None if shift_only else nn.Parameter(torch.empty(num_kernels, 1, kernel_size))
        scale_G = nn.Parameter(torch.empty(num_kernels)) if shift_only and scaled_shift else None
        self.register_parameter("weight", weight_G1W)
        self.register_parameter("scale", scale_G)
        self.activation = activation
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights, and set scales to 1."""
        if self.weight is not None:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.scale is not None:
            nn.init.ones_(self.scale)

    def kernel_per_channel(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Return the kernels ``[D, W]`` as the channels of ``x_BTD`` see them, the oldest token first."""
        if self.weight is not None:
            kernel_GW = self.weight[:, 0]
        elif self.scale is not None:
            kernel_GW = torch.stack([self.scale, torch.ones_like(self.scale)], dim=1)
        else:
            kernel_GW = torch.eye(1, 2, dtype=x_BTD.dtype, device=x_BTD.device)
        return kernel_GW.repeat_interleave(x_BTD.shape[-1] // len(kernel_GW), dim=0)

    def forward(
        self,
        x: torch.Tensor,
        cache: torch.Tensor | None = None,
        output_final_state: bool | None = False,
        cu_seqlens: torch.Tensor | None = None,
        activation: str | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Convolve, then activate; the arguments are those that fla's layers pass to its ``ShortConvolution``.

        Args:
            x: the inputs ``[B, T, D]``; B is 1 where ``cu_seqlens`` is given. G divides D.
            cache: the last W inputs so far, ``[N, D, W]``, written in place when each sequence gets one token without
                autograd.
            output_final_state: whether to return the last W inputs.
            cu_seqlens: where packed sequences start, and where the last one ends, ``[N + 1]``.
            activation: another activation than the convolution's own.

        Returns:
            The output in the shape and dtype of ``x``, and the last W inputs ``[N, D, W]`` or None.
        """
        activation = activation or self.activation
        B, T, D = x.shape
        kernel_DW = self.kernel_per_channel(x)
        N = B if cu_seqlens is None else len(cu_seqlens) - 1
        is_step = not torch.is_grad_enabled() and B * T == N
        if is_step and (cu_seqlens is None or bool((cu_seqlens.diff() == 1).all())):
            if cache is None:
                cache = x.new_zeros(N, D, kernel_DW.shape[1])
            # Its decorators hide its signature.
            update = cast("Callable[..., tuple[torch.Tensor, torch.Tensor]]", causal_conv1d_update)
            y_BTD, cache = update(x=x, cache=cache, weight=kernel_DW, activation=activation)
            return y_BTD, cache if output_final_state else None
        return causal_conv1d(  # pyright: ignore[reportCallIssue, reportReturnType]  (decorators)
            x=x,
            weight=kernel_DW,
            initial_state=cache,
            output_final_state=bool(output_final_state),
            activation=activation,
            cu_seqlens=cu_seqlens,
        )


class DeltaNet2(DeltaNet):
    """fla's DeltaNet layer with shared convolutions; its other options and all its tensors are as there.

    Args:
        per_head_conv: one kernel for each head; otherwise one for all.
        share_kv_conv: ``kv_conv1d`` serves k and v; otherwise ``k_conv1d`` and ``v_conv1d`` do.
        shift_only_conv, conv_scaled_shift: which convolution, see :class:`SharedShortConvolution`.
        **kwargs: the arguments of fla's ``DeltaNet``.
    """

    def __init__(
        self,
        *,
        per_head_conv: bool = False,
        share_kv_conv: bool = False,
        shift_only_conv: bool = False,
        conv_scaled_shift: bool = False,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        if not self.use_short_conv:
            return
        num_kernels = self.num_heads if per_head_conv else 1
        new = partial(SharedShortConvolution, num_kernels, self.conv_size, shift_only_conv, conv_scaled_shift)
        qk_activation = "silu" if self.qk_activation == "silu" else None
        del self.k_conv1d, self.v_conv1d
        self.q_conv1d = new(qk_activation)
        if share_kv_conv:
            # One module with one kernel, and the names by which fla's layer calls it.
            self.kv_conv1d = new()
            self.k_conv1d = partial(self.kv_conv1d, activation=qk_activation)
            self.v_conv1d = partial(self.kv_conv1d, activation="silu")
        else:
            self.k_conv1d, self.v_conv1d = new(qk_activation), new("silu")
