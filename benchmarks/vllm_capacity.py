"""What vLLM's own cache manager makes of a budget of memory, for keyreduce's arithmetic to be compared with.

    python benchmarks/vllm_capacity.py --output benchmarks/serving/vllm_capacity.json

It wants vLLM and no GPU: its configuration, the sizes of its pages, its division into blocks and its block manager run
as they are, on a machine that is taken for one with an H100. For each setting the JSON has the name of a config and
what vLLM computed: tokens in a block, bytes of a page, blocks, the concurrency that it would log, and, where prefix
caching is off, the sequences that its block manager admits one after another. tests/serving/test_vllm_capacity.py
compares.
"""

import argparse
import itertools
import json
import logging
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from made_up_gpu import make_up_for_vllm

GIB = 2**30
_ROPE = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
_QWEN_SIZES = {
    "hidden_size": 2048, "intermediate_size": 512, "num_attention_heads": 16, "head_dim": 256, "vocab_size": 32_000,
    "linear_num_key_heads": 16, "linear_conv_kernel_dim": 4, "max_position_embeddings": 262_144,
    "rope_parameters": _ROPE, "partial_rotary_factor": 0.25,
}  # fmt: skip


def _kinds(layers: int) -> list[str]:
    return ["full_attention" if layer % 4 == 3 else "linear_attention" for layer in range(layers)]


def qwen3_next(key: int, value: int, layers: int = 48) -> dict:
    """The mixers and the attention of Qwen3-Next-80B-A3B."""
    return _QWEN_SIZES | {
        "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "dtype": "bfloat16",
        "num_hidden_layers": layers, "layer_types": _kinds(layers), "num_key_value_heads": 2,
        "linear_num_value_heads": 32, "linear_key_head_dim": key, "linear_value_head_dim": value, "num_experts": 8,
        "num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
    }  # fmt: skip


def qwen3_5(key: int, value: int, layers: int = 64) -> dict:
    """Those of Qwen3.5-27B, whose config asks for states in float32."""
    text = _QWEN_SIZES | {
        "model_type": "qwen3_5_text", "dtype": "bfloat16", "num_hidden_layers": layers, "layer_types": _kinds(layers),
        "num_key_value_heads": 4, "linear_num_value_heads": 48, "linear_key_head_dim": key,
        "linear_value_head_dim": value, "mamba_ssm_dtype": "float32",
    }  # fmt: skip
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "text_config": text,
        "vision_config": {"model_type": "qwen3_5", "depth": 1}, "dtype": "bfloat16",
    }  # fmt: skip


def olmo_hybrid(key: int, value: int, layers: int = 32) -> dict:
    """Those of OLMo-Hybrid-7B: every head of attention keeps keys and values of its own."""
    return {
        "architectures": ["OlmoHybridForCausalLM"], "model_type": "olmo_hybrid", "dtype": "bfloat16",
        "hidden_size": 3840, "intermediate_size": 512, "num_hidden_layers": layers, "layer_types": _kinds(layers),
        "num_attention_heads": 30, "num_key_value_heads": 30, "vocab_size": 32_000, "max_position_embeddings": 65_536,
        "linear_num_key_heads": 30, "linear_num_value_heads": 30, "linear_key_head_dim": key,
        "linear_value_head_dim": value, "linear_conv_kernel_dim": 4, "rope_parameters": None,
    }  # fmt: skip


def kimi_linear(key: int, value: int, layers: int = 27) -> dict:
    """Those of Kimi-Linear-48B-A3B: latent attention, and as many key as value channels."""
    softmax = [4, 8, 12, 16, 20, 24, 27]
    mixers = {
        "full_attn_layers": softmax, "kda_layers": [one for one in range(1, layers + 1) if one not in softmax],
        "num_heads": 32, "head_dim": key, "short_conv_kernel_size": 4,
    }  # fmt: skip
    return {
        "architectures": ["KimiLinearForCausalLM"], "model_type": "kimi_linear", "dtype": "bfloat16",
        "hidden_size": 2304, "intermediate_size": 512, "num_hidden_layers": layers, "num_attention_heads": 32,
        "num_key_value_heads": 32, "head_dim": 72, "vocab_size": 32_000, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128, "v_head_dim": 128, "linear_attn_config": mixers, "num_experts": 8,
        "num_experts_per_token": 2, "moe_intermediate_size": 64, "num_shared_experts": 1, "mla_use_nope": True,
        "model_max_length": 1_048_576, "max_position_embeddings": 1_048_576, "rope_theta": 10_000.0,
    }  # fmt: skip


