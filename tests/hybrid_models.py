"""Tiny random hybrids of the families that transformers ships, and their checkpoints as those of the real ones are."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import VOCABULARY, edit_tensors, save
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from keyreduce.families import FAMILIES

_COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=3,
    layer_types=["linear_attention", "full_attention", "linear_attention"],
    num_attention_heads=2,
    num_key_value_heads=1,
    initializer_range=0.15,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=6,
    bos_token_id=256,
    eos_token_id=256,
    pad_token_id=0,
)
_EXPERTS = dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8)
_VISION = dict(
    depth=1, hidden_size=8, intermediate_size=8, num_heads=2, out_hidden_size=32, num_position_embeddings=4,
    patch_size=2,
)  # fmt: skip
LANGUAGE = {
    "qwen3_next": _COMMON | _EXPERTS | dict(head_dim=8),
    "qwen3_5_text": _COMMON | dict(head_dim=8),
    "qwen3_5_moe_text": _COMMON | _EXPERTS | dict(head_dim=8),
    "olmo_hybrid": _COMMON,
}
SEEING = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
HYBRIDS = (*LANGUAGE, *SEEING)
_ATTENTION = dict(kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4)
CHANNEL_DECAY = {
    "kda": dict(
        hidden_size=32, num_heads=2, num_v_heads=4, head_dim=8, expand_v=0.75, num_hidden_layers=3,
        intermediate_size=32, vocab_size=VOCABULARY, initializer_range=0.15, bos_token_id=256, eos_token_id=256,
        attn={"layers": [1], "num_heads": 2},
    ),
    "kimi_linear": {name: value for name, value in _COMMON.items() if not name.startswith("linear")}
    | _ATTENTION
    | dict(num_key_value_heads=2, linear_num_heads=2, linear_head_dim=8)
    | dict(moe_intermediate_size=8, num_experts=2, num_experts_per_token=1),
}  # fmt: skip
"""Those whose key channels decay each in its own time."""

_EXPERTS_ALONE = {name: value for name, value in _COMMON.items() if name != "intermediate_size"} | _EXPERTS
_WITHOUT_SIZES = {name: value for name, value in _COMMON.items() if not name.startswith("linear")}
_INDEXED = dict(layer_types=["linear_attention", "indexed_attention", "linear_attention"])
ALIKE = {
    "qwen4_exp_text": _EXPERTS_ALONE
    | _INDEXED
    | dict(head_dim=8, hc_count=2, hc_lowrank=4, ple_layer_ids=[3], ngram_vocab_size_base=11, heads_per_ngram=2)
    | dict(make_ngram_vocab_size_divisible_by=4, split_ngram_parts=2, indexer_n_heads=2, indexer_kv_heads=1)
    | dict(indexer_head_dim=8, indexer_budget=128, indexer_compress_ratio=2),
    "lara_mini": _EXPERTS_ALONE | dict(head_dim=8, sliding_window=64),
    "glm5_next_text": _WITHOUT_SIZES
    | _ATTENTION
    | _INDEXED
    | dict(num_key_value_heads=2, linear_num_heads=2, linear_head_dim=8, q_lora_rank=8, qk_rope_head_dim=0)
    | dict(moe_intermediate_size=8, n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1, hc_mult=2)
    | dict(index_topk=128, index_kpool=2, index_head_dim=8, index_n_heads=2)
    | dict(mlp_layer_types=["dense", "sparse", "sparse"]),
    "bailing_hybrid": _WITHOUT_SIZES
    | _ATTENTION
    | dict(num_key_value_heads=2, head_dim=8, moe_intermediate_size=8, num_experts=2, num_experts_per_token=1)
    | dict(n_group=1, topk_group=1, first_k_dense_replace=1),
    "precond_gated_deltanet": CHANNEL_DECAY["kda"],
    "precond_kda": CHANNEL_DECAY["kda"],
}
"""Those whose mixers are nearly the ones of a family above, so that what is theirs alone is tested."""

_PATCHES = dict(
    hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=2
)
_GLM_VISION = dict(depth=1, hidden_size=8, intermediate_size=8, num_heads=2, out_hidden_size=32, patch_size=2)
WRAPPED = {
    "qwen4_exp": ("qwen4_exp_text", dict(vision_config=_VISION)),
    "glm5_next": ("glm5_next_text", dict(vision_config=_GLM_VISION | dict(image_size=4, num_channels=3))),
    "minicpmv4_6": ("qwen3_5_text", dict(vision_config=_PATCHES, insert_layer_id=0)),
    "minicpmv4_7": ("qwen3_5_text", dict(vision_config=_PATCHES, insert_layer_id=0)),
    "minicpm_ocr": ("qwen3_5_text", dict(vision_config=_PATCHES, insert_layer_id=0)),
    "jev": ("qwen3_5_text", dict(hidden_size=32)),
}
"""Larger models -> the language model that they hold, and the other settings of their configs."""
NEWER = (*(name for name in ALIKE if name != "glm5_next_text"), *WRAPPED)
"""All of these; of the language model of glm5_next transformers has no class with a head."""

SINCE = {
    "bailing_hybrid": "5.23", "glm5_next": "5.23", "glm5_next_text": "5.23", "jev": "5.23", "lara_mini": "5.24",
    "minicpm_ocr": "5.23", "minicpmv4_6": "5.23", "minicpmv4_7": "5.23", "qwen4_exp": "5.23", "qwen4_exp_text": "5.23",
}  # fmt: skip
"""Model types that not every transformers has that keyreduce runs with -> the first that was seen to have it."""


def marked(model_types) -> list:
    """Return the model types as parameters of a test, which skips where the installed transformers has no such one."""
    return [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                name in SINCE and name not in CONFIG_MAPPING,
                reason=f"transformers {transformers.__version__} has no {name}; {SINCE.get(name)} has it",
            ),
        )
        for name in model_types
    ]


def needs(model_type: str) -> None:
    """Skip the test where the installed transformers is of before this architecture."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers has no {model_type}")


