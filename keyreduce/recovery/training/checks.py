"""Checks that a training passes before it loads its models, so that one that cannot fit is refused before the work."""

import importlib.util
from collections.abc import Mapping
from typing import NamedTuple

import torch
from transformers import TrainingArguments

from keyreduce.calibration.run import Settings
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.devices import available_memory
from keyreduce.errors import KeyreduceError
from keyreduce.families import family_of
from keyreduce.models.classes import family_in, refuse_headless, vocabulary_of
from keyreduce.models.file_tensors import rehearse_writing
from keyreduce.models.miscompiled import refuse_wrong_gradients
from keyreduce.models.tokenizers import load_tokenizer
from keyreduce.recovery.modes import LORA, Training
from keyreduce.recovery.training.lora import find_targets

_FLOAT = 4
_MOMENTS = 2
_LOGIT_COPIES = 3  # the logits, their logarithms in float32, and the gradient


class Needs(NamedTuple):
    """What one process has to hold in memory, whatever the kernels; activations are not counted.

    Attributes:
        weights: the number of the student's parameters.
        trained: the number of parameters that are trained, low-rank additions included; each has a gradient and Adam's
            two moments.
        teacher: the number of the teacher's parameters, 0 without one.
        logits: rows x tokens x vocabulary of a micro-batch.
        weight_bytes: bytes of a weight that is not trained.
        shards: the number of processes that weights, gradients and moments are distributed among.
    """

    weights: int
    trained: int
    teacher: int
    logits: int
    weight_bytes: int = _FLOAT
    shards: int = 1

    @property
    def nbytes(self) -> int:
        """The least number of bytes."""
        frozen = max(self.weights - self.trained, 0) * self.weight_bytes
        student = frozen + self.trained * _FLOAT * (2 + _MOMENTS)
        logits = self.logits * _FLOAT * (_LOGIT_COPIES + (1 if self.teacher else 0))
        return student // self.shards + self.teacher * self.weight_bytes + logits


def refuse_without_extra() -> None:
    """Raise KeyreduceError where packages that training needs are not installed."""
    missing = [name for name in ("accelerate", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        raise KeyreduceError(f"training needs {' and '.join(missing)}: pip install 'keyreduce[train]'")


def refuse_other_vocabulary(student: Checkpoint, teacher: Checkpoint) -> None:
    """Raise KeyreduceError if a teacher's vocabulary is not the student's, or a tokenizer does not load."""
    sizes = [family_of(one.config).language(one.config).get("vocab_size") for one in (student, teacher)]
    told = f"{teacher.path} cannot teach {student.path}"
    if sizes[0] != sizes[1]:
        raise KeyreduceError(f"{told}: its vocabulary has {sizes[1]} tokens, not {sizes[0]}")
    try:
        vocabularies = [load_tokenizer(source.path).get_vocab() for source in (student, teacher)]
    except KeyreduceError as error:
        raise KeyreduceError(f"{told}: {error}") from error
    if vocabularies[0] != vocabularies[1]:
        raise KeyreduceError(f"{told}: their tokenizers give different ids to the same tokens")


def check(
    pruned: Checkpoint,
    teacher: Checkpoint | None,
    settings: Settings,
    mode: str,
    training: Training,
    arguments: TrainingArguments,
) -> list[str]:
    """Check, before weights are loaded, that a training can be done; ``arguments`` are its settings as Trainer's.

    Returns:
        The names of the layers that get low-rank additions; an empty list in mode ``full``.

    Raises:
        KeyreduceError: a LoRA target matches no layer, weights cannot be written back, the gradients of fla's kernels
            are wrong on this device, or there is too little memory.
    """
    model = rehearse_writing(pruned)
    refuse_headless(model, pruned.path)
    family = family_in(model)
    if training.kernels == "fla":
        refuse_wrong_gradients(family, model.config.to_dict(), arguments.device, ", or take `kernels` torch")
    every = dict(model.named_parameters())
    targets = find_targets(model, family, training.lora_targets) if mode == LORA else []
    weights = sum(parameter.numel() for parameter in every.values())
    # Low-rank additions to a matrix of m x n are r x (m + n) numbers.
    attended = targets or find_targets(model, family, ())
    added = training.lora_rank * sum(sum(every[f"{target}.weight"].shape) for target in attended)
    micro = arguments.per_device_train_batch_size
    row = settings.seq_len * vocabulary_of(model)
    needs = Needs(
        weights=weights,
        trained=added if mode == LORA else weights,
        teacher=0 if teacher is None else sum(torch.Size(spec.shape).numel() for spec in teacher.tensors.values()),
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
    _refuse_without_room(needs, available_memory(arguments.device), options)
    return targets


def _refuse_without_room(needs: Needs, room: int, options: Mapping[str, Needs]) -> None:
    """Refuse what takes more than ``room`` bytes, and name those of the other settings in ``options`` that fit."""
    if needs.nbytes <= room:
        return
    fitting = [f"{name} ({_gib(other.nbytes)})" for name, other in options.items() if other.nbytes <= room]
    instead = f"these fit: {'; '.join(fitting)}" if fitting else "take a larger device, or more of them with `shard`"
    raise KeyreduceError(
        f"training takes at least {_gib(needs.nbytes)} without activations, and {_gib(room)} are free; {instead}"
    )


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:,.2f} GiB"
