"""Layer norm, RMS norm, their gated forms, and the L2 norm of queries and keys.

Shapes: R rows, D channels. With groups, row r belongs to group ``r mod groups`` and the weight holds one
row of D for each group.
"""

import torch

from fla_torch.numerics import widen

L2_EPS = 1e-6


def l2_normalize(x: torch.Tensor, eps: float = L2_EPS) -> torch.Tensor:
    """Divide by the square root of the sum of squares plus eps, as fla and transformers do (eps is in the sum).

    The result is float32, or float64 where ``x`` is.
    """
    x = widen(x)
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + eps)


def l2norm_fwd(x, eps=L2_EPS, output_dtype=None):
    """Return ``x`` normalised along the last axis and the reciprocal norm of each row, float32."""
    wide = widen(x)
    reciprocal = torch.rsqrt(wide.square().sum(dim=-1) + eps)
    return (wide * reciprocal[..., None]).to(output_dtype or x.dtype), reciprocal


def l2norm_bwd(y, rstd, dy, eps=L2_EPS):
    """Return the gradient of the input from the normalised output: ``(dy - y (dy . y)) rstd``."""
    wide_y, wide_dy = widen(y), widen(dy)
    gradient = (wide_dy - wide_y * (wide_dy * wide_y).sum(dim=-1, keepdim=True)) * rstd[..., None]
    return gradient.to(y.dtype)


def layer_norm_fwd(
    x, weight, bias, eps=1e-5, residual=None, out_dtype=None, residual_dtype=None, is_rms_norm=False, num_groups=1,
):  # fmt: skip
    """Return output, mean (None for RMS), reciprocal deviation, and ``x + residual`` (``x`` where there is none)."""
    summed, mean, reciprocal, kept = _moments(x, residual, residual_dtype, eps, is_rms_norm)
    output = _scale(_standardize(summed, mean, reciprocal), weight, bias, num_groups)
    return output.to(out_dtype or x.dtype), mean, reciprocal, kept


def layer_norm_bwd(
    dy, x, weight, bias, mean=None, rstd=None, dres=None, has_residual=False, is_rms_norm=False, x_dtype=None,
    recompute_output=False, num_groups=1,
):  # fmt: skip
    """Return the gradients of x, weight, bias and residual, and the output again where it is asked for."""
    standard = _standardize(widen(x), mean, rstd)
    dx, dw, db = _input_gradients(widen(dy), standard, weight, bias, rstd, is_rms_norm, num_groups)
    dx, dresidual = _with_residual(dx, x, dres, has_residual, x_dtype)
    gradients = (dx, dw, db, dresidual)
    if recompute_output:
        return *gradients, _scale(standard, weight, bias, num_groups).to(dy.dtype)
    return gradients


def layer_norm_gated_fwd(
    x, g, weight, bias, activation="swish", eps=1e-5, residual=None, out_dtype=None, residual_dtype=None,
    is_rms_norm=False,
):  # fmt: skip
    """Return ``norm(x + residual) act(g)``, mean, reciprocal deviation, and ``x + residual``, as above."""
    summed, mean, reciprocal, kept = _moments(x, residual, residual_dtype, eps, is_rms_norm)
    normed = _scale(_standardize(summed, mean, reciprocal), weight, bias)
    return (normed * _gate(widen(g), activation)).to(out_dtype or x.dtype), mean, reciprocal, kept


def layer_norm_gated_bwd(
    dy, x, g, weight, bias, activation="swish", eps=1e-5, mean=None, rstd=None, dresidual=None, has_residual=False,
    is_rms_norm=False, x_dtype=None, recompute_output=False,
):  # fmt: skip
    """Return the gradients of x, g, weight, bias and residual, and the output again where it is asked for."""
    wide_dy, wide_g = widen(dy), widen(g)
    standard = _standardize(widen(x), mean, rstd)
    normed, gate = _scale(standard, weight, bias), _gate(wide_g, activation)
    sigmoid = wide_g.sigmoid()
    gate_slope = sigmoid * (1 - sigmoid) if activation == "sigmoid" else sigmoid * (1 + wide_g * (1 - sigmoid))
    dg = (wide_dy * normed * gate_slope).to(x_dtype or g.dtype)
    dx, dw, db = _input_gradients(wide_dy * gate, standard, weight, bias, rstd, is_rms_norm)
    dx, dresidual_in = _with_residual(dx, x, dresidual, has_residual, x_dtype)
    gradients = (dx, dg, dw, db, dresidual_in)
    return (*gradients, (normed * gate).to(dy.dtype)) if recompute_output else gradients


def _moments(x, residual, residual_dtype, eps, is_rms_norm):
    """The summed input in float32 or float64, its moments, and the sum in the dtype that the residual stream has."""
    summed = widen(x) if residual is None else widen(x) + widen(residual)
    mean = None if is_rms_norm else summed.mean(dim=-1)
    centered = summed if mean is None else summed - mean[:, None]
    reciprocal = torch.rsqrt(centered.square().mean(dim=-1) + eps)
    residual_dtype = residual_dtype if residual is None else residual.dtype
    kept = x if residual is None and residual_dtype in (None, x.dtype) else summed.to(residual_dtype)
    return summed, mean, reciprocal, kept


def _standardize(x_RD, mean_R, reciprocal_R):
    return (x_RD if mean_R is None else x_RD - mean_R[:, None]) * reciprocal_R[:, None]


def _scale(standard_RD, weight, bias, num_groups=1):
    rows = standard_RD.unflatten(0, (-1, num_groups))
    if weight is not None:
        rows = rows * widen(weight).view(num_groups, -1)
    if bias is not None:
        rows = rows + widen(bias).view(num_groups, -1)
    return rows.flatten(0, 1)


def _gate(g, activation):
    return g.sigmoid() if activation == "sigmoid" else g * g.sigmoid()


def _input_gradients(dy_RD, standard_RD, weight, bias, reciprocal_R, is_rms_norm, num_groups=1):
    """Gradients of the summed input (float32 or float64), weight and bias of a norm."""

    def over_rows(values_RD, parameter):
        return values_RD.unflatten(0, (-1, num_groups)).sum(dim=0).view_as(parameter).to(parameter.dtype)

    dw = None if weight is None else over_rows(dy_RD * standard_RD, weight)
    db = None if bias is None else over_rows(dy_RD, bias)
    dstandard_RD = _scale(dy_RD, weight, None, num_groups)
    dx_RD = dstandard_RD - standard_RD * (dstandard_RD * standard_RD).mean(dim=-1, keepdim=True)
    if not is_rms_norm:
        dx_RD = dx_RD - dstandard_RD.mean(dim=-1, keepdim=True)
    return dx_RD * reciprocal_R[:, None], dw, db


def _with_residual(dx, x, dresidual, has_residual, x_dtype):
    """Add the gradient that arrives on the residual stream; return those of x and of the residual (or None)."""
    if dresidual is not None:
        dx = dx + widen(dresidual)
    return dx.to(x_dtype or x.dtype), dx.to(x.dtype) if has_residual else None
