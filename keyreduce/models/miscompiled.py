"""Where Triton makes something else of fla's kernels than they say: on Hopper GPUs, before Triton 3.7.1.

fla itself refuses the backward pass of the gated rule there (its issue 640). Found beside it, on an H100 with Triton
3.6.0 and fla 0.6.0 in bfloat16, by running every variant that fla tunes among; K x V are the channels of a head, and
the variants are those of four warps:

=========================== ======= ==================================================================
kernel                      K x V   what it gives
=========================== ======= ==================================================================
``chunk_bwd_dqkwg``         24x128  gradients that are wrong by 105% of their norm
same                        16x128  an illegal memory access; 32x64 and 32x128 too
``chunk_bwd_dv_local``      64x32   a gradient of v that is not what the other variants give
``recompute_w_u_fwd``       32x64   in the forward pass, a w that is not what the other variants give
=========================== ======= ==================================================================

``chunk_bwd_dqkwg`` is right at 16x16, 32x32, 64x16, 64x32 and 48, 64 and 128 x 128, all that the ungated rule runs at
48x128, its forward pass at 16, 24 and 32 x 128 and at 64x32, and that of the gated rule at 16x128, 32x64, 32x128 and
64x32. So what is suspected is a head of the ungated rule with no more than 32 channels on one side and more on the
other; which variant is the fastest, and so is taken, hangs on the GPU. Triton's issue 10573 is of the same kind.
"""

import importlib.util
import logging
from collections.abc import Mapping

import torch

from keyreduce.errors import KeyreduceError
from keyreduce.families import Family

_SMALL = 32
_log = logging.getLogger(__name__)


def refuse_wrong_gradients(family: Family, config: Mapping, device: torch.device, otherwise: str = "") -> None:
    """Refuse to train with fla's kernels where their gradients may be wrong.

    Args:
        family, config: the model.
        device: where it would be trained.
        otherwise: what a user may do instead of installing another Triton.

    Raises:
        KeyreduceError: says why.
    """
    if not _is_affected(device):
        return
    # With tilelang fla has other kernels for the gated rule.
    is_gated = "chunk_gated_delta_rule" in family.operators and importlib.util.find_spec("tilelang") is None
    why = "of the gated rule" if is_gated else _suspected(family, config)
    if why:
        raise KeyreduceError(f"{_told('gradients', why)}{otherwise}")


def warn_of_wrong_results(family: Family, config: Mapping, device: torch.device) -> None:
    """Warn where what fla's kernels compute in a forward pass may be wrong."""
    if _is_affected(device) and (why := _suspected(family, config)):
        _log.warning("%s", _told("results", why))


def _is_affected(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    from fla import utils

    return utils.IS_NVIDIA_HOPPER and utils.TRITON_ABOVE_3_4_0 and not utils.TRITON_ABOVE_3_7_1


def _suspected(family: Family, config: Mapping) -> str | None:
    """Return which heads of the ungated rule are of a size at which a variant was wrong, if there are any."""
    if "chunk_delta_rule" not in family.operators:
        return None
    for sizes in family.layer_sizes(config).values():
        channels = (sizes.head_k_dim, sizes.head_v_dim)
        if min(channels) <= _SMALL < max(channels):
            return f"of heads of {channels[0]} x {channels[1]} channels"
    return None


def _told(what: str, why: str) -> str:
    from triton import __version__ as version

    return (
        f"with Triton {version} on a Hopper GPU {what} of fla's kernels {why} may be wrong: "
        "install Triton 3.7.1 or later, as fla asks"
    )
