"""What the loss says of each channel: gradients of the mixers' projections, row by row of the text.

Ma et al., "LLM-Pruner", arXiv:2305.11627; Molchanov et al., arXiv:1906.10771. The sums are described at
:class:`keyreduce.calibration.statistics.TaylorSums`.

No weight asks for a gradient. A projection ``y = W x`` has ``dL/dW = sum_t dL/dy_t x_t^T``, so that a row of W comes to
``sum_d W_cd dL/dW_cd = sum_t y_tc dL/dy_tc``, and a column to the same of x: what goes in and out says all, wherever
the weights wait. Each block is run once more on the way back, so that one alone keeps what its gradient needs.

Shapes: B rows, T tokens, U token ids, C channels of a projection, D hidden, N outputs and M inputs of a weight.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from keyreduce.calibration.projections import PROJECTIONS, projection_name, projection_weight
from keyreduce.calibration.statistics import TaylorSums
from keyreduce.errors import KeyreduceError
from keyreduce.families import Family
from keyreduce.models.offloading import read_parameter


@contextlib.contextmanager
def differentiating(
    model: torch.nn.Module,
    family: Family,
    layers: Mapping[int, TaylorSums],
    folder: Path | None = None,
    add: Callable[[torch.Tensor], object] = lambda sums: None,
) -> Iterator[Callable[[torch.Tensor], None]]:
    """While the block runs, give a function that takes a batch of tokens ``[B, T]`` and adds to ``layers``.

    It runs the model forward without gradients, then block by block forward and backward; a sample of the squared form
    is a row. Memory does not depend on how many batches there are: beside the model it holds what goes into each block,
    one block's activations, one row's logits, and the summed gradient of the four projections of each mixer in float32
    (float64 for a float64 model), on the CPU where the weight is not on the device. When the block ends each parameter
    asks for a gradient or not as before.

    Args:
        model, family: the model.
        layers: layer number -> sums to add to; complete when the block has ended.
        folder: its checkpoint, for weights that wait on the disk.
        add: puts into a tensor what it comes to over all processes, at the end.

    Raises:
        KeyreduceError: a row has a single token, so that there is nothing to predict, or its loss is NaN or inf.
    """
    sizes = family.layer_sizes(model.config.to_dict())
    # Projections may share a weight.
    parts: dict[str, list[tuple[int, str]]] = {}
    for layer in layers:
        for part in PROJECTIONS:
            parts.setdefault(projection_name(family, layer, part), []).append((layer, part))
    summed = {name: _zeros_like(model.get_parameter(name)) for name in parts}

    def watch(name: str):
        is_output = parts[name][0][1] == "output"

        def add_channels(channels_BTC: torch.Tensor, gradient_BTC: torch.Tensor) -> None:
            amount_BC = (channels_BTC.double() * gradient_BTC).sum(1)
            for layer, part in parts[name]:
                # As if they were a weight's: of the output projection the channels are columns.
                amount_CB = projection_weight(family, sizes[layer], part, amount_BC if is_output else amount_BC.T)
                for form, amount_C in (("signed", amount_CB.sum(1)), ("squared", amount_CB.square().sum(1))):
                    sums = layers[layer].of(form, part)
                    sums += amount_C.view_as(sums)

        def hook(module, args, output_BTN):
            if not torch.is_grad_enabled():
                return
            input_BTM, output = args[0].detach(), output_BTN.detach()

            def on_output(gradient_BTN):
                wide = summed[name].dtype
                product_NM = gradient_BTN.flatten(0, 1).to(wide).T @ input_BTM.flatten(0, 1).to(wide)
                summed[name] += product_NM.to(summed[name].device)
                if not is_output:
                    add_channels(output, gradient_BTN)

            output_BTN.register_hook(on_output)
            if is_output:
                args[0].register_hook(lambda gradient_BTM: add_channels(input_BTM, gradient_BTM))

        return hook

    def run(tokens_BT: torch.Tensor) -> None:
        if tokens_BT.shape[1] < 2:
            raise KeyreduceError("gradients need rows of at least 2 tokens, the second to be predicted from the first")
        with torch.enable_grad():
            hidden_BTD = model.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state
            inner_BTD = hidden_BTD.detach().requires_grad_()
            for row, tokens_T in enumerate(tokens_BT):
                _loss(model.get_output_embeddings(), inner_BTD[row], tokens_T).backward()
            hidden_BTD.backward(inner_BTD.grad)

    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with contextlib.ExitStack() as undo:
        for parameter, before in asked:
            undo.callback(parameter.requires_grad_, before)
            parameter.requires_grad_(False)
        undo.callback(model.get_input_embeddings().register_forward_hook(_ask_for_gradient).remove)
        for block in model.get_submodule(family.mixer.split(".{layer}")[0]):
            undo.enter_context(_run_twice(block))
        for name in parts:
            undo.callback(model.get_submodule(name.rpartition(".")[0]).register_forward_hook(watch(name)).remove)
        yield run
    for name, places in parts.items():
        add(summed[name])
        effect_NM = (read_parameter(model, name, folder).detach().to(summed[name].device).double() * summed[name]).abs()
        for layer, part in places:
            taylor = layers[layer]
            sums = taylor.of("element", part)
            sums.copy_(projection_weight(family, sizes[layer], part, effect_NM).sum(1).view_as(sums))
            for form in ("signed", "squared"):
                add(taylor.of(form, part))


def _ask_for_gradient(embedding, args, output_BTD) -> None:
    """A forward hook: without it nothing would ask for one, since no weight does."""
    if torch.is_grad_enabled():
        output_BTD.requires_grad_()


@contextlib.contextmanager
def _run_twice(block: torch.nn.Module) -> Iterator[None]:
    """While the context holds, a block that runs with gradients runs without, and again when they come back to it."""
    has_own, forward = "forward" in vars(block), block.forward

    def run(*args, **kwargs):
        return checkpoint(partial(forward, **kwargs), *args, use_reentrant=True, preserve_rng_state=False)

    block.forward = run
    try:
        yield
    finally:
        if has_own:
            block.forward = forward
        else:
            del block.forward


def _zeros_like(weight: torch.Tensor) -> torch.Tensor:
    return torch.zeros(weight.shape, dtype=_wide(weight), device="cpu" if weight.is_meta else weight.device)


def _loss(head: torch.nn.Module, hidden_TD: torch.Tensor, tokens_T: torch.Tensor) -> torch.Tensor:
    """The mean cross entropy of a row's next-token predictions, in nats."""
    logits_TU = head(hidden_TD[None])[0]
    loss = F.cross_entropy(logits_TU[:-1].to(_wide(logits_TU)), tokens_T[1:].to(logits_TU.device))
    if not torch.isfinite(loss):
        raise KeyreduceError(
            f"the loss of a row of the text is {loss.item()}: the model is damaged, or its activations overflow "
            "this dtype (try `dtype` float32)"
        )
    return loss


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
