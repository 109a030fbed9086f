"""Wanda: weights times the norm of what they multiply.

``score_hc = sum_d (|Wq_hcd| + |Wk_hcd|) ||x_d||`` with ``||x_d||`` the L2 norm of hidden channel d over the
calibration tokens. The paper scores single weights; a channel is a row of weights, so its scores are summed, of
query and key together, since both lose the channel. Sun et al., arXiv:2306.11695, equation 1.
"""

from keyreduce.pruning.methods.method import LayerView, Method, highest


def _select(layer: LayerView, keep: int, generator):
    input_norm_D = layer.statistics.input_square_D.sqrt()
    weight_HKD = layer.query_weight_HKD.abs() + layer.key_weight_HKD.abs()
    return highest(weight_HKD.double() @ input_norm_D, keep)


WANDA = Method(
    name="wanda",
    summary="weights times the norm of their input",
    citation="Sun et al., arXiv:2306.11695",
    needs_statistics=True,
    select=_select,
)
