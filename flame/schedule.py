"""Training for a time instead of a number of steps: the learning rate follows the share of the time that has passed."""

import math
import time
from collections.abc import Callable

import torch
from transformers import TrainerCallback


class TimeSchedule:
    """The learning rate as a share of its highest: up in the first steps, then along a cosine to zero in a given time.

    The first step of a process compiles and tunes kernels, which may take minutes. It counts as time but moves nothing:
    the cosine spans what is left after it, so that it always ends at zero, and when the time is over. An interrupted
    training resumes at the share that it had reached.

    What `LambdaLR` saves with a checkpoint are the attributes that are plain numbers; the others are slots.

    Args:
        seconds: for how long to train, over all interruptions.
        warmup: how many steps the rate rises.
    """

    __slots__ = ("__dict__", "_before", "_began", "_clock", "_first")

    def __init__(self, seconds: float, warmup: int):
        self.seconds, self.warmup = seconds, warmup
        self.used = self.share = 0.0  # seconds, of all processes one after another; and share of the cosine

    def begin(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start the clock of this process, after its checkpoint was loaded."""
        self._clock, self._began, self._first = clock, clock(), None
        self._before = (self.used, self.share)

    def advance(self) -> None:
        """Take the time at the end of a step; all processes then have that of the first one."""
        elapsed = self._clock() - self._began
        if self._first is None:
            self._first = elapsed
        used, share = self._before
        left = self.seconds - used - self._first
        share = min(1.0, share + (1 - share) * (elapsed - self._first) / left) if left > 0 else 1.0
        self.used, self.share = from_first_process(used + elapsed, share)

    def __call__(self, step: int) -> float:
        rising = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return rising * (1 + math.cos(math.pi * self.share)) / 2


class InTime(TrainerCallback):
    """Ends a training when the time of its schedule is over, or pauses it when that of this process is.

    Args:
        schedule: the schedule, or None where the number of steps ends the training.
        pause_at: when a checkpoint is saved and the training ends, to be resumed, by `time.monotonic`; None is never.
    """

    def __init__(self, schedule: TimeSchedule | None, pause_at: float | None):
        self.schedule, self.pause_at, self.is_paused = schedule, pause_at, False

    def on_train_begin(self, args, state, control, **_) -> None:
        if self.schedule is not None:
            self.schedule.begin()

    def on_optimizer_step(self, args, state, control, **_) -> None:
        """Advance the schedule before it is asked for the next learning rate."""
        if self.schedule is not None:
            self.schedule.advance()

    def on_step_end(self, args, state, control, **_) -> None:
        is_over = state.global_step >= state.max_steps
        if self.schedule is not None and self.schedule.share >= 1:
            control.should_training_stop = is_over = True
        if self.pause_at is not None and not is_over:
            (is_late,) = from_first_process(float(time.monotonic() >= self.pause_at))
            if is_late:
                self.is_paused = control.should_save = control.should_training_stop = True


def from_first_process(*numbers: float) -> list[float]:
    """Return the numbers that the first process gives, in every process; each calls this equally often.

    Were each to use its own clock, learning rates would differ, and with them the weights. It goes by the CPUs, so that
    no process waits for its GPU.
    """
    if not torch.distributed.is_initialized():
        return list(numbers)
    shared = torch.tensor(numbers, dtype=torch.float64)
    torch.distributed.broadcast(shared, 0, group=_cpu_group())
    return shared.tolist()


def _cpu_group() -> torch.distributed.ProcessGroup:
    global _group
    if _group is None:
        _group = torch.distributed.new_group(backend="gloo")
    return _group


_group: torch.distributed.ProcessGroup | None = None
