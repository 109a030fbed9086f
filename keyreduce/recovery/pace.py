"""How gradient steps run on a device: in which precision, by whose kernels, and launched one by one or all at once.

On a CPU they are computed in float32, as they are written. On a GPU a step of one layer consists of so many small
kernels that Python launches them more slowly than they run. There the launches of a step are recorded once, as a CUDA
graph, and then replayed.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from keyreduce.families import Family
from keyreduce.models.loading import prepare_backend
from keyreduce.models.miscompiled import torch_operations
from keyreduce.models.tuning import tune_few_variants
from keyreduce.recovery.modes import Kernels

_UNRECORDED = 3
"""Steps that run before one is recorded: libraries allocate what they keep, and Triton tunes its kernels."""
_WORTH_COMPILING = 8192
"""Steps in all from which fla's kernels are taken. On a machine without them Triton compiles for half a minute, for
each size of the heads; a step of a layer of a 222M model then takes 1.3 ms instead of 5.3 (benchmarks/recover_speed.py,
on an H200)."""
_log = logging.getLogger(__name__)


@dataclass
class Pace:
    """How gradient steps run.

    Attributes:
        is_mixed: whether matrix products of a step take bfloat16, and those in float32, also in all that is done before
            and after the steps, TF32. Weights, the optimizer and the error are float32 anyway.
        is_recorded: whether a step is recorded and replayed. It becomes false where that turns out not to work.
        kernels: ``torch`` is the PyTorch backend, ``fla`` fla's own Triton kernels where they are known to be right,
            which is for mixed precision alone.
    """

    is_mixed: bool = False
    is_recorded: bool = False
    kernels: Kernels = "torch"

    @classmethod
    def of(cls, device: torch.device, steps: int = 0) -> "Pace":
        """Return the pace of a device for so many steps in all layers, unless another one is asked for."""
        if device.type != "cuda":
            return cls()
        return cls(is_mixed=True, is_recorded=True, kernels="fla" if steps >= _WORTH_COMPILING else "torch")

    @contextlib.contextmanager
    def running(self, family: Family, config: Mapping, device: torch.device) -> Iterator[None]:
        """Have the kernels of this pace, and TF32, while the ``with`` statement runs; after it PyTorch's kernels."""
        with self.products():
            if self.kernels == "torch" or device.type == "cpu":
                yield
                return
            import fla_torch

            try:
                fla_torch.enable(cuda=torch_operations(family, config, device))
                tune_few_variants()
                yield
            finally:
                prepare_backend(device, gradients=True)

    def products(self) -> contextlib.AbstractContextManager:
        """Return a context in which matrix products in float32 on CUDA take TF32, if mixed."""
        return _tf32(self.is_mixed)

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        """Return what the forward pass of a step runs in."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.is_mixed)

    def paced(self, function: Callable[..., torch.Tensor], device: torch.device) -> Callable[..., torch.Tensor]:
        """Return a function of tensors on the device as it is, or recorded."""
        return Recorded(self, function, device) if self.is_recorded and device.type == "cuda" else function


class Recorded:
    """A function of tensors that is recorded as a CUDA graph, and replayed for tensors of the same shapes.

    What it returns is overwritten by the next call. What the function changes besides, such as weights, has to stay
    where it is in memory. Tensors of other shapes than those of the first call go to the function itself. So do all
    where it cannot be recorded, since it waits for the device; nothing was run by the attempt.
    """

    def __init__(self, pace: Pace, function: Callable[..., torch.Tensor], device: torch.device):
        self.pace, self.function, self.device = pace, function, device
        self._inputs: list[torch.Tensor] = []
        self._calls = 0
        self._aside: torch.cuda.Stream | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        self._inputs = self._inputs or [tensor.clone() for tensor in tensors]
        if not self.pace.is_recorded or any(
            mine.shape != given.shape for mine, given in zip(self._inputs, tensors, strict=True)
        ):
            return self.function(*tensors)
        for mine, given in zip(self._inputs, tensors, strict=True):
            mine.copy_(given)
        self._calls += 1
        if self._calls <= _UNRECORDED:
            return self._run_aside()
        if self._graph is None and not self._record():
            return self.function(*tensors)
        assert self._graph is not None
        self._graph.replay()
        return self._output

    def _run_aside(self) -> torch.Tensor:
        """Run the function on a stream of its own, as what is to be recorded has to."""
        current = torch.cuda.current_stream(self.device)
        self._aside = self._aside or torch.cuda.Stream(self.device)
        self._aside.wait_stream(current)
        with torch.cuda.stream(self._aside):
            output = self.function(*self._inputs)
        current.wait_stream(self._aside)
        return output

    def _record(self) -> bool:
        pool, graph = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
        try:
            # A recording that fails leaves its own stream the current one: the outer statement gives this one back.
            with (
                torch.cuda.stream(torch.cuda.current_stream(self.device)),
                torch.cuda.graph(graph, pool=pool, stream=self._aside),
            ):
                self._output = self.function(*self._inputs)
        except RuntimeError as error:
            self.pace.is_recorded = False
            with contextlib.suppress(RuntimeError, AttributeError):  # else no memory could be given back from now on
                torch._C._cuda_endAllocateToPool(self.device.index or 0, pool)
            first = str(error).strip().partition("\n")[0]
            _log.warning("steps run without a CUDA graph, which is slower: %s", first)
            return False
        self._graph = graph
        return True


@contextlib.contextmanager
def _tf32(is_allowed: bool) -> Iterator[None]:
    """Let CUDA's matrix products in float32 use TF32 while the ``with`` statement runs, if allowed."""
    products = torch.backends.cuda.matmul
    # PyTorch 2.9 has another name for it, and does not like the older one beside it.
    name, value = ("fp32_precision", "tf32") if hasattr(products, "fp32_precision") else ("allow_tf32", True)
    before = getattr(products, name)
    try:
        if is_allowed:
            setattr(products, name, value)
        yield
    finally:
        setattr(products, name, before)
