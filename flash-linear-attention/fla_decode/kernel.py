"""The Triton kernel of one decoding step of the delta rule, gated or not.

Per value head, with state ``S`` of shape ``[K, V]``, decay ``a`` (1 where ungated), key and query as they are used::

    u = beta (v - a S^T k)
    o = a S^T q + (q . k) u
    S <- a S + k u^T

which is the rule of arXiv:2406.06484 (ungated) and arXiv:2412.06464 (gated), with the output taken from the state as it
was: both products read the state once, and neither waits for the other. The step is bound by reading and writing the
state. A tile, all K channels by some value channels of one head, stays in registers between the two.

A state is float32, bfloat16, float16, or int8 with a float32 scale for each value channel of a head (`state.py` says
what those mean). It is widened to float32 as it is read and rounded to nearest, ties to even, as it is written; the
output comes before the rounding. A program holds all key channels of a value channel, so it knows their scale.

Shapes: B sequences, H key heads, W value heads (a multiple of H), K key channels, V value channels.
"""

import triton
import triton.language as tl


@triton.jit
def _load(pointers, mask, IS_MASKED: tl.constexpr, CACHE: tl.constexpr, POLICY: tl.constexpr):
    if IS_MASKED:
        values = tl.load(pointers, mask=mask, other=0, cache_modifier=CACHE, eviction_policy=POLICY)
    else:
        values = tl.load(pointers, cache_modifier=CACHE, eviction_policy=POLICY)
    return values.to(tl.float32)


@triton.jit
def _store(pointers, values, mask, IS_MASKED: tl.constexpr, POLICY: tl.constexpr):
    values = values.to(pointers.dtype.element_ty)
    if IS_MASKED:
        tl.store(pointers, values, mask=mask, eviction_policy=POLICY)
    else:
        tl.store(pointers, values, eviction_policy=POLICY)


@triton.jit
def _by_key(vector_K, V_FIRST: tl.constexpr):
    """A vector over the key channels, to be spread over a tile."""
    AXIS: tl.constexpr = 0 if V_FIRST else 1
    return tl.expand_dims(vector_K, AXIS)


@triton.jit
def _by_value(vector_V, V_FIRST: tl.constexpr):
    """A vector over the value channels, to be spread over a tile."""
    AXIS: tl.constexpr = 1 if V_FIRST else 0
    return tl.expand_dims(vector_V, AXIS)


@triton.jit
def _place(key_channels, value_channels, K: tl.constexpr, V: tl.constexpr, V_FIRST: tl.constexpr):
    """Where a tile's numbers lie in the state of a head, and which of them there are."""
    keys, values = _by_key(key_channels, V_FIRST), _by_value(value_channels, V_FIRST)
    offsets = values * K + keys if V_FIRST else keys * V + values
    return offsets, (values < V) & (keys < K)


@triton.jit
def _read(tile, vector_K, V_FIRST: tl.constexpr):
    """``S^T x``, for each value channel of the tile."""
    AXIS: tl.constexpr = 1 if V_FIRST else 0
    return tl.sum(tile * _by_key(vector_K, V_FIRST), axis=AXIS)


@triton.jit
def _step(tile, decay_V, key_K, update_V, V_FIRST: tl.constexpr):
    """``a S + k u^T``."""
    return _by_value(decay_V, V_FIRST) * tile + _by_value(update_V, V_FIRST) * _by_key(key_K, V_FIRST)


@triton.jit
def _largest(tile, V_FIRST: tl.constexpr):
    """The largest magnitude for each value channel of the tile."""
    AXIS: tl.constexpr = 1 if V_FIRST else 0
    return tl.max(tl.abs(tile), axis=AXIS)


@triton.jit
def _quantized(tile, inverse_V, V_FIRST: tl.constexpr):
    """The whole numbers nearest to ``tile * inverse``, which are within +-127, as int8."""
    # Added to 1.5 * 2^23, a float32 keeps no fraction, and its lowest bits are the number in two's complement. That is
    # one multiply-add; converting a float to an integer takes a slower unit of the GPU.
    shifted = tile * _by_value(inverse_V, V_FIRST) + 12582912.0
    return shifted.to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _log_decay(gate_BW, A_log_W, dt_bias_W, value_head, head, IS_RAW: tl.constexpr, HAS_DT_BIAS: tl.constexpr):
    gate = tl.load(gate_BW + value_head).to(tl.float32)
    if IS_RAW:
        if HAS_DT_BIAS:
            gate += tl.load(dt_bias_W + head).to(tl.float32)
        # softplus; beyond 20 it is its argument in float32, and the exponential would overflow.
        gate = tl.where(gate > 20.0, gate, tl.log(1.0 + tl.exp(tl.minimum(gate, 20.0))))
        gate = -tl.exp(tl.load(A_log_W + head).to(tl.float32)) * gate
    return gate


@triton.jit
def _strength(beta_BW, value_head, IS_LOGIT: tl.constexpr, IS_DOUBLED: tl.constexpr):
    beta = tl.load(beta_BW + value_head).to(tl.float32)
    if IS_LOGIT:
        beta = tl.sigmoid(beta)
    if IS_DOUBLED:
        beta = beta * 2
    return beta


