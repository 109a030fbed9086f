"""What the loss says of each channel: gradients of the mixers' projections, one row of the text at a time.

Ma et al., "LLM-Pruner", arXiv:2305.11627; Molchanov et al., arXiv:1906.10771. The sums are described at
:class:`keyreduce.calibration.statistics.TaylorSums`.

Shapes: B rows, T tokens, U token ids, C channels of a projection, D hidden.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F

from keyreduce.calibration.projections import PROJECTIONS, projection_name
from keyreduce.calibration.statistics import TaylorSums
from keyreduce.errors import KeyreduceError
from keyreduce.families import Family


@contextlib.contextmanager
def differentiating(
    model: torch.nn.Module, family: Family, layers: Mapping[int, TaylorSums]
) -> Iterator[Callable[[torch.Tensor], None]]:
    """While the block runs, give a function that takes a batch of tokens ``[B, T]`` and adds to ``layers``.

    It runs the model forward and backward, once a row: a sample of the squared form is a row. Memory does not depend
    on how many there are: beside the model it holds one row's activations and gradients, and the summed gradient of
    the four projections of each mixer in float32 (float64 for a float64 model). No other parameter gets a gradient,
    and when the block ends each asks for one or not as before.

    Raises:
        KeyreduceError: a row has a single token, so that there is nothing to predict, or its loss is NaN or inf.
    """
    places = [(layer, part) for layer in layers for part in PROJECTIONS]
    weights = [model.get_parameter(projection_name(family, layer, part)) for layer, part in places]
    summed = [torch.zeros_like(weight, dtype=_wide(weight)) for weight in weights]

    def run(tokens_BT: torch.Tensor) -> None:
        if tokens_BT.shape[1] < 2:
            raise KeyreduceError("gradients need rows of at least 2 tokens, the second to be predicted from the first")
        for tokens_T in tokens_BT:
            gradients = torch.autograd.grad(_loss(model, tokens_T), weights)
            for (layer, part), weight, total, gradient in zip(places, weights, summed, gradients, strict=True):
                total += gradient
                per_channel = _by_channel(weight.detach().double() * gradient, part).sum(1)
                for form, amount in (("signed", per_channel), ("squared", per_channel.square())):
                    sums = layers[layer].of(form, part)
                    sums += amount.view_as(sums)

    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in asked:
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        yield run
        for (layer, part), weight, total in zip(places, weights, summed, strict=True):
            sums = layers[layer].of("element", part)
            sums.copy_(_by_channel((weight.detach().double() * total).abs(), part).sum(1).view_as(sums))
    finally:
        for parameter, before in asked:
            parameter.requires_grad_(before)


def _loss(model: torch.nn.Module, tokens_T: torch.Tensor) -> torch.Tensor:
    """The mean cross entropy of a row's next-token predictions, in nats."""
    with torch.enable_grad():
        logits_TU = model(input_ids=tokens_T[None], use_cache=False).logits[0]
        loss = F.cross_entropy(logits_TU[:-1].to(_wide(logits_TU)), tokens_T[1:])
    if not torch.isfinite(loss):
        raise KeyreduceError(
            f"the loss of a row of the text is {loss.item()}: the model is damaged, or its activations overflow "
            "this dtype (try --dtype float32)"
        )
    return loss


def _by_channel(weight: torch.Tensor, part: str) -> torch.Tensor:
    """A projection's weight with one row a channel, ``[C, D]``."""
    return weight.T if part == "output" else weight


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
