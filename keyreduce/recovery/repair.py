"""A dense and a pruned model and text to a repaired model: what ``keyreduce recover`` does.

Layer by layer from the bottom, see :mod:`keyreduce.recovery.streams`. The result has the pruned model's sizes and
config, and differs from it in numbers alone.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from keyreduce.calibration.run import Settings
from keyreduce.checkpoint.shards import TORCH_DTYPES
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.data.batches import batches, text_token_ids, token_rows
from keyreduce.data.text import TextSource
from keyreduce.errors import KeyreduceError
from keyreduce.families import family_of
from keyreduce.models.file_tensors import changed_tensors, rehearse_writing
from keyreduce.models.loading import load_model, prepare_backend
from keyreduce.recovery.least_squares import refit_output
from keyreduce.recovery.modes import LEAST_SQUARES, MODES, RECONSTRUCT, REPEATS
from keyreduce.recovery.reconstruct import SCOPES, Steps, reconstruct
from keyreduce.recovery.repeats import check_repeats, with_repeats
from keyreduce.recovery.streams import Stream, open_stream


class Repaired(NamedTuple):
    """What a repair gives.

    Attributes:
        tensors: name -> the tensors that changed, in the dtypes of the pruned checkpoint.
        tokens: how many tokens it saw.
        layers: layer -> figures for the record.
    """

    tensors: dict[str, torch.Tensor]
    tokens: int
    layers: dict[int, dict]


def make_steps(mode: str, options: Mapping[str, object]) -> Steps | None:
    """Return the gradient steps of a mode, or None where it takes none.

    Args:
        mode: one of :data:`keyreduce.recovery.modes.MODES`.
        options: fields of :class:`Steps` that are not to be its defaults.

    Raises:
        KeyreduceError: there is no such mode, it takes no such option, or not this value.
    """
    if mode not in MODES:
        raise KeyreduceError(f"`mode` {mode} is unknown; take one of {', '.join(MODES)}")
    if mode == LEAST_SQUARES:
        if options:
            raise KeyreduceError(f"`mode` {mode} takes no `{min(options)}`; leave it out, or take `mode` {RECONSTRUCT}")
        return None
    steps = Steps(**options)
    if steps.scope not in SCOPES:
        raise KeyreduceError(f"`scope` {steps.scope} is unknown; take one of {', '.join(SCOPES)}")
    if steps.steps < 1 or not 0 < steps.lr < math.inf:
        raise KeyreduceError("`steps` is at least 1, and `lr` above 0")
    return steps


def check_pair(dense: Checkpoint, pruned: Checkpoint) -> None:
    """Refuse two models of which one cannot have been pruned from the other.

    Raises:
        KeyreduceError: they differ in architecture, hidden size, layers or vocabulary.
    """
    family = family_of(pruned.config)
    known = {
        "architecture": lambda config: family_of(config).model_type,
        "hidden size": lambda config: round(family.hidden.read(config)),
        "number of layers": lambda config: round(family.num_layers.read(config)),
        "vocabulary": lambda config: config.get("vocab_size"),
    }
    for what, read in known.items():
        of_dense, of_pruned = read(dense.config), read(pruned.config)
        if of_dense != of_pruned:
            raise KeyreduceError(f"{pruned.path} was not pruned from {dense.path}: {what} {of_pruned}, not {of_dense}")


def repair(
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
) -> Repaired:
    """Repair a pruned model, in float32.

    Both models are in the CPU's memory, with the hidden states of all tokens three times; on ``device`` there is one
    block of one of them at a time.

    Args:
        dense, pruned: the two checkpoints, Hugging Face folders.
        text: what to run through them.
        settings: how much of it.
        steps: the gradient steps that follow the least squares in each layer; None takes none.
        device: where blocks run.
        repeats: the share of the rows that are not text (:mod:`keyreduce.recovery.repeats`).
        progress: called with 1 after each layer.
        note: told where the text is shorter than was asked for.

    Raises:
        KeyreduceError: the models do not belong together, one does not load, the text is empty, ``repeats`` is no
            share, or numbers are NaN or inf.
    """
    settings.check()
    check_repeats(repeats)
    check_pair(dense, pruned)
    beyond_mixers = steps is not None and steps.scope == "block"
    if beyond_mixers:
        rehearse_writing(pruned)
    loaded = {
        name: load_model(source.path, torch.device("cpu"), torch.float32)
        for name, source in (("dense", dense), ("pruned", pruned))
    }
    prepare_backend(device, gradients=True)
    model, family = loaded["pruned"].model, loaded["pruned"].family
    rows = token_rows(text.documents(settings.seed), loaded["dense"].tokenizer, settings.seq_len)
    tokens_S = text_token_ids(loaded["dense"].tokenizer, model.config.vocab_size)
    rows = with_repeats(rows, repeats, tokens_S, settings.seed)
    taken = list(batches(rows, settings.batch_size, settings.num_batches))
    tokens = sum(batch.numel() for batch in taken)
    if tokens < settings.tokens:
        note(f"the text ended after {tokens:,} of {settings.tokens:,} tokens")
    streams = [open_stream(one.model, family, taken, device) for one in loaded.values()]
    dtypes = {name: TORCH_DTYPES[spec.dtype] for name, spec in pruned.tensors.items()}
    layers = repair_streams(*streams, dtypes, steps=steps, seed=settings.seed, progress=progress)
    return Repaired(dict(changed_tensors(model, pruned, whole=beyond_mixers)), tokens, layers)


def repair_streams(
    dense: Stream,
    pruned: Stream,
    dtypes: dict[str, torch.dtype],
    *,
    steps: Steps | None,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> dict[int, dict]:
    """Repair the model of one stream by that of another, in place; both end behind their last block.

    Args:
        dense, pruned: the streams, before their first block.
        dtypes: parameter -> the dtype that it will be written in. A layer is rounded to it as soon as it is repaired,
            so that the layers above make up for the rounding too.
        steps: the gradient steps in each layer, or None.
        seed: of what is drawn.
        progress: called with 1 after each layer.

    Returns:
        Layer -> figures for the record.

    Raises:
        KeyreduceError: numbers are NaN or inf.
    """
    config = pruned.model.config.to_dict()
    mixers, figures = set(pruned.family.mixer_layers(config)), {}
    for layer in range(round(pruned.family.num_layers.read(config))):
        with dense.on_device(layer):
            targets = dense.advance(layer, keep_mixer=layer in mixers)
        with pruned.on_device(layer):
            if layer in mixers:
                figures[layer] = refit_output(pruned, layer, targets)
                if steps is not None:
                    of_scope = targets if steps.scope == "mixer" else dense.hidden
                    figures[layer] |= reconstruct(pruned, layer, of_scope, steps, seed=seed)
                _round(pruned.model, pruned.block(layer), dtypes)
            pruned.advance(layer)
        if progress is not None:
            progress(1)
    return figures


@torch.no_grad()
def _round(model: nn.Module, block: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter in block.parameters():
        name = names[id(parameter)]
        if name in dtypes:
            parameter.copy_(parameter.to(dtypes[name]))
        if not torch.isfinite(parameter).all():
            raise KeyreduceError(f"the repair made {name!r} NaN or inf: activations overflow, or the model is damaged")
