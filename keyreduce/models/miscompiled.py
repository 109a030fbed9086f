"""Which of fla's kernels Triton compiles wrongly: on Hopper GPUs, before Triton 3.7.1.

fla refuses the backward pass of the gated rule there by itself (its issue 640). Of the ungated rule variants were found
wrong where a head has no more than 32 channels on one side and more on the other; ``flash-linear-attention/README.md``
says which, and ``kernel_variants.py`` beside it finds them. Whether such a variant runs depends on which
one is fastest.
"""

import importlib.util
import logging
from collections.abc import Mapping

import torch

from keyreduce.errors import KeyreduceError
from keyreduce.families import Family

_SMALL, _LARGEST = 32, 256
_log = logging.getLogger(__name__)


def refuse_wrong_gradients(family: Family, config: Mapping, device: torch.device, otherwise: str = "") -> None:
    """Refuse to train with fla's kernels where their gradients may be wrong.

    ``otherwise`` is what a user may do instead of installing another Triton.
    """
    if not _is_affected(device):
        return
    why = "of the gated rule" if has_wrong_gated_gradients(family, device) else _suspected(family, config)
    if why:
        raise KeyreduceError(f"{_told('gradients', why)}{otherwise}")


def has_wrong_gated_gradients(family: Family, device: torch.device) -> bool:
    """Return whether a family has the gated rule, and fla's kernels of its backward pass are wrong on a device."""
    # Hybrids of transformers call fla's by the name of their own, with `torch_` before it. With tilelang fla has other
    # kernels for it.
    is_gated = any(name.removeprefix("torch_") == "chunk_gated_delta_rule" for name in family.operators)
    is_gated = is_gated and importlib.util.find_spec("tilelang") is None
    return is_gated and _is_affected(device)


def torch_operations(family: Family, config: Mapping, device: torch.device) -> bool | tuple[str, ...]:
    """Return what is to run in PyTorch where fla's kernels train in 16 bits: all, single operations, or nothing.

    It is what ``fla_torch.enable`` takes for ``cuda``. The kernels take at most 256 channels, and an even number.
    """
    if has_wrong_gated_gradients(family, device):
        return ("gated_delta_rule",)
    sizes = family.layer_sizes(config).values()
    channels = [number for one in sizes for number in (one.head_k_dim, one.head_v_dim)]
    is_refused = any(number % 2 or number > _LARGEST for number in channels)
    return is_refused or bool(_is_affected(device) and _suspected(family, config))


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
