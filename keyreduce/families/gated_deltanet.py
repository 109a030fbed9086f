"""Gated DeltaNet, as fla ships it (arXiv:2412.06464)."""

from keyreduce.families.axes import Part
from keyreduce.families.delta_net import BIASES, CONVOLUTIONS, FLA_TENSORS
from keyreduce.families.fields import Field, Ratio
from keyreduce.families.table import Family

_HEADS, _HEAD_DIM = Field("num_heads", 6), Field("head_dim", 256)

GATED_TENSORS = FLA_TENSORS | {
    "a_proj.weight": (Part.VALUE_HEAD, Part.HIDDEN),
    "A_log": (Part.VALUE_HEAD,),
    "dt_bias": (Part.VALUE_HEAD,),
}

GATED_DELTANET = Family(
    model_type="gated_deltanet",
    mixer="model.layers.{layer}.attn",
    operators=("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"),
    key_heads=_HEADS,
    value_heads=Field("num_v_heads", _HEADS),
    head_k_dim=_HEAD_DIM,
    head_v_dim=Ratio("expand_v", 2.0, of=_HEAD_DIM),
    hidden=Field("hidden_size", 2048),
    num_layers=Field("num_hidden_layers", 21),
    tensors=GATED_TENSORS,
    taps=Field("conv_size", 4),
    rule="gated delta rule",
    paper="arXiv:2412.06464",
    switches={"use_short_conv": True, "use_gate": True},
    only_with=CONVOLUTIONS | {"g_proj.weight": {"use_gate": True}},
    optional=BIASES,
)
