"""The Triton kernel of one decoding step of the delta rule, gated or not.

Per value head, with state ``S`` of shape ``[K, V]``, decay ``a`` (1 where ungated), key and query as they are used::

    u = beta (v - a S^T k)
    o = a S^T q + (q . k) u
    S <- a S + k u^T

which is the rule of arXiv:2406.06484 (ungated) and arXiv:2412.06464 (gated), with the output taken from the state as it
was: both products read the state once, and neither waits for the other. The step is bound by reading and writing the
state. A tile, all K channels by some value channels of one head, stays in registers between the two.

The sides of a tile are powers of two, so a tile comes in parts along the keys: 96 channels are three parts of 32, and
80 are five of 16. All parts are alike, and a thread holds the same rows of each. (Parts of unlike sizes, 64 and 32, do
waste no channel either, but each has rows in other threads, and Triton then moves whole tiles through shared memory.)
All that a program reads is asked for before anything is computed, or it would wait for memory more than once.

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
    """A vector over key channels, to be spread over a tile."""
    AXIS: tl.constexpr = 0 if V_FIRST else 1
    return tl.expand_dims(vector_K, AXIS)


@triton.jit
def _by_value(vector_V, V_FIRST: tl.constexpr):
    """A vector over value channels, to be spread over a tile."""
    AXIS: tl.constexpr = 1 if V_FIRST else 0
    return tl.expand_dims(vector_V, AXIS)


@triton.jit
def _place(keys, values, K: tl.constexpr, V: tl.constexpr, V_FIRST: tl.constexpr, RUN: tl.constexpr):
    """Where a tile's numbers lie in the state of a head, and which of them there are."""
    keys, values = _by_key(keys, V_FIRST), _by_value(values, V_FIRST)
    # With V_FIRST so many neighbours, and no more, go to a thread.
    places = tl.max_contiguous(values * K + keys, [1, RUN]) if V_FIRST else keys * V + values
    return places, (values < V) & (keys < K)


