"""The kernels of a mixer's short convolutions, head by head.

Shapes: C channels of all heads, X heads (or one for all), R channels of a head, L taps.
"""

import torch

from keyreduce.families import Part
from keyreduce.models.loading import LoadedModel

_HEADS_AND_CHANNELS = {
    Part.QUERY: ("key_heads", "head_k_dim"),
    Part.KEY: ("key_heads", "head_k_dim"),
    Part.VALUE: ("value_heads", "head_v_dim"),
}


def filters_of(loaded: LoadedModel, layer: int) -> dict[str, torch.Tensor]:
    """Return the learned kernels of one layer, the oldest token's tap first.

    Returns:
        ``q``, ``k``, ``v`` (``kv`` where one convolution serves both) -> float32 ``[X, R, L]`` on the CPU. R is 1 where
        the channels of a head share a kernel. Convolutions without a learned kernel are left out.
    """
    sizes = loaded.family.sizes(loaded.model.config.to_dict(), layer)
    mixer = loaded.model.get_submodule(loaded.family.mixer.format(layer=layer))
    parameters, found = dict(mixer.named_parameters()), {}
    for name, axes in loaded.family.tensors.items():
        if axes[1:] != (Part.OTHER, Part.OTHER) or name not in parameters:
            continue
        kernels_CL = parameters[name].detach().float().cpu()[:, 0]
        if axes[0] in _HEADS_AND_CHANNELS:
            shape = [getattr(sizes, size) for size in _HEADS_AND_CHANNELS[axes[0]]]
        else:
            shape = [len(kernels_CL), 1]
        found[name.split("_")[0]] = kernels_CL.unflatten(0, shape)
    return found
