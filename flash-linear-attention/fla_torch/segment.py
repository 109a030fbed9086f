"""Some chunks of the delta rule at once, forward and backward: what ``delta_rule.py`` calls for each segment.

What chunks can compute without the state is computed for all chunks of the segment in large products; only what needs
the state goes chunk by chunk, in small ones. In a chunk of C tokens, with ``c`` the running sum of the log decay,
``D_ij = exp(c_i - c_j)`` for j <= i, ``e = exp(c)`` and ``w = exp(c_C - c)``::

    T = (I + L)^-1,  L_ij = beta_i D_ij k_i . k_j for j < i          P_ij = D_ij q_i . k_j for j <= i
    u = T (beta v) - T (beta e k) S        S' = e_C S + (w k)^T u        o = scale ((e q) S + P u)

This is the WY form of Yang et al., arXiv:2406.06484, with the decays of arXiv:2412.06464. The backward pass is its
derivative by hand: it keeps the state before each chunk, u and T, and makes the rest again. No exponent is above 0, so
that nothing overflows however strong the decay is.

Shapes: B batch, T tokens, Z chunks of C tokens, H key heads, W value heads (a multiple of H), M = B H, N = B W,
K key channels, V value channels. X is any of them.
"""

from typing import NamedTuple

import torch

from fla_torch.numerics import reduced_products


class Operands(NamedTuple):
    """What the products of a segment are made of. Without a decay the last three are None."""

    query_ZNCK: torch.Tensor
    key_ZNCK: torch.Tensor
    value_ZNCV: torch.Tensor
    beta_ZNC1: torch.Tensor
    key_gram_ZNCC: torch.Tensor  # D_ij k_i . k_j; what is above the diagonal has no meaning
    query_gram_ZNCC: torch.Tensor  # P
    between_ZNCC: torch.Tensor | None  # D, and ones above the diagonal
    since_start_ZNC1: torch.Tensor | None  # e
    to_end_ZNC1: torch.Tensor | None  # w

    @property
    def kept_ZN11(self) -> torch.Tensor | None:
        """What a chunk leaves of the state before it."""
        return None if self.since_start_ZNC1 is None else self.since_start_ZNC1[:, :, -1:]

    @property
    def strength_ZNC1(self) -> torch.Tensor:
        """How much of what a key reads from the state before its chunk is taken off its value."""
        return _times(self.beta_ZNC1, self.since_start_ZNC1)


class Segment(torch.autograd.Function):
    """:func:`run_segment`, with the gradients of :func:`segment_gradients`."""

    @staticmethod
    def forward(ctx, query, key, value, beta, log_decay, state_NKV, scale, chunk_size, reduced):
        output = torch.empty_like(value, memory_format=torch.contiguous_format)
        inputs, settings = (query, key, value, beta, log_decay), (scale, chunk_size, reduced)
        final_NKV, kept = run_segment(*inputs, state_NKV, *settings, output, keep_states=True)
        ctx.save_for_backward(*inputs, *kept)
        ctx.settings = settings
        return output, final_NKV

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_output, d_final_NKV):
        *inputs, states_ZNKV, update_ZNCV, inverse_ZNCC = ctx.saved_tensors
        kept = states_ZNKV, update_ZNCV, inverse_ZNCC
        with torch.autocast(d_output.device.type, enabled=False):
            gradients = segment_gradients(inputs, kept, *ctx.settings, d_output, d_final_NKV)
        return *gradients, None, None, None


