"""Norms of activations.

``score_hc = ||q_hc|| + ||k_hc||`` with q and k as the operator receives them, L2 norms over the calibration tokens,
which are the roots of the Gram matrices' diagonals. A value channel's score is the norm of its input to the output
projection, a head's the root of the energy that its value heads add to the mixer's output. These two are roots of the
scores of ``energy``, so that the choice is the same. Hu et al., "Network Trimming", arXiv:1607.03250, were the first to
prune by the size of activations.
"""

from keyreduce.pruning.methods.energy import head_energy, key_energy, query_energy, value_energy
from keyreduce.pruning.methods.method import Method, ranked

MAGNITUDE = Method(
    name="magnitude",
    summary="norms of the activations",
    citation="Hu et al., arXiv:1607.03250",
    select={
        "key": ranked(lambda layer: query_energy(layer).sqrt() + key_energy(layer).sqrt()),
        "value": ranked(lambda layer: value_energy(layer).sqrt()),
        "head": ranked(lambda layer: head_energy(layer).sqrt()),
    },
    needs_statistics=True,
)
