"""Energies of activations: sums of squares over the calibration tokens.

``score_hc = sum_t q_thc^2 + k_thc^2`` with q and k as the operator receives them, before they are normalised: the kept
channels hold the most of the squared Frobenius norm of the stacked queries and keys. A value channel's score is the
same sum over the output projection's input, which unlike v includes the effect of the decay and the output gate. A
head's score is the energy of what its value heads add to the mixer's output.
"""

from keyreduce.pruning.methods.method import LayerView, Method, ranked


def query_energy(layer: LayerView):
    """Return the energy of q, ``[H, K]``."""
    return layer.statistics.query_gram_HKK.diagonal(dim1=-2, dim2=-1)


def key_energy(layer: LayerView):
    """Return the energy of k, ``[H, K]``."""
    return layer.statistics.key_gram_HKK.diagonal(dim1=-2, dim2=-1)


def value_energy(layer: LayerView):
    """Return the energy of the output projection's input, ``[W, V]``."""
    return layer.statistics.output_gram_WVV.diagonal(dim1=-2, dim2=-1)


def head_energy(layer: LayerView):
    """Return the energy that the value heads of each key head add to the mixer's output, ``[1, H]``."""
    return layer.in_groups(layer.statistics.output_energy_W)[None]


ENERGY = Method(
    name="energy",
    summary="sums of squared activations",
    citation="baseline",
    select={
        "key": ranked(lambda layer: query_energy(layer) + key_energy(layer)),
        "value": ranked(value_energy),
        "head": ranked(head_energy),
    },
    needs_statistics=True,
)
