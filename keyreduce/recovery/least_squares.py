"""The output projection of a pruned mixer, refitted in closed form to what the dense mixer gives.

The correction of the projection is a ridge regression: what is missing of the dense mixer's output, on what the
projection receives. Where nothing is missing, the projection stays as it is, bit by bit. The dense mixer sees the dense
model's hidden states, and the pruned mixer sees those that the recovered layers below it give, so that the correction
makes up for their errors too (as in Frantar and Alistarh, "Optimal Brain Compression", arXiv:2208.11580, section 6,
where compressed layers are recalibrated one after another).

Memory is ``2 (C^2 + D C)`` float64 numbers, whatever the number of tokens.

Shapes: B rows, T tokens, D hidden, C channels that the output projection receives.
"""

from collections.abc import Sequence

import torch

from keyreduce.recovery.ridge import NormalEquations, fit
from keyreduce.recovery.streams import Stream

HELDOUT_EVERY = 8


@torch.no_grad()
def refit_output(pruned: Stream, layer: int, targets: Sequence[torch.Tensor]) -> dict[str, float]:
    """Correct the output projection of a layer, in place.

    The strength of the ridge is chosen by the error on every eighth batch, which the fits that are compared leave out.

    Args:
        pruned: the pruned model's stream before the layer, whose block is on the device.
        layer: the number of the layer.
        targets: what its mixer is to give, ``[B, T, D]`` for each batch.

    Returns:
        Figures for the record: the strength of the ridge as ``ridge``, and the share of the targets' squares that is
        missing as ``missing_before`` and ``missing_after``.
    """
    weight_DC = pruned.projection(layer).weight
    sums = [NormalEquations(weight_DC.shape[1], weight_DC.shape[0], pruned.device) for _ in range(2)]
    energy = torch.zeros((), dtype=torch.float64, device=pruned.device)
    for place, (hidden_BTD, target_BTD) in enumerate(zip(pruned.hidden, targets, strict=True)):
        target_BTD = target_BTD.to(pruned.device)
        inputs_BTC, output_BTD = pruned.see_mixer(layer, hidden_BTD.to(pruned.device))
        is_heldout = place % HELDOUT_EVERY == HELDOUT_EVERY - 1
        residual_BTD = target_BTD.double() - output_BTD.double()
        sums[is_heldout].add(inputs_BTC.flatten(0, 1), residual_BTD.flatten(0, 1))
        energy += target_BTD.double().square().sum()
    fitted, heldout = sums
    correction_DC, strength = fit(fitted, heldout if len(targets) >= HELDOUT_EVERY else None)
    weight_DC += correction_DC.to(weight_DC.dtype)
    total, energy = fitted + heldout, max(float(energy), torch.finfo(torch.float64).tiny)
    return {
        "ridge": strength,
        "missing_before": float(total.energy) / energy,
        "missing_after": max(total.error(correction_DC), 0.0) / energy,
    }
