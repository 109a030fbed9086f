"""How the loss depends on each channel: gradients of the mixers' projections, row by row of the text.

Ma et al., "LLM-Pruner", arXiv:2305.11627; Molchanov et al., arXiv:1906.10771. The statistics are described at
:class:`keyreduce.calibration.statistics.TaylorStatistics`.

No weight requires a gradient. A projection ``y = W x`` has ``dL/dW = sum_t dL/dy_t x_t^T``, so that a row of W has
``sum_d W_cd dL/dW_cd = sum_t y_tc dL/dy_tc``, and a column the same of x: the projection's inputs and outputs suffice,
also for weights that are offloaded. Each block is recomputed in the backward pass, so that only one at a time keeps the
activations that its gradient needs.

Shapes: B rows, T tokens, U token ids, C channels of a projection, D hidden, N outputs and M inputs of a weight.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from keyreduce.calibration.projections import PROJECTIONS, projection_name, projection_weight
from keyreduce.calibration.statistics import TaylorStatistics
from keyreduce.errors import KeyreduceError
from keyreduce.families import Family
from keyreduce.models.offloading import read_parameter


@contextlib.contextmanager
def differentiating(
    model: PreTrainedModel,
    family: Family,
    layers: Mapping[int, TaylorStatistics],
    folder: Path | None = None,
    add: Callable[[torch.Tensor], object] = lambda tensor: None,
) -> Iterator[tuple[Callable[[torch.Tensor], None], Mapping[str, torch.Tensor]]]:
    """While the block runs, give a function that takes a batch of tokens ``[B, T]`` and adds to ``layers``.

    With it come the sums that it adds up beside them: name of a weight -> its gradient.

    It runs the model forward without gradients, then block by block forward and backward; a sample of the squared form
    is a row. Memory does not depend on the number of batches: beside the model it holds the inputs of all blocks, one
    block's activations, one row's logits, and the summed gradient of the four projections of each mixer in float32
    (float64 for a float64 model), on the CPU if the weight is not on the device.

    Args:
        layers: layer number -> statistics to add to; complete when the block has ended.
        folder: its checkpoint, for weights that are offloaded to the disk.
        add: sums a tensor over all processes, in place; called at the end.

    Raises:
        KeyreduceError: a row has a single token, so that there is nothing to predict, or its loss is NaN or inf.
    """
    gradients, head = _Gradients(model, family, layers), model.get_output_embeddings()
    assert head is not None  # the model is a causal language model

    def run(tokens_BT: torch.Tensor) -> None:
        if tokens_BT.shape[1] < 2:
            raise KeyreduceError("gradients need rows of at least 2 tokens, the second to be predicted from the first")
        with torch.enable_grad():
            hidden_BTD = model.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state
            inner_BTD = hidden_BTD.detach().requires_grad_()
            for row, tokens_T in enumerate(tokens_BT):
                _loss(head, inner_BTD[row], tokens_T).backward()
            hidden_BTD.backward(inner_BTD.grad)

    with contextlib.ExitStack() as undo:
        for parameter in model.parameters():
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        undo.callback(model.get_input_embeddings().register_forward_hook(_require_gradient).remove)
        for block in model.get_submodule(family.mixer.split(".{layer}")[0]).children():
            undo.enter_context(_recomputing(block))
        for name in gradients.parts:
            projection = model.get_submodule(name.rpartition(".")[0])
            undo.callback(projection.register_forward_hook(partial(gradients.observe, name)).remove)
        yield run, gradients.summed
    gradients.finish(lambda name: read_parameter(model, name, folder).detach(), add)


class _Gradients:
    """The gradients of the mixers' projections, as they are summed.

    Attributes:
        parts: name of a weight -> the layers and projections that it holds; several projections may share a weight.
        summed: name of a weight -> its gradient, summed.
    """

    def __init__(self, model: PreTrainedModel, family: Family, layers: Mapping[int, TaylorStatistics]):
        self._family, self._layers, self._sizes = family, layers, family.layer_sizes(model.config.to_dict())
        self.parts: dict[str, list[tuple[int, str]]] = {}
        for layer in layers:
            for part in PROJECTIONS:
                self.parts.setdefault(projection_name(family, layer, part), []).append((layer, part))
        self.summed = {name: _zeros_like(model.get_parameter(name)) for name in self.parts}

    def observe(self, name: str, module: torch.nn.Module, args: tuple, output_BTN: torch.Tensor) -> None:
        """The forward hook of the projection with this weight: add its gradient in the backward pass."""
        if not torch.is_grad_enabled():
            return
        input_BTM, output, is_output = args[0].detach(), output_BTN.detach(), self._is_output(name)

        def on_output(gradient_BTN: torch.Tensor) -> None:
            summed = self.summed[name]
            product_NM = gradient_BTN.flatten(0, 1).to(summed.dtype).T @ input_BTM.flatten(0, 1).to(summed.dtype)
            summed += product_NM.to(summed.device)
            if not is_output:
                self._add_channels(name, output, gradient_BTN)

        output_BTN.register_hook(on_output)
        if is_output:
            args[0].register_hook(lambda gradient_BTM: self._add_channels(name, input_BTM, gradient_BTM))

    def finish(self, read: Callable[[str], torch.Tensor], add: Callable[[torch.Tensor], object]) -> None:
        """Complete the statistics, over all processes, with the weights that ``read`` returns."""
        for name, places in self.parts.items():
            summed = self.summed[name]
            add(summed)
            effect_NM = (read(name).to(summed.device).double() * summed).abs()
            for layer, part in places:
                statistics = self._layers[layer]
                element = statistics.of("element", part)
                element.copy_(self._rows(layer, part, effect_NM).sum(1).view_as(element))
                for form in ("signed", "squared"):
                    add(statistics.of(form, part))

    def _add_channels(self, name: str, channels_BTC: torch.Tensor, gradient_BTC: torch.Tensor) -> None:
        amount_BC = (channels_BTC.double() * gradient_BTC).sum(1)
        for layer, part in self.parts[name]:
            # In the layout of a weight: the channels of the output projection are columns.
            amount_CB = self._rows(layer, part, amount_BC if self._is_output(name) else amount_BC.T)
            for form, amount_C in (("signed", amount_CB.sum(1)), ("squared", amount_CB.square().sum(1))):
                total = self._layers[layer].of(form, part)
                total += amount_C.view_as(total)

    def _is_output(self, name: str) -> bool:
        return self.parts[name][0][1] == "output"

    def _rows(self, layer: int, part: str, weight: torch.Tensor) -> torch.Tensor:
        return projection_weight(self._family, self._sizes[layer], part, weight)


def _require_gradient(embedding, args, output_BTD) -> None:
    """A forward hook: the embeddings require a gradient, since no weight does."""
    if torch.is_grad_enabled():
        output_BTD.requires_grad_()


@contextlib.contextmanager
def _recomputing(block: torch.nn.Module) -> Iterator[None]:
    """While the context holds, the block is recomputed in the backward pass instead of keeping its activations."""
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
