"""Elementwise activations, forward and backward, computed in float32 and returned in the inputs' dtype."""

import torch.nn.functional as F

from fla_torch.numerics import pull_back, widen


def sigmoid_fwd(x, output_contiguous=False):
    """Return ``sigmoid(x)``."""
    return widen(x).sigmoid().to(x.dtype)


def sigmoid_bwd(x, dy, output_contiguous=False):
    """Return the gradient of ``x``."""
    return pull_back(sigmoid_fwd, [x], [dy])[0]


def logsigmoid_fwd(x, temperature=1.0, output_contiguous=False):
    """Return ``log(sigmoid(x)) / temperature``."""
    return (F.logsigmoid(widen(x)) / temperature).to(x.dtype)


def logsigmoid_bwd(x, dy, temperature=1.0, output_contiguous=False):
    """Return the gradient of ``x``."""
    return pull_back(lambda x: logsigmoid_fwd(x, temperature), [x], [dy])[0]


def swish_fwd(x, output_contiguous=False):
    """Return ``x sigmoid(x)``."""
    return F.silu(widen(x)).to(x.dtype)


def swish_bwd(x, dy, output_contiguous=False):
    """Return the gradient of ``x``."""
    return pull_back(swish_fwd, [x], [dy])[0]


def swiglu_fwd(x, y, output_contiguous=False):
    """Return ``swish(x) y``."""
    return (F.silu(widen(x)) * widen(y)).to(x.dtype)


def swiglu_fwdbwd(x, y, g, use_weight=False, output_contiguous=False):
    """Return the gradients of x and y for the output's gradient ``g``, and the output again with ``use_weight``."""
    gradients = pull_back(swiglu_fwd, [x, y], [g])
    return (*gradients, swiglu_fwd(x, y)) if use_weight else tuple(gradients)
