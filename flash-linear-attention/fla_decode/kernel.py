"""The Triton kernel of one decoding step of the delta rule, gated or not.

Per value head, with state ``S`` of shape ``[K, V]``, decay ``a`` (1 where ungated), key and query as they are used::

    u = beta (v - a S^T k)
    o = a S^T q + (q . k) u
    S <- a S + k u^T

which is the rule of arXiv:2406.06484 (ungated) and arXiv:2412.06464 (gated), with the output taken from the state as it
was: both products read the state once, and neither waits for the other. The step is bound by reading and writing the
state. A tile, all K channels by some value channels of one head, stays in registers between the two.

Shapes: B sequences, H key heads, W value heads (a multiple of H), K key channels, V value channels.
"""

import triton
import triton.language as tl


@triton.jit
def _load(pointers, mask, IS_MASKED: tl.constexpr, CACHE: tl.constexpr, POLICY: tl.constexpr):
    if IS_MASKED:
        values = tl.load(pointers, mask=mask, other=0.0, cache_modifier=CACHE, eviction_policy=POLICY)
    else:
        values = tl.load(pointers, cache_modifier=CACHE, eviction_policy=POLICY)
    return values.to(tl.float32)


@triton.jit
def _store(pointers, values, mask, IS_MASKED: tl.constexpr, POLICY: tl.constexpr):
    if IS_MASKED:
        tl.store(pointers, values, mask=mask, eviction_policy=POLICY)
    else:
        tl.store(pointers, values, eviction_policy=POLICY)


@triton.jit
def _offsets(key_channels, value_channels, K: tl.constexpr, V: tl.constexpr, V_FIRST: tl.constexpr):
    """Where a tile's numbers lie in the state of a head, and which of them there are."""
    if V_FIRST:
        offsets = value_channels[:, None] * K + key_channels[None, :]
        mask = (value_channels < V)[:, None] & (key_channels < K)[None, :]
    else:
        offsets = key_channels[:, None] * V + value_channels[None, :]
        mask = (key_channels < K)[:, None] & (value_channels < V)[None, :]
    return offsets, mask


@triton.jit
def _read(tile, vector, V_FIRST: tl.constexpr):
    """``S^T x``, for each value channel of the tile."""
    if V_FIRST:  # noqa: SIM108  (a choice when the kernel is compiled, written as such)
        result = tl.sum(tile * vector[None, :], axis=1)
    else:
        result = tl.sum(tile * vector[:, None], axis=0)
    return result


@triton.jit
def _write(tile, decay, vector, update, V_FIRST: tl.constexpr):
    """``a S + k u^T``."""
    if V_FIRST:
        result = decay * tile + update[:, None] * vector[None, :]
    else:
        result = decay * tile + vector[:, None] * update[None, :]
    return result


