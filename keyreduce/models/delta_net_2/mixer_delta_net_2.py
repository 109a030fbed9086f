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
G kernels (one for each head, or one for all), W taps, H heads, K key channels, V value channels.
"""

import math

import torch
import torch.nn.functional as F
from fla.layers.delta_net import DeltaNet, sum_norm
from fla.layers.utils import get_layer_cache, repad_hidden_states, unpad_hidden_states, update_layer_cache
from fla.models.cache_utils import Cache
from fla.modules.activations import elu_p1
from fla.modules.causal_conv1d import causal_conv1d, causal_conv1d_update
from fla.ops.delta_rule import chunk_delta_rule, fused_recurrent_delta_rule
from torch import nn

# As in fla: up to here the recurrent kernel serves, since chunks would be mostly empty.
LONGEST_RECURRENT = 64


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
    """

    def __init__(
        self, num_kernels: int, kernel_size: int, shift_only: bool = False, scaled_shift: bool = False
    ) -> None:
        super().__init__()
        weight_G1W = None if shift_only else nn.Parameter(torch.empty(num_kernels, 1, kernel_size))
        scale_G = nn.Parameter(torch.empty(num_kernels)) if shift_only and scaled_shift else None
        self.register_parameter("weight", weight_G1W)
        self.register_parameter("scale", scale_G)
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
        x_BTD: torch.Tensor,
        activation: str | None = None,
        cache_NDW: torch.Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Convolve, then activate.

        Args:
            x_BTD: the inputs; B is 1 where ``cu_seqlens`` is given. G divides D.
            activation: ``"silu"``, or None for none.
            cache_NDW: the last W inputs so far, written in place when each sequence gets one token without autograd.
            output_final_state: whether to return the last W inputs.
            cu_seqlens: where packed sequences start, and where the last one ends, ``[N + 1]``.

        Returns:
            The output in the shape and dtype of ``x_BTD``, and the last W inputs ``[N, D, W]`` or None.
        """
        B, T, D = x_BTD.shape
        kernel_DW = self.kernel_per_channel(x_BTD)
        N = B if cu_seqlens is None else len(cu_seqlens) - 1
        is_step = not torch.is_grad_enabled() and B * T == N
        if is_step and (cu_seqlens is None or bool((cu_seqlens.diff() == 1).all())):
            if cache_NDW is None:
                cache_NDW = x_BTD.new_zeros(N, D, kernel_DW.shape[1])
            y_BTD, cache_NDW = causal_conv1d_update(x=x_BTD, cache=cache_NDW, weight=kernel_DW, activation=activation)
            return y_BTD, cache_NDW if output_final_state else None
        return causal_conv1d(
            x=x_BTD,
            weight=kernel_DW,
            initial_state=cache_NDW,
            output_final_state=output_final_state,
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
        self.share_kv_conv = share_kv_conv
        if not self.use_short_conv:
            return
        del self.q_conv1d, self.k_conv1d, self.v_conv1d
        for name in ("q_conv1d", "kv_conv1d") if share_kv_conv else ("q_conv1d", "k_conv1d", "v_conv1d"):
            convolution = SharedShortConvolution(
                num_kernels=self.num_heads if per_head_conv else 1,
                kernel_size=self.conv_size,
                shift_only=shift_only_conv,
                scaled_shift=conv_scaled_shift,
            )
            self.add_module(name, convolution)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        **kwargs,
    ) -> tuple[torch.Tensor, None, Cache | None]:
        """Mix the tokens of each sequence.

        Args:
            hidden_states: ``[B, T, hidden_size]``.
            attention_mask: ``[B, tokens so far]``, 0 where there is padding; what comes out there is 0.
            past_key_values: the cache, brought up to date in place.
            use_cache: whether to fill the cache.
            output_attentions: there are none; taken because transformers passes it.
            **kwargs: ``cu_seqlens`` ``[N + 1]`` where sequences are packed in one row.

        Returns:
            The output ``[B, T, hidden_size]``, None, and the cache.

        Raises:
            ValueError: the mask is not two-dimensional.
        """
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(f"attention_mask is {list(attention_mask.shape)}, where [batch, tokens] belongs")
        batch_size, num_tokens, _ = hidden_states.shape
        state = get_layer_cache(self, past_key_values) or {"recurrent_state": None, "conv_state": None}
        hidden_states, indices, cu_seqlens = unpad_hidden_states(
            hidden_states, kwargs.get("cu_seqlens"), attention_mask, num_tokens
        )
        (query_BTHK, key_BTHK, value_BTHV), conv_state = self._project(
            hidden_states, state["conv_state"], bool(use_cache), cu_seqlens
        )
        if self.use_beta:
            beta_BTH = self.b_proj(hidden_states).sigmoid()
        else:
            beta_BTH = torch.ones_like(query_BTHK[..., 0])
        arguments = dict(
            q=query_BTHK,
            k=key_BTHK,
            v=value_BTHV,
            beta=beta_BTH * 2 if self.allow_neg_eigval else beta_BTH,
            initial_state=state["recurrent_state"],
            output_final_state=bool(use_cache),
            cu_seqlens=cu_seqlens,
            use_qk_l2norm_in_kernel=self.qk_norm == "l2",
        )
        # Called by their names in this module, where a backend or a recorder may have put something else.
        if num_tokens <= LONGEST_RECURRENT or self.mode == "fused_recurrent":
            output_BTHV, recurrent_state = fused_recurrent_delta_rule(**arguments)
        else:
            output_BTHV, recurrent_state = chunk_delta_rule(**arguments)
        update_layer_cache(
            self, past_key_values, recurrent_state=recurrent_state, conv_state=conv_state, offset=num_tokens
        )
        if self.use_gate:
            gate_BTHV = self.g_proj(hidden_states).unflatten(-1, (self.num_heads, self.head_v_dim))
            output_BTHV = self.o_norm(output_BTHV, gate_BTHV)
        else:
            output_BTHV = self.o_norm(output_BTHV)
        output = self.o_proj(output_BTHV.flatten(start_dim=2))
        return repad_hidden_states(output, indices, batch_size, num_tokens), None, past_key_values

    def _project(
        self,
        hidden_states: torch.Tensor,
        conv_state: tuple[torch.Tensor, ...] | None,
        use_cache: bool,
        cu_seqlens: torch.Tensor | None,
    ) -> tuple[list[torch.Tensor], tuple[torch.Tensor | None, ...] | None]:
        """Return q, k and v as the operator takes them, l2 normalisation aside, and the convolutions' new state."""
        projected = [projection(hidden_states) for projection in (self.q_proj, self.k_proj, self.v_proj)]
        qk_activation = "silu" if self.qk_activation == "silu" else None
        activations = (qk_activation, qk_activation, "silu")
        if self.use_short_conv:
            if self.share_kv_conv:
                convolutions = (self.q_conv1d, self.kv_conv1d, self.kv_conv1d)
            else:
                convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
            results = [
                convolve(x_BTD, activation, cache_NDW, use_cache, cu_seqlens)
                for convolve, x_BTD, activation, cache_NDW in zip(
                    convolutions, projected, activations, conv_state or (None, None, None), strict=True
                )
            ]
            projected, conv_state = zip(*results, strict=True)
        else:
            projected = [
                x_BTD if activation is None else F.silu(x_BTD)
                for x_BTD, activation in zip(projected, activations, strict=True)
            ]
        query_BTHK, key_BTHK, value_BTHV = (x_BTD.unflatten(-1, (self.num_heads, -1)) for x_BTD in projected)
        if self.qk_activation == "relu":
            query_BTHK, key_BTHK = query_BTHK.relu(), key_BTHK.relu()
        elif self.qk_activation == "elu":
            query_BTHK, key_BTHK = elu_p1(query_BTHK), elu_p1(key_BTHK)
        if self.qk_norm == "sum":
            query_BTHK, key_BTHK = sum_norm(query_BTHK), sum_norm(key_BTHK)
        return [query_BTHK, key_BTHK, value_BTHV], conv_state
