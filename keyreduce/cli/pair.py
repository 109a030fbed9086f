"""Which models commands take where none is named, and which ones they compare."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from keyreduce.cli.console import Console
    from keyreduce.models.loading import LoadedModel
    from keyreduce.workspace import Workspace


def latest(workspace: "Workspace") -> Path:
    """Return the folder that commands after ``prune`` take: the repaired model, or the pruned one without a repair.

    A repair of another pruned model, made before the one that is there, is passed over.

    Raises:
        KeyreduceError: a record is damaged.
    """
    from keyreduce.pruning.prune import read_record
    from keyreduce.recovery.record import read_repairs

    if not workspace.recovered.is_dir() or not workspace.pruned.is_dir():
        return workspace.recovered if workspace.recovered.is_dir() else workspace.pruned
    made_from = [repair["inputs"].get("pruned") for repair in read_repairs(workspace.recovered)]
    return workspace.recovered if read_record(workspace.pruned).get("identity") in made_from else workspace.pruned


def load_pair(
    console: "Console",
    model: str | None,
    compressed: str | None,
    workspace: "Workspace",
    device: "torch.device",
    dtype: "torch.dtype",
    *,
    with_tokenizer: bool = True,
    each: bool = False,
) -> "dict[str, LoadedModel]":
    """Load the models to compare, labelled ``dense`` and ``pruned``, or the dense one alone where nothing was pruned.

    Without ``--model`` the dense model is the one that the pruned one says it was made from. Without ``--compressed``
    the second one is what :func:`latest` finds, labelled ``recovered`` if it is a repaired one, which is then the third
    with ``each``.

    Raises:
        KeyreduceError: one of them does not load, or there is no telling which one is the dense one.
    """
    from keyreduce.checkpoint.find import find_model
    from keyreduce.errors import KeyreduceError
    from keyreduce.models.loading import load_model
    from keyreduce.pruning.prune import read_record

    others = {} if compressed is None else {"pruned": find_model(compressed)}
    if compressed is None and (found := latest(workspace)).is_dir():
        is_repaired = found == workspace.recovered
        others = {"pruned": workspace.pruned} if not is_repaired or each and workspace.pruned.is_dir() else {}
        others |= {"recovered": found} if is_repaired else {}
    folders = {}
    if others:
        *_, cut = others.values()
        record = read_record(cut)
        dense = model or record.get("dense")
        if dense is None:
            raise KeyreduceError(f"{compressed or cut} does not say what it was pruned from; name that with --model")
        config = record.get("dense_config") if model is None else None
        folders = {"dense": find_model(dense, config=config and Path(config)), **others}
    else:
        folders["dense"] = find_model(model)
    models = {
        label: load_model(folder, device, dtype, with_tokenizer=with_tokenizer) for label, folder in folders.items()
    }
    if not others:
        console.note(f"there is no pruned model at {workspace.pruned}: the dense one alone")
    return models
