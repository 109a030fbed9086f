"""CUDA graphs: kernels that Python launches too slowly to be timed are recorded once and replayed by the GPU."""

from collections.abc import Callable

import torch

from keyreduce.errors import reason


class NotRecordedError(Exception):
    """A function cannot be recorded as a CUDA graph; the message says why."""


def capture(function: Callable[[], object], device: torch.device, reads: object = None) -> Callable[[], None]:
    """Record the kernels that a function launches, and return a function that launches them all at once.

    A cache replaces its tensors at every step. So each step of a recorded chain reads what the step before it wrote,
    and every replay starts from the same tensors: nothing needs to be copied back.

    Args:
        function: the function. It must have run before, so that all kernels are compiled and tuned.
        device: the device that it runs on.
        reads: an object that holds the tensors that the function starts from. A replay reads them at their present
            addresses, so they are kept as long as the recording, also where the function drops them.

    Raises:
        NotRecordedError: the function does what a graph cannot hold, such as waiting for the device; or it is a CPU.
        torch.OutOfMemoryError: there is no memory for a second set of the tensors that the function makes.
    """
    if device.type != "cuda":
        raise NotRecordedError("CUDA graphs are for a GPU")
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.inference_mode(), torch.cuda.graph(graph):
            kept = (reads, function())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # Operators raise all kinds of errors here; if it is the device that has failed, this raises again.
        torch.cuda.synchronize(device)
        raise NotRecordedError(reason(error)) from error

    def replay(kept: object = kept) -> None:
        graph.replay()

    return replay
