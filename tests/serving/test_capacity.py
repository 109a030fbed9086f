"""The arithmetic of serving engines, against plain counting and against what vLLM itself computed."""

import math

import pytest

from keyreduce.errors import KeyreduceError
from keyreduce.families import FAMILIES
from keyreduce.serving.capacity import (
    CacheLayout,
    cache_memory,
    sequences_that_fit,
    sglang_pool,
    state_bytes_that_fit,
    state_dtype,
    vllm_pool,
)

GIB = 2**30
# The mixers of Qwen3-Next-80B-A3B, of Qwen3.5-27B, of Kimi-Linear-48B-A3B and of OLMo-Hybrid-7B.
QWEN_NEXT = {"model_type": "qwen3_next", "num_hidden_layers": 48, "dtype": "bfloat16"}
QWEN = {
    "model_type": "qwen3_5",
    "text_config": {
        "num_hidden_layers": 64, "linear_num_key_heads": 16, "linear_num_value_heads": 48, "mamba_ssm_dtype": "float32",
        "num_key_value_heads": 4, "head_dim": 256, "dtype": "bfloat16",
    },
}  # fmt: skip
KIMI = {"model_type": "kimi_linear"}
OLMO = {"model_type": "olmo_hybrid"}


@pytest.mark.parametrize(
    ("config", "mebibytes"),
    # The states in float32 of published models.
    [(QWEN_NEXT, 72), (QWEN, 144), (OLMO, 51)],
)
def test_state_bytes_of_published_models(config, mebibytes):
    assert math.floor(CacheLayout.of(config).state_bytes("float32") / 2**20 + 0.5) == mebibytes


def test_bytes_by_hand():
    layout = CacheLayout.of(QWEN_NEXT)
    layers, key_heads, value_heads, size = 36, 16, 32, 128
    assert layout.state_bytes("bfloat16") == 2 * layers * value_heads * size * size
    assert layout.state_bytes("int8") == layers * value_heads * (size * size + 4 * size)
    assert layout.convolution_bytes == 2 * 3 * layers * (2 * key_heads * size + value_heads * size)
    assert layout.softmax_bytes(1000) == 12 * 1000 * 2 * 2 * 256 * 2
    assert layout.tokens_of_equal_bytes("bfloat16") == 1536
    # Latent attention keeps one vector of 512 + 64 numbers for all heads.
    assert CacheLayout.of(KIMI).softmax_bytes(10) == 10 * 2 * 576 * len(CacheLayout.of(KIMI).softmax)


def test_a_model_of_mixers_alone_keeps_no_keys():
    layout = CacheLayout.of({"model_type": "delta_net", "num_hidden_layers": 3, "use_short_conv": False})
    assert (layout.softmax, layout.convolution_bytes, layout.tokens_of_equal_bytes("float32")) == ((), 0, None)


def test_hybrids_of_fla():
    attn = {"layers": [1], "num_heads": 8, "num_kv_heads": 2, "window_size": 100}
    config = {"model_type": "gated_deltanet", "num_hidden_layers": 3, "hidden_size": 512, "attn": attn}
    layout = CacheLayout.of(config)
    assert layout.softmax_bytes(40) == 40 * 2 * 2 * 64 * 2
    assert layout.softmax_bytes(4000) == 100 * 2 * 2 * 64 * 2
    assert layout.tokens_of_equal_bytes("float32") is None  # the window ends growing
    with pytest.raises(KeyreduceError, match="attn has num_heads None"):
        CacheLayout.of(config | {"attn": {"layers": [1]}})


@pytest.mark.parametrize(
    ("config", "engine", "asked", "dtype"),
    [
        (QWEN_NEXT, "vllm", None, "bfloat16"),
        (QWEN_NEXT | {"dtype": "float32"}, "vllm", None, "bfloat16"),
        (QWEN_NEXT | {"dtype": "float16"}, "vllm", None, "float16"),
        (QWEN, "vllm", None, "float32"),
        (QWEN, "vllm", "bfloat16", "bfloat16"),
        (KIMI, "vllm", "bfloat16", "float32"),
        (QWEN_NEXT, "sglang", None, "float32"),
        (QWEN_NEXT | {"mamba_ssm_dtype": "bfloat16"}, "sglang", None, "bfloat16"),
    ],
)
def test_engines_choose_the_dtype_of_the_state(config, engine, asked, dtype):
    assert state_dtype(CacheLayout.of(config), engine, asked) == dtype


def test_no_engine_keeps_states_in_8_bits():
    with pytest.raises(KeyreduceError, match="`state_dtype` int8: vllm keeps states in float32"):
        sequences_that_fit(QWEN, GIB, 1000, dtype="int8")


