"""Kimi Delta Attention (arXiv:2510.26692): the gated delta rule with a decay for each key channel.

As fla ships it (``kda``), and as transformers ships Kimi Linear, whose config has one size for keys and values alike.
The decay and the output gate reach their channels through a bottleneck that is as wide as a head's values.
"""

from dataclasses import replace

from keyreduce.families.axes import Part
from keyreduce.families.delta_net import BIASES, CONVOLUTIONS, FLA_TENSORS, JOINED_CONVOLUTIONS
from keyreduce.families.fields import Field, LayerTypes, Ratio
from keyreduce.families.table import Family

_HEADS, _HEAD_DIM = Field("num_heads", 16), Field("head_dim", 128)
_PER_CHANNEL = "decays at a rate of its own"
_UNGATED = {name: axes for name, axes in FLA_TENSORS.items() if name != "g_proj.weight"}

KDA = Family(
    model_type="kda",
    mixer="model.layers.{layer}.attn",
    operators=("chunk_kda", "fused_recurrent_kda"),
    key_heads=_HEADS,
    value_heads=Field("num_v_heads", _HEADS),
    head_k_dim=_HEAD_DIM,
    head_v_dim=Ratio("expand_v", 1.0, of=_HEAD_DIM),
    hidden=Field("hidden_size", 2048),
    num_layers=Field("num_hidden_layers", 24),
    tensors=_UNGATED
    | {
        "f_proj.0.weight": (Part.DECAY_RANK, Part.HIDDEN),
        "f_proj.1.weight": (Part.DECAY, Part.DECAY_RANK),
        "g_proj.0.weight": (Part.GATE_RANK, Part.HIDDEN),
        "g_proj.1.weight": (Part.GATE, Part.GATE_RANK),
        "g_proj.1.bias": (Part.GATE,),
        "A_log": (Part.VALUE_HEAD,),
        "dt_bias": (Part.DECAY,),
    },
    taps=Field("conv_size", 4),
    rule="Kimi Delta Attention",
    paper="arXiv:2510.26692",
    switches={"use_short_conv": True},
    only_with=CONVOLUTIONS,
    optional=BIASES,
    per_channel=_PER_CHANNEL,
)

_SECTION = "linear_attn_config"
_KIMI_HEADS = Field("linear_num_heads", 32, also=(_SECTION, "num_heads"))
_KIMI_HEAD_DIM = Field("linear_head_dim", 128, also=(_SECTION, "head_dim"))
_OF_GATE = ("f_a_proj.weight", "f_b_proj.weight", "f_proj.weight", "A_log", "dt_bias")
_IN_GATE = {name: f"forget_gate.{name}" for name in _OF_GATE}


def _tied(model_type: str) -> str:
    return (
        f"a {model_type} config says one size for the key and the value channels of a head: "
        "cut both alike, with `target` key,value and one `keep`"
    )


KIMI_LINEAR = Family(
    model_type="kimi_linear",
    mixer="model.layers.{layer}.self_attn",
    operators=("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"),
    key_heads=_KIMI_HEADS,
    value_heads=_KIMI_HEADS,
    head_k_dim=_KIMI_HEAD_DIM,
    head_v_dim=_KIMI_HEAD_DIM,
    hidden=Field("hidden_size", 2304),
    num_layers=Field("num_hidden_layers", 27),
    tensors={name: axes for name, axes in _UNGATED.items() if name not in BIASES}
    | {
        "f_a_proj.weight": (Part.DECAY_RANK, Part.HIDDEN),
        "f_b_proj.weight": (Part.DECAY, Part.DECAY_RANK),
        "g_a_proj.weight": (Part.GATE_RANK, Part.HIDDEN),
        "g_b_proj.weight": (Part.GATE, Part.GATE_RANK),
        "A_log": (Part.OTHER, Part.OTHER, Part.VALUE_HEAD, Part.OTHER),
        "dt_bias": (Part.DECAY,),
    },
    taps=Field("linear_conv_kernel_dim", 4, also=(_SECTION, "short_conv_kernel_size")),
    rule="Kimi Delta Attention",
    paper="arXiv:2510.26692",
    layers=LayerTypes(softmax=(4,), listed=_SECTION),
    shipped_by="transformers",
    per_channel=_PER_CHANNEL,
    inside=JOINED_CONVOLUTIONS | {name: _IN_GATE[name] for name in _OF_GATE if name != "f_proj.weight"},
    tied=_tied("kimi_linear"),
)

_GLM_HEADS = replace(_KIMI_HEADS, default=64)

GLM5_NEXT_TEXT = replace(
    KIMI_LINEAR,
    model_type="glm5_next_text",
    key_heads=_GLM_HEADS,
    value_heads=_GLM_HEADS,
    hidden=Field("hidden_size", 4096),
    num_layers=Field("num_hidden_layers", 45),
    tensors={**KIMI_LINEAR.tensors, "A_log": (Part.VALUE_HEAD,)},
    layers=LayerTypes(interval=None),
    elsewhere=("model.language_model.layers.{layer}.self_attn",),
    tied=_tied("glm5_next"),
)

# On the hub its config says the sizes of softmax attention and of mixers in one, transformers writes the latter too.
_BAILING_HEADS = Field("linear_num_heads", Field("num_attention_heads", 32))
_BAILING_HEAD_DIM = Field("head_dim", 128, also=("", "linear_head_dim"))

BAILING_HYBRID = replace(
    KIMI_LINEAR,
    model_type="bailing_hybrid",
    elsewhere=("model.layers.{layer}.attention",),
    key_heads=_BAILING_HEADS,
    value_heads=_BAILING_HEADS,
    head_k_dim=_BAILING_HEAD_DIM,
    head_v_dim=_BAILING_HEAD_DIM,
    hidden=Field("hidden_size", 2560),
    num_layers=Field("num_hidden_layers", 42),
    tensors={name: axes for name, axes in FLA_TENSORS.items() if name not in (*BIASES, "o_proj.weight")}
    | {
        "dense.weight": FLA_TENSORS["o_proj.weight"],
        "f_proj.weight": (Part.DECAY, Part.HIDDEN),
        "A_log": (Part.VALUE_HEAD,),
        "dt_bias": (Part.DECAY,),
    },
    taps=Field("short_conv_kernel_size", 4, also=("", "linear_conv_kernel_dim")),
    layers=LayerTypes(softmax=(5,), period=6, interval="layer_group_size"),
    inside=JOINED_CONVOLUTIONS
    | {name: _IN_GATE[name] for name in ("f_proj.weight", "A_log", "dt_bias")}
    | {"dense.weight": "o_proj.weight"},
    tied=_tied("bailing_hybrid"),
)
