"""A Triton kernel for decoding with the delta rule: it takes the place of fla's recurrent kernels for one token.

    import fla_decode
    fla_decode.enable()   # from here on fla's models decode by it on CUDA; fla_decode.disable() takes it back

A step is bound by reading and writing the state, and the kernel is laid out for that. It can keep the state in fewer
bytes: ``fla_decode.enable(state_dtype=torch.bfloat16)``, float16 or int8. It is off unless asked for.
"""

from fla_decode.registry import UnsupportedVersionError, disable, enable, is_enabled
from fla_decode.state import Int8State, dequantize, quantize
from fla_decode.step import Tiling, decode_step

__all__ = [
    "Int8State",
    "Tiling",
    "UnsupportedVersionError",
    "decode_step",
    "dequantize",
    "disable",
    "enable",
    "is_enabled",
    "quantize",
]
