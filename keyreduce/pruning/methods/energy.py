"""Energies of activations (sums of squares over the calibration tokens), and norms, which are their roots.

``score_hc = sum_t q_thc^2 + k_thc^2`` with q and k as the operator receives them, before they are normalised: the kept
channels hold the most of the squared Frobenius norm of the stacked queries and keys. A value channel's score is the
same sum over the output projection's input, which unlike v includes the effect of the decay and the output gate. A
head's score is the energy of what its value heads add to the mixer's output. The scores of ``magnitude`` are
``||q_hc|| + ||k_hc||`` and the roots of the other two, whose choice is that of ``energy``. Hu et al., "Network
Trimming", arXiv:1607.03250, were the first to prune by the size of activations.
"""

from keyreduce.pruning.methods.method import LayerView, Method, ranked


def _query(layer: LayerView):
    return layer.statistics.query_gram_HKK.diagonal(dim1=-2, dim2=-1)


def _key(layer: LayerView):
    return layer.statistics.key_gram_HKK.diagonal(dim1=-2, dim2=-1)


def _value(layer: LayerView):
    return layer.statistics.output_gram_WVV.diagonal(dim1=-2, dim2=-1)


def _head(layer: LayerView):
    return layer.in_groups(layer.statistics.output_energy_W)[None]


SCORES = {"key": lambda layer: _query(layer) + _key(layer), "value": _value, "head": _head}
"""Target -> the energy of each channel of each group, ``[G, C]``."""

ENERGY = Method(
    name="energy",
    summary="sums of squared activations",
    citation="baseline",
    select={target: ranked(score) for target, score in SCORES.items()},
    needs_statistics=True,
)
MAGNITUDE = Method(
    name="magnitude",
    summary="norms of the activations",
    citation="Hu et al., arXiv:1607.03250",
    select={
        "key": ranked(lambda layer: _query(layer).sqrt() + _key(layer).sqrt()),
        "value": ranked(lambda layer: _value(layer).sqrt()),
        "head": ranked(lambda layer: _head(layer).sqrt()),
    },
    needs_statistics=True,
)
