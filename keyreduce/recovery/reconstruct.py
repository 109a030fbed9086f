"""One layer of a pruned model, fitted by gradient steps to what the same layer of the dense model gives.

Every layer is fitted on its own, from the bottom up, on the hidden states that the repaired layers below it give: no
gradient crosses a layer's border, and no loss of the whole model is looked at (as Nagel et al., arXiv:2004.10568, and
Li et al., "BRECQ", arXiv:2102.05426, reconstruct quantized layers and blocks).

Shapes: B rows, T tokens, D hidden.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from keyreduce.errors import KeyreduceError
from keyreduce.recovery.streams import Stream

SCOPES = ("mixer-in-block", "mixer", "block")


class Steps(NamedTuple):
    """How a layer is fitted.

    Attributes:
        steps: Adam steps, one batch each.
        lr: the highest learning rate; it rises for a twentieth of the steps and falls along a cosine to nothing.
        scope: ``mixer`` fits the mixer to what the dense mixer gives, ``mixer-in-block`` the mixer to what the dense
            block gives, through the MLP behind it, which stays, ``block`` the mixer, the MLP and their norms to that.
    """

    steps: int = 512
    lr: float = 5e-4
    scope: str = "mixer-in-block"


def reconstruct(
    pruned: Stream,
    layer: int,
    targets: Sequence[torch.Tensor],
    settings: Steps,
    *,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> dict:
    """Fit a layer, in place.

    The error is the squared difference, each token's divided by the mean square of what the dense model has there: as
    the norms behind it see it.

    Args:
        pruned: the pruned model's stream before the layer, whose block is on the device, in float32.
        layer: the layer.
        targets: what its mixer, or its block, is to give, as ``settings.scope`` says; ``[B, T, D]`` for each batch.
        settings: how.
        seed: of the order of batches.
        progress: called with 1 after each step.

    Returns:
        Figures for the record: the error, averaged over the first and the last sixteenth of the steps.

    Raises:
        KeyreduceError: the error is NaN or inf.
    """
    block = pruned.block(layer)
    module = block if settings.scope == "block" else pruned.mixer(layer)
    parameters = [parameter for parameter in module.parameters() if parameter.is_floating_point()]
    asked = [(parameter, parameter.requires_grad) for parameter in block.parameters()]
    block.requires_grad_(False)  # no time is spent on gradients of what stays
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=settings.lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_cosine(step, settings.steps))
    generator = torch.Generator().manual_seed(seed)
    errors: list[float] = []
    order: list[int] = []
    try:
        with torch.enable_grad():
            for _ in range(settings.steps):
                order = order or torch.randperm(len(targets), generator=generator).tolist()
                place = order.pop()
                hidden_BTD = pruned.hidden[place].to(pruned.device)
                target_BTD = targets[place].to(pruned.device)
                if settings.scope == "mixer":
                    _, output_BTD = pruned.see_mixer(layer, hidden_BTD)
                else:
                    output_BTD = pruned.run(layer, hidden_BTD)
                error = relative_error(output_BTD, target_BTD)
                optimizer.zero_grad(set_to_none=True)
                error.backward()
                optimizer.step()
                schedule.step()
                errors.append(error.detach())
                if progress is not None:
                    progress(1)
    finally:
        for parameter, was_asked in asked:
            parameter.grad = None
            parameter.requires_grad_(was_asked)
    few = max(1, settings.steps // 16)
    first, last = (float(torch.stack(some).mean()) for some in (errors[:few], errors[-few:]))
    if not math.isfinite(last):
        raise KeyreduceError(f"layer {layer} does not converge at learning rate {settings.lr:g}; give a lower `lr`")
    return {"error_first": first, "error_last": last}


def relative_error(output_BTD: torch.Tensor, target_BTD: torch.Tensor) -> torch.Tensor:
    """Return the mean over tokens of the squared difference, relative to the target's mean square."""
    square_BT1 = target_BTD.float().square().mean(dim=-1, keepdim=True)
    floor = 1e-3 * square_BT1.mean() + 1e-12  # a token where the dense mixer says nothing is not all that matters
    return ((output_BTD.float() - target_BTD.float()).square() / (square_BT1 + floor)).mean()


def warm_cosine(step: int, steps: int) -> float:
    """Return the factor of the learning rate at a step."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
