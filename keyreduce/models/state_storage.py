"""A model whose recurrent state is stored, and so rounded, as a serving engine would store it."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from fla_torch.kda import chunk_kda
from fla_torch.operators import chunk_delta_rule, chunk_gated_delta_rule
from fla_torch.stored_state import stored_delta_rule
from transformers import PreTrainedModel

from keyreduce.errors import KeyreduceError
from keyreduce.families import Family
from keyreduce.models.operators import replaced_by_layer
from keyreduce.models.state_rounding import storing
from keyreduce.serving.state_formats import StateDtypes, formats_of

# What a mixer's module calls an operator -> ours of the same arguments, whatever the length of a row.
_OURS = {
    "chunk_delta_rule": chunk_delta_rule,
    "fused_recurrent_delta_rule": chunk_delta_rule,
    "chunk_gated_delta_rule": chunk_gated_delta_rule,
    "fused_recurrent_gated_delta_rule": chunk_gated_delta_rule,
    "torch_chunk_gated_delta_rule": chunk_gated_delta_rule,
    "torch_recurrent_gated_delta_rule": chunk_gated_delta_rule,
    "chunk_kda": chunk_kda,
    "fused_recurrent_kda": chunk_kda,
    "chunk_kimi_delta_attention": chunk_kda,
    "recurrent_kimi_delta_attention": chunk_kda,
}
# Of what transformers hands on to its operators, which includes arguments of the whole model, those that they read.
_READ = ("g", "beta", "initial_state", "output_final_state", "use_qk_l2norm_in_kernel", "cu_seqlens")

Recurrence = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""Takes and returns what :func:`fla_torch.delta_rule.recurrent_delta_rule` does."""


@contextlib.contextmanager
def stored_states(
    model: PreTrainedModel, family: Family, dtypes: StateDtypes, chunk: int | None = None
) -> Iterator[None]:
    """While the block runs, every mixer of the model keeps its state in these formats.

    The rule runs in float32 (float64 in such a model) by the PyTorch operators, on any device. The state is rounded
    after each token, as it is where an engine decodes; with a ``chunk`` after each so many tokens and after the last of
    a call, as it is where one prefills in chunks. Layers with float32 alone run as ever, by the PyTorch operators.

    Args:
        dtypes: one format for all heads, or layer -> the format of each value head, for all layers with a state.
        chunk: at least 1; None is 1.

    Raises KeyreduceError if a format is unknown or there is not one for each value head; and at the end, if the mixers
    ran without calling their operators by name, so that nothing was rounded.
    """
    sizes = family.layer_sizes(model.config.to_dict())
    stores = {layer: storing(names) for layer, names in formats_of(dtypes, sizes).items()}
    every = 1 if chunk is None else chunk

    def recurrence_of(layer: int) -> Recurrence | None:
        store = stores[layer]
        return None if store is None else partial(stored_delta_rule, store=store, every=every)

    with replaced_recurrences(model, family, recurrence_of):
        yield


@contextlib.contextmanager
def replaced_recurrences(
    model: PreTrainedModel, family: Family, recurrence_of: Callable[[int], Recurrence | None]
) -> Iterator[None]:
    """While the block runs, ``recurrence_of(layer)`` computes the delta rule of each layer, on any device.

    It gets queries and keys normalised, and the decay and beta as the rule uses them; states are ``[B, W, K, V]``. None
    stands for the PyTorch operators as they are.

    Raises KeyreduceError if no operator here computes the family's rule in such a way; and at the end, if mixers ran
    without calling their operators by name.
    """
    layers = family.mixer_layers(model.config.to_dict())
    ours, calls, runs = _OURS.get(family.operators[0]), [], []
    if ours is None:
        raise KeyreduceError(f"`state_dtype`: the {family.rule} runs here with a state in float32 alone")

    def replace(operator: Callable, layer: Callable[[], int]) -> Callable:
        def call(*operands, **arguments):
            calls.append(layer())
            if family.shipped_by == "transformers":
                arguments = {name: value for name, value in arguments.items() if name in _READ}
            # fla's layers pass q, k and v by name, those of transformers by position.
            return ours(*operands, **arguments, recurrence=recurrence_of(layer()))

        return call

    first = model.get_submodule(family.mixer.format(layer=layers[0]))
    with contextlib.ExitStack() as undo:
        undo.callback(first.register_forward_pre_hook(lambda *_: runs.append(True)).remove)
        undo.enter_context(replaced_by_layer(model, family, layers, replace))
        yield
        if runs and not calls:
            raise KeyreduceError(
                f"the installed transformers hides the operators of {family.model_type}, so that its state cannot be "
                "rounded: take transformers 5.15 or later"
            )
