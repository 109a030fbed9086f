"""For each target, the method that lost least where we measured: the tables of the README.

Of those that need no gradients. On key channels RRQR and energy differ little at a quarter and at half, and RRQR keeps
more at three quarters once repaired. Of value channels energy loses as little as any or nearly so. Of heads Wanda does
well on both shipped models, where energy is far off on one and weights alone on the other.
"""

from keyreduce.pruning.methods.energy import ENERGY
from keyreduce.pruning.methods.method import Method
from keyreduce.pruning.methods.rrqr import RRQR
from keyreduce.pruning.methods.wanda import WANDA

BEST = {"key": RRQR, "value": ENERGY, "head": WANDA}


def _select(target: str, method: Method):
    def select(layer, keep, generator):
        return method.select[target](layer, keep, generator, **method.options)

    return select


AUTO = Method(
    name="auto",
    summary=f"what kept most quality in our measurements: {', '.join(f'{of.name} for {t}s' for t, of in BEST.items())}",
    citation="keyreduce's README",
    select={target: _select(target, method) for target, method in BEST.items()},
    needs_statistics=True,
)
