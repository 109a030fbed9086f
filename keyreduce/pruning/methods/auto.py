"""For each target, the method that lost the least quality in our measurements: keyreduce sweep methods.

Only methods that need no gradients are considered. For key channels, RRQR and energy differ little when a quarter or
half of them is removed, and RRQR is better at three quarters after least squares. For value channels, energy is the
best or nearly so. For heads, Wanda does well on both shipped models; energy is far worse on one of them, and norms of
the weights are on the other.
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
    citation="measured, by keyreduce sweep methods",
    select={target: _select(target, method) for target, method in BEST.items()},
    needs_statistics=True,
    parts=BEST,
)
