"""Qwen3-Next and Qwen3.5, as transformers ships them: Gated DeltaNet (arXiv:2412.06464) in three layers of four.

They differ in how the projections of the input are packed, and Qwen3.5 is also the language model within a larger one,
whose vision part, like layers that predict several tokens ahead (``mtp``), has no mixer.
"""

from dataclasses import replace

from keyreduce.families.axes import Joined, Part
from keyreduce.families.fields import Field, LayerTypes
from keyreduce.families.table import Family

_QUERY_KEY_VALUE = Joined((Part.QUERY, Part.KEY, Part.VALUE))
_SHARED_TENSORS = {
    "conv1d.weight": (_QUERY_KEY_VALUE, Part.OTHER, Part.TAPS),
    "A_log": (Part.VALUE_HEAD,),
    "dt_bias": (Part.VALUE_HEAD,),
    "norm.weight": (Part.SHARED_VALUE,),
    "out_proj.weight": (Part.HIDDEN, Part.VALUE),
}

QWEN3_NEXT = Family(
    model_type="qwen3_next",
    mixer="model.layers.{layer}.linear_attn",
    operators=("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"),
    key_heads=Field("linear_num_key_heads", 16),
    value_heads=Field("linear_num_value_heads", 32),
    head_k_dim=Field("linear_key_head_dim", 128),
    head_v_dim=Field("linear_value_head_dim", 128),
    hidden=Field("hidden_size", 2048),
    num_layers=Field("num_hidden_layers", 48),
    tensors=_SHARED_TENSORS
    | {
        "in_proj_qkvz.weight": (Joined((Part.QUERY, Part.KEY, Part.VALUE, Part.GATE), by_key_head=True), Part.HIDDEN),
        "in_proj_ba.weight": (Joined((Part.BETA, Part.VALUE_HEAD), by_key_head=True), Part.HIDDEN),
    },
    taps=Field("linear_conv_kernel_dim", 4),
    layers=LayerTypes(),
    shipped_by="transformers",
)

_WITHIN = "model.language_model.layers.{layer}.linear_attn"

QWEN3_5_TEXT = replace(
    QWEN3_NEXT,
    model_type="qwen3_5_text",
    hidden=Field("hidden_size", 4096),
    num_layers=Field("num_hidden_layers", 32),
    tensors=_SHARED_TENSORS
    | {
        "in_proj_qkv.weight": (_QUERY_KEY_VALUE, Part.HIDDEN),
        "in_proj_z.weight": (Part.GATE, Part.HIDDEN),
        "in_proj_b.weight": (Part.BETA, Part.HIDDEN),
        "in_proj_a.weight": (Part.VALUE_HEAD, Part.HIDDEN),
    },
    elsewhere=(_WITHIN,),
)

QWEN3_5_MOE_TEXT = replace(
    QWEN3_5_TEXT,
    model_type="qwen3_5_moe_text",
    hidden=Field("hidden_size", 2048),
    num_layers=Field("num_hidden_layers", 40),
)


def _within(family: Family, model_type: str) -> Family:
    """The same language model as a part of one that sees."""
    section = "text_config"
    sizes = ("key_heads", "value_heads", "head_k_dim", "head_v_dim", "hidden", "num_layers", "taps")
    return replace(
        family,
        model_type=model_type,
        mixer=_WITHIN,
        elsewhere=(family.mixer,),
        layers=replace(family.layers, section=section),
        **{name: replace(getattr(family, name), section=section) for name in sizes},
    )


QWEN3_5 = _within(QWEN3_5_TEXT, "qwen3_5")
QWEN3_5_MOE = _within(QWEN3_5_MOE_TEXT, "qwen3_5_moe")
