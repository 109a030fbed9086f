"""Heads by the norm and the rank of their states: those of a high rank and a small norm go first.

A head's score is ``norm / rank``, the mean Frobenius norm of its states divided by their mean stable rank, both at the
end of each calibration row and summed over the value heads of a key head. Sun et al., "State Rank Dynamics in Linear
Attention LLMs", arXiv:2602.02195, found that heads whose states have a low rank are indispensable and those of a high
rank redundant, and prune by rank and norm together. Their rank is the effective one; this one is the stable rank of
arXiv:2602.04852, as ``keyreduce rank`` measures it.
"""

from keyreduce.pruning.methods.method import LayerView, Method, ranked


def _head(layer: LayerView):
    statistics = layer.statistics
    # Both are sums over as many rows. The rank of a state is at least 1, but for states that are all zeros.
    score_W = statistics.state_norm_W / statistics.state_rank_W.clamp(min=1e-12)
    return layer.in_groups(score_W)[None]


RANK_NORM = Method(
    name="rank-norm",
    summary="for heads: the norm of the states by their rank",
    citation="Sun et al., arXiv:2602.02195",
    select={"head": ranked(_head)},
    needs_statistics=True,
)
