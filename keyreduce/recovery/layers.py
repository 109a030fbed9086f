"""The layer-wise modes of recovery: each layer of a pruned model is fitted to the same layer of the dense model.

The layers are taken one after another from the bottom up, see :mod:`keyreduce.recovery.streams`. The pruned model keeps
its sizes and its config; only its weights change.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from keyreduce.calibration.run import Settings
from keyreduce.checkpoint.record import Record
from keyreduce.checkpoint.shards import torch_dtypes
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.data.batches import batches, spread_of, spread_rows, text_token_ids, token_rows
from keyreduce.data.text import TextSource
from keyreduce.devices import available_memory
from keyreduce.errors import KeyreduceError
from keyreduce.families import family_of
from keyreduce.families.mixer_tensors import expected_tensors
from keyreduce.models.classes import family_in, vocabulary_of
from keyreduce.models.file_tensors import changed_tensors, file_tensors, rehearse_writing
from keyreduce.models.loading import LoadedModel, load_model, prepare_backend
from keyreduce.recovery.least_squares import refit_output
from keyreduce.recovery.modes import REPEATS, Steps
from keyreduce.recovery.pace import Pace
from keyreduce.recovery.reconstruct import reconstruct
from keyreduce.recovery.repeats import check_repeats, with_repeats
from keyreduce.recovery.streams import Stream, open_stream
from keyreduce.recovery.writing_strength import corrected_heads, restore_writing_strength

_CPU = torch.device("cpu")


class Recovered(NamedTuple):
    """What a recovery gives.

    Attributes:
        tensors: name -> the tensors that changed, in the dtypes of the pruned checkpoint.
        tokens: the number of tokens that it used.
        layers: layer -> figures for the record; empty where the whole model was trained.
    """

    tensors: dict[str, torch.Tensor]
    tokens: int
    layers: dict[int, dict[str, float]]


def check_pair(dense: Mapping, pruned: Mapping, names: tuple[str, str]) -> None:
    """Raise KeyreduceError if one config cannot have been pruned from the other; messages use the models' names."""
    family = family_of(pruned)
    known = {
        "architecture": lambda config: family_of(config).model_type,
        "hidden size": family.width,
        "number of layers": family.depth,
        "vocabulary": lambda config: family.language(config).get("vocab_size"),
    }
    for what, read in known.items():
        of_dense, of_pruned = read(dense), read(pruned)
        if of_dense != of_pruned:
            raise KeyreduceError(f"{names[1]} was not pruned from {names[0]}: {what} {of_pruned}, not {of_dense}")


def recover_checkpoint(
    dense: Checkpoint,
    pruned: Checkpoint,
    text: TextSource,
    settings: Settings,
    *,
    steps: Steps | None,
    device: torch.device,
    repeats: float = REPEATS,
    progress: Callable[[int], None] | None = None,
    note: Callable[[str], None] = lambda message: None,
) -> Recovered:
    """Load two models of Hugging Face folders in float32, and do what :func:`recover_layers` does, which see.

    Raises:
        KeyreduceError: a model does not load or cannot be written back, or see :func:`recover_layers`.
    """
    check_pair(dense.config, pruned.config, (str(dense.path), str(pruned.path)))
    beyond_mixers = steps is not None and steps.scope == "block"
    if beyond_mixers:
        prepare_backend(_CPU)  # registers fla's models, which transformers does not know by itself
        rehearse_writing(pruned)
    of_dense, of_pruned = (load_model(source.path, _CPU, torch.float32, with_head=False) for source in (dense, pruned))
    record = Record.read(pruned.path)
    if record.dense_identity == dense.identity:
        restore_writing_strength(of_dense, of_pruned, corrected_heads(record))
    tokens, layers = recover_layers(
        of_dense,
        of_pruned,
        _written_dtypes(of_pruned, pruned, whole=beyond_mixers),
        text,
        settings,
        steps=steps,
        device=device,
        repeats=repeats,
        progress=progress,
        note=note,
    )
    return Recovered(dict(changed_tensors(of_pruned.model, pruned, whole=beyond_mixers)), tokens, layers)


