"""OLMo-Hybrid, as transformers ships it: Gated DeltaNet (arXiv:2412.06464) with separate projections.

Checkpoints have a convolution for each of q, k and v, which transformers joins when it loads them.
"""

from keyreduce.families.delta_net import BIASES, JOINED_CONVOLUTIONS
from keyreduce.families.fields import Field, LayerTypes, Ratio
from keyreduce.families.gated_deltanet import GATED_TENSORS
from keyreduce.families.table import Family

_HIDDEN, _ATTENTION_HEADS = Field("hidden_size", 3840), Field("num_attention_heads", 30)
_KEY_HEADS = Field("linear_num_key_heads", _ATTENTION_HEADS)
_KEY = Field("linear_key_head_dim", Ratio("", 0.75, of=_HIDDEN, over=_KEY_HEADS))

OLMO_HYBRID = Family(
    model_type="olmo_hybrid",
    mixer="model.layers.{layer}.linear_attn",
    operators=("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"),
    key_heads=_KEY_HEADS,
    value_heads=Field("linear_num_value_heads", _ATTENTION_HEADS),
    head_k_dim=_KEY,
    head_v_dim=Field("linear_value_head_dim", Ratio("", 2, of=_KEY)),
    hidden=_HIDDEN,
    num_layers=Field("num_hidden_layers", 32),
    tensors={name: parts for name, parts in GATED_TENSORS.items() if name not in BIASES},
    taps=Field("linear_conv_kernel_dim", 4),
    rule="gated delta rule",
    paper="arXiv:2412.06464",
    layers=LayerTypes(needs_softmax=True),
    shipped_by="transformers",
    doubled=("linear_allow_neg_eigval", True),
    inside=JOINED_CONVOLUTIONS,
)
