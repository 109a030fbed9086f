"""Norms of the weights, without data.

``l1``: ``score_hc = sum_d |Wq_hcd| + sum_d |Wk_hcd|``; ``l2``: ``score_hc = ||Wq_hc|| + ||Wk_hc||``. A value channel's
score is the norm of its row of Wv, a head's the sum of all three over its channels. Li et al., "Pruning Filters for
Efficient ConvNets", arXiv:1608.08710, use the L1 norm of filters.
"""

from keyreduce.pruning.methods.method import LayerView, Method, all_targets


def _method(order: int) -> Method:
    def key(layer: LayerView):
        return layer.query_weight_HKD.norm(order, -1) + layer.key_weight_HKD.norm(order, -1)

    def value(layer: LayerView):
        return layer.value_weight_WVD.norm(order, -1)

    return Method(
        name=f"l{order}",
        summary=f"L{order} norm of the projections' rows, no data",
        citation="Li et al., arXiv:1608.08710",
        select=all_targets(key, value),
    )


L1, L2 = _method(1), _method(2)
