"""Checks that a training passes before it loads its models."""

import importlib.util

import torch
from transformers import AutoTokenizer, TrainingArguments

from keyreduce.calibration.run import Settings
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.devices import available_memory
from keyreduce.errors import KeyreduceError
from keyreduce.families import family_of
from keyreduce.models.file_tensors import rehearse_writing
from keyreduce.models.miscompiled import refuse_wrong_gradients
from keyreduce.recovery.modes import LORA, Training
from keyreduce.recovery.training.lora import find_targets
from keyreduce.recovery.training.memory import Needs, refuse_without_room


def refuse_without_extra() -> None:
    """Refuse to train where packages that it needs are not installed.

    Raises:
        KeyreduceError: names the missing packages.
    """
    missing = [name for name in ("accelerate", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        raise KeyreduceError(f"training needs {' and '.join(missing)}: pip install 'keyreduce[train]'")


def refuse_other_vocabulary(student: Checkpoint, teacher: Checkpoint) -> None:
    """Refuse a teacher whose vocabulary is not the student's.

    Raises:
        KeyreduceError: the vocabularies differ in size or in the numbers of their tokens, or a tokenizer does not load.
    """
    sizes = [source.config.get("vocab_size") for source in (student, teacher)]
    told = f"{teacher.path} cannot teach {student.path}"
    if sizes[0] != sizes[1]:
        raise KeyreduceError(f"{told}: its vocabulary has {sizes[1]} tokens, not {sizes[0]}")
    try:
        vocabularies = [AutoTokenizer.from_pretrained(source.path).get_vocab() for source in (student, teacher)]
    except Exception as error:  # what a tokenizer's library raises is anything
        raise KeyreduceError(f"{told}: a tokenizer does not load ({type(error).__name__})") from error
    if vocabularies[0] != vocabularies[1]:
        raise KeyreduceError(f"{told}: their tokenizers give other numbers to the same tokens")


def check(
    pruned: Checkpoint,
    teacher: Checkpoint | None,
    settings: Settings,
    mode: str,
    training: Training,
    arguments: TrainingArguments,
) -> list[str]:
    """Refuse, before weights are loaded, a training that cannot be done.

    Args:
        pruned: the checkpoint that is to be trained.
        teacher: the checkpoint of its teacher, or None.
        settings: the number of batches, rows and tokens.
        mode: ``lora`` or ``full``.
        training: how the model is trained.
        arguments: the same settings as Trainer's arguments.

    Returns:
        The names of the layers that get low-rank additions; an empty list in mode ``full``.

    Raises:
        KeyreduceError: a LoRA target matches no layer, weights cannot be written back, the gradients of fla's kernels
            are wrong on this device, or there is too little memory.
    """
    model = rehearse_writing(pruned)
    family = family_of(model.config.to_dict())
    if training.kernels == "fla":
        refuse_wrong_gradients(family, model.config.to_dict(), arguments.device, ", or take `kernels` torch")
    every = dict(model.named_parameters())
    targets = find_targets(model, family, training.lora_targets) if mode == LORA else []
    weights = sum(parameter.numel() for parameter in every.values())
    # Low-rank additions to a matrix of m x n are r x (m + n) numbers.
    attended = targets or find_targets(model, family, ())
    added = training.lora_rank * sum(sum(every[f"{target}.weight"].shape) for target in attended)
    micro = arguments.per_device_train_batch_size
    row = settings.seq_len * model.config.vocab_size
    needs = Needs(
        weights=weights,
        trained=added if mode == LORA else weights,
        teacher=0 if teacher is None else sum(_numbers(spec.shape) for spec in teacher.tensors.values()),
        logits=micro * row,
        weight_bytes=4 if arguments.device.type == "cpu" or training.shard else 2,
        shards=arguments.world_size if training.shard else 1,
    )
    smaller = needs._replace(logits=row)
    options = {
        "`micro_batch` 1": smaller,
        "`mode` lora": needs._replace(trained=added),
        "`mode` lora `micro_batch` 1": smaller._replace(trained=added),
        "`mode` lora `micro_batch` 1 without a teacher": smaller._replace(trained=added, teacher=0),
        "`shard` over 8 processes": smaller._replace(shards=8),
    }
    refuse_without_room(needs, available_memory(arguments.device), options)
    return targets


def _numbers(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
