"""A pruned model and text to the same model, trained on: what ``keyreduce recover`` does in the modes lora and full.

The loop is transformers' Trainer, with accelerate's processes and sharding; the model's sizes and config stay.
"""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PrinterCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging as their_logging

from keyreduce.calibration.run import Settings
from keyreduce.checkpoint.rewrite import is_finite
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.data.text import TextSource
from keyreduce.errors import KeyreduceError
from keyreduce.models.file_tensors import changed_tensors
from keyreduce.models.loading import LoadedModel, load_model, prepare_backend
from keyreduce.outputs import read_json, write_json
from keyreduce.recovery.training.arguments import trainer_arguments
from keyreduce.recovery.training.checks import check, refuse_other_vocabulary, refuse_without_extra
from keyreduce.recovery.training.lora import add_lora, merge_lora
from keyreduce.recovery.training.rows import Rows
from keyreduce.recovery.training.settings import LORA, Training
from keyreduce.recovery.training.trainer import DivergedError, RecoveryTrainer, Telling

_RECIPE_NAME = "recipe.json"


class Trained(NamedTuple):
    """What a training gives.

    Attributes:
        tensors: name -> the tensors that changed, in the dtypes of the pruned checkpoint.
        tokens: how many tokens it saw.
        passes: how often it went through the text, the last one counted.
        steps: the steps at which the loss was logged.
        losses: the loss there, nats per token.
        trained: how many numbers were trained.
    """

    tensors: dict[str, torch.Tensor]
    tokens: int
    passes: int
    steps: list[int]
    losses: list[float]
    trained: int


