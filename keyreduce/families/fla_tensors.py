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
    "q_conv1d.weight": (Part.QUERY, Part.OTHER, Part.OTHER),
    "k_conv1d.weight": (Part.KEY, Part.OTHER, Part.OTHER),
    "v_conv1d.weight": (Part.VALUE, Part.OTHER, Part.OTHER),
    "q_conv1d.bias": (Part.QUERY,),
    "k_conv1d.bias": (Part.KEY,),
    "v_conv1d.bias": (Part.VALUE,),
    "o_norm.weight": (Part.SHARED_VALUE,),
    "o_proj.weight": (Part.HIDDEN, Part.VALUE),
}
