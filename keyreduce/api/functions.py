"""The Python API: what ``import keyreduce`` gives. Models are folders, or modules in memory.

A module is one of fla's or transformers' language models, on any device. The dense one is never changed, and what is
made in memory is, bit by bit, what the commands make of folders. What all functions take:

- ``model``: a folder or a name, or a module, which runs where it is.
- ``texts``: documents as strings, paths of text files or folders, or a TextSource; by default the source of the Python
  standard library, of which ``evaluate`` takes another part than the others.
- ``tokenizer``: of modules; by default the one that was given before, or that of the folder they were loaded from.
- ``output``: a file or folder to write, as the command does.
- ``reporter``: receives remarks and progress.
- ``settings``: other fields of the function's request (:class:`keyreduce.api.prune.PruneRequest` and the like), with
  the same defaults.
"""

import contextlib
import copy
import json
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from keyreduce.api.calibrate import CalibrateRequest
from keyreduce.api.calibrate import run as run_calibrate
from keyreduce.api.evaluate import EvaluateRequest, row_costs
from keyreduce.api.prune import Cut, PruneRequest, PruneResult
from keyreduce.api.prune import run as run_prune
from keyreduce.api.recover import RecoverRequest
from keyreduce.api.recover import run as run_recover
from keyreduce.calibration.file import read_statistics, write_statistics
from keyreduce.calibration.run import Settings, calibrate_loaded
from keyreduce.calibration.statistics import Statistics
from keyreduce.checkpoint.find import find_model
from keyreduce.data.text import DatasetText, DocumentText, FileText, StdlibText, TextSource
from keyreduce.devices import pick_device, pick_dtype
from keyreduce.errors import KeyreduceError
from keyreduce.evaluation.perplexity import Perplexity, total
from keyreduce.families import family_of
from keyreduce.models.classes import family_in
from keyreduce.models.in_memory import ModuleCheckpoint, loaded_module
from keyreduce.models.loading import LoadedModel, load_model
from keyreduce.pruning.in_memory import pruned_module
from keyreduce.recovery.layers import recover_layers
from keyreduce.recovery.modes import AUTO, REPEATS, TRAINING_MODES, Mode, auto_note, make_steps
from keyreduce.reporting import Reporter

Model = str | Path | PreTrainedModel
Texts = TextSource | Path | Sequence[str] | Sequence[Path] | None

_CPU = torch.device("cpu")
_tokenizers: "weakref.WeakKeyDictionary[PreTrainedModel, PreTrainedTokenizerBase]" = weakref.WeakKeyDictionary()
"""The tokenizers of modules: one that was given for a model serves it, and what is pruned from it, from then on."""


def calibrate(
    model: Model,
    texts: Texts = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    output: str | Path | None = None,
    reporter: Reporter = Reporter(),
    **settings: Any,
) -> Statistics:
    """Run text through a model and return statistics of what its mixers see, for every method and every ratio.

    The settings are ``num_batches``, ``batch_size``, ``seq_len``, ``gradients`` and ``seed``; of a folder also
    ``device``, ``dtype``, ``offload``, ``config`` and ``overwrite``.

    Raises:
        KeyreduceError: no table knows the model's type, the text is empty, or numbers are NaN or inf.
    """
    text = _text_source(texts, "calibration")
    if not isinstance(model, PreTrainedModel):
        with tempfile.TemporaryDirectory(prefix="keyreduce-") as scratch, _as_fields(text) as fields:
            target = Path(output or Path(scratch, "calibration.safetensors"))
            run_calibrate(CalibrateRequest(model=_name_of(model), output=target, **fields, **settings), reporter)
            return read_statistics(target)  # mapped: a temporary file lives on until the statistics are let go
    request = CalibrateRequest(**settings)
    amount = Settings(request.num_batches, request.batch_size, request.seq_len, request.seed)
    amount.check(gradients=request.gradients)
    inputs = _loaded(model, tokenizer), ModuleCheckpoint(model), text, amount, model.dtype, request.gradients
    with reporter.progress("calibrating", amount.tokens, "tokens") as progress, _evaluating(model):
        statistics = calibrate_loaded(*inputs, progress=progress, note=reporter.note)
    if output is not None:
        write_statistics(statistics, Path(output), overwrite=request.overwrite)
    return statistics


