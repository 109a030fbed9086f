"""Preconditioned Gated DeltaNet and Kimi Delta Attention, as fla ships them (arXiv:2604.21100).

Beside its state a mixer keeps the sums of its keys' squares, in float32: one number for each key channel, and of the
latter for each key channel of each value head, whose decays differ. It writes a key with its
channels divided by about the square roots of these. A channel that is dropped takes its sum along, so that a cut is as
exact as without; methods that combine key channels would have to combine the sums, and are refused.
"""

from dataclasses import replace

from keyreduce.families.axes import Part
from keyreduce.families.gated_deltanet import GATED_DELTANET
from keyreduce.families.kda import KDA

_PER_CHANNEL = "has the sum of its squares as preconditioner"

PRECOND_GATED_DELTANET = replace(
    GATED_DELTANET,
    model_type="precond_gated_deltanet",
    rule="preconditioned gated delta rule",
    paper="arXiv:2604.21100",
    operators=("chunk_precond_gated_delta_rule", "fused_recurrent_precond_gated_delta_rule"),
    tensors={
        **GATED_DELTANET.tensors,
        "a_atk_proj.weight": (Part.KEY_HEAD, Part.HIDDEN),
        "b_atk_proj.weight": (Part.KEY_HEAD, Part.HIDDEN),
        "log_atk_scale": (Part.KEY_HEAD,),
        "A_log_atk": (Part.KEY_HEAD,),
        "dt_bias_atk": (Part.KEY_HEAD,),
    },
    per_channel=_PER_CHANNEL,
    preconditioner=Part.KEY,
)

PRECOND_KDA = replace(
    KDA,
    model_type="precond_kda",
    rule="preconditioned Kimi Delta Attention",
    paper="arXiv:2604.21100",
    operators=("chunk_precond_kda", "fused_recurrent_precond_kda"),
    tensors={
        **KDA.tensors,
        "b_proj.weight": (Part.KEY_HEAD, Part.HIDDEN),
        "a_proj.weight": (Part.VALUE_HEAD, Part.HIDDEN),
        "b_atk_proj.weight": (Part.VALUE_HEAD, Part.HIDDEN),
        "log_atk_scale": (Part.VALUE_HEAD,),
        "A_log_atk": (Part.VALUE_HEAD,),
        "dt_bias_atk": (Part.VALUE_HEAD,),
    },
    per_channel=_PER_CHANNEL,
    preconditioner=Part.DECAY,
)
