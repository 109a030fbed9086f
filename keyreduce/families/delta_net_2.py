"""DeltaNet2: DeltaNet with shared convolution kernels and a key size of its own in each layer (keyreduce.models)."""

from dataclasses import replace

from keyreduce.families.axes import Part
from keyreduce.families.delta_net import DELTA_NET, FLA_TENSORS

_CONVOLUTIONS = {
    "q_conv1d": {"use_short_conv": True},
    "k_conv1d": {"use_short_conv": True, "share_kv_conv": False},
    "v_conv1d": {"use_short_conv": True, "share_kv_conv": False},
    "kv_conv1d": {"use_short_conv": True, "share_kv_conv": True},
}

DELTA_NET_2 = replace(
    DELTA_NET,
    model_type="delta_net_2",
    shipped_by="keyreduce",
    head_k_dim=replace(DELTA_NET.head_k_dim, per_layer=True),
    tensors={name: parts for name, parts in FLA_TENSORS.items() if "conv1d" not in name}
    | {f"{name}.weight": (Part.HEAD_OR_ALL, Part.OTHER, Part.TAPS) for name in _CONVOLUTIONS}
    | {f"{name}.scale": (Part.HEAD_OR_ALL,) for name in _CONVOLUTIONS},
    per_head="per_head_conv",
    switches={**DELTA_NET.switches, "shift_only_conv": False, "conv_scaled_shift": False, "share_kv_conv": False},
    only_with={name: flags for name, flags in DELTA_NET.only_with.items() if "conv1d" not in name}
    | {f"{name}.weight": flags | {"shift_only_conv": False} for name, flags in _CONVOLUTIONS.items()}
    | {
        f"{name}.scale": flags | {"shift_only_conv": True, "conv_scaled_shift": True}
        for name, flags in _CONVOLUTIONS.items()
    },
    optional=(),
)
