"""Chance, from the seed: what every other method must beat."""

from keyreduce.pruning.methods.method import LayerView, Method, highest


def _select(layer: LayerView, keep: int, generator):
    import torch

    return highest(torch.rand(layer.query_weight_HKD.shape[:2], generator=generator), keep)


RANDOM = Method(
    name="random",
    summary="chance, from --seed",
    citation="baseline",
    needs_statistics=False,
    select=_select,
)
