"""Norms of activations.

``score_hc = ||q_hc|| + ||k_hc||`` with q and k as the operator receives them, L2 norms over the calibration tokens,
which are the roots of the Gram matrices' diagonals. A value channel: the norm of what the output projection receives
of it. A head: the root of the energy that its value heads add to the mixer's output. There a single activation is
looked at, so that the choice is that of ``energy``. Hu et al., "Network Trimming", arXiv:1607.03250, is the first to
prune by the size of activations.
"""

from keyreduce.pruning.methods.energy import head_energy, key_energies, value_energy
from keyreduce.pruning.methods.method import Method, ranked

MAGNITUDE = Method(
    name="magnitude",
    summary="norms of the activations",
    citation="Hu et al., arXiv:1607.03250",
    select={
        "key": ranked(lambda layer: sum(energy_HK.sqrt() for energy_HK in key_energies(layer))),
        "value": ranked(lambda layer: value_energy(layer).sqrt()),
        "head": ranked(lambda layer: head_energy(layer).sqrt()),
    },
    needs_statistics=True,
)