@triton.jit
def decode_kernel(  # noqa: C901  (most branches are constants by which the compiler leaves code out)
    query_BHK, key_BHK, value_BWV, beta_BW, gate_BW, A_log_W, dt_bias_W, state, new_state, output_BWV, scale,
    H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_V: tl.constexpr,
    HAS_GATE: tl.constexpr, IS_GATE_RAW: tl.constexpr, HAS_DT_BIAS: tl.constexpr, NORMALIZE: tl.constexpr,
    BETA_IS_LOGIT: tl.constexpr, DOUBLE_BETA: tl.constexpr, V_FIRST: tl.constexpr,
    READ_CACHE: tl.constexpr, READ_POLICY: tl.constexpr, WRITE_POLICY: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Step one tile: BLOCK_V value channels of a head.

    Its key channels are HEAD of them and, where that leaves some over, a second part of at most TAIL: the sides of a
    tile are powers of two, and in two parts 96 channels waste none. What the caches are told is of the state alone.
    With OVERLAPS the programs of a launch take their places while the launch before them ends.
    """
    BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    IS_V_MASKED: tl.constexpr = V % BLOCK_V != 0
    IS_HEAD_MASKED: tl.constexpr = HEAD > K
    IS_TAIL_MASKED: tl.constexpr = HEAD + TAIL > K
    tile = tl.program_id(0)
    value_head = (tile // BLOCKS).to(tl.int64)
    head = value_head % W
    key_head = value_head // W * H + head // (W // H)
    value_channels = (tile % BLOCKS) * BLOCK_V + tl.arange(0, BLOCK_V)
    key_channels = tl.arange(0, HEAD)

    # Nothing is read or written before all that was launched before is done.
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    # The state first: all else is small, and arrives while the state is on its way.
    state += value_head * (K * V)
    offsets, mask = _offsets(key_channels, value_channels, K, V, V_FIRST)
    old = _load(state + offsets, mask, IS_HEAD_MASKED or IS_V_MASKED, READ_CACHE, READ_POLICY)
    if TAIL > 0:
        tail_channels = HEAD + tl.arange(0, TAIL)
        tail_offsets, tail_mask = _offsets(tail_channels, value_channels, K, V, V_FIRST)
        old_tail = _load(state + tail_offsets, tail_mask, IS_TAIL_MASKED or IS_V_MASKED, READ_CACHE, READ_POLICY)

    query_BHK += key_head * K
    key_BHK += key_head * K
    query = _load(query_BHK + key_channels, key_channels < K, IS_HEAD_MASKED, "", "")
    key = _load(key_BHK + key_channels, key_channels < K, IS_HEAD_MASKED, "", "")
    if TAIL > 0:
        query_tail = _load(query_BHK + tail_channels, tail_channels < K, IS_TAIL_MASKED, "", "")
        key_tail = _load(key_BHK + tail_channels, tail_channels < K, IS_TAIL_MASKED, "", "")
    value = _load(value_BWV + value_head * V + value_channels, value_channels < V, IS_V_MASKED, "", "")
    beta = tl.load(beta_BW + value_head).to(tl.float32)
    if BETA_IS_LOGIT:
        beta = tl.sigmoid(beta)
    if DOUBLE_BETA:
        beta = beta * 2
    decay = 1.0
    if HAS_GATE:
        gate = tl.load(gate_BW + value_head).to(tl.float32)
        if IS_GATE_RAW:
            if HAS_DT_BIAS:
                gate += tl.load(dt_bias_W + head).to(tl.float32)
            # softplus; beyond 20 it is its argument in float32, and the exponential would overflow.
            gate = tl.where(gate > 20.0, gate, tl.log(1.0 + tl.exp(tl.minimum(gate, 20.0))))
            gate = -tl.exp(tl.load(A_log_W + head).to(tl.float32)) * gate
        decay = tl.exp(gate)

    # Key and query stay as they came: their lengths and the scale are factors of what they read and write.
    overlap = tl.sum(key * query)
    if TAIL > 0:
        overlap += tl.sum(key_tail * query_tail)
    key_scale = 1.0
    query_scale = scale
    if NORMALIZE:
        key_square = tl.sum(key * key)
        query_square = tl.sum(query * query)
        if TAIL > 0:
            key_square += tl.sum(key_tail * key_tail)
            query_square += tl.sum(query_tail * query_tail)
        key_scale = 1.0 / tl.sqrt(key_square + 1e-6)
        query_scale = scale / tl.sqrt(query_square + 1e-6)

    read_by_key = _read(old, key, V_FIRST)
    read_by_query = _read(old, query, V_FIRST)
    if TAIL > 0:
        read_by_key += _read(old_tail, key_tail, V_FIRST)
        read_by_query += _read(old_tail, query_tail, V_FIRST)
    update = key_scale * beta * (value - decay * key_scale * read_by_key)

    new_state += value_head * (K * V)
    new = _write(old, decay, key, update, V_FIRST)
    _store(new_state + offsets, new, mask, IS_HEAD_MASKED or IS_V_MASKED, WRITE_POLICY)
    if TAIL > 0:
        new_tail = _write(old_tail, decay, key_tail, update, V_FIRST)
        _store(new_state + tail_offsets, new_tail, tail_mask, IS_TAIL_MASKED or IS_V_MASKED, WRITE_POLICY)
    output = query_scale * (decay * read_by_query + overlap * update)
    pointers = output_BWV + value_head * V + value_channels
    _store(pointers, output.to(output_BWV.dtype.element_ty), value_channels < V, IS_V_MASKED, "")
