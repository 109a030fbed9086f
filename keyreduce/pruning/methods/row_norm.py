"""Row norms of the projections, without data.

``l1``: ``score_hc = sum_d |Wq_hcd| + sum_d |Wk_hcd|``; ``l2``: ``score_hc = ||Wq_hc|| + ||Wk_hc||``.
Li et al., "Pruning Filters for Efficient ConvNets", arXiv:1608.08710, there with the L1 norm of filters.
"""

from keyreduce.pruning.methods.method import LayerView, Method, highest


def _select_by(order: int):
    def select(layer: LayerView, keep: int, generator):
        return highest(layer.query_weight_HKD.norm(order, -1) + layer.key_weight_HKD.norm(order, -1), keep)

    return select


def _method(order: int) -> Method:
    return Method(
        name=f"l{order}",
        summary=f"L{order} norm of the projection rows, no data",
        citation="Li et al., arXiv:1608.08710",
        needs_statistics=False,
        select=_select_by(order),
    )


L1, L2 = _method(1), _method(2)
