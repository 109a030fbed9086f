"""DeltaNet, as fla ships it (arXiv:2406.06484)."""

from keyreduce.families.fields import Field, Ratio
from keyreduce.families.fla_tensors import BIASES, CONVOLUTIONS, FLA_TENSORS
from keyreduce.families.table import Family

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
    switches={"use_short_conv": True, "use_gate": False, "use_beta": True},
    only_with=CONVOLUTIONS | {"g_proj.weight": {"use_gate": True}, "b_proj.weight": {"use_beta": True}},
    optional=BIASES,
)