def run_segment(
    query_BTHK: torch.Tensor,
    key_BTHK: torch.Tensor,
    value_BTWV: torch.Tensor,
    beta_BTW: torch.Tensor,
    log_decay_BTW: torch.Tensor | None,
    state_NKV: torch.Tensor,
    scale: float,
    chunk_size: int,
    reduced: bool,
    output_BTWV: torch.Tensor,
    *,
    keep_states: bool = False,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Run whole chunks in the dtype of the state, and write the output into ``output_BTWV``.

    Returns:
        The state after the segment, and what the backward pass needs: the state before each chunk (which has no
        meaning unless ``keep_states``), u and T.
    """
    with reduced_products(reduced):
        inputs = (query_BTHK, key_BTHK, value_BTWV, beta_BTW, log_decay_BTW)
        operands = prepare(*inputs, chunk_size, state_NKV.dtype)
        inverse_ZNCC = invert_unit_lower(operands.key_gram_ZNCC.mul_(operands.beta_ZNC1))
        solving_ZNCC = inverse_ZNCC * operands.beta_ZNC1.mT
        writing_ZNCK = _times(operands.key_ZNCK, operands.to_end_ZNC1)
        if operands.since_start_ZNC1 is not None:  # in place: all that is left to do for these two is to read the state
            operands.key_ZNCK.mul_(operands.since_start_ZNC1)
            operands.query_ZNCK.mul_(operands.since_start_ZNC1)
        update_ZNCV, states_ZNKV, final_NKV, output_ZNCV = scan(
            operands.key_ZNCK,
            solving_ZNCC,
            writing_ZNCK,
            operands.value_ZNCV,
            operands.kept_ZN11,
            state_NKV,
            query_ZNCK=operands.query_ZNCK,
            keep_states=keep_states,
        )
        add_product(output_ZNCV, operands.query_gram_ZNCC, update_ZNCV)
    place_ZBWCV = _by_chunk(output_BTWV, chunk_size)
    torch.mul(output_ZNCV.view(place_ZBWCV.shape), scale, out=place_ZBWCV)
    return final_NKV, (states_ZNKV, update_ZNCV, inverse_ZNCC)


def segment_gradients(
    inputs: tuple[torch.Tensor | None, ...],
    kept: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
    chunk_size: int,
    reduced: bool,
    d_output_BTWV: torch.Tensor,
    d_final_NKV: torch.Tensor,
) -> list[torch.Tensor | None]:
    """Return the gradients of what :func:`run_segment` takes, up to the state; ``d_x`` is the gradient of ``x``."""
    states_ZNKV, update_ZNCV, inverse_ZNCC = kept
    with reduced_products(reduced):
        operands = prepare(*inputs, chunk_size, states_ZNKV.dtype)
        query_ZNCK, key_ZNCK, value_ZNCV, beta_ZNC1, key_gram_ZNCC, query_gram_ZNCC, between_ZNCC, *_ = operands
        since_start_ZNC1, strength_ZNC1 = operands.since_start_ZNC1, operands.strength_ZNC1
        d_output_ZNCV = _to_chunks(d_output_BTWV, chunk_size, states_ZNKV.dtype).mul_(scale)

        # The same scan from the last chunk to the first, in which reading and writing have changed places.
        d_solved_ZNCV, d_states_ZNKV, d_state_NKV, _ = scan(
            _times(-key_ZNCK, operands.to_end_ZNC1),
            inverse_ZNCC.mT,
            key_ZNCK * -strength_ZNC1,
            query_gram_ZNCC.mT @ d_output_ZNCV,
            operands.kept_ZN11,
            d_final_NKV,
            added_ZNKV=_times(query_ZNCK, since_start_ZNC1).mT @ d_output_ZNCV,
            reverse=True,
        )
        d_query_gram_ZNCC = (d_output_ZNCV @ update_ZNCV.mT).tril_()
        d_key_gram_ZNCC = (d_solved_ZNCV @ update_ZNCV.mT).neg_().tril_(-1)
        # What the query and the key read from the state before the chunk, and what the key wrote into the one after.
        d_query_ZNCK = _times(d_output_ZNCV @ states_ZNKV.mT, since_start_ZNC1)
        d_reading_ZNCK = (d_solved_ZNCV @ states_ZNKV.mT).neg_()
        d_writing_ZNCK = _times(update_ZNCV @ d_states_ZNKV.mT, operands.to_end_ZNC1)

        d_beta_ZNC1 = (d_key_gram_ZNCC * key_gram_ZNCC).sum(dim=-1, keepdim=True)
        d_beta_ZNC1 += (d_solved_ZNCV * value_ZNCV).sum(dim=-1, keepdim=True)
        read_ZNC1 = (d_reading_ZNCK * key_ZNCK).sum(dim=-1, keepdim=True)
        d_beta_ZNC1 += _times(read_ZNC1, since_start_ZNC1)
        d_key_gram_ZNCC.mul_(beta_ZNC1)

        d_log_decay_ZNC1 = None
        if between_ZNCC is not None:
            changes_ZNCC = torch.addcmul(d_key_gram_ZNCC * key_gram_ZNCC, d_query_gram_ZNCC, query_gram_ZNCC)
            written_ZNC1 = (d_writing_ZNCK * key_ZNCK).sum(dim=-1, keepdim=True)
            d_sum_ZNC1 = changes_ZNCC.sum(dim=-1, keepdim=True) - changes_ZNCC.sum(dim=-2).unsqueeze(-1)
            d_sum_ZNC1 += (d_query_ZNCK * query_ZNCK).sum(dim=-1, keepdim=True)
            d_sum_ZNC1 += read_ZNC1 * strength_ZNC1 - written_ZNC1
            kept_ZN1 = (states_ZNKV * d_states_ZNKV).sum(dim=(-2, -1)).unsqueeze(-1) * operands.kept_ZN11[..., 0]
            d_sum_ZNC1[:, :, -1] += kept_ZN1 + written_ZNC1.sum(dim=-2)
            d_log_decay_ZNC1 = d_sum_ZNC1.flip(-2).cumsum(dim=-2).flip(-2)
            d_key_gram_ZNCC.mul_(between_ZNCC)
            d_query_gram_ZNCC.mul_(between_ZNCC)

        d_value_ZNCV = d_solved_ZNCV.mul_(beta_ZNC1)
        d_key_ZNCK = torch.addcmul(d_writing_ZNCK, d_reading_ZNCK, strength_ZNC1)
        add_product(d_key_ZNCK, d_key_gram_ZNCC + d_key_gram_ZNCC.mT, key_ZNCK)
        add_product(d_key_ZNCK, d_query_gram_ZNCC.mT, query_ZNCK)
        add_product(d_query_ZNCK, d_query_gram_ZNCC, key_ZNCK)
    parts = (d_query_ZNCK, d_key_ZNCK, d_value_ZNCV, d_beta_ZNC1, d_log_decay_ZNC1)
    return [*map(_from_chunks, parts, inputs), d_state_NKV]


def prepare(
    query_BTHK: torch.Tensor,
    key_BTHK: torch.Tensor,
    value_BTWV: torch.Tensor,
    beta_BTW: torch.Tensor,
    log_decay_BTW: torch.Tensor | None,
    chunk_size: int,
    dtype: torch.dtype,
) -> Operands:
    """Lay the inputs of a segment out by chunk and value head, in one dtype, and make what each chunk has alone."""
    query_ZMCK, key_ZMCK, value_ZNCV = (_to_chunks(x, chunk_size, dtype) for x in (query_BTHK, key_BTHK, value_BTWV))
    beta_ZNC1 = _to_chunks(beta_BTW[..., None], chunk_size, dtype)
    grams = (key_ZMCK @ key_ZMCK.mT, query_ZMCK @ key_ZMCK.mT)
    group = value_ZNCV.shape[1] // key_ZMCK.shape[1]
    query_ZNCK, key_ZNCK, key_gram_ZNCC, query_gram_ZNCC = (
        x if group == 1 else x.repeat_interleave(group, dim=1) for x in (query_ZMCK, key_ZMCK, *grams)
    )
    between_ZNCC = since_start_ZNC1 = to_end_ZNC1 = None
    if log_decay_BTW is not None:
        sum_ZNC1 = _to_chunks(log_decay_BTW[..., None], chunk_size, dtype).cumsum(dim=2)
        # Above the diagonal the difference is positive and could overflow; what is there is not used.
        between_ZNCC = (sum_ZNC1 - sum_ZNC1.mT).clamp_(max=0).exp_()
        since_start_ZNC1, to_end_ZNC1 = sum_ZNC1.exp(), (sum_ZNC1[:, :, -1:] - sum_ZNC1).exp()
        key_gram_ZNCC.mul_(between_ZNCC)
        query_gram_ZNCC.mul_(between_ZNCC)
    decays = (between_ZNCC, since_start_ZNC1, to_end_ZNC1)
    return Operands(query_ZNCK, key_ZNCK, value_ZNCV, beta_ZNC1, key_gram_ZNCC, query_gram_ZNCC.tril_(), *decays)


def scan(
    reading_ZNCK: torch.Tensor,
    solving_ZNCC: torch.Tensor,
    writing_ZNCK: torch.Tensor,
    start_ZNCV: torch.Tensor,
    kept_ZN11: torch.Tensor | None,
    state_NKV: torch.Tensor,
    *,
    query_ZNCK: torch.Tensor | None = None,
    added_ZNKV: torch.Tensor | None = None,
    keep_states: bool = True,
    reverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Go through the chunks: ``x = solving (start - reading S)``, then ``S <- kept S + writing^T x + added``.

    Returns:
        x ``[Z, N, C, V]``; the state before each chunk, without meaning unless ``keep_states``; the state after the
        last; ``query S``, without meaning if there is no query. ``start_ZNCV`` is overwritten.
    """
    Z, before, after = len(start_ZNCV), int(reverse), int(not reverse)
    keep_states |= _launches_are_dear(start_ZNCV)
    states_ZNKV = state_NKV.new_empty(Z + 1 if keep_states else 1, *state_NKV.shape).expand(Z + 1, -1, -1, -1)
    states_ZNKV[Z if reverse else 0] = state_NKV
    order = range(Z)[:: -1 if reverse else 1]
    if _launches_are_dear(start_ZNCV):  # one product a chunk, for more operations in all
        reading_ZNCK, start_ZNCV = -solving_ZNCC @ reading_ZNCK, solving_ZNCC @ start_ZNCV
        moving_ZNKK = writing_ZNCK.mT @ reading_ZNCK
        diagonal_ZNK = moving_ZNKK.diagonal(dim1=-2, dim2=-1)
        diagonal_ZNK += 1 if kept_ZN11 is None else kept_ZN11[..., 0]
        moved_ZNKV = writing_ZNCK.mT @ start_ZNCV
        if added_ZNKV is not None:
            moved_ZNKV += added_ZNKV
        for z in order:
            torch.baddbmm(moved_ZNKV[z], moving_ZNKK[z], states_ZNKV[z + before], out=states_ZNKV[z + after])
        add_product(start_ZNCV, reading_ZNCK, states_ZNKV[before : before + Z])
        solved_ZNCV = start_ZNCV
        read_ZNCV = start_ZNCV if query_ZNCK is None else query_ZNCK @ states_ZNKV[before : before + Z]
    else:
        solved_ZNCV, read_ZNCV = torch.empty_like(start_ZNCV), torch.empty_like(start_ZNCV)
        for z in order:
            state_NKV, next_NKV = states_ZNKV[z + before], states_ZNKV[z + after]
            if query_ZNCK is not None:
                torch.bmm(query_ZNCK[z], state_NKV, out=read_ZNCV[z])
            unsolved_NCV = start_ZNCV[z].baddbmm_(reading_ZNCK[z], state_NKV, alpha=-1)
            torch.bmm(solving_ZNCC[z], unsolved_NCV, out=solved_ZNCV[z])
            if kept_ZN11 is not None:
                torch.mul(state_NKV, kept_ZN11[z], out=next_NKV)
            elif keep_states:
                next_NKV.copy_(state_NKV)
            if added_ZNKV is not None:
                next_NKV += added_ZNKV[z]
            next_NKV.baddbmm_(writing_ZNCK[z].mT, solved_ZNCV[z])
    return solved_ZNCV, states_ZNKV[before : before + Z], states_ZNKV[0 if reverse else Z].clone(), read_ZNCV


def invert_unit_lower(matrix_ZNCC: torch.Tensor) -> torch.Tensor:
    """Return ``(I + L)^-1`` where L is what lies below the diagonal."""
    identity_CC = torch.eye(matrix_ZNCC.shape[-1], dtype=matrix_ZNCC.dtype, device=matrix_ZNCC.device)
    if _launches_are_dear(matrix_ZNCC):
        return torch.linalg.solve_triangular(matrix_ZNCC, identity_CC, upper=False, unitriangular=True)
    # The transposes, which are solved faster on a CPU.
    solved_ZNCC = torch.linalg.solve_triangular(matrix_ZNCC.mT, identity_CC, upper=True, left=False, unitriangular=True)
    return solved_ZNCC.mT


def add_product(sum_ZNXX: torch.Tensor, left_ZNXX: torch.Tensor, right_ZNXX: torch.Tensor) -> None:
    """Add the product of two stacks of matrices to a third, in place."""
    sum_ZNXX.flatten(0, 1).baddbmm_(left_ZNXX.flatten(0, 1), right_ZNXX.flatten(0, 1))


def _launches_are_dear(tensor: torch.Tensor) -> bool:
    """Whether a small operation there costs its launch rather than its work."""
    return tensor.is_cuda


def _times(tensor: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    return tensor if factor is None else tensor * factor


def _by_chunk(tensor_BTWX: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """View ``[B, T, W, X]`` as ``[Z, B, W, C, X]``."""
    return tensor_BTWX.unflatten(1, (-1, chunk_size)).permute(1, 0, 3, 2, 4)


def _to_chunks(tensor_BTWX: torch.Tensor, chunk_size: int, dtype: torch.dtype) -> torch.Tensor:
    """Copy ``[B, T, W, X]`` to ``[Z, N, C, X]`` in the dtype."""
    view_ZBWCX = _by_chunk(tensor_BTWX, chunk_size)
    return view_ZBWCX.new_empty(view_ZBWCX.shape, dtype=dtype).copy_(view_ZBWCX).flatten(1, 2)


def _from_chunks(gradient_ZNCX: torch.Tensor | None, tensor_BTWX: torch.Tensor | None) -> torch.Tensor | None:
    """Return the gradient of an input in the shape and dtype of that: the value heads of a key head are summed."""
    if gradient_ZNCX is None or tensor_BTWX is None:
        return None
    B, T, H = tensor_BTWX.shape[:3]
    Z, N, C, X = gradient_ZNCX.shape
    grouped_ZBHRCX = gradient_ZNCX.view(Z, B, H, N // (B * H), C, X)
    summed_ZBHCX = grouped_ZBHRCX[:, :, :, 0] if N == B * H else grouped_ZBHRCX.sum(dim=3)
    result = torch.empty(tensor_BTWX.shape, dtype=tensor_BTWX.dtype, device=tensor_BTWX.device)
    _by_chunk(result.view(B, T, H, X), C).copy_(summed_ZBHCX)
    return result