def train(
    pruned: Checkpoint,
    teacher: Checkpoint | None,
    text: TextSource,
    settings: Settings,
    mode: str,
    training: Training,
    *,
    device: torch.device,
    folder: Path,
    recipe: dict,
    anew: bool = False,
    progress: Callable[[int], None] | None = None,
    note: Callable[[str], None] = lambda message: None,
) -> Trained | None:
    """Train a pruned model on; under ``torchrun`` every process calls this.

    Args:
        pruned: the checkpoint to begin with, a Hugging Face folder.
        teacher: the model to learn from, or None for the text alone.
        text: what to train on.
        settings: the rows: ``num_batches`` steps of ``batch_size`` rows of ``seq_len`` tokens, of all processes.
        mode, training: how.
        device: where.
        folder: where checkpoints go; one that is there already is gone on from.
        recipe: what the result depends on, as a JSON object; checkpoints of another one are refused.
        anew: whether those are removed instead.
        progress: called with a number of tokens after each step.
        note: told how it goes.

    Returns:
        What came of it; None in all processes but the first.

    Raises:
        KeyreduceError: models do not load or belong together, there is no room, the text does not fill a row, LoRA's
            targets match nothing, a setting does not fit, processes do not share ``folder``, or the loss becomes NaN or
            inf (:class:`DivergedError`, with the last checkpoint kept).
    """
    refuse_without_extra()
    settings.check()
    if settings.seq_len < 2:
        raise KeyreduceError("`seq_len` is 1; training needs at least 2, to predict one from the other")
    with _quiet():
        arguments = trainer_arguments(settings, training, device, folder)
        device = arguments.device
        prepare_backend(device, gradients=training.kernels == "torch")
        if teacher is not None:
            refuse_other_vocabulary(pruned, teacher)
        targets = check(pruned, teacher, settings, mode, training, arguments)
        # FSDP takes weights of one dtype alone, and LoRA's additions are float32.
        loaded = _load(pruned, training, device, is_frozen=mode == LORA and not training.shard)
        rows = Rows(text, loaded.tokenizer, settings.seq_len, settings.seed)
        # After what can refuse the inputs: from here on there is a folder.
        is_first = arguments.process_index == 0
        checkpoint = _last_checkpoint(folder, recipe, anew, is_first=is_first)
        _refuse_unshared(folder, recipe, is_to_go=is_first and checkpoint is None)
        model = add_lora(loaded.model, targets, training, settings.seed) if mode == LORA else loaded.model
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        trainer = RecoveryTrainer(
            model=model.train(),
            args=arguments,
            train_dataset=rows,
            teacher=teacher and _load(teacher, training, device, is_frozen=True).model.requires_grad_(False),
            distill_weight=training.distill_weight,
            temperature=training.temperature,
        )
        telling = Telling(
            settings.batch_size * settings.seq_len, note, progress, every=max(1, settings.num_batches // 20)
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(telling)
        if checkpoint is not None:
            note(f"going on from {checkpoint}")
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except DivergedError as error:
            kept = get_last_checkpoint(str(folder)) if folder.is_dir() else None
            where = f"the last good checkpoint is {kept}" if kept else "there was no checkpoint yet"
            raise KeyreduceError(f"{error}: {where}; give a lower `lr`, with `overwrite` to begin anew") from error
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        # Sharded weights are gathered by kernels that a GPU runs behind its process: one that ended before they are
        # done would leave the others waiting for its share for ever.
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        trainer.accelerator.wait_for_everyone()
        if arguments.process_index:
            return None
        final = _final(pruned, mode, training, targets, state)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return Trained(
        dict(_changed(final, pruned)),
        settings.tokens,
        rows.passes,
        [entry["step"] for entry in log],
        [entry["loss"] for entry in log],
        trained,
    )


def discard(folder: Path) -> None:
    """Remove the checkpoints of a training that is done, or that is not to be gone on with."""
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Let the libraries print neither bars nor what is no matter of the user's."""
    verbosity = their_logging.get_verbosity()
    their_logging.set_verbosity_error()
    their_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # what these libraries are to change in each other
            yield
    finally:
        their_logging.set_verbosity(verbosity)


def _load(source: Checkpoint, training: Training, device: torch.device, *, is_frozen: bool) -> LoadedModel:
    """A model in float32; on a GPU, what is not trained is in bfloat16, which is what all is computed in there."""
    dtype = torch.bfloat16 if is_frozen and device.type != "cpu" else torch.float32
    return load_model(source.path, device, dtype, gradients=training.kernels == "torch")


def _last_checkpoint(folder: Path, recipe: dict, anew: bool, *, is_first: bool) -> str | None:
    """Return the newest complete checkpoint of this very training; ``trainer_state.json`` is what is written last."""
    # In this order: the first process may be removing them right now.
    is_same = _is_of(folder, recipe)
    complete = [one.parent for one in folder.glob("checkpoint-*/trainer_state.json")]
    if complete and not is_same and not anew:
        raise KeyreduceError(
            f"{folder} holds checkpoints of a training from other inputs; pass `overwrite` to begin anew, "
            "or another output"
        )
    if is_first and not is_same:
        discard(folder)
        write_json(folder / _RECIPE_NAME, recipe)
    newest = max(complete if is_same else (), key=lambda one: int(one.name.rpartition("-")[2]), default=None)
    return newest and str(newest)


def _is_of(folder: Path, recipe: dict) -> bool:
    path = folder / _RECIPE_NAME
    return path.is_file() and read_json(path) == json.loads(json.dumps(recipe))


def _refuse_unshared(folder: Path, recipe: dict, *, is_to_go: bool) -> None:
    """Refuse a folder that some processes do not see, as those of another node may not: checkpoints are of them all."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    PartialState().wait_for_everyone()
    if all(gather_object([_is_of(folder, recipe)])):
        return
    if is_to_go:
        discard(folder)
    raise KeyreduceError(f"not all processes see {folder}: put `output` on a file system that all nodes share")


def _final(pruned: Checkpoint, mode: str, training: Training, targets: list[str], state: dict) -> PreTrainedModel:
    """The trained model in float32 on the CPU, as an ordinary one: from one process' state or from all of theirs."""
    model = load_model(pruned.path, torch.device("cpu"), torch.float32, gradients=True).model
    if mode != LORA:
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        return model
    # The additions alone: what they are added to may have been computed in fewer bits than it has.
    whole = add_lora(model, targets, training, seed=0)
    whole.load_state_dict({name: tensor for name, tensor in state.items() if ".lora_" in name}, strict=False)
    return merge_lora(whole)


def _changed(model: PreTrainedModel, pruned: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in changed_tensors(model, pruned, whole=True):
        if not is_finite(tensor):
            raise KeyreduceError(f"training made {name!r} NaN or inf; give a lower `lr`")
        yield name, tensor
