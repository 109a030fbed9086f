"""Wanda: weights times the norm of their inputs.

A weight's score is ``|W_ij| ||x_j||`` with ``||x_j||`` the L2 norm of its input over the calibration tokens (Sun et
al., arXiv:2306.11695, equation 1). A channel's score is the sum over its weights. A key channel has its rows of Wq and
Wk, whose input is the mixer's; a value channel has its column of Wo, whose input is the output projection's; a head has
the columns of Wo of all its value channels.
"""

from keyreduce.pruning.methods.method import LayerView, Method, ranked


def _key(layer: LayerView):
    input_norm_D = layer.statistics.input_square_D.sqrt().float()
    return layer.query_weight_HKD.abs() @ input_norm_D + layer.key_weight_HKD.abs() @ input_norm_D


def _value(layer: LayerView):
    output_norm_WV = layer.statistics.output_gram_WVV.diagonal(dim1=-2, dim2=-1).sqrt()
    return layer.output_weight_WVD.norm(1, -1) * output_norm_WV


def _head(layer: LayerView):
    return layer.in_groups(_value(layer).sum(-1))[None]


WANDA = Method(
    name="wanda",
    summary="weights times the norm of their input",
    citation="Sun et al., arXiv:2306.11695",
    select={"key": ranked(_key), "value": ranked(_value), "head": ranked(_head)},
    needs_statistics=True,
)
