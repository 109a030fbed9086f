"""Work that Python starts too slowly to be timed, recorded once and played back by the GPU: CUDA graphs."""

from collections.abc import Callable

import torch

from keyreduce.errors import reason


class NotRecordedError(Exception):
    """A function does not record as a CUDA graph; the message is why."""


def capture(function: Callable[[], object], device: torch.device, reads: object = None) -> Callable[[], None]:
    """Record what a function launches, and return a function that launches it all at once.

    A cache replaces its tensors at every step, so a recorded chain of steps reads what the step before it wrote, and
    every replay starts from the same tensors: nothing needs to be copied back.

    Args:
        function: what to record. It must have run before, so that all kernels are compiled and tuned.
        device: where it computes.
        reads: whatever holds the tensors that the function starts from and may let go of; a replay reads them where
            they are now, so they are kept for as long as the recording is.

    Raises:
        NotRecordedError: it does something that a graph cannot hold, such as waiting for the device; or that is a CPU.
        torch.OutOfMemoryError: there is no memory for a second set of the tensors that it makes.
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
        # Any operator may refuse in a way of its own; a device that has failed says so again here.
        torch.cuda.synchronize(device)
        raise NotRecordedError(reason(error)) from error

    def replay(kept: object = kept) -> None:
        graph.replay()

    return replay
