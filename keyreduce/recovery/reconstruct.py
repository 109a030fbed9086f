"""One layer of a pruned model, fitted by gradient steps to what the same layer of the dense model gives.

Each layer is fitted on its own, from the bottom up, on the hidden states that the recovered layers below it give. No
gradient passes from one layer to another, and the loss of the whole model is not used (as Nagel et al.,
arXiv:2004.10568, and Li et al., "BRECQ", arXiv:2102.05426, reconstruct quantized layers and blocks).

Shapes: B rows, T tokens, D hidden.
"""

import math
from collections.abc import Sequence

import torch

from keyreduce.errors import KeyreduceError
from keyreduce.recovery.modes import Steps
from keyreduce.recovery.pace import Pace
from keyreduce.recovery.streams import Stream


def reconstruct(
    pruned: Stream, layer: int, targets: Sequence[torch.Tensor], settings: Steps, *, seed: int, pace: Pace | None = None
) -> dict[str, float]:
    """Fit a layer, in place; return the steps, and the error averaged over the first and the last sixteenth of them.

    The error of a token is the squared difference, divided by the mean square of what the dense model gives for it: the
    norm that follows divides by the same.

    Args:
        pruned: the pruned model's stream before the layer, whose block is on the device, in float32.
        targets: what the mixer or the block (see ``settings.scope``) is to give, ``[B, T, D]`` for each batch.
        seed: the seed of the order of batches.
        pace: how the steps run; by default as is best on the device.

    Raises:
        KeyreduceError: the error is NaN or inf.
    """
    device, pace = pruned.device, pace or Pace.of(pruned.device)
    block = pruned.block(layer)
    module = block if settings.scope == "block" else pruned.mixer(layer)
    parameters = [parameter for parameter in module.parameters() if parameter.is_floating_point()]
    wanted_gradients = [(parameter, parameter.requires_grad) for parameter in block.parameters()]
    block.requires_grad_(False)  # the gradients of weights that stay as they are would cost time
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = _adam(parameters, settings.lr, device)

    def step(hidden_BTD: torch.Tensor, tokens_BT: torch.Tensor, target_BTD: torch.Tensor) -> torch.Tensor:
        with pace.autocast(device):
            if settings.scope == "mixer":
                output_BTD = pruned.call_mixer(layer, hidden_BTD, tokens_BT)[1]
            else:
                output_BTD = pruned.call(layer, hidden_BTD, tokens_BT)
        error = relative_error(output_BTD, target_BTD)
        optimizer.zero_grad(set_to_none=True)
        error.backward()
        optimizer.step()
        return error.detach()

    generator = torch.Generator().manual_seed(seed)
    steps = settings.number(len(targets))
    errors_S, order = torch.zeros(steps, device=device), []
    try:
        with torch.enable_grad(), pace.running(pruned.family, pruned.model.config.to_dict(), device):
            take = pace.paced(step, device)
            for number in range(steps):
                order = order or torch.randperm(len(targets), generator=generator).tolist()
                place = order.pop()
                _set_rate(optimizer, settings.lr * warm_cosine(number, steps))
                errors_S[number] = take(*pruned.inputs(place), targets[place].to(device))
    finally:
        for parameter, wanted in wanted_gradients:
            parameter.grad = None
            parameter.requires_grad_(wanted)
    few = max(1, steps // 16)
    first, last = (float(some.mean()) for some in (errors_S[:few], errors_S[-few:]))
    if not math.isfinite(last):
        raise KeyreduceError(f"layer {layer} does not converge at learning rate {settings.lr:g}; give a lower `lr`")
    return {"steps": steps, "error_first": first, "error_last": last}


def _adam(parameters: list[torch.nn.Parameter], lr: float, device: torch.device) -> torch.optim.Adam:
    """Return the optimizer; on a GPU one kernel takes a step of all parameters, and reads the rate from memory."""
    if device.type != "cuda":
        return torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.99))
    rate = torch.tensor(lr, device=device)
    return torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.99), fused=True, capturable=True)


def _set_rate(optimizer: torch.optim.Adam, rate: float) -> None:
    (group,) = optimizer.param_groups
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def relative_error(output_BTD: torch.Tensor, target_BTD: torch.Tensor) -> torch.Tensor:
    """Return the mean over tokens of the squared difference, each divided by its target's mean square; no shape."""
    square_BT1 = target_BTD.float().square().mean(dim=-1, keepdim=True)
    floor = 1e-3 * square_BT1.mean() + 1e-12  # tokens for which the target is next to 0 would outweigh all others
    return ((output_BTD.float() - target_BTD.float()).square() / (square_BT1 + floor)).mean()


def warm_cosine(step: int, steps: int) -> float:
    """Return what the learning rate is multiplied by at a step, counted from 0: a linear rise, then a cosine to 0."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