@triton.jit
def _load_tile(
    state, values, K: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr, V_FIRST: tl.constexpr, RUN: tl.constexpr,
    IS_CUT: tl.constexpr, CACHE: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """The parts of a tile, as a tuple."""
    parts = ()
    for first in tl.static_range(0, K, WIDTH):
        places, is_there = _place(first + tl.arange(0, WIDTH), values, K, V, V_FIRST, RUN)
        parts += (_load(state + places, is_there, IS_CUT, CACHE, POLICY),)
    return parts


@triton.jit
def _load_keys(vector_K, K: tl.constexpr, WIDTH: tl.constexpr):
    """A vector over all key channels, in the same parts."""
    parts = ()
    for first in tl.static_range(0, K, WIDTH):
        keys = first + tl.arange(0, WIDTH)
        parts += (_load(vector_K + keys, keys < K, K % WIDTH != 0, "", ""),)
    return parts


@triton.jit
def _dot(a, b, PARTS: tl.constexpr):
    """``a . b``, a scalar."""
    products = a[0] * b[0]
    for part in tl.static_range(1, PARTS):
        products += a[part] * b[part]
    return tl.sum(products)


@triton.jit
def _read(tile, vector, PARTS: tl.constexpr, V_FIRST: tl.constexpr):
    """``S^T x``, for each value channel of the tile."""
    AXIS: tl.constexpr = 1 if V_FIRST else 0
    products = tile[0] * _by_key(vector[0], V_FIRST)
    for part in tl.static_range(1, PARTS):
        products += tile[part] * _by_key(vector[part], V_FIRST)
    return tl.sum(products, axis=AXIS)


@triton.jit
def _step(tile, decay_V, key, update_V, PARTS: tl.constexpr, V_FIRST: tl.constexpr):
    """``a S + k u^T``."""
    parts = ()
    for part in tl.static_range(PARTS):
        new = _by_value(decay_V, V_FIRST) * tile[part] + _by_value(update_V, V_FIRST) * _by_key(key[part], V_FIRST)
        parts += (new,)
    return parts


@triton.jit
def _inverse(x):
    """``1 / x`` for x > 0, to 22 bits: two instructions, where a division takes eight."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def _quantize(tile, PARTS: tl.constexpr, V_FIRST: tl.constexpr):
    """The whole numbers nearest to a tile over its scales, within -127 and 127, as int8, and those scales."""
    AXIS: tl.constexpr = 1 if V_FIRST else 0
    most = tl.abs(tile[0])
    for part in tl.static_range(1, PARTS):
        most = tl.maximum(most, tl.abs(tile[part]))
    most_V = tl.max(most, axis=AXIS)
    inverse_V = tl.where(most_V > 1e-30, 127.0 * _inverse(most_V), 0.0)
    codes = ()
    for part in tl.static_range(PARTS):
        # Added to 1.5 * 2^23, a float32 keeps no fraction, and its lowest bits are the number in two's complement. That
        # is one multiply-add; converting a float to an integer takes a slower unit of the GPU.
        shifted = tile[part] * _by_value(inverse_V, V_FIRST) + 12582912.0
        codes += (shifted.to(tl.int32, bitcast=True).to(tl.int8),)
    return codes, most_V * 0.007874015748031496  # 1 / 127


@triton.jit
def _load_gate(gate_BW, A_log_W, dt_bias_W, value_head, head, IS_RAW: tl.constexpr, HAS_DT_BIAS: tl.constexpr):
    """What the log decay is computed from."""
    gate = tl.load(gate_BW + value_head).to(tl.float32)
    A_log = 0.0
    if IS_RAW:
        A_log = tl.load(A_log_W + head).to(tl.float32)
        if HAS_DT_BIAS:
            gate += tl.load(dt_bias_W + head).to(tl.float32)
    return gate, A_log


@triton.jit
def _decay(gate, A_log, IS_RAW: tl.constexpr):
    if IS_RAW:
        # softplus; beyond 20 it is its argument in float32, and the exponential would overflow.
        gate = tl.where(gate > 20.0, gate, tl.log(1.0 + tl.exp(tl.minimum(gate, 20.0))))
        gate = -tl.exp(A_log) * gate
    return tl.exp(gate)


@triton.jit
def decode_kernel(
    query_BHK, key_BHK, value_BWV, beta_BW, gate_BW, A_log_W, dt_bias_W,
    state, scales_BWV, new_state, new_scales_BWV, output_BWV, scale,
    H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    WIDTH: tl.constexpr, RUN: tl.constexpr, BLOCK_V: tl.constexpr,
    HAS_GATE: tl.constexpr, IS_GATE_RAW: tl.constexpr, HAS_DT_BIAS: tl.constexpr, NORMALIZE: tl.constexpr,
    BETA_IS_LOGIT: tl.constexpr, DOUBLE_BETA: tl.constexpr, V_FIRST: tl.constexpr,
    HAS_SCALES: tl.constexpr, WRITES_SCALES: tl.constexpr,
    READ_CACHE: tl.constexpr, READ_POLICY: tl.constexpr, WRITE_POLICY: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Step one tile: BLOCK_V value channels of a head, and its key channels in parts of WIDTH.

    The cache policies are those of reads and writes of the state alone. With OVERLAPS the programs of a launch start
    while the launch before it ends (programmatic dependent launch).
    """
    BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    PARTS: tl.constexpr = (K + WIDTH - 1) // WIDTH
    CUTS_V: tl.constexpr = V % BLOCK_V != 0
    IS_CUT: tl.constexpr = CUTS_V or K % WIDTH != 0
    program = tl.program_id(0)
    value_head = (program // BLOCKS).to(tl.int64)
    head = value_head % W
    key_head = value_head // W * H + head // (W // H)
    values = (program % BLOCKS) * BLOCK_V + tl.arange(0, BLOCK_V)
    value_places = value_head * V + values

    # Nothing is read or written before all that was launched before is done.
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    # Loads alone. Keys and queries are last: they change threads as they come.
    old = _load_tile(state + value_head * (K * V), values, K, V, WIDTH, V_FIRST, RUN, IS_CUT, READ_CACHE, READ_POLICY)
    decay = tl.full((BLOCK_V,), 1.0, tl.float32)
    if HAS_SCALES:
        decay = _load(scales_BWV + value_places, values < V, CUTS_V, "", "")
    value = _load(value_BWV + value_places, values < V, CUTS_V, "", "")
    beta = tl.load(beta_BW + value_head).to(tl.float32)
    if HAS_GATE:
        gate, A_log = _load_gate(gate_BW, A_log_W, dt_bias_W, value_head, head, IS_GATE_RAW, HAS_DT_BIAS)
    query = _load_keys(query_BHK + key_head * K, K, WIDTH)
    key = _load_keys(key_BHK + key_head * K, K, WIDTH)

    if BETA_IS_LOGIT:
        beta = tl.sigmoid(beta)
    if DOUBLE_BETA:
        beta *= 2
    if HAS_GATE:
        decay *= _decay(gate, A_log, IS_GATE_RAW)
    # Key and query stay as they came: their lengths and the scale are factors of what they read and write.
    key_scale = 1.0
    query_scale = scale
    if NORMALIZE:
        key_scale = tl.rsqrt(_dot(key, key, PARTS) + 1e-6)
        query_scale = scale * tl.rsqrt(_dot(query, query, PARTS) + 1e-6)
    update = key_scale * beta * (value - decay * key_scale * _read(old, key, PARTS, V_FIRST))
    output = query_scale * (decay * _read(old, query, PARTS, V_FIRST) + _dot(key, query, PARTS) * update)

    if WRITES_SCALES:
        # In units of what the old numbers count: to rescale each would be one multiplication more. The least unit keeps
        # its inverse finite; what it changes is below 1e-17.
        unit = tl.maximum(decay, 1e-20)
        new = _step(old, tl.full((BLOCK_V,), 1.0, tl.float32), key, update * _inverse(unit), PARTS, V_FIRST)
        new, scales = _quantize(new, PARTS, V_FIRST)
        _store(new_scales_BWV + value_places, unit * scales, values < V, CUTS_V, "")
    else:
        new = _step(old, decay, key, update, PARTS, V_FIRST)
    new_state += value_head * (K * V)
    for part in tl.static_range(PARTS):
        places, is_there = _place(part * WIDTH + tl.arange(0, WIDTH), values, K, V, V_FIRST, RUN)
        _store(new_state + places, new[part], is_there, IS_CUT, WRITE_POLICY)
    _store(output_BWV + value_places, output, values < V, CUTS_V, "")