@overload
def prune(
    model: Model, *, output: None = None, statistics: Statistics | None = None, **settings: Any
) -> PreTrainedModel: ...
@overload
def prune(model: str | Path, *, output: str | Path, statistics: Statistics | None = None, **settings: Any) -> Path: ...
def prune(
    model: Model,
    *,
    method: str = "auto",
    target: str | Sequence[str] = (),
    ratio: float | str | Sequence[float | str] = (),
    statistics: Statistics | None = None,
    output: str | Path | None = None,
    reporter: Reporter = Reporter(),
    **settings: Any,
) -> PreTrainedModel | Path:
    """Return a smaller model: key channels, value channels or whole heads are removed. A module stays as it is.

    Args:
        method: how to choose what is removed.
        target: ``key``, ``value``, ``head``, or several.
        ratio: the share to remove, for all targets or one for each. Without it, and where nothing else says what to
            remove, half of the state goes, in the sizes that lose least (``state_ratio``); of a module they are chosen
            by the statistics alone.
        statistics: what :func:`calibrate` returned. A folder is calibrated first where they are needed and missing. Of
            a module's they must have the sizes; that they are of another model of the same sizes is not noticed.
        settings: ``state_ratio``, ``state_bytes``, ``keep``, ``variance``, ``multiple_of``, ``engine``, ``seed``,
            ``uncorrected``, ... A module that is to be recovered layer by layer is best pruned ``uncorrected``.

    Returns:
        A new module on the model's device; or the path of the folder, where ``output`` is given.

    Raises:
        KeyreduceError: see :func:`keyreduce.api.prune.run`.
    """
    fields = {"method": method, "target": target, "ratio": ratio, **settings}
    if output is not None:
        if isinstance(model, PreTrainedModel):
            raise KeyreduceError("`output` is for a folder that is pruned; save the pruned module with save_pretrained")
        result = run_prune(PruneRequest(model=_name_of(model), output=Path(output), **fields), reporter, statistics)
        return result.pruned if isinstance(result, PruneResult) else result.report
    if not isinstance(model, PreTrainedModel):
        model = _loaded(model, None).model
    request = PruneRequest(**fields).resolved(model.device.type)
    if request.dry_run or request.search == "measured":
        raise KeyreduceError("`dry_run` and `search` measured are for a folder: give its path, and `output`")
    source, cut = ModuleCheckpoint(model), Cut.of(request)
    cut.check(source)
    if statistics is not None:
        _check_sizes(statistics, source)
        statistics = replace(statistics, model=source.identity)
    elif cut.needs_statistics:
        raise KeyreduceError(f"`method` {method} needs `statistics`; make them with keyreduce.calibrate")
    found = None
    if cut.state_budget is not None and statistics is not None:
        found = cut.search(replace(request, search="predicted"), source, statistics, reporter)
    plan = cut.plan(source, statistics, {}, reporter, found)
    small = pruned_module(model, source, plan)
    if model in _tokenizers:
        _tokenizers[small] = _tokenizers[model]
    return small


def recover(
    model: Model,
    teacher: Model | None = None,
    texts: Texts = None,
    *,
    mode: Mode = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    output: str | Path | None = None,
    reporter: Reporter = Reporter(),
    **settings: Any,
) -> PreTrainedModel | Path:
    """Win quality back after pruning. A module is changed in place; a folder becomes another one, ``output``.

    Args:
        model: the pruned model.
        teacher: the dense model, which stays as it is; of a folder by default the one that it was pruned from.
        mode: ``least-squares``, ``reconstruct``, ``lora`` or ``full``; ``auto`` is ``reconstruct`` on a GPU, and
            ``least-squares`` on a CPU.
        settings: ``num_batches``, ``batch_size``, ``seq_len``, ``repeats``, ``steps``, ``lr``, ``scope``, ``seed``,
            ``device``, ...; by default as of :class:`keyreduce.api.recover.RecoverRequest`

    Returns:
        The same module, or the path of the folder.

    Raises:
        KeyreduceError: see :func:`keyreduce.api.recover.run`; or a module and a folder are mixed.
    """
    text = _text_source(texts, "train" if mode in TRAINING_MODES else "calibration")
    if not isinstance(model, PreTrainedModel):
        if output is None or isinstance(teacher, PreTrainedModel):
            raise KeyreduceError("a folder is not changed in place: give `output`, and a folder as `teacher`")
        dense = None if teacher is None else _name_of(teacher)
        with _as_fields(text) as fields:
            settings |= {"mode": mode, "compressed": _name_of(model), "teacher": dense, "output": output, **fields}
            run_recover(RecoverRequest(**settings), reporter)
        return Path(output)
    if output is not None:
        raise KeyreduceError("`output` is for a folder that is recovered; save that module with save_pretrained")
    if not isinstance(teacher, PreTrainedModel):
        raise KeyreduceError("to recover a module, give as `teacher` the dense module that it was pruned from")
    if mode in TRAINING_MODES:
        # By way of folders, since that is where training keeps its checkpoints.
        with tempfile.TemporaryDirectory(prefix="keyreduce-") as scratch:
            pruned, dense, trained = (Path(scratch, name) for name in ("pruned", "teacher", "output"))
            for folder, module in ((pruned, model), (dense, teacher)):
                module.save_pretrained(folder)
                _tokenizer_of(module, tokenizer).save_pretrained(folder)
            recover(pruned, dense, text, mode=mode, output=trained, reporter=reporter, **settings)
            _copy_parameters(load_model(trained, _CPU, torch.float32, with_tokenizer=False).model, model)
        return model
    request = RecoverRequest(mode=mode, **settings)
    device = pick_device(request.device) if request.device else model.device
    request = request.resolved(device.type)
    given = request.settings
    where: dict[str, Any] = {"device": device, "repeats": given.pop("repeats", REPEATS), "note": reporter.note}
    steps = make_steps(request.mode, given)
    amount = request.amount(device.type, family_in(model).width(model.config.to_dict()))
    amount.check()
    if mode == AUTO:
        reporter.note(auto_note(request.mode))
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    dense, pruned = (_copied(one, tokenizer) for one in (teacher, model))
    with reporter.progress("recovering", pruned.family.depth(pruned.model.config.to_dict()), "layers") as progress:
        recover_layers(dense, pruned, dtypes, text, amount, steps=steps, progress=progress, **where)
    _copy_parameters(pruned.model, model)
    return model