@triton.jit
def decode_kernel(  # noqa: C901  (most branches are constants by which the compiler leaves code out)
    query_BHK, key_BHK, value_BWV, beta_BW, gate_BW, A_log_W, dt_bias_W,
    state, scales_BWV, new_state, new_scales_BWV, output_BWV, scale,
    H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_V: tl.constexpr,
    HAS_GATE: tl.constexpr, IS_GATE_RAW: tl.constexpr, HAS_DT_BIAS: tl.constexpr, NORMALIZE: tl.constexpr,
    BETA_IS_LOGIT: tl.constexpr, DOUBLE_BETA: tl.constexpr, V_FIRST: tl.constexpr,
    HAS_SCALES: tl.constexpr, WRITES_SCALES: tl.constexpr,
    READ_CACHE: tl.constexpr, READ_POLICY: tl.constexpr, WRITE_POLICY: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Step one tile: BLOCK_V value channels of a head.

    Its key channels are HEAD of them and, where that leaves some over, a second part of at most TAIL: the sides of a
    tile are powers of two, and in two parts 96 channels waste none. What the caches are told is of the state alone.
    With OVERLAPS the programs of a launch take their places while the launch before them ends.
    """
    BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    CUTS_V: tl.constexpr = V % BLOCK_V != 0
    CUTS_HEAD: tl.constexpr = HEAD > K
    CUTS_TAIL: tl.constexpr = HEAD + TAIL > K
    program = tl.program_id(0)
    value_head = (program // BLOCKS).to(tl.int64)
    head = value_head % W
    key_head = value_head // W * H + head // (W // H)
    values = (program % BLOCKS) * BLOCK_V + tl.arange(0, BLOCK_V)
    keys = tl.arange(0, HEAD)
    tail_keys = HEAD + tl.arange(0, TAIL if TAIL > 0 else 1)

    # Nothing is read or written before all that was launched before is done.
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    # The state first: all else is small, and arrives while the state is on its way.
    place, is_there = _place(keys, values, K, V, V_FIRST)
    tail_place, is_tail_there = _place(tail_keys, values, K, V, V_FIRST)
    state += value_head * (K * V)
    old = _load(state + place, is_there, CUTS_HEAD or CUTS_V, READ_CACHE, READ_POLICY)
    if TAIL > 0:
        old_tail = _load(state + tail_place, is_tail_there, CUTS_TAIL or CUTS_V, READ_CACHE, READ_POLICY)
    value_places = value_head * V + values
    decay = tl.full((BLOCK_V,), 1.0, tl.float32)
    if HAS_SCALES:
        decay = _load(scales_BWV + value_places, values < V, CUTS_V, "", "")
    query_BHK += key_head * K
    key_BHK += key_head * K
    query = _load(query_BHK + keys, keys < K, CUTS_HEAD, "", "")
    key = _load(key_BHK + keys, keys < K, CUTS_HEAD, "", "")
    if TAIL > 0:
        query_tail = _load(query_BHK + tail_keys, tail_keys < K, CUTS_TAIL, "", "")
        key_tail = _load(key_BHK + tail_keys, tail_keys < K, CUTS_TAIL, "", "")
    value = _load(value_BWV + value_places, values < V, CUTS_V, "", "")
    beta = _strength(beta_BW, value_head, BETA_IS_LOGIT, DOUBLE_BETA)
    if HAS_GATE:
        decay *= tl.exp(_log_decay(gate_BW, A_log_W, dt_bias_W, value_head, head, IS_GATE_RAW, HAS_DT_BIAS))

    read_by_key = _read(old, key, V_FIRST)
    read_by_query = _read(old, query, V_FIRST)
    overlap = tl.sum(key * query)
    key_square = tl.sum(key * key)
    query_square = tl.sum(query * query)
    if TAIL > 0:
        read_by_key += _read(old_tail, key_tail, V_FIRST)
        read_by_query += _read(old_tail, query_tail, V_FIRST)
        overlap += tl.sum(key_tail * query_tail)
        key_square += tl.sum(key_tail * key_tail)
        query_square += tl.sum(query_tail * query_tail)
    # Key and query stay as they came: their lengths and the scale are factors of what they read and write.
    key_scale = 1.0
    query_scale = scale
    if NORMALIZE:
        key_scale = 1.0 / tl.sqrt(key_square + 1e-6)
        query_scale = scale / tl.sqrt(query_square + 1e-6)
    update = key_scale * beta * (value - decay * key_scale * read_by_key)
    output = query_scale * (decay * read_by_query + overlap * update)

    if WRITES_SCALES:
        # In units of what the old numbers count: to rescale each number would be one multiplication more. The least
        # unit keeps the division finite; what it changes is below 1e-17.
        unit = tl.maximum(decay, 1e-20)
        decay = tl.full((BLOCK_V,), 1.0, tl.float32)
        update = update / unit
    new = _step(old, decay, key, update, V_FIRST)
    if TAIL > 0:
        new_tail = _step(old_tail, decay, key_tail, update, V_FIRST)
    if WRITES_SCALES:
        largest = _largest(new, V_FIRST)
        if TAIL > 0:
            largest = tl.maximum(largest, _largest(new_tail, V_FIRST))
        inverse = tl.where(largest > 0.0, 127.0 / largest, 0.0)
        _store(new_scales_BWV + value_places, unit * largest / 127.0, values < V, CUTS_V, "")
        new = _quantized(new, inverse, V_FIRST)
        if TAIL > 0:
            new_tail = _quantized(new_tail, inverse, V_FIRST)
    new_state += value_head * (K * V)
    _store(new_state + place, new, is_there, CUTS_HEAD or CUTS_V, WRITE_POLICY)
    if TAIL > 0:
        _store(new_state + tail_place, new_tail, is_tail_there, CUTS_TAIL or CUTS_V, WRITE_POLICY)
    _store(output_BWV + value_places, output, values < V, CUTS_V, "")
