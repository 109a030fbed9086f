"""DeltaNet2: DeltaNet with shared convolution kernels and a key size of its own in each layer (keyreduce.models)."""

from dataclasses import replace

from keyreduce.families.axes import Part
from keyreduce.families.delta_net import DELTA_NET
from keyreduce.families.fla_tensors import FLA_TENSORS

_CONVOLUTIONS = ("q_conv1d", "k_conv1d", "v_conv1d", "kv_conv1d")

DELTA_NET_2 = replace(
    DELTA_NET,
    model_type="delta_net_2",
    shipped_by="keyreduce",
    head_k_dim=replace(DELTA_NET.head_k_dim, per_layer=True),
    tensors={name: parts for name, parts in FLA_TENSORS.items() if "conv1d" not in name}
    | {f"{name}.weight": (Part.HEAD_OR_ALL, Part.OTHER, Part.OTHER) for name in _CONVOLUTIONS}
    | {f"{name}.scale": (Part.HEAD_OR_ALL,) for name in _CONVOLUTIONS},
)
