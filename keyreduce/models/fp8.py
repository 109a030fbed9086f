"""Checkpoints whose linear layers are in blocks of FP8, such as Qwen3.5's, loaded as plain numbers.

What is calibrated, measured and recovered must run on any device and in any dtype, and FP8's own kernels do not. A
weight is its 8-bit numbers times the scale of their block (``weight_scale_inv``), as transformers multiplies them.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from keyreduce.errors import KeyreduceError


def plain_numbers(folder: Path, config: Mapping) -> dict[str, Any]:
    """Return the arguments with which ``from_pretrained`` multiplies blocks of FP8 by their scales; else none.

    ``config`` is the content of the folder's config.json.

    Raises KeyreduceError for blocks of FP8 where accelerate, without which transformers loads none, is not installed.
    """
    settings = config.get("quantization_config")
    if not isinstance(settings, Mapping) or settings.get("quant_method") != "fp8":
        return {}
    if find_spec("accelerate") is None:
        raise KeyreduceError(
            f"{folder} is in FP8, which transformers loads only with accelerate: pip install 'keyreduce[train]'"
        )
    theirs = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    theirs.quantization_config = {**settings, "dequantize": True}
    return {"config": theirs}


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters of a model that was loaded so: they are left in the dtypes of the files."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and not parameter.is_meta:
            parameter.data = parameter.data.to(dtype)
