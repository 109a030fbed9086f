"""The tensors that fla's delta-rule mixers have in common: separate projections, separate convolutions."""

from keyreduce.families.axes import Part

JOINED_CONVOLUTIONS = {f"{which}_conv1d.weight": "conv1d.weight" for which in "qkv"}
"""Separate in files, one tensor in models of transformers."""

FLA_TENSORS = {
    "q_proj.weight": (Part.QUERY, Part.HIDDEN),
    "k_proj.weight": (Part.KEY, Part.HIDDEN),
    "v_proj.weight": (Part.VALUE, Part.HIDDEN),
    "b_proj.weight": (Part.VALUE_HEAD, Part.HIDDEN),
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
