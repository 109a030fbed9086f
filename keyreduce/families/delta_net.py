"""DeltaNet, as fla ships it (arXiv:2406.06484), and the tensors that all delta-rule mixers of fla have in common."""

from keyreduce.families.axes import Part
from keyreduce.families.fields import Field, Ratio
from keyreduce.families.table import Family

JOINED_CONVOLUTIONS = {f"{which}_conv1d.weight": "conv1d.weight" for which in "qkv"}
"""Separate in files, one tensor in models of transformers."""

FLA_TENSORS = {
    "q_proj.weight": (Part.QUERY, Part.HIDDEN),
    "k_proj.weight": (Part.KEY, Part.HIDDEN),
    "v_proj.weight": (Part.VALUE, Part.HIDDEN),
    "b_proj.weight": (Part.BETA, Part.HIDDEN),
    "g_proj.weight": (Part.GATE, Part.HIDDEN),
    "q_conv1d.weight": (Part.QUERY, Part.OTHER, Part.TAPS),
    "k_conv1d.weight": (Part.KEY, Part.OTHER, Part.TAPS),
    "v_conv1d.weight": (Part.VALUE, Part.OTHER, Part.TAPS),
    "q_conv1d.bias": (Part.QUERY,),
    "k_conv1d.bias": (Part.KEY,),
    "v_conv1d.bias": (Part.VALUE,),
    "o_norm.weight": (Part.SHARED_VALUE,),
    "o_proj.weight": (Part.HIDDEN, Part.VALUE),
}

CONVOLUTIONS = {name: {"use_short_conv": True} for name in FLA_TENSORS if "conv1d" in name}
"""Tensors of the convolutions -> the switch that a config has for them."""

BIASES = tuple(name for name in FLA_TENSORS if name.endswith("conv1d.bias"))
"""fla's layers can have them, and its configs cannot say so."""

_HEADS, _HIDDEN = Field("num_heads", 16), Field("hidden_size", 2048)

DELTA_NET = Family(
    model_type="delta_net",
    mixer="model.layers.{layer}.attn",
    operators=("chunk_delta_rule", "fused_recurrent_delta_rule"),
    key_heads=_HEADS,
    value_heads=_HEADS,
    head_k_dim=Ratio("expand_k", 1, of=_HIDDEN, over=_HEADS),
    head_v_dim=Ratio("expand_v", 1, of=_HIDDEN, over=_HEADS),
    hidden=_HIDDEN,
    num_layers=Field("num_hidden_layers", 24),
    tensors=FLA_TENSORS,
    taps=Field("conv_size", 4),
    rule="delta rule",
    paper="arXiv:2406.06484",
    switches={"use_short_conv": True, "use_gate": False, "use_beta": True},
    only_with=CONVOLUTIONS | {"g_proj.weight": {"use_gate": True}, "b_proj.weight": {"use_beta": True}},
    optional=BIASES,
)
