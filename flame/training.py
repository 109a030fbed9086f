"""transformers' Trainer as `pretrain.py` uses it: its arguments, the model that it is given, what it measures and logs.

Shapes: B rows in a batch, T tokens in a row, V token ids.
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from schedule import TimeSchedule
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from keyreduce.data.batches import batches
from keyreduce.errors import KeyreduceError
from keyreduce.evaluation.perplexity import Perplexity, measure_rows

_ENDLESS = 10**9  # steps, where time ends a training


class ByteTrainer(Trainer):
    """`Trainer` that measures bits per byte of held-out rows, and logs tokens a second."""

    def __init__(
        self,
        *,
        heldout_rows: list[torch.Tensor],
        bytes_V: torch.Tensor,
        tokens_per_step: int,
        schedule: TimeSchedule | None,
        **kwargs,
    ):
        super().__init__(eval_dataset=heldout_rows, **kwargs)
        # fla's models take any keyword, by which Trainer believes that they divide the loss by `num_items_in_batch`.
        # They return the mean, which is what Trainer assumes of a model that does not.
        self.model_accepts_loss_kwargs = False
        self.bytes_V, self.tokens_per_step, self.schedule = bytes_V, tokens_per_step, schedule
        self.clock = time.monotonic()

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.schedule is not None and self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.schedule)
        return super().create_scheduler(num_training_steps, optimizer)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        exempt = {name for name, parameter in model.named_parameters() if getattr(parameter, "_no_weight_decay", False)}
        return [name for name in super().get_decay_parameter_names(model) if name not in exempt]

    def floating_point_ops(self, inputs: dict) -> int:
        """Return 0: nobody asks for it, and to count parameters at each step takes milliseconds."""
        return 0

    def evaluate(self, *_, **__) -> dict[str, float]:
        metrics = {"heldout_bits_per_byte": self.bits_per_byte(self.model)}
        self.log(metrics)
        return metrics

    def bits_per_byte(self, model: torch.nn.Module) -> float:
        """Measure a model on the held-out rows, which the processes divide among themselves."""
        rows, processes = self.eval_dataset, self.args.world_size
        if self.is_fsdp_enabled:
            # Each forward pass gathers shards of all processes, so that all must take equally many rows.
            rows = rows[: max(len(rows) // processes, 1) * processes]
        own = measure(model.eval(), rows[self.args.process_index :: processes], self.args, self.bytes_V)
        total = torch.tensor([own.nats, own.bytes], dtype=torch.float64, device=self.args.device)
        nats, num_bytes = self.accelerator.reduce(total, reduction="sum").tolist()
        return nats / math.log(2) / num_bytes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # The log is saved with each checkpoint, so the seconds add up over interruptions.
        before = self.state.log_history[-1] if self.state.log_history else {"seconds": 0.0, "step": 0}
        now = time.monotonic()
        elapsed, self.clock = now - self.clock, now
        logs["seconds"] = round(before["seconds"] + elapsed, 1)
        if "loss" in logs:
            tokens = (self.state.global_step - before["step"]) * self.tokens_per_step
            logs["tokens_per_second"] = round(tokens / elapsed)
        super().log(logs, start_time)


def measure(model: torch.nn.Module, rows: list[torch.Tensor], settings: TrainingArguments, bytes_V) -> Perplexity:
    """Return what it costs a model to predict some rows."""
    rows_BT = batches(rows, settings.per_device_eval_batch_size)
    return measure_rows(model, rows_BT, bytes_V, name="the model in training")


def training_arguments(args: argparse.Namespace) -> TrainingArguments:
    on_cpu = not torch.cuda.is_available()
    in_processes = torch.distributed.is_torchelastic_launched()
    if args.shard and not in_processes:
        raise KeyreduceError("--shard divides a model among processes: start this under torchrun")
    settings = TrainingArguments(
        output_dir=str(args.output / "checkpoints"),
        max_steps=args.steps or _ENDLESS,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=args.warmup,
        weight_decay=args.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and in_processes else None,
        ddp_find_unused_parameters=False,
        fsdp=args.shard,
        fsdp_config={"version": 2} if args.shard else None,
        bf16=not on_cpu,
        # For what is left in float32: matrix products of the PyTorch rule, whose inputs have 8 bits of mantissa anyway.
        tf32=True if args.kernels == "fla" and not on_cpu else None,
        # A copy that blocks would make the CPU wait for the step before.
        accelerator_config={"non_blocking": not on_cpu},
        seed=args.seed,
        train_sampling_strategy="sequential",  # the rows come in random order already
        remove_unused_columns=False,
        logging_first_step=True,
        logging_steps=args.log_every,
        logging_nan_inf_filter=False,  # it would wait for the device at every step
        eval_strategy="steps",
        eval_steps=args.evaluate_every,
        save_steps=args.save_every,
        save_total_limit=2,
        disable_tqdm=True,
        report_to="none",
    )
    rows, rest = divmod(args.batch_size, settings.world_size)
    if rest:
        raise KeyreduceError(f"--batch-size {args.batch_size} does not divide among {settings.world_size} processes")
    micro = min(args.micro_batch or rows, rows)
    if rows % micro:
        raise KeyreduceError(f"--micro-batch {micro} does not divide the {rows} rows that a process takes of a batch")
    settings.per_device_train_batch_size = settings.per_device_eval_batch_size = micro
    settings.gradient_accumulation_steps = rows // micro  # between steps, Trainer adds gradients up without a sync
    return settings


def build_model(args: argparse.Namespace, settings: TrainingArguments) -> PreTrainedModel:
    """Return a new model, whose residual stream and output are as a training wants them."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.config))
    if args.residual == "bfloat16" and settings.device.type == "cuda":
        # Autocast leaves embeddings in float32, and what is added to them: each norm would read and each projection
        # convert twice the bytes.
        model.get_input_embeddings().register_forward_hook(lambda module, given, found: found.to(torch.bfloat16))
    model.forward = without_logits(model.forward)
    return model


def without_logits(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a model's forward so that where there is a loss, it is all: accelerate would widen all logits to float32."""

    @wraps(forward)
    def run(*args, **kwargs):
        output = forward(*args, **kwargs)
        if output.loss is not None:
            output.logits = None
        return output

    return run
