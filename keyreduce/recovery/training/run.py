"""The modes lora and full of recovery: a pruned model is trained as a whole.

The loop is transformers' Trainer, with accelerate's processes and sharding. The model's sizes and config stay.
"""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from keyreduce.calibration.run import Settings
from keyreduce.checkpoint.rewrite import is_finite
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.data.text import TextSource
from keyreduce.errors import KeyreduceError
from keyreduce.models.file_tensors import changed_tensors
from keyreduce.models.loading import LoadedModel, load_model, prepare_backend, silenced
from keyreduce.outputs import read_json, write_json
from keyreduce.recovery.modes import LORA, Training
from keyreduce.recovery.training.checks import check, refuse_other_vocabulary, refuse_without_extra
from keyreduce.recovery.training.lora import add_lora, merge_lora
from keyreduce.recovery.training.trainer import DivergedError, ProgressReport, RecoveryTrainer, Rows, trainer_arguments

_INPUTS_NAME = "recipe.json"


class Trained(NamedTuple):
    """What a training gives.

    Attributes:
        tensors: name -> the tensors that changed, in the dtypes of the pruned checkpoint.
        tokens: the number of tokens that it used.
        passes: the number of passes through the text that were begun.
        logged: step -> its loss, nats per token.
        trained: the number of trained parameters.
    """

    tensors: dict[str, torch.Tensor]
    tokens: int
    passes: int
    logged: dict[int, float]
    trained: int

    @property
    def losses(self) -> list[float]:
        """The losses that were logged, in order."""
        return list(self.logged.values())

    def figures(self, tokens_per_step: int) -> dict:
        """Return the figures for the record; the first and last loss are means over a twentieth of the log each."""
        few = max(1, len(self.losses) // 20)
        return {
            "trained_parameters": self.trained,
            "passes": self.passes,
            "loss_first": sum(self.losses[:few]) / few,
            "loss_last": sum(self.losses[-few:]) / few,
            "losses": [[step * tokens_per_step, round(loss, 6)] for step, loss in self.logged.items()],
        }


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
    inputs: dict,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
    note: Callable[[str], None] = lambda message: None,
) -> Trained | None:
    """Train a pruned model; under ``torchrun`` every process calls this, and all but the first get None.

    Args:
        pruned: the checkpoint to begin with, a Hugging Face folder.
        teacher: the model to learn from, or None to learn from the text alone.
        settings: ``num_batches`` steps of ``batch_size`` rows of ``seq_len`` tokens, of all processes together.
        mode: ``lora`` or ``full``.
        folder: where checkpoints go; a training whose checkpoints are there already is resumed.
        inputs: what the result depends on, as a JSON object; checkpoints from other inputs are refused.
        overwrite: whether these are removed instead.
        progress: called with a number of tokens after each step.
        note: called with messages about the progress.

    Raises:
        KeyreduceError: models do not load or belong together, there is too little memory, the text does not fill a row,
            a LoRA target matches nothing, a setting does not fit, processes do not share ``folder``, or the loss
            becomes NaN or inf (:class:`DivergedError`; the last checkpoint is kept).
    """
    refuse_without_extra()
    if settings.seq_len < 2:
        raise KeyreduceError("`seq_len` is 1; training needs at least 2, to predict one token from the other")
    with silenced(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of what transformers will change
        arguments = trainer_arguments(settings, training, device, folder)
        device = arguments.device
        prepare_backend(device, gradients=training.kernels == "torch")
        if teacher is not None:
            refuse_other_vocabulary(pruned, teacher)
        targets = check(pruned, teacher, settings, mode, training, arguments)
        # FSDP takes weights of one dtype alone, and LoRA's additions are float32.
        loaded = _load(pruned, training, device, is_frozen=mode == LORA and not training.shard)
        assert loaded.tokenizer is not None
        rows = Rows(text, loaded.tokenizer, settings.seq_len, settings.seed)
        # All that can refuse the inputs has passed before the folder is made.
        checkpoint = _checkpoint_to_resume(folder, inputs, overwrite, is_first=arguments.process_index == 0)
        model = add_lora(loaded.model, targets, training, settings.seed) if mode == LORA else loaded.model
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        taught_by = teacher and _load(teacher, training, device, is_frozen=True).model.requires_grad_(False)
        trainer = RecoveryTrainer(
            model=model.train(),
            args=arguments,
            train_dataset=rows,
            teacher=taught_by,
            distill_weight=training.distill_weight,
            temperature=training.temperature,
        )
        every = max(1, settings.num_batches // 20)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(ProgressReport(settings.batch_size * settings.seq_len, note, progress, every))
        if checkpoint is not None:
            note(f"resuming from {checkpoint}")
        state = _trained_state(trainer, checkpoint, folder)
        if arguments.process_index:
            return None
        final = _final(pruned, mode, training, targets, state)
    logged = {int(entry["step"]): entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    return Trained(dict(_changed(final, pruned)), settings.tokens, rows.passes, logged, trained)


def _trained_state(trainer: RecoveryTrainer, checkpoint: str | None, folder: Path) -> Mapping[str, Any]:
    """Run the training, and return the model's parameters, gathered from all processes."""
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except DivergedError as error:
        kept = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        where = f"the last good checkpoint is {kept}" if kept else "there was no checkpoint yet"
        raise KeyreduceError(f"{error}: {where}; give a lower `lr`, with `overwrite` to start again") from error
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    # Sharded weights are gathered by kernels that may still run on the GPU. A process that ended before they are done
    # would leave the others waiting for its share for ever.
    if trainer.args.device.type == "cuda":
        torch.cuda.synchronize(trainer.args.device)
    trainer.accelerator.wait_for_everyone()
    return state


def _load(source: Checkpoint, training: Training, device: torch.device, *, is_frozen: bool) -> LoadedModel:
    """Return a model in float32, or in bfloat16 if it is frozen and on a GPU, where training computes in bfloat16."""
    dtype = torch.bfloat16 if is_frozen and device.type != "cpu" else torch.float32
    return load_model(source.path, device, dtype, gradients=training.kernels == "torch")


def _checkpoint_to_resume(folder: Path, inputs: dict, overwrite: bool, *, is_first: bool) -> str | None:
    """Return the last complete checkpoint of a training from the same inputs, or None; all processes call this.

    The first process removes other checkpoints and writes the inputs into the folder.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    # The inputs are compared first, since the first process may be removing the checkpoints already.
    is_same = _is_from(folder, inputs)
    # Trainer writes ``trainer_state.json`` last: a checkpoint without it is incomplete.
    complete = [one.parent for one in folder.glob("checkpoint-*/trainer_state.json")]
    if complete and not is_same and not overwrite:
        raise KeyreduceError(
            f"{folder} holds checkpoints of a training from other inputs; pass `overwrite` to replace them, "
            "or another output"
        )
    if is_first and not is_same:
        shutil.rmtree(folder, ignore_errors=True)
        write_json(folder / _INPUTS_NAME, inputs)
    newest = max(complete if is_same else (), key=lambda one: int(one.name.rpartition("-")[2]), default=None)
    PartialState().wait_for_everyone()
    if not all(gather_object([_is_from(folder, inputs)])):
        if is_first and newest is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise KeyreduceError(f"not all processes see {folder}: put `output` on a file system that all nodes share")
    return newest and str(newest)


def _is_from(folder: Path, inputs: dict) -> bool:
    path = folder / _INPUTS_NAME
    return path.is_file() and read_json(path) == json.loads(json.dumps(inputs))


def _final(
    pruned: Checkpoint, mode: str, training: Training, targets: list[str], state: Mapping[str, Any]
) -> PreTrainedModel:
    """Return the trained model in float32 on the CPU, with low-rank additions merged."""
    model = load_model(pruned.path, torch.device("cpu"), torch.float32, gradients=True).model
    if mode != LORA:
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        return model
    # Only the additions are taken: during training the frozen weights may have been rounded to bfloat16.
    whole = add_lora(model, targets, training, seed=0)
    whole.load_state_dict({name: tensor for name, tensor in state.items() if ".lora_" in name}, strict=False)
    return merge_lora(whole)


def _changed(model: PreTrainedModel, pruned: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in changed_tensors(model, pruned, whole=True):
        if not is_finite(tensor):
            raise KeyreduceError(f"training made {name!r} NaN or inf; give a lower `lr`")
        yield name, tensor
