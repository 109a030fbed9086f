"""transformers' Trainer: its arguments, the rows that it is fed, the losses of distillation, and its reports.

Shapes: B rows of a micro-batch, T tokens, V vocabulary, N = B * T.
"""

import importlib.util
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from keyreduce.calibration.run import Settings
from keyreduce.data.batches import token_rows
from keyreduce.data.text import TextSource
from keyreduce.errors import KeyreduceError
from keyreduce.processes import is_torchrun
from keyreduce.recovery.modes import Training

_LOGGED = 500  # entries in the log of a run, at the most
_CHECKPOINTS = 10
# From these accelerate concludes that there are several processes. Clusters set them for other programs too.
_LAUNCHER = ("LOCAL_RANK", "MV2_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE")
_SHUFFLE_BUFFER = 1_000  # rows


def trainer_arguments(settings: Settings, training: Training, device: torch.device, folder: Path) -> TrainingArguments:
    """Return Trainer's arguments; one batch of ``settings`` is one step, whatever the number of processes.

    Checkpoints go to ``folder``. Each process of torchrun takes a GPU of its own, unless ``device`` is the CPU.

    Raises:
        KeyreduceError: a batch does not divide among the processes, or a process' share of it into micro-batches; or
            ``shard`` was asked for without torchrun, or a GPU other than the first.
    """
    on_cpu, recomputes = device.type == "cpu", training.gradient_checkpointing
    in_processes = is_torchrun()
    if training.shard and not in_processes:
        raise KeyreduceError(
            "`shard` distributes a model among processes: start keyreduce under torchrun, or leave it out"
        )
    if device.type == "cuda" and device.index and not in_processes:
        raise KeyreduceError(f"training takes the first GPU; choose with CUDA_VISIBLE_DEVICES={device.index}")
    hidden = {} if in_processes else {name: os.environ.pop(name) for name in _LAUNCHER if name in os.environ}
    try:
        made = TrainingArguments(
            output_dir=str(folder),
            max_steps=settings.num_batches,
            learning_rate=training.lr,
            lr_scheduler_type="cosine",
            warmup_steps=round(training.warmup * settings.num_batches),
            adam_beta2=0.95,
            max_grad_norm=1.0,
            use_cpu=on_cpu,
            bf16=not on_cpu,
            ddp_backend="gloo" if on_cpu and in_processes else None,
            ddp_find_unused_parameters=False,
            fsdp=training.shard,  # pyright: ignore[reportArgumentType]  (its annotation is older than its code)
            # FSDP computes activations again by itself, and gathers the weights once less for it.
            fsdp_config={"version": 2, "activation_checkpointing": recomputes} if training.shard else None,
            gradient_checkpointing=recomputes and not training.shard,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            seed=settings.seed,
            remove_unused_columns=False,
            logging_steps=max(1, settings.num_batches // _LOGGED),
            logging_first_step=True,
            logging_nan_inf_filter=False,
            save_strategy="steps",
            save_steps=training.save_every or max(1, settings.num_batches // _CHECKPOINTS),
            save_total_limit=2,
            disable_tqdm=True,
            report_to=["tensorboard"] if importlib.util.find_spec("tensorboard") else "none",
        )
    finally:
        os.environ.update(hidden)
    if device.type == "cuda" and not in_processes:
        # With several visible GPUs, Trainer would distribute each batch among threads (DataParallel). Here torchrun's
        # processes do that.
        made._n_gpu = 1
    rows, rest = divmod(settings.batch_size, made.world_size)
    if rest:
        raise KeyreduceError(f"`batch_size` {settings.batch_size} does not divide among {made.world_size} processes")
    micro = min(training.micro_batch or rows, rows)
    if rows % micro:
        raise KeyreduceError(
            f"`micro_batch` {micro} does not divide the {rows} rows that each process takes of a batch"
        )
    made.per_device_train_batch_size, made.gradient_accumulation_steps = micro, rows // micro
    return made


class Rows(torch.utils.data.IterableDataset):
    """An endless stream of rows of ``row_length`` tokens; each pass has the documents in another order.

    Each row is drawn from the next 1,000, so that a batch does not consist of rows of one document.

    Accelerate reads the rows in the first process and distributes each batch among all of them. Row i depends on text
    and seed alone, so that a run that was interrupted, or one in more processes, gets the same rows.

    Raises:
        KeyreduceError: the text does not fill one row.
    """

    def __init__(self, text: TextSource, tokenizer: PreTrainedTokenizerFast, row_length: int, seed: int):
        self.text, self.tokenizer, self.row_length, self.seed = text, tokenizer, row_length, seed
        self.passes = 0
        first_T = next(token_rows(text.in_pieces(seed), tokenizer, row_length))
        if len(first_T) < row_length:
            raise KeyreduceError(
                f"the text has {len(first_T):,} tokens, which do not fill one row of {row_length:,}; "
                "give more text, or a smaller `seq_len`"
            )

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self.passes = 0
        while True:
            self.passes += 1
            seed = self.seed + self.passes - 1
            rows = token_rows(self.text.in_pieces(seed), self.tokenizer, self.row_length)
            yield from ({"input_ids": row_T} for row_T in _shuffled(rows, random.Random(seed)))


def _shuffled(rows: Iterable[torch.Tensor], generator: random.Random) -> Iterator[torch.Tensor]:
    buffer: list[torch.Tensor] = []
    for row_T in rows:
        buffer.append(row_T)
        if len(buffer) > _SHUFFLE_BUFFER:
            place = generator.randrange(len(buffer))
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            yield buffer.pop()
    generator.shuffle(buffer)
    yield from buffer


def text_loss(logits_BTV: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy in nats of each token, given those before it; float32, no shape."""
    return F.cross_entropy(logits_BTV[:, :-1].float().flatten(0, 1), tokens_BT[:, 1:].flatten())


def teacher_loss(student_BTV: torch.Tensor, teacher_BTV: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the mean over tokens of KL(teacher || student) of logits, in nats; float32, no shape.

    Logits are divided by the temperature and the result is multiplied by its square, which keeps gradients of the same
    size at any temperature (Hinton et al., arXiv:1503.02531, section 2).
    """
    student_NV = (student_BTV.float() / temperature).flatten(0, 1).log_softmax(-1)
    teacher_NV = (teacher_BTV.float() / temperature).flatten(0, 1).log_softmax(-1)
    return F.kl_div(student_NV, teacher_NV, reduction="batchmean", log_target=True) * temperature**2


class RecoveryTrainer(Trainer):
    """A Trainer whose loss is that on the text, or with a share of ``distill_weight`` that against a teacher."""

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
            raise DivergedError(f"the loss became NaN or inf at step {self.state.global_step + 1}")
        return norm


class DivergedError(KeyreduceError):
    """The loss, or a gradient, became NaN or inf."""


class ProgressReport(TrainerCallback):
    """Calls ``progress`` with the tokens of each step, and ``note`` with the loss after each ``every`` steps.

    ``tokens_per_step`` counts those of all processes together.
    """

    def __init__(
        self, tokens_per_step: int, note: Callable[[str], None], progress: Callable[[int], None] | None, every: int
    ):
        self.tokens_per_step, self.note, self.every = tokens_per_step, note, every
        self.progress = progress or (lambda tokens: None)

    def on_train_begin(self, args, state, control, **_) -> None:
        """Start the clock; a run that was resumed has done its first steps already."""
        self.begun, self.first = time.monotonic(), state.global_step
        if self.first:
            self.progress(self.first * self.tokens_per_step)

    def on_step_end(self, args, state, control, **_) -> None:
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