def recover_layers(
    dense: LoadedModel,
    pruned: LoadedModel,
    dtypes: Mapping[str, torch.dtype],
    text: TextSource,
    settings: Settings,
    *,
    steps: Steps | None,
    device: torch.device,
    repeats: float = REPEATS,
    pace: Pace | None = None,
    spread: int | None = None,
    progress: Callable[[int], None] | None = None,
    note: Callable[[str], None] = lambda message: None,
) -> tuple[int, dict[int, dict[str, float]]]:
    """Recover a pruned model, in place.

    Both models are in the memory of ``device`` meanwhile, together with the hidden states of all tokens three times
    over, and with gradient steps four times, where all that takes no more than half of what is free. Else it is in the
    CPU's memory, and one block of one model at a time is on ``device``.

    Args:
        dense, pruned: the models, in float32 and in evaluation mode; they stay on the device that each is on. The
            tokenizer is the dense one's.
        dtypes: parameter of the pruned model -> the dtype that it will be kept in. A layer is rounded to it as soon as
            it is recovered, so that the layers above make up for the rounding too.
        settings: how much text to take.
        steps: the gradient steps that follow the least squares in each layer; None takes none.
        repeats: the share of the rows that are not text (:mod:`keyreduce.recovery.repeats`).
        pace: how the gradient steps run; by default as is best on the device.
        spread: over how many times as much text the rows are spread, which are then of more documents; by default
            :func:`keyreduce.data.batches.spread_of`.
        progress: called with 1 after each layer.
        note: called with a message where the text is shorter than was asked for.

    Returns:
        The number of tokens that were used, and layer -> figures for the record.

    Raises:
        KeyreduceError: the models do not belong together, the dense one has no tokenizer, the text is empty,
            ``repeats`` is no share, or numbers are NaN or inf.
    """
    check_repeats(repeats)
    model, family = pruned.model, pruned.family
    check_pair(dense.model.config.to_dict(), model.config.to_dict(), (str(dense.folder), str(pruned.folder)))
    if dense.tokenizer is None:
        raise KeyreduceError(f"{dense.folder} has no tokenizer, without which text cannot become tokens")
    prepare_backend(device, gradients=True)
    rows = token_rows(text.in_pieces(settings.seed), dense.tokenizer, settings.seq_len)
    rows = spread_rows(rows, settings.num_batches * settings.batch_size, spread or spread_of(settings.tokens))
    rows = with_repeats(rows, repeats, text_token_ids(dense.tokenizer, vocabulary_of(model)), settings.seed)
    taken = list(batches(rows, settings.batch_size, settings.num_batches))
    tokens = sum(batch.numel() for batch in taken)
    if tokens < settings.tokens:
        note(f"the text ended after {tokens:,} of {settings.tokens:,} tokens")
    home = _home(dense, pruned, tokens, device)
    models: tuple[Any, Any] = (dense.model, pruned.model)
    places = [one.device for one in models]
    try:
        before, after = (open_stream(one.to(home), family, taken, device, home) for one in models)
        figures = _recover_streams(before, after, dtypes, steps=steps, seed=settings.seed, pace=pace, progress=progress)
    finally:
        for one, place in zip(models, places, strict=True):
            one.to(place)
    return tokens, figures


def _home(dense: LoadedModel, pruned: LoadedModel, tokens: int, device: torch.device) -> torch.device:
    """Return where both models, and the hidden states of so many tokens, are: on the device or on the CPU."""
    if device.type == "cpu":
        return device
    parameters = sum(one.numel() for loaded in (dense, pruned) for one in loaded.model.parameters())
    width = dense.model.config.get_text_config().hidden_size
    needed = 4 * (parameters + 4 * tokens * width)  # bytes of float32
    return device if needed <= available_memory(device) / 2 else _CPU


def _recover_streams(
    dense: Stream,
    pruned: Stream,
    dtypes: Mapping[str, torch.dtype],
    *,
    steps: Steps | None,
    seed: int,
    pace: Pace | None,
    progress: Callable[[int], None] | None,
) -> dict[int, dict[str, float]]:
    config = pruned.model.config.to_dict()
    mixers, figures = set(pruned.family.mixer_layers(config)), {}
    in_all = 0 if steps is None else steps.number(len(pruned.batches)) * len(mixers)
    pace = pace or Pace.of(pruned.device, in_all)  # one for all layers: what does not work is not tried again
    with pace.products():
        for layer in range(pruned.family.depth(config)):
            with dense.on_device(layer):
                targets = dense.advance(layer, keep_mixer=layer in mixers)
            fitted = steps if layer in mixers else None
            with pruned.on_device(layer):
                if layer in mixers:
                    figures[layer] = refit_output(pruned, layer, targets)
                if fitted is not None:
                    of_scope = targets if fitted.scope == "mixer" else dense.hidden
                    figures[layer] |= reconstruct(pruned, layer, of_scope, fitted, seed=seed, pace=pace)
                if layer in mixers:
                    _round(pruned.model, pruned.block(layer), dtypes)
                given = pruned.advance(layer, keep_mixer=fitted is not None)
            if fitted is not None:
                figures[layer]["missing_reconstructed"] = _missing(given, targets)
            if progress is not None:
                progress(1)
    return figures


def _missing(given: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> float:
    """Return the share of the targets' squares that is missing."""
    missing = energy = torch.zeros((), dtype=torch.float64, device=targets[0].device)
    for one, target in zip(given, targets, strict=True):
        missing = missing + (target.double() - one.double()).square().sum()
        energy = energy + target.double().square().sum()
    return float(missing) / max(float(energy), torch.finfo(torch.float64).tiny)


def _written_dtypes(loaded: LoadedModel, source: Checkpoint, *, whole: bool) -> dict[str, torch.dtype]:
    """Return parameter -> its dtype in the checkpoint, whose files may name and divide parameters in another way."""
    family, dtypes = family_in(loaded.model), {}
    for name, tensor in expected_tensors(source.config, source.tensors).items():
        if name in source.tensors:
            dtype = torch_dtypes()[source.tensors[name].dtype]
            dtypes |= {family.tensor_name(tensor.layer, inner): dtype for inner in tensor.inner}
    if whole:
        # The first piece of a parameter begins where the parameter does.
        in_files = file_tensors(loaded.model, source).items()
        places = {tensor.data_ptr(): torch_dtypes()[source.tensors[name].dtype] for name, tensor in in_files}
        parameters = loaded.model.named_parameters()
        dtypes = {name: places[one.data_ptr()] for name, one in parameters if one.data_ptr() in places} | dtypes
    return dtypes


@torch.no_grad()
def _round(model: nn.Module, block: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter in block.parameters():
        name = names[id(parameter)]
        if name in dtypes:
            parameter.copy_(parameter.to(dtypes[name]))
        if not torch.isfinite(parameter).all():
            raise KeyreduceError(f"recovery made {name!r} NaN or inf: activations overflow, or the model is damaged")
