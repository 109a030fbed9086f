"""A model run one block at a time, so that the dense and the pruned model can be taken side by side.

Blocks, and the hidden states of all calibration rows between two blocks, wait on the device where it has room for them,
else on the CPU, and then only one block is on the device at a time. A block is called with the arguments that its own
model gave it, recorded on a first pass over one batch of each shape: no architecture needs code of its own here.

Shapes: B rows, T tokens, D hidden, C channels that the output projection receives.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from keyreduce.calibration.projections import projection_name
from keyreduce.errors import KeyreduceError
from keyreduce.families import Family

_TOKENS = object()  # stands for the token ids of a batch among the arguments of a block


class _Enough(Exception):
    """Ends a forward pass once it has reached the layer that it was run for."""


@dataclass
class Stream:
    """A model, and its hidden states between two blocks, which run on ``device``.

    Attributes:
        home: where the model is, and all that waits between two blocks.
        batches: the token ids, ``[B, T]`` for each batch, which some models give to their blocks too.
        hidden: the input of the next block, ``[B, T, D]`` at ``home`` for each batch.
        arguments: (block, shape of the batch) -> the other arguments that the model gives to the block.
    """

    model: PreTrainedModel
    family: Family
    device: torch.device
    home: torch.device
    batches: Sequence[torch.Tensor]
    hidden: list[torch.Tensor]
    arguments: dict[tuple[int, tuple[int, ...]], dict]

    def block(self, layer: int) -> nn.Module:
        """Return the block of a layer: mixer, MLP and their norms."""
        return self.model.get_submodule(self.family.mixer.format(layer=layer).rpartition(".")[0])

    def mixer(self, layer: int) -> nn.Module:
        """Return the mixer of a layer."""
        return self.model.get_submodule(self.family.mixer.format(layer=layer))

    def projection(self, layer: int) -> nn.Linear:
        """Return the output projection of a layer's mixer."""
        projection = self.model.get_submodule(projection_name(self.family, layer, "output").rpartition(".")[0])
        return cast(nn.Linear, projection)

    def run(self, layer: int, place: int) -> torch.Tensor:
        """Return the output ``[B, T, D]`` of a layer's block for the batch at a place of the list, on the device."""
        return self.call(layer, *self.inputs(place))

    def see_mixer(self, layer: int, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the input ``[B, T, C]`` of the mixer's output projection, and the mixer's output ``[B, T, D]``.

        They are those of the batch at a place of the list, on the device.
        """
        return self.call_mixer(layer, *self.inputs(place))

    def inputs(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the hidden states ``[B, T, D]`` and token ids ``[B, T]`` at a place of the list, on the device."""
        return self.hidden[place].to(self.device), self.batches[place].to(self.device)

    def call(self, layer: int, hidden_BTD: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Return the output ``[B, T, D]`` of a layer's block; all tensors are on the device."""
        arguments = {
            name: tokens_BT if value is _TOKENS else value
            for name, value in self.arguments[layer, tuple(tokens_BT.shape)].items()
        }
        return _first(self.block(layer)(hidden_BTD, **arguments))

    def call_mixer(
        self, layer: int, hidden_BTD: torch.Tensor, tokens_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the input ``[B, T, C]`` of the mixer's output projection, and the mixer's output ``[B, T, D]``."""
        seen = {}

        def at_projection(module, args):
            seen["input"] = args[0]

        def at_mixer(module, args, output):
            seen["output"] = _first(output)
            raise _Enough

        projection_hook = self.projection(layer).register_forward_pre_hook(at_projection)
        with projection_hook, self.mixer(layer).register_forward_hook(at_mixer), contextlib.suppress(_Enough):
            self.call(layer, hidden_BTD, tokens_BT)
        return seen["input"].reshape(*tokens_BT.shape, -1), seen["output"]

    @torch.no_grad()
    def advance(self, layer: int, *, keep_mixer: bool = False) -> list[torch.Tensor]:
        """Replace the hidden states by the output of a layer's block, which is on the device.

        Returns:
            With ``keep_mixer``, the outputs of its mixer, ``[B, T, D]`` at ``home`` for each batch; else an empty list.
        """
        kept: list[torch.Tensor] = []

        def at_mixer(module, args, output):
            kept.append(_first(output).to(self.home))

        with self.mixer(layer).register_forward_hook(at_mixer) if keep_mixer else contextlib.nullcontext():
            for place in range(len(self.hidden)):
                self.hidden[place] = self.run(layer, place).to(self.home)
        return kept

    @contextlib.contextmanager
    def on_device(self, layer: int) -> Iterator[None]:
        """Have a layer's block on the device while the ``with`` statement runs."""
        block = self.block(layer).to(self.device)
        try:
            yield
        finally:
            block.to(self.home)


@torch.no_grad()
def open_stream(
    model: PreTrainedModel,
    family: Family,
    batches: Sequence[torch.Tensor],
    device: torch.device,
    home: torch.device = torch.device("cpu"),
) -> Stream:
    """Return a causal language model's stream before its first block, of batches ``[B, T]`` of token ids.

    The model is at ``home``, which is ``device`` or the CPU, and its blocks run on ``device``.

    Raises:
        KeyreduceError: more than hidden states passes from block to block, or blocks take arguments without names.
    """
    _refuse_more_than_hidden_states(model)
    batches = [tokens_BT.to(home) for tokens_BT in batches]
    stream = Stream(model, family, device, home, batches, [], {})
    blocks = [stream.block(layer) for layer in range(family.depth(model.config.to_dict()))]
    shapes: set[tuple[int, ...]] = set()

    def recorded(layer: int, block: nn.Module) -> Callable:
        forward = block.forward

        def call(*args, **kwargs):
            hidden_BTD, *others = args or (kwargs.pop("hidden_states"),)
            if others:
                raise KeyreduceError(f"a block of {type(model).__name__} takes arguments that have no names")
            if layer == 0:
                stream.hidden.append(hidden_BTD.to(home))
                if tuple(batches[len(stream.hidden) - 1].shape) in shapes:
                    raise _Enough
            tokens_BT = batches[len(stream.hidden) - 1]
            stream.arguments[layer, tuple(tokens_BT.shape)] = {
                name: _TOKENS if _are_tokens(value, tokens_BT) else value for name, value in kwargs.items()
            }
            with stream.on_device(layer):
                return forward(hidden_BTD, **kwargs)

        return call

    outside = _outside(model, family.mixer.split(".{layer}")[0])
    try:
        for module in outside:
            module.to(device)
        for layer, block in enumerate(blocks):
            block.forward = recorded(layer, block)
        for tokens_BT in batches:
            with contextlib.suppress(_Enough):
                model.base_model(input_ids=tokens_BT.to(device), use_cache=False)
            shapes.add(tuple(tokens_BT.shape))
    finally:
        for block in blocks:
            vars(block).pop("forward", None)
        for module in outside:
            module.to(home)
    return stream


def _are_tokens(value: object, tokens_BT: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == tokens_BT.dtype and value.cpu().equal(tokens_BT.cpu())


def _refuse_more_than_hidden_states(model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    if getattr(config, "attnres_block_size", None) is not None:
        raise KeyreduceError("blocks of a model with attention residuals cannot be recovered one by one")
    if "shared" in (getattr(config, "indexer_types", None) or ()):
        raise KeyreduceError("blocks that share what an indexer chose cannot be recovered one by one")


def _outside(model: PreTrainedModel, blocks: str) -> list[nn.Module]:
    """Return what a pass needs outside the blocks: embeddings, the last norm, rotary tables.

    Of a larger model it is what lies beside the blocks' own list and beside the modules that hold that.
    """
    found, path = [], blocks.split(".")
    for depth in range(len(path)):
        children = model.get_submodule(".".join(path[:depth])).named_children() if depth else ()
        found += [child for name, child in children if name != path[depth]]
    return found


def _first(output: torch.Tensor | tuple) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
