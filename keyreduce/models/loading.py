"""A checkpoint folder as a model that is ready to run: its backend, its weights, its tokenizer."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as their_logging

from keyreduce.checkpoint.folder import open_folder
from keyreduce.checkpoint.rewrite import is_finite
from keyreduce.errors import KeyreduceError, UnknownArchitecture, reason
from keyreduce.families import Family, family_of
from keyreduce.families.mixer_tensors import check_mixers, refuse_faults
from keyreduce.models.classes import class_of, family_in, from_pretrained, refuse_headless
from keyreduce.models.fp8 import cast_parameters, plain_numbers
from keyreduce.models.miscompiled import warn_of_wrong_results
from keyreduce.models.tokenizers import check_vocabulary, embedding_rows, load_tokenizer

_log = logging.getLogger(__name__)


class LoadedModel(NamedTuple):
    """A model ready to run, with what is needed to feed it and to know its parts."""

    model: PreTrainedModel
    tokenizer: Any  # a PreTrainedTokenizerFast, or None where it was not asked for
    family: Family
    folder: Path


def prepare_backend(device: torch.device, *, gradients: bool = False) -> None:
    """Make fla's model classes known to transformers, and make them run on ``device``.

    On a CPU that takes our PyTorch backend; on a GPU fla's own kernels are left alone, unless there will be backward
    passes: its backward kernels refuse some dtypes and some pairs of GPU and Triton, and take minutes to tune
    themselves. The choice holds until the next model is loaded. On either, fla's models decode with the installed
    transformers, and those with softmax layers are built without flash-attn too.

    Raises KeyreduceError if the installed fla is of a version that the backend does not fit.
    """
    import fla_torch

    # Where an earlier model of this process asked for PyTorch on a GPU, this one gets the kernels back.
    if device.type == "cpu" or gradients or fla_torch.is_enabled():
        try:
            fla_torch.enable(cuda=gradients and device.type != "cpu")
        except fla_torch.UnsupportedVersionError as error:
            raise KeyreduceError(str(error)) from error
    import fla  # noqa: F401  (registers its models)

    import keyreduce.models.delta_net_2  # noqa: F401  (registers itself)

    fla_torch.mend()


def load_model(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    gradients: bool = False,
    placement: Mapping | None = None,
    with_tokenizer: bool = True,
    with_head: bool = True,
) -> LoadedModel:
    """Load a checkpoint folder in evaluation mode.

    Args:
        folder: a Hugging Face folder, as :func:`keyreduce.checkpoint.find.find_model` returns it.
        device, gradients: see :func:`prepare_backend`.
        dtype: what to compute in; the weights are cast. Where fla's kernels refuse it, PyTorch's take their place.
        placement: what :func:`keyreduce.models.offloading.offloading` gives, where layers are to wait elsewhere.
        with_tokenizer: whether its tokenizer is needed; without, it need not have one.
        with_head: whether its predictions of tokens are needed.

    Raises KeyreduceError if no DeltaNet-family checkpoint is there, it does not load, its mixers are not those that the
    config asks for, weights are missing, one is NaN or inf, or it has no tokenizer that fits it, or predicts no tokens,
    where that is needed.
    """
    source = open_folder(folder)
    config = source.config
    family = family_of(config)
    family.layer_sizes(config)
    with contextlib.suppress(UnknownArchitecture):  # of a quantised model the table says nothing
        check_mixers(config, source.shapes, folder)
    tokenizer = None
    if with_tokenizer:
        with silenced():
            tokenizer = load_tokenizer(folder)
        check_vocabulary(tokenizer, embedding_rows(source), folder)
    # fla's kernels of the ungated rule refuse float32.
    refused = device.type == "cuda" and dtype == torch.float32 and "chunk_delta_rule" in family.operators
    in_torch = gradients or refused
    prepare_backend(device, gradients=in_torch)
    if not in_torch:
        warn_of_wrong_results(family, config, device)
    plain = plain_numbers(folder, config)
    try:
        with silenced():
            model, report = _loader_for(folder)(
                folder, dtype=dtype, ignore_mismatched_sizes=True, trust_remote_code=False, **plain, **(placement or {})
            )
            model = (model if placement else model.to(device)).eval()
    except Exception as error:
        # A config that no model would have makes its constructor raise nearly anything.
        raise KeyreduceError(f"{folder} does not load: {reason(error)}") from error
    _check_weights(folder, report)
    if with_head:
        refuse_headless(model, folder)
    if plain:
        cast_parameters(model, dtype)
    for name, parameter in model.named_parameters():
        # Of what waits on the disk the activations will tell.
        if not parameter.is_meta and not is_finite(parameter.detach()):
            raise KeyreduceError(f"tensor {name!r} of {folder} holds NaN or inf: the checkpoint is damaged")
    # Where the language model of a larger one is loaded alone, its mixers are elsewhere than in the checkpoint.
    return LoadedModel(model, tokenizer, family_in(model), folder)


def _loader_for(folder: Path) -> Any:
    """Return the ``from_pretrained`` that loads a folder.

    The auto class of causal language models also takes them out of larger models.
    """
    model_class = class_of(theirs := AutoConfig.from_pretrained(folder, trust_remote_code=False))
    if model_class is None or model_class is MODEL_FOR_CAUSAL_LM_MAPPING.get(type(theirs), None):
        return partial(AutoModelForCausalLM.from_pretrained, output_loading_info=True)
    return partial(from_pretrained, model_class)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Keep transformers from reporting what is said in one line here, and from a bar beside those of the commands."""
    verbosity, has_bar = their_logging.get_verbosity(), their_logging.is_progress_bar_enabled()
    their_logging.set_verbosity_error()
    their_logging.disable_progress_bar()
    try:
        yield
    finally:
        their_logging.set_verbosity(verbosity)
        if has_bar:
            their_logging.enable_progress_bar()


def _check_weights(folder: Path, report: dict) -> None:
    """Refuse what transformers would fill with random numbers, and mention what it leaves out."""
    refuse_faults(
        folder,
        missing=sorted(report["missing_keys"]),
        left_over=(),
        reshaped={name: (found, wanted) for name, found, wanted in sorted(report["mismatched_keys"])},
    )
    if report["unexpected_keys"]:
        name, count = min(report["unexpected_keys"]), len(report["unexpected_keys"])
        _log.warning("%s: the model has no place for %d of its tensors, such as %r", folder, count, name)
