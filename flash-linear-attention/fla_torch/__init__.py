"""A PyTorch backend for flash-linear-attention: fla's own models, on a machine without a GPU.

    import fla_torch
    fla_torch.enable()            # from here on fla's kernels run in PyTorch where tensors lie on a CPU
    fla_torch.enable(cuda=True)   # on CUDA too, for programs that cannot wait for Triton's autotuning
    fla_torch.mend()              # kernels stay as they are: decoding with transformers 5.24, models without flash-attn

It covers what DeltaNet and Gated DeltaNet models touch, forward, backward and decoding.
"""

import warnings

# fla looks for a GPU when it is imported, and warns where there is none: that is what this backend is for.
warnings.filterwarnings("ignore", message="Triton is not supported on current platform", category=UserWarning)

from fla_torch.registry import UnsupportedVersionError, enable, is_enabled, mend  # noqa: E402

__all__ = ["UnsupportedVersionError", "enable", "is_enabled", "mend"]