def build(model_type: str, *, seed: int = 0, outer: Mapping = {}, **changes) -> PreTrainedModel:
    """Return a random float32 model in evaluation mode, of which no parameter is trivial.

    Changes are of its language model's sizes, those of ``outer`` of the rest of a larger one.
    """
    needs(model_type)
    torch.manual_seed(seed)
    if model_type in SEEING:
        text = LANGUAGE[SEEING[model_type]] | changes
        config = AutoConfig.for_model(model_type, text_config=text, vision_config=_VISION)
        model = AutoModelForImageTextToText.from_config(config)
    elif model_type in WRAPPED:
        text, others = WRAPPED[model_type]
        text = (LANGUAGE | ALIKE)[text] | changes | dict(model_type=text)
        config = AutoConfig.for_model(model_type, text_config=text, **others | outer)
        if model_type == "jev":
            model = transformers.JevForDecision(config)
        else:
            model = AutoModelForImageTextToText.from_config(config)
    else:
        sizes = (LANGUAGE | CHANNEL_DECAY | ALIKE)[model_type] | changes
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            if name.endswith(("A_log", "dt_bias")):
                parameter.uniform_(-2, 1)
    return model.eval()


def store(model: PreTrainedModel, folder: Path, **options) -> Path:
    """Save a model as its makers do, with a tokenizer of bytes, and return the folder."""
    save(model, folder, **options)
    if model.config.model_type == "olmo_hybrid":
        edit_tensors(folder, lambda tensors: _split_convolutions(tensors, model.config))
    return folder


def _split_convolutions(tensors: dict[str, torch.Tensor], config) -> None:
    """transformers joins what files have apart, and when it saves cuts it into thirds, whatever they hold."""
    sizes = FAMILIES["olmo_hybrid"].sizes(config.to_dict())
    lengths = [sizes.key_heads * sizes.head_k_dim] * 2 + [sizes.value_heads * sizes.head_v_dim]
    for layer in FAMILIES["olmo_hybrid"].mixer_layers(config.to_dict()):
        names = [f"model.layers.{layer}.linear_attn.{which}_conv1d.weight" for which in "qkv"]
        joined = torch.cat([tensors[name] for name in names])
        tensors |= {name: part.contiguous() for name, part in zip(names, joined.split(lengths), strict=True)}