def evaluate(
    model: Model,
    texts: Texts = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reporter: Reporter = Reporter(),
    **settings: Any,
) -> Perplexity:
    """Return what it costs a model to predict held-out text: perplexity per token and per word, and bits per byte.

    The settings are ``num_batches``, ``batch_size``, ``seq_len``, ``stride`` and ``by_document``; of a folder also
    ``device`` and ``dtype``.

    Raises:
        KeyreduceError: the text leaves nothing to predict, or a logit is NaN or inf.
    """
    request, text = EvaluateRequest(**settings), _text_source(texts, "heldout")
    loaded = _loaded(model, tokenizer, request.device, request.dtype)
    with _evaluating(loaded.model):
        return total(row_costs(request, loaded, text, reporter))


@torch.no_grad()
def _copy_parameters(source: PreTrainedModel, target: PreTrainedModel) -> None:
    found = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        parameter.copy_(found[name])


def _text_source(texts: Texts, default: Any) -> TextSource:
    if isinstance(texts, TextSource):
        return texts
    if texts is None:
        return StdlibText(default)
    if isinstance(texts, str):
        raise KeyreduceError("`texts` is one string; give a list of documents, or a pathlib.Path")
    items = [texts] if isinstance(texts, Path) else list(texts)
    paths = [item for item in items if isinstance(item, Path)]
    if paths and len(paths) == len(items):
        return FileText(paths)
    documents = [item for item in items if isinstance(item, str)]
    if len(documents) < len(items):
        other = next(item for item in items if not isinstance(item, str))
        raise KeyreduceError(f"`texts` holds {other!r}; it is a list of documents (strings), or of paths alone")
    return DocumentText(documents)


@contextlib.contextmanager
def _as_fields(text: TextSource) -> Iterator[Mapping[str, Any]]:
    """Yield the fields of a request that say the same text; documents in memory are put into a temporary file."""
    if isinstance(text, StdlibText):
        yield {}
    elif isinstance(text, FileText):
        yield {"text": text.paths}
    elif isinstance(text, DatasetText):
        yield {"dataset": text.name, "dataset_config": text.config, "split": text.split}
    else:
        with tempfile.TemporaryDirectory(prefix="keyreduce-") as folder:
            file = Path(folder, "documents.jsonl")
            with file.open("w", encoding="utf-8") as lines:
                lines.writelines(json.dumps({"text": document}) + "\n" for document in text.documents())
            yield {"text": [file]}


def _loaded(
    model: Model, tokenizer: PreTrainedTokenizerBase | None, device: str | None = None, dtype: str | None = None
) -> LoadedModel:
    """Return a model ready to run, with its tokenizer; a folder is loaded."""
    if isinstance(model, PreTrainedModel):
        return loaded_module(model, _tokenizer_of(model, tokenizer))
    place = pick_device(device)
    return load_model(find_model(_name_of(model)), place, pick_dtype(dtype, place))


def _name_of(model: Any) -> str:
    """Return what a request calls a model that is no module in memory."""
    if not isinstance(model, str | Path):
        raise KeyreduceError(f"a model is a folder, a name or a module of transformers, not a {type(model).__name__}")
    return str(model)


def _tokenizer_of(model: PreTrainedModel, given: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if given is not None:
        _tokenizers[model] = given
    if model not in _tokenizers:
        try:
            _tokenizers[model] = AutoTokenizer.from_pretrained(model.name_or_path, trust_remote_code=False)
        except Exception as error:  # what a tokenizer's library raises is anything
            raise KeyreduceError("the module does not say where its tokenizer is; give `tokenizer`") from error
    return _tokenizers[model]


def _copied(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> LoadedModel:
    """Return a copy in float32 on the CPU, in evaluation mode."""
    copied = copy.deepcopy(model).to(device=_CPU, dtype=torch.float32)  # pyright: ignore  (its stub lacks self)
    return loaded_module(copied.eval(), _tokenizer_of(model, tokenizer))


@contextlib.contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Have a model in evaluation mode while the block runs."""
    was_training = model.training
    try:
        model.eval()
        yield
    finally:
        model.train(was_training)


def _check_sizes(statistics: Statistics, source: ModuleCheckpoint) -> None:
    found, wanted = {}, {}
    for layer, sums in statistics.layers.items():
        found[layer] = (*sums.query_gram_HKK.shape[:2], *sums.output_gram_WVV.shape[:2])
    for layer, sizes in family_of(source.config).layer_sizes(source.config).items():
        wanted[layer] = (sizes.key_heads, sizes.head_k_dim, sizes.value_heads, sizes.head_v_dim)
    if found != wanted:
        raise KeyreduceError("`statistics` are of a model of other sizes; calibrate this one")
