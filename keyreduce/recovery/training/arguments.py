"""The settings of a training as the arguments of transformers' Trainer."""

import importlib.util
import os
from pathlib import Path

import torch
from transformers import TrainingArguments

from keyreduce.calibration.run import Settings
from keyreduce.errors import KeyreduceError
from keyreduce.processes import is_torchrun
from keyreduce.recovery.modes import Training

_LOGGED = 500  # entries in the log of a run, at the most
_CHECKPOINTS = 10
# From these accelerate concludes that there are several processes. Clusters set them for other programs too.
_LAUNCHER = ("LOCAL_RANK", "MV2_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE")


def trainer_arguments(settings: Settings, training: Training, device: torch.device, folder: Path) -> TrainingArguments:
    """Return Trainer's arguments; one batch of ``settings`` is one step, whatever the number of processes.

    Args:
        settings: the number of batches, and of rows in each.
        training: how the model is trained.
        device: the CPU, or a GPU; each process of torchrun takes a GPU of its own.
        folder: where checkpoints go.

    Raises:
        KeyreduceError: a batch does not divide among the processes, or a process' share of it into micro-batches; or
            ``shard`` was asked for without torchrun, or a GPU other than the first.
    """
    on_cpu, recomputes = device.type == "cpu", training.gradient_checkpointing
    in_processes = is_torchrun()
    if not in_processes:
        _refuse_one_process(training, device)
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
    rows = _micro_batch(settings.batch_size, training.micro_batch, made.world_size)
    made.per_device_train_batch_size = rows
    made.gradient_accumulation_steps = settings.batch_size // made.world_size // rows
    return made


def _micro_batch(batch_size: int, micro_batch: int | None, processes: int) -> int:
    """Return the number of rows that a device takes at a time."""
    rows, rest = divmod(batch_size, processes)
    if rest:
        raise KeyreduceError(f"`batch_size` {batch_size} does not divide among {processes} processes")
    micro = min(micro_batch or rows, rows)
    if rows % micro:
        raise KeyreduceError(
            f"`micro_batch` {micro} does not divide the {rows} rows that each process takes of a batch"
        )
    return micro


def _refuse_one_process(training: Training, device: torch.device) -> None:
    """Refuse what a process cannot do where torchrun did not start it."""
    if training.shard:
        raise KeyreduceError(
            "`shard` distributes a model among processes: start keyreduce under torchrun, or leave it out"
        )
    if device.type == "cuda" and device.index:
        raise KeyreduceError(f"training takes the first GPU; choose with CUDA_VISIBLE_DEVICES={device.index}")
