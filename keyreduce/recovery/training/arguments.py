"""The settings of a training in the words of transformers' Trainer."""

import importlib.util
from pathlib import Path

import torch
from transformers import TrainingArguments

from keyreduce.calibration.run import Settings
from keyreduce.errors import KeyreduceError
from keyreduce.recovery.training.settings import Training

_LOGGED = 500  # entries in the log of a run, at the most
_CHECKPOINTS = 10


def trainer_arguments(settings: Settings, training: Training, device: torch.device, folder: Path) -> TrainingArguments:
    """Return Trainer's arguments; a batch of ``settings`` is a step, whatever the number of processes.

    Args:
        settings: how many batches, of how many rows.
        training: how.
        device: a CPU, or the GPUs: each process takes its own.
        folder: where checkpoints go.

    Raises:
        KeyreduceError: a batch does not divide among the processes, or a process' share into micro-batches; or what
            was asked for needs processes that there are not.
    """
    on_cpu = device.type == "cpu"
    in_processes = torch.distributed.is_torchelastic_launched()
    if training.shard and not in_processes:
        raise KeyreduceError(
            "`shard` shares a model out among processes: start keyreduce under torchrun, or leave it out"
        )
    if device.type == "cuda" and device.index and not in_processes:
        raise KeyreduceError(f"training takes the first GPU; choose with CUDA_VISIBLE_DEVICES={device.index}")
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
        fsdp=training.shard,
        # FSDP recomputes by itself, with one gathering of weights less.
        fsdp_config={"version": 2, "activation_checkpointing": training.checkpointing} if training.shard else None,
        gradient_checkpointing=training.checkpointing and not training.shard,
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
    if device.type == "cuda" and not in_processes:
        # With several GPUs in sight Trainer would share out each batch among threads (DataParallel); here that is what
        # torchrun's processes are for.
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
