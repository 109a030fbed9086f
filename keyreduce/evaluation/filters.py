"""The kernels of a mixer's short convolutions, head by head.

Shapes: C channels of all heads, X heads (or one for all), R channels of a head, L taps.
"""

import torch

from keyreduce.checkpoint.source import Checkpoint
from keyreduce.families import Part, family_of
from keyreduce.families.axes import parts_of

_WORDS = {Part.QUERY: "q", Part.KEY: "k", Part.VALUE: "v"}


def filters_of(source: Checkpoint, layer: int) -> dict[str, torch.Tensor]:
    """Return the learned kernels of a layer with a mixer, the oldest token's tap first.

    Returns:
        ``q``, ``k``, ``v`` (``kv`` where keys and values share a convolution) -> float32 ``[X, R, L]``. R is 1 where
        the channels of a head share a kernel. Convolutions without a learned kernel are left out.

    Raises:
        KeyreduceError: a tensor cannot be read.
    """
    family = family_of(source.config).located(source.tensors)
    sizes, found = family.sizes(source.config, layer), {}
    heads_of = {"q": sizes.key_heads, "k": sizes.key_heads, "v": sizes.value_heads}
    for short_name, axes in family.tensors.items():
        name = family.tensor_name(layer, short_name)
        if Part.TAPS not in axes or name not in source.tensors:
            continue
        kernels_CL, parts = source.read(name).float()[:, 0], parts_of(axes[0])
        if parts == (Part.HEAD_OR_ALL,):
            found[short_name.split("_")[0]] = kernels_CL[:, None]
            continue
        for part, one_CL in zip(parts, kernels_CL.split([sizes.lengths[part] for part in parts]), strict=True):
            word = _WORDS[part]
            found[word] = one_CL.unflatten(0, (heads_of[word], -1))
    return found