def settings() -> list[dict]:
    """What is asked: model, sizes, dtype of the state, prefix caching, GPUs, memory of one GPU for caches, tokens."""
    found = []
    models = [
        (qwen3_next, [(128, 128), (96, 128), (80, 104), (72, 128), (64, 64), (64, 128)], ("auto", "float32")),
        (qwen3_5, [(128, 128), (80, 104), (64, 64)], ("auto", "bfloat16")),
        (olmo_hybrid, [(96, 192), (48, 192)], ("auto", "float32")),
        (kimi_linear, [(128, 128), (64, 64)], ("auto",)),
    ]
    for make, sizes, dtypes in models:
        for (key, value), dtype, prefix in itertools.product(sizes, dtypes, (False, True)):
            cases = itertools.product((288, 4096, 32_768), (1, 2))
            for tokens, gpus in cases if make is qwen3_next else [(1000, 1), (16_384, 1), (4096, 2)]:
                found.append(
                    {
                        "config": make(key, value), "state_dtype": dtype, "prefix_caching": prefix, "tokens": tokens,
                        "gpus": gpus, "memory_gib": 40,
                    }
                )  # fmt: skip
    return found


def computed(model: dict, asked: dict) -> dict:
    """Return what vLLM computes for one setting of a model of this config."""
    from vllm.config.vllm import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.kv_cache_utils import get_kv_cache_configs, get_max_concurrency_for_kv_cache_config

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(model))
        config = EngineArgs(
            model=folder, load_format="dummy", skip_tokenizer_init=True, max_model_len=asked["tokens"],
            max_num_seqs=1024, max_num_batched_tokens=8192, enable_prefix_caching=asked["prefix_caching"],
            mamba_ssm_cache_dtype=asked["state_dtype"], tensor_parallel_size=asked["gpus"],
            distributed_executor_backend="mp",
            compilation_config={"mode": 0}, limit_mm_per_prompt={"image": 0, "video": 0},
        ).create_engine_config()  # fmt: skip
    with set_current_vllm_config(config):
        specs = layer_specs(config)
        (pool,) = get_kv_cache_configs(config, [specs], [asked["memory_gib"] * GIB])
    page = pool.kv_cache_groups[0].kv_cache_spec.page_size_bytes
    found = {"block_tokens": config.cache_config.block_size, "page_bytes": page, "blocks": pool.num_blocks}
    found["concurrency"] = get_max_concurrency_for_kv_cache_config(config, pool)
    found["admitted"] = None if asked["prefix_caching"] else admitted(config, pool, asked["tokens"])
    return found


def layer_specs(config) -> dict:
    """Return what each layer keeps, as vLLM's own layers would say it: building them would want a GPU."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, MLAAttentionSpec

    model, cache = config.model_config, config.cache_config
    backend = AttentionBackendEnum["FLASH_ATTN_MLA" if model.use_mla else "FLASH_ATTN"].get_class()
    cache.block_size = backend.get_preferred_block_size(cache.DEFAULT_BLOCK_SIZE)
    current_platform._align_hybrid_block_size(config, backend)
    chosen, _ = ModelRegistry.resolve_model_cls(model.architecture, model_config=model)
    mixer = MambaSpec(
        shapes=chosen.get_mamba_state_shape_from_config(config),
        dtypes=chosen.get_mamba_state_dtype_from_config(config),
        block_size=cache.mamba_block_size,
        page_size_padded=cache.mamba_page_size_padded,
        mamba_cache_mode=cache.mamba_cache_mode,
    )
    kind = MLAAttentionSpec if model.use_mla else FullAttentionSpec
    softmax = kind(
        block_size=cache.block_size,
        num_kv_heads=model.get_num_kv_heads(config.parallel_config),
        head_size=model.get_head_size(),
        dtype=model.dtype,
    )
    text = model.hf_text_config
    if hasattr(text, "is_kda_layer"):
        has_state = [text.is_kda_layer(layer) for layer in range(text.num_hidden_layers)]
    else:
        has_state = [kind == "linear_attention" for kind in text.layer_types]
    return {f"layers.{layer}": mixer if state else softmax for layer, state in enumerate(has_state)}


def admitted(config, pool, tokens: int) -> int:
    """Return how many sequences vLLM's block manager takes before it refuses one."""
    from vllm import SamplingParams
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes
    from vllm.v1.request import Request

    sizes = resolve_kv_cache_block_sizes(pool, config)
    manager = KVCacheManager(pool, tokens, *sizes, enable_caching=False)
    prompt, parameters = [0] * tokens, SamplingParams(max_tokens=1)
    for count in itertools.count():
        request = Request(str(count), prompt, parameters, None)
        if manager.allocate_slots(request, tokens) is None:
            return count
    raise AssertionError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    make_up_for_vllm(90)
    logging.disable(logging.WARNING)
    import vllm

    configs, rows = {}, []
    for asked in settings():
        config = asked.pop("config")
        name = f"{config['model_type']} {len(configs)}"
        name = next((known for known, one in configs.items() if one == config), name)
        configs[name] = config
        rows.append({"config": name} | asked | computed(config, asked))
        print(len(rows), rows[-1], flush=True)
    found = {"vllm": vllm.__version__, "made_up_gpu": "H100 80GB", "configs": configs}
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    output.parent.mkdir(parents=True, exist_ok=True)
    described = json.dumps(found, indent=1).removesuffix("\n}")
    output.write_text(f'{described},\n "settings": [\n  {lines}\n ]\n}}\n')


if __name__ == "__main__":
    main()
