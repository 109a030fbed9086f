"""The delta rule with a state that is stored as it goes, and so may be rounded: what a serving engine does.

A decoding step reads the state, widens it to float32, updates it, takes the output from the updated state, and stores
that in the dtype of its cache. So the output of a token does not see the rounding of its own state, only that of the
states before it. Prefill does the same once a chunk.

Shapes as in ``delta_rule.py``: B batch, T tokens, H key heads, W value heads, N = B W, K key channels, V value
channels; X is 1 where one number serves all channels.
"""

from collections.abc import Callable

import torch

from fla_torch.delta_rule import chunked_delta_rule

Store = Callable[[torch.Tensor], torch.Tensor]
"""Takes a state ``[B, W, K, V]``, which it may overwrite, and returns what is read back after it was stored."""


@torch.no_grad()
def stored_delta_rule(
    query_BTHK: torch.Tensor,
    key_BTHK: torch.Tensor,
    value_BTWV: torch.Tensor,
    beta_BTW: torch.Tensor,
    log_decay_BTWKV: torch.Tensor | None = None,
    *,
    scale: float,
    initial_state_BWKV: torch.Tensor | None = None,
    store: Store | None = None,
    every: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the delta rule, and store the state after every ``every`` tokens and after the last.

    Arguments and results are otherwise those of :func:`fla_torch.delta_rule.recurrent_delta_rule`, without gradients.
    Between two times of storing nothing is rounded: those tokens run in chunks where a head has one decay and one beta.
    """
    tokens, (W, V) = key_BTHK.shape[1], value_BTWV.shape[-2:]
    state_BWKV = value_BTWV.new_zeros(len(key_BTHK), W, key_BTHK.shape[-1], V)
    if initial_state_BWKV is not None:
        state_BWKV.copy_(initial_state_BWKV)
    operands = (query_BTHK * scale, key_BTHK, value_BTWV, beta_BTW, log_decay_BTWKV)
    if every == 1:
        return _token_by_token(*operands, state_BWKV, store)
    is_per_channel = beta_BTW.ndim == value_BTWV.ndim or (
        log_decay_BTWKV is not None and log_decay_BTWKV.shape[-2:] != (1, 1)
    )
    output_BTWV = torch.empty_like(value_BTWV)
    for start in range(0, tokens, every):
        part = slice(start, start + every)
        *cut, decay = (None if operand is None else operand[:, part] for operand in operands)
        if is_per_channel:
            output_BTWV[:, part], state_BWKV = _token_by_token(*cut, decay, state_BWKV, None)
        else:
            decay_BTW = None if decay is None else decay[..., 0, 0]
            output_BTWV[:, part], state_BWKV = chunked_delta_rule(
                *cut, decay_BTW, scale=1.0, initial_state_BWKV=state_BWKV
            )
        state_BWKV = state_BWKV if store is None else store(state_BWKV)
    return output_BTWV, state_BWKV


def _token_by_token(
    query_BTHK: torch.Tensor,
    key_BTHK: torch.Tensor,
    value_BTWV: torch.Tensor,
    beta_BTW: torch.Tensor,
    log_decay_BTWXX: torch.Tensor | None,
    state_BWKV: torch.Tensor,
    store: Store | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence in few and in-place steps, since each is a kernel to launch; the state is overwritten."""
    shape_BWKV, (B, T, H, _) = state_BWKV.shape, key_BTHK.shape
    W = shape_BWKV[1]
    beta_BTWX = beta_BTW if beta_BTW.ndim == value_BTWV.ndim else beta_BTW[..., None]

    def steps(tensor_BTWX: torch.Tensor) -> tuple[torch.Tensor, ...]:
        heads = tensor_BTWX.repeat_interleave(W // H, dim=2) if tensor_BTWX.shape[2] != W else tensor_BTWX
        return heads.movedim(1, 0).flatten(1, 2).contiguous().unbind(0)

    queries, keys, values, betas = (
        steps(tensor[..., None, :]) for tensor in (query_BTHK, key_BTHK, value_BTWV, beta_BTWX)
    )
    decays = [None] * T if log_decay_BTWXX is None else steps(log_decay_BTWXX.exp())
    output_TN1V = value_BTWV.new_empty(T, B * W, 1, shape_BWKV[-1])
    state_NKV = state_BWKV.flatten(0, 1)
    for query_N1K, key_N1K, value_N1V, beta_N1X, decay_NXX, output_N1V in zip(
        queries, keys, values, betas, decays, output_TN1V, strict=True
    ):
        if decay_NXX is not None:
            state_NKV.mul_(decay_NXX)
        update_N1V = torch.baddbmm(value_N1V, key_N1K, state_NKV, alpha=-1).mul_(beta_N1X)
        state_NKV.baddbmm_(key_N1K.mT, update_N1V)
        torch.bmm(query_N1K, state_NKV, out=output_N1V)
        if store is not None:
            state_NKV = store(state_NKV.view(shape_BWKV)).flatten(0, 1)
    return output_TN1V[:, :, 0].unflatten(1, (B, W)).movedim(0, 1).contiguous(), state_NKV.view(shape_BWKV)
