"""The tensors of a model's mixers under the names, and in the pieces, that its checkpoint has them in."""

from collections.abc import Iterator

import torch

from keyreduce.checkpoint.source import Checkpoint
from keyreduce.families import family_of


@torch.no_grad()
def mixer_tensors(model: torch.nn.Module, source: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name in the checkpoint and tensor of the model, for all mixers.

    Args:
        model: a model that was loaded from ``source``, and perhaps trained since.
        source: the checkpoint; what it does not have is left out.
    """
    config = model.config.to_dict()
    ours, theirs = family_of(config), family_of(source.config, source.tensors)
    shapes = {name: spec.shape for name, spec in source.tensors.items()}
    for layer, sizes in ours.layer_sizes(config).items():
        mixer = model.get_submodule(ours.mixer.format(layer=layer))
        found = dict(mixer.named_parameters())
        for short_name in theirs.tensors:
            name = theirs.tensor_name(layer, short_name)
            if name not in source.tensors:
                continue
            tensor, pieces = found[theirs.inside.get(short_name, short_name)], theirs.joined_with(short_name)
            if pieces:
                lengths, _ = theirs.divided(layer, short_name, shapes, sizes.lengths)
                tensor = tensor.split(lengths)[pieces.index(short_name)]
            yield name, tensor