def simulated(layout, pool, memory, tokens, groups):
    """Hand out blocks to sequences one after another, until there are no more."""
    state_groups, softmax_groups = groups
    free, admitted = memory // (pool.page_bytes * pool.layers_per_block) - 1, 0
    while True:
        for _ in range(state_groups):
            free -= 1
        for _ in range(softmax_groups):
            kept = 0
            while kept < tokens:
                kept += pool.block_tokens
                free -= 1
        if free < 0:
            return admitted
        admitted += 1


@pytest.mark.parametrize("tokens", [1, 288, 4096, 100_000])
@pytest.mark.parametrize(("config", "groups"), [(QWEN_NEXT, (3, 1)), (QWEN, (3, 1)), (OLMO, (3, 1)), (KIMI, (4, 1))])
def test_blocks_are_handed_out_until_there_are_none(config, groups, tokens):
    layout = CacheLayout.of(config)
    pool = vllm_pool(layout, 20 * GIB, tokens)
    assert pool.sequences == simulated(layout, pool, 20 * GIB, tokens, groups)
    state = (layout.state_bytes(state_dtype(layout, "vllm")) + layout.convolution_bytes) / len(layout.mixers)
    assert pool.page_bytes >= state > pool.page_bytes - 16 * pool.page_bytes / pool.block_tokens


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("tokens", [300, 4096])
@pytest.mark.parametrize("sequences", [10, 90, 200])
def test_the_most_state_that_fits_does_fit(engine, tokens, sequences):
    memory = 40 * GIB
    most = state_bytes_that_fit(QWEN_NEXT, memory, tokens, sequences, engine)
    layout = CacheLayout.of(QWEN_NEXT)
    family = FAMILIES["qwen3_next"]
    (before,) = set(layout.mixers)
    dtype = state_dtype(layout, engine)
    # A state of just under so many bytes, by the value channels alone; the convolution must not grow.
    channels = int(most / layout.state_bytes(dtype) * before.head_v_dim)
    assert channels > 0
    one_more = [channels, channels + 8]
    fits = []
    for value in one_more:
        sizes = dict.fromkeys(family.mixer_layers(QWEN_NEXT), before._replace(head_v_dim=value))
        slim = CacheLayout.of(QWEN_NEXT, sizes)
        pool = vllm_pool if engine == "vllm" else sglang_pool
        kept = {"taps": layout.taps if value <= before.head_v_dim else 1}
        fits.append(pool(CacheLayout(**{**vars(slim), **kept}), memory, tokens).sequences >= sequences)
    assert fits == [True, False]


def test_nothing_fits_where_the_keys_and_values_are_too_many():
    assert state_bytes_that_fit(QWEN_NEXT, 10 * GIB, 10**6, 10) == 0
    assert state_bytes_that_fit(QWEN_NEXT, 10 * GIB, 10**6, 10, "sglang") == 0
    assert sequences_that_fit(QWEN_NEXT, 10 * GIB, 10**6) == 0


def test_sglang_takes_the_smaller_of_slots_and_tokens():
    layout = CacheLayout.of(QWEN_NEXT)
    state = layout.state_bytes("float32") + layout.convolution_bytes
    pool = sglang_pool(layout, 40 * GIB, 1000)
    assert (pool.slots + 1) * state <= 40 * GIB * 0.9 / 1.9 < (pool.slots + 2) * state
    assert (pool.sequences, pool.by_slots) == (pool.slots // 5, True)
    assert sglang_pool(layout, 40 * GIB, 1000, prefix_caching=False).sequences == pool.slots
    long = sglang_pool(layout, 40 * GIB, 200_000)
    assert (long.by_slots, long.sequences) == (False, long.tokens // 200_000)
    # At the share that is named both allow as many, but for the slot that SGLang keeps free.
    even = sglang_pool(layout, 40 * GIB, 1000, share=pool.even_share)
    assert even.slots / 5 == pytest.approx(even.tokens / 1000, rel=0.03)


def test_gpus_share_the_heads():
    one, four = (vllm_pool(CacheLayout.of(QWEN), 40 * GIB, 2000, gpus=gpus) for gpus in (1, 4))
    assert four.page_bytes == one.page_bytes / 4
    # Two heads of keys and values cannot be divided by four, so that each GPU keeps a whole one.
    layout = CacheLayout.of(QWEN_NEXT)
    assert vllm_pool(layout, GIB, 1, gpus=4).block_tokens < vllm_pool(layout, GIB, 1, gpus=2).block_tokens
    with pytest.raises(KeyreduceError, match="`gpus` is 3, which does not divide 16 key"):
        vllm_pool(layout, GIB, 1, gpus=3)


def test_memory_that_is_left_for_caches():
    gpu = 80 * GIB
    assert cache_memory(gpu, 20 * GIB, "vllm", gpus=2, reserve_bytes=GIB) == int(0.92 * gpu) - 11 * GIB
    assert cache_memory(gpu, 20 * GIB, "sglang", gpus=1, reserve_bytes=GIB) == 50 * GIB
    assert cache_memory(gpu, 200 * GIB, "vllm", gpus=1, reserve_bytes=GIB) == 0
