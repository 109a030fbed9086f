"""What to compute on, and in what dtype."""

import torch

from keyreduce.errors import KeyreduceError, reason

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str | None) -> torch.device:
    """Return the device to compute on: the one named, else a GPU where there is one, else the CPU.

    Raises:
        KeyreduceError: no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
        torch.zeros((), device=picked).item()
    except (RuntimeError, AssertionError) as error:
        raise KeyreduceError(f"device {device!r} cannot be used here: {reason(error)}") from None
    return picked


def pick_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in: the one named, else bfloat16 on a GPU and float32 on a CPU.

    Raises:
        KeyreduceError: no such dtype.
    """
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return dtype_named(dtype)


def dtype_named(dtype: str) -> torch.dtype:
    """Return the dtype of that name.

    Raises:
        KeyreduceError: no such dtype.
    """
    if dtype not in DTYPES:
        raise KeyreduceError(f"dtype {dtype!r} is unknown; take one of {', '.join(DTYPES)}")
    return DTYPES[dtype]
