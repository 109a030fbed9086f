"""What the loss says of each channel: gradients of the mixers' projections, one row of the text at a time.

Ma et al., "LLM-Pruner", arXiv:2305.11627; Molchanov et al., arXiv:1906.10771. The sums are described at
:class:`keyreduce.calibration.statistics.TaylorSums`.

Shapes: B rows, T tokens, U token ids, C channels of a projection, D hidden.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F

from keyreduce.calibration.projections import PROJECTIONS, projection_name, projection_weight
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
    sizes = family.layer_sizes(model.config.to_dict())
    # Projections may share a weight.
    names = {(layer, part): projection_name(family, layer, part) for layer in layers for part in PROJECTIONS}
    weights = {name: model.get_parameter(name) for name in names.values()}
    summed = {name: torch.zeros_like(weight, dtype=_wide(weight)) for name, weight in weights.items()}

    def per_channel(layer: int, part: str, amount: torch.Tensor) -> torch.Tensor:
        return projection_weight(family, sizes[layer], part, amount).sum(1)

    def run(tokens_BT: torch.Tensor) -> None:
        if tokens_BT.shape[1] < 2:
            raise KeyreduceError("gradients need rows of at least 2 tokens, the second to be predicted from the first")
        for tokens_T in tokens_BT:
            gradients = torch.autograd.grad(_loss(model, tokens_T), list(weights.values()))
            effect = {}
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                summed[name] += gradient
                effect[name] = weight.detach().double() * gradient
            for (layer, part), name in names.items():
                amount_C = per_channel(layer, part, effect[name])
                for form, amount in (("signed", amount_C), ("squared", amount_C.square())):
                    sums = layers[layer].of(form, part)
                    sums += amount.view_as(sums)

    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in asked:
            parameter.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        yield run
        for (layer, part), name in names.items():
            sums = layers[layer].of("element", part)
            effect_CD = (weights[name].detach().double() * summed[name]).abs()
            sums.copy_(per_channel(layer, part, effect_CD).view_as(sums))
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


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
