"""A random choice, from the seed: the baseline that every other method must beat."""

from keyreduce.pruning.methods.method import LayerView, Method, highest


def _select(groups_of):
    def select(layer: LayerView, keep: int, generator):
        import torch

        return highest(torch.rand(groups_of(layer.sizes), generator=generator), keep)

    return select


RANDOM = Method(
    name="random",
    summary="a random choice",
    citation="baseline",
    select={
        "key": _select(lambda sizes: (sizes.key_heads, sizes.head_k_dim)),
        "value": _select(lambda sizes: (sizes.value_heads, sizes.head_v_dim)),
        "head": _select(lambda sizes: (1, sizes.key_heads)),
    },
)
