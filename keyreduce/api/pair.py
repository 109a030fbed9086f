"""Which models commands take where none is named, and which ones they compare."""

from pathlib import Path
from typing import TYPE_CHECKING

from keyreduce.api.options import OfPair
from keyreduce.errors import KeyreduceError
from keyreduce.reporting import Reporter
from keyreduce.workspace import Workspace

if TYPE_CHECKING:
    import torch

    from keyreduce.models.loading import LoadedModel


def latest(workspace: Workspace, field: str | None = None) -> Path:
    """Return the folder that commands after ``prune`` take: the recovered model, or the pruned one if there is none.

    A model that was recovered from another pruned model than the one that is there is passed over.

    Raises KeyreduceError if a record is damaged; or if there is no such folder, where ``field`` names another one.
    """
    from keyreduce.checkpoint.record import Record

    recovered, pruned = workspace.recovered, workspace.pruned
    path = recovered if recovered.is_dir() else pruned
    if recovered.is_dir() and pruned.is_dir():
        made_from = [repair["inputs"].get("pruned") for repair in Record.read(recovered).repairs]
        path = recovered if Record.read(pruned).identity in made_from else pruned
    if field is not None and not path.is_dir():
        raise KeyreduceError(f"there is no pruned model at {path}; run keyreduce prune, or name {field}")
    return path


def load_pair(
    request: OfPair,
    reporter: Reporter,
    device: "torch.device",
    dtype: "torch.dtype",
    *,
    with_tokenizer: bool = True,
    each: bool = False,
) -> "dict[str, LoadedModel]":
    """Load the models to compare, labelled ``dense`` and ``pruned``, or the dense one alone where nothing was pruned.

    The dense model is by default the one that the pruned model says it was made from, and the pruned one what
    :func:`latest` finds, labelled ``recovered`` if it was recovered; with ``each`` that comes after the pruned one
    instead of replacing it.

    Raises:
        KeyreduceError: one of them does not load, there is no telling which one is the dense one, or the pruned model
            was not made from it, and the request does not allow that.
    """
    from keyreduce.checkpoint.find import find_model
    from keyreduce.models.loading import load_model

    workspace, compressed = request.workspace, request.compressed
    others = {} if compressed is None else {"pruned": find_model(compressed)}
    if compressed is None and (found := latest(workspace)).is_dir():
        is_recovered = found == workspace.recovered
        others = {"pruned": workspace.pruned} if not is_recovered or (each and workspace.pruned.is_dir()) else {}
        others |= {"recovered": found} if is_recovered else {}
    if others:
        *_, cut = others.values()
        dense = find_dense(request.model, cut, compressed, unrelated=request.unrelated)
    else:
        dense = find_model(request.model)
    models = {}
    for label, folder in {"dense": dense, **others}.items():
        models[label] = load_model(folder, device, dtype, with_tokenizer=with_tokenizer)
    if not others:
        reporter.note(f"there is no pruned model at {workspace.pruned}: the dense model alone is measured")
    return models


def find_dense(
    model: str | None, pruned: Path, pruned_name: str | None = None, *, unrelated: bool, field: str = "model"
) -> Path:
    """Return the folder of the dense model that belongs to a pruned one.

    Args:
        model: the dense model as a user names it; None is the one that the record of the pruned model names.
        pruned, pruned_name: the folder of the pruned model, and what messages call it, if not by its folder.
        unrelated: whether it may be another one than the pruned model was made from.
        field: what messages call the field of the request that names the dense model.

    Raises:
        KeyreduceError: there is no such model, the record names none, or the pruned model was not made from it. To tell
            that, headers and a sample of the weights are read (``Checkpoint.identity``).
    """
    from keyreduce.checkpoint.find import find_model
    from keyreduce.checkpoint.folder import open_folder
    from keyreduce.checkpoint.record import Record

    record = Record.read(pruned)
    name, config = (record.dense, record.dense_config) if model is None else (model, None)
    if name is None:
        raise KeyreduceError(f"{pruned_name or pruned} does not say what it was pruned from; name that with `{field}`")
    try:
        dense = find_model(name, config=Path(config) if config else None)
    except KeyreduceError as error:
        if model is not None:
            raise
        found = f"{pruned_name or pruned} was pruned from {name}, which is not found now; say where with `{field}`"
        raise KeyreduceError(f"{found} ({error})") from error
    entries = record.steps + record.repairs
    made_from = {entry["inputs"].get(source) for entry in entries for source in ("source", "pruned")} - {None}
    if made_from and not unrelated and open_folder(dense).identity not in made_from:
        raise KeyreduceError(
            f"{pruned_name or pruned} was not made from {name}, or that has changed since; give what it was made from "
            f"as `{field}`, or pass `unrelated` to take this one anyway"
        )
    return dense
