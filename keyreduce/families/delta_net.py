"""DeltaNet, as fla ships it (arXiv:2406.06484)."""

from keyreduce.families.table import Family, Field, Part, Ratio

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
    tensors={
        "q_proj.weight": (Part.QUERY, Part.HIDDEN),
        "k_proj.weight": (Part.KEY, Part.HIDDEN),
        "v_proj.weight": (Part.VALUE, Part.HIDDEN),
        "b_proj.weight": (Part.VALUE_HEAD, Part.HIDDEN),
        "g_proj.weight": (Part.VALUE, Part.HIDDEN),
        "q_conv1d.weight": (Part.QUERY, Part.OTHER, Part.OTHER),
        "k_conv1d.weight": (Part.KEY, Part.OTHER, Part.OTHER),
        "v_conv1d.weight": (Part.VALUE, Part.OTHER, Part.OTHER),
        "q_conv1d.bias": (Part.QUERY,),
        "k_conv1d.bias": (Part.KEY,),
        "v_conv1d.bias": (Part.VALUE,),
        "o_norm.weight": (Part.SHARED_VALUE,),
        "o_proj.weight": (Part.HIDDEN, Part.VALUE),
    },
)
