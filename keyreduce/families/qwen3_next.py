"""Qwen3-Next and the models that have its mixer, as transformers ships them: Gated DeltaNet (arXiv:2412.06464).

They differ in how the projections of the input are packed. Qwen3.5 and Qwen4-Exp are also the language models within
larger ones, whose vision part, like layers that predict several tokens ahead (``mtp``), has no mixer. Lara-4-Mini has
all projections of the input in one tensor, which the model divides into those of Qwen3.5.
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
    rule="gated delta rule",
    paper="arXiv:2412.06464",
    layers=LayerTypes(),
    shipped_by="transformers",
)

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
    elsewhere=("model.language_model.layers.{layer}.linear_attn",),
)

QWEN3_5_MOE_TEXT = replace(
    QWEN3_5_TEXT,
    model_type="qwen3_5_moe_text",
    hidden=Field("hidden_size", 2048),
    num_layers=Field("num_hidden_layers", 40),
)

QWEN4_EXP_TEXT = replace(QWEN3_5_MOE_TEXT, model_type="qwen4_exp_text")

_IN_PROJ = ("in_proj_qkv.weight", "in_proj_z.weight", "in_proj_b.weight", "in_proj_a.weight")

LARA_MINI = replace(
    QWEN3_NEXT,
    model_type="lara_mini",
    key_heads=Field("linear_num_key_heads", 8),
    value_heads=Field("linear_num_value_heads", 16),
    hidden=Field("hidden_size", 1024),
    num_layers=Field("num_hidden_layers", 34),
    tensors={name: axes for name, axes in _SHARED_TENSORS.items() if name != "norm.weight"}
    | {
        "in_proj.weight": (
            Joined((Part.QUERY, Part.KEY, Part.VALUE, Part.GATE, Part.BETA, Part.VALUE_HEAD)),
            Part.HIDDEN,
        ),
        "out_norm.weight": (Part.SHARED_VALUE,),
    },
    layers=LayerTypes(softmax=(1, 3, 4), period=5, interval=None),
    inside={"out_norm.weight": "norm.weight"},
    apart={"in_proj.weight": {name: QWEN3_5_TEXT.tensors[name][0] for name in _IN_PROJ}},
)
