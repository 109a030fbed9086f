"""A machine without a GPU that torch, Triton and vLLM take for one with an NVIDIA GPU.

Imports, configurations, arithmetic and the compilation of Triton kernels then work; no kernel ever runs. Call
:func:`make_up` before anything that asks for a GPU is imported.
"""

import contextlib
import importlib.abc
import importlib.util
import re
import sys
import types

import torch
import triton
from triton.backends.compiler import GPUTarget

# Compute capability -> name, memory in MiB, shared memory of a block in bytes, multiprocessors.
GPUS = {
    80: ("NVIDIA A100-SXM4-80GB", 81_920, 166_912, 108),
    90: ("NVIDIA H100 80GB HBM3", 81_559, 232_448, 132),
    100: ("NVIDIA B200", 183_359, 232_448, 148),
}
# vLLM's compiled extensions, which want CUDA's libraries: none of what is done here calls them.
_EXTENSIONS = re.compile(r"vllm\.(vllm_flash_attn\.)?_\w*C(_stable_libtorch)?")


def make_up(capability: int) -> None:
    """Make this process take the machine for one with a GPU of a compute capability: 80, 90 or 100."""
    name, mebibytes, shared, processors = GPUS[capability]
    major, minor = divmod(capability, 10)
    total = mebibytes * 2**20
    properties = types.SimpleNamespace(
        name=name, major=major, minor=minor, total_memory=total, multi_processor_count=processors, warp_size=32,
        shared_memory_per_block_optin=shared, L2_cache_size=50 * 2**20, is_integrated=False, gcnArchName="",
    )  # fmt: skip
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_name": name,
        "get_device_capability": (major, minor), "get_device_properties": properties, "mem_get_info": (total, total),
        "is_bf16_supported": True,
    }  # fmt: skip
    for function, answer in answers.items():
        setattr(torch.cuda, function, lambda *args, _answer=answer, **settings: _answer)
    torch.cuda.Stream = torch.cuda.Event = type("Stream", (), {"__init__": lambda self, *args, **settings: None})
    torch.cuda.device = lambda *args: contextlib.nullcontext()
    torch.accelerator.device_index = lambda *args: contextlib.nullcontext()
    triton.runtime.driver.set_active(_Driver(capability, shared, processors))
    sys.meta_path.insert(0, _EmptyExtensions())
    _answer_for_extensions()


class _Driver:
    """What Triton asks of a driver while it compiles."""

    def __init__(self, capability: int, shared: int, processors: int):
        self._target = GPUTarget("cuda", capability, 32)
        self._properties = {
            "max_shared_mem": shared, "multiprocessor_count": processors, "max_num_regs": 65_536, "warpSize": 32,
            "mem_clock_rate": 1, "mem_bus_width": 1, "sm_clock_rate": 1,
        }  # fmt: skip
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> types.ModuleType:
        return torch.cuda

    def get_device_properties(self, device: int) -> dict[str, int]:
        return self._properties

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def is_active(self) -> bool:
        return True

    def get_benchmarker(self):
        return lambda *args, **settings: [0.0] * 3


class _EmptyExtensions(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds an empty module wherever vLLM imports an extension, whether it is there or not."""

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if _EXTENSIONS.fullmatch(name) else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        pass


def _answer_for_extensions() -> None:
    """Say yes where vLLM asks an extension what it supports; these operators are not registered."""
    found = torch._ops._OpNamespace.__getattr__

    def answer(namespace, name):
        try:
            return found(namespace, name)
        except AttributeError:
            if "supports" in name:
                return lambda *args: True
            raise

    torch._ops._OpNamespace.__getattr__ = answer


def make_up_for_vllm(capability: int) -> None:
    """:func:`make_up`, and vLLM's choice of platform, which it makes by asking the driver's library."""
    make_up(capability)
    import vllm.platforms
    from vllm.platforms.cuda import CudaPlatform

    CudaPlatform.is_pin_memory_available = classmethod(lambda cls: False)
    vllm.platforms._current_platform = CudaPlatform()
    from vllm.model_executor.models import registry

    # It looks at a model's class in another process, which would not be prepared.
    registry._run_in_subprocess = lambda function: function()
