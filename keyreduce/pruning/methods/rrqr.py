"""Strong rank-revealing QR: the channels whose span approximates the others best.

For each key head, let ``A`` be the queries stacked on the keys as the operator receives them: its rows are tokens, its
columns channels. The kept columns are those of a strong RRQR factorisation of A. It is computed from ``A^T A`` alone,
which is the sum of the Gram matrices of q and k. Nazari and Rusch, arXiv:2602.04852; Gu and Eisenstat 1996, SIAM J.
Sci. Comput. 17(4). For value channels, A is the output projection's input: v itself does not include the effect of the
decay and the output gate (on a Gated DeltaNet its choice was worse than random). Heads cannot be chosen in this way,
since they have no channels in common.
"""

import math

from keyreduce.errors import KeyreduceError
from keyreduce.pruning.methods.method import LayerView, Method, Selection


def _select(gram_of):
    def select(layer: LayerView, keep: int, generator, *, f: float, permute: bool) -> Selection:
        import numpy as np
        import torch

        from keyreduce.pruning.strong_rrqr import strong_rrqr

        gram_GCC = gram_of(layer.statistics).numpy()
        channels = gram_GCC.shape[-1]
        kept, results = [], []
        for gram_CC in gram_GCC:
            # Ties go to the lower index, so that permuted channels can give another choice.
            order = torch.randperm(channels, generator=generator).numpy() if permute else np.arange(channels)
            result = strong_rrqr(gram_CC[np.ix_(order, order)], keep, f=f)
            kept.append(np.sort(order[result.kept_R]))
            results.append(result)
        figures = ("rho", "swaps", "smallest_kept", "largest_dropped")
        report = {figure: [getattr(result, figure) for result in results] for figure in figures}
        return Selection(torch.from_numpy(np.stack(kept)), report=report)

    return select


def _check(options) -> None:
    if not 1 <= options["f"] < math.inf:
        raise KeyreduceError(f"`f` is {options['f']:g}; it is at least 1, and finite")


RRQR = Method(
    name="rrqr",
    summary="strong rank-revealing QR of q and k together",
    citation="Nazari and Rusch, arXiv:2602.04852; Gu and Eisenstat 1996",
    select={
        "key": _select(lambda statistics: statistics.query_gram_HKK + statistics.key_gram_HKK),
        "value": _select(lambda statistics: statistics.output_gram_WVV),
    },
    needs_statistics=True,
    options={"f": 1.5, "permute": False},
    check=_check,
)
