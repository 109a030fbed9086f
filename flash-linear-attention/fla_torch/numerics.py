"""What every operator of the backend does with precision and with gradients."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch


def widen(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in float32, as fla's kernels compute; float64 stays as it is, for ``gradcheck``."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@contextmanager
def reduced_products(reduced: bool) -> Iterator[None]:
    """Let float32 matrix products on CUDA round their operands to TF32 inside, where ``reduced``; sums stay float32."""
    if not reduced:
        yield
        return
    settings = torch.backends.cuda.matmul
    before, settings.fp32_precision = settings.fp32_precision, "tf32"
    try:
        yield
    finally:
        settings.fp32_precision = before


def pull_back(
    function: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]],
    inputs: Sequence[torch.Tensor | None],
    output_gradients: Sequence[torch.Tensor | None],
) -> list[torch.Tensor | None]:
    """Recompute ``function(*inputs)`` and return the gradient of each input.

    fla asks a backend for forward and backward apart, and hands the backward the inputs again: so the
    backward of an operator here is autograd over its forward, and the two cannot disagree.

    Args:
        function: takes the inputs, returns a tensor or a tuple of tensors.
        inputs: tensors, or None for an argument that is absent.
        output_gradients: one for each output; None where an output was not used.

    Returns:
        One gradient for each input, in its dtype and shape; None for an absent input.
    """
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    used = [
        (output, gradient.to(output.dtype))
        for output, gradient in zip(outputs, output_gradients, strict=True)
        if gradient is not None
    ]
    gradients = torch.autograd.grad(
        [output for output, _ in used],
        [leaf for leaf in leaves if leaf is not None],
        [gradient for _, gradient in used],
        materialize_grads=True,
    )
    remaining = iter(gradients)
    return [None if leaf is None else next(remaining) for leaf in leaves]
