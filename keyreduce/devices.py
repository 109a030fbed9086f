"""What to compute on, in what dtype, and how much memory there is."""

import os
import platform
from pathlib import Path

import torch

from keyreduce.errors import KeyreduceError, reason

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str | None) -> torch.device:
    """Return the device to compute on: the one named, else a GPU where there is one, else the CPU.

    It raises KeyreduceError where there is no such device.
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
    """Return the dtype to compute in: the one named, else bfloat16 on a GPU and float32 on a CPU."""
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return dtype_named(dtype)


def dtype_named(dtype: str) -> torch.dtype:
    """Return the dtype of that name; raise KeyreduceError where there is none."""
    if dtype not in DTYPES:
        raise KeyreduceError(f"dtype {dtype!r} is unknown; take one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def device_name(device: torch.device) -> str:
    """Return what reports and pictures call a device: a GPU by its name, a CPU by what it computes with."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    processor = platform.processor() or platform.machine()
    return f"{processor} CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"


def available_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device, without swapping.

    On a GPU, what PyTorch keeps in reserve is given back first: it is free, too, and the driver does not know.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
