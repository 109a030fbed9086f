"""transformers' Trainer with the losses of distillation; it stops where numbers are not finite, and reports progress.

Shapes: B rows of a micro-batch, T tokens, V vocabulary.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from keyreduce.errors import KeyreduceError
from keyreduce.recovery.training.distillation import teacher_loss, text_loss


class RecoveryTrainer(Trainer):
    """A Trainer whose loss is that on the text, that against a teacher, or a weighted mean of both.

    Args:
        teacher: a model of the same vocabulary on the same device, or None.
        distill_weight: the share of the loss against the teacher.
        temperature: the temperature of that loss.
        kwargs: Trainer's own arguments.
    """

    def __init__(self, *, teacher: nn.Module | None, distill_weight: float, temperature: float, **kwargs):
        super().__init__(**kwargs)
        # fla's models take any keyword, from which Trainer concludes that they divide by `num_items_in_batch`. All rows
        # have the same length, so that the mean of the micro-batches' means is the mean of the batch.
        self.model_accepts_loss_kwargs = False
        self.teacher, self.distill_weight, self.temperature = teacher, distill_weight, temperature

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **_) -> torch.Tensor:
        """Return the loss of a micro-batch, no shape, in nats; the teacher's logits are freed when this returns."""
        tokens_BT = inputs["input_ids"]
        logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits
        if self.teacher is None or not self.distill_weight:
            return text_loss(logits_BTV, tokens_BT)
        with torch.no_grad(), self.compute_loss_context_manager():
            given_BTV = self.teacher(input_ids=tokens_BT, use_cache=False).logits
        loss = self.distill_weight * teacher_loss(logits_BTV, given_BTV, self.temperature)
        if self.distill_weight < 1:
            loss = (1 - self.distill_weight) * text_loss(logits_BTV, tokens_BT) + loss
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        # This comes before the step, so that no weight and no checkpoint gets numbers that are not finite.
        norm: Any = super()._clip_grad_norm(model)  # sharded, it is a DTensor
        if not math.isfinite(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)):
            raise DivergedError(self.state.global_step + 1)
        return norm


class DivergedError(KeyreduceError):
    """The loss, or a gradient, became NaN or inf.

    Attributes:
        step: the step at which it happened.
    """

    def __init__(self, step: int):
        super().__init__(f"the loss became NaN or inf at step {step}")
        self.step = step


class ProgressReport(TrainerCallback):
    """Feeds a progress bar, and reports the loss in regular intervals.

    Args:
        tokens_per_step: the number of tokens in a step, of all processes together.
        note: called with a message of the loss, the rate and the time left.
        progress: called with the number of tokens of each step.
        every: the number of steps from one message to the next.
    """

    def __init__(
        self, tokens_per_step: int, note: Callable[[str], None], progress: Callable[[int], None] | None, every: int
    ):
        self.tokens_per_step, self.note, self.progress, self.every = tokens_per_step, note, progress, every

    def on_train_begin(self, args, state, control, **_) -> None:
        """Start the clock; a run that was resumed has done its first steps already."""
        self.begun, self.first = time.monotonic(), state.global_step
        if self.progress is not None and self.first:
            self.progress(self.first * self.tokens_per_step)

    def on_step_end(self, args, state, control, **_) -> None:
        """Count a step."""
        if self.progress is not None:
            self.progress(self.tokens_per_step)

    def on_log(self, args, state, control, logs=None, **_) -> None:
        """Report what was logged at the first, the last and every ``every``-th step."""
        step = state.global_step
        if not logs or "loss" not in logs or (step % self.every and step not in (1, state.max_steps)):
            return
        seconds = max(time.monotonic() - self.begun, 1e-9) / max(step - self.first, 1)
        left = round(seconds * (state.max_steps - step))
        rate = self.tokens_per_step / seconds
        self.note(
            f"step {step:,} of {state.max_steps:,}: loss {logs['loss']:.4f}, {rate:,.0f} tokens/s, "
            f"{left // 60}:{left % 60:02} min left"
        )
