"""Activation norm: how large q and k are, as the operator receives them.

``score_hc = ||q_hc|| + ||k_hc||``, L2 norms over the calibration tokens, which are the roots of the Gram matrices'
diagonals. Hu et al., "Network Trimming", arXiv:1607.03250, is the first to prune by the size of activations.
"""

from keyreduce.pruning.methods.method import LayerView, Method, highest


def _select(layer: LayerView, keep: int, generator):
    grams = (layer.statistics.query_gram_HKK, layer.statistics.key_gram_HKK)
    return highest(sum(gram_HKK.diagonal(dim1=-2, dim2=-1).sqrt() for gram_HKK in grams), keep)


MAGNITUDE = Method(
    name="magnitude",
    summary="norm of the q and k activations",
    citation="Hu et al., arXiv:1607.03250",
    needs_statistics=True,
    select=_select,
)
