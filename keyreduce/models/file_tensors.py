"""A model's tensors under the names, and in the pieces, that its checkpoint has them in."""

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from keyreduce.checkpoint.shards import torch_dtypes
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.checkpoint.tied import tied_output
from keyreduce.errors import KeyreduceError
from keyreduce.families.mixer_tensors import below_mixers, expected_tensors
from keyreduce.models.classes import family_in
from keyreduce.models.meta import check_source


@torch.no_grad()
def file_tensors(model: PreTrainedModel, source: Checkpoint) -> dict[str, torch.Tensor]:
    """Return name in the checkpoint -> tensor of a model that was loaded from it, and perhaps trained since.

    Raises KeyreduceError if the checkpoint has something of the model otherwise than transformers would save it.
    """
    parameters = dict(model.named_parameters())
    mixers = below_mixers(model.config.to_dict(), parameters)
    saved = revert_weight_conversion(model, {name: tensor for name, tensor in parameters.items() if name not in mixers})
    for second, first in tied_output(source.config, source.tensors).items():
        if second in saved and second not in source.tensors:
            saved[first] = saved.pop(second)
    for name, tensor in saved.items():
        if name not in source.tensors or tuple(source.tensors[name].shape) != tuple(tensor.shape):
            raise KeyreduceError(
                f"{source.path} has no {name!r} of {list(tensor.shape)}, which is how transformers would save it, so "
                "that it cannot be written back"
            )
    # Of weights that are tied a model has one, and a checkpoint perhaps one under each name.
    named = dict(model.named_parameters(remove_duplicate=False))
    again = revert_weight_conversion(model, {name: named[name] for name in named.keys() - parameters.keys()})
    tied = {name: tensor for name, tensor in again.items() if name in source.tensors}
    return saved | tied | dict(mixer_tensors(model, source))


def rehearse_writing(source: Checkpoint) -> PreTrainedModel:
    """Refuse a checkpoint into which its model cannot be written back, before any weights are loaded.

    It returns the model on torch's meta device, and raises what :func:`file_tensors` and
    :func:`keyreduce.models.meta.check_loading` do.
    """
    model = check_source(source)
    file_tensors(model, source)
    return model


@torch.no_grad()
def changed_tensors(model: PreTrainedModel, source: Checkpoint, *, whole: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name in the checkpoint and tensor of the model, in the checkpoint's dtype, where the two differ.

    All of the model is looked at where ``whole`` is true (see :func:`file_tensors`), and else its mixers alone.
    """
    for name, tensor in file_tensors(model, source).items() if whole else mixer_tensors(model, source):
        tensor = tensor.to(torch_dtypes()[source.tensors[name].dtype])
        if not tensor.equal(source.read(name)):
            yield name, tensor


@torch.no_grad()
def mixer_tensors(model: PreTrainedModel, source: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name in the checkpoint and tensor of the model, for all mixers; what it does not have is left out."""
    family = family_in(model)
    rows_before: dict[str, int] = {}
    held = {name for name, _ in model.named_parameters()}
    for name, tensor in expected_tensors(source.config, source.tensors).items():
        if name not in source.tensors:
            continue
        inner, *others = (family.tensor_name(tensor.layer, one) for one in tensor.inner)
        if others:
            yield name, torch.cat([model.get_parameter(one) for one in (inner, *others)])
            continue
        if inner not in held:
            # transformers up to 5.14 has the convolutions of OLMo-Hybrid in the pieces that files have.
            inner = family.tensor_name(tensor.layer, tensor.name)
        # Pieces of one tensor come in the order in which the model joins them.
        begin, parameter = rows_before.get(inner, 0), model.get_parameter(inner)
        rows_before[inner] = begin + source.tensors[name].shape[0]
        yield name, parameter[begin : rows_before[inner]]
