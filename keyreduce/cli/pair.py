"""Which two models `benchmark` and `eval` compare: the dense one, and what was pruned from it."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from keyreduce.cli.console import Console
    from keyreduce.models.loading import LoadedModel
    from keyreduce.workspace import Workspace


def load_pair(
    console: "Console",
    model: str | None,
    compressed: str | None,
    workspace: "Workspace",
    device: "torch.device",
    dtype: "torch.dtype",
    *,
    with_tokenizer: bool = True,
) -> "dict[str, LoadedModel]":
    """Load the models to compare, labelled ``dense`` and ``pruned``, or the dense one alone where nothing was pruned.

    Without ``--model`` the dense model is the one that the pruned one says it was made from.

    Raises:
        KeyreduceError: one of them does not load, or there is no telling which one is the dense one.
    """
    from keyreduce.checkpoint.find import find_model
    from keyreduce.errors import KeyreduceError
    from keyreduce.models.loading import load_model
    from keyreduce.pruning.prune import read_record

    if compressed is None and workspace.pruned.is_dir():
        compressed = str(workspace.pruned)
    folders: dict[str, Path] = {}
    if compressed is None:
        folders["dense"] = find_model(model)
    else:
        pruned = find_model(compressed)
        record = read_record(pruned)
        dense = model or record.get("dense")
        if dense is None:
            raise KeyreduceError(f"{compressed} does not say what it was pruned from; name that with --model")
        config = record.get("dense_config") if model is None else None
        folders = {"dense": find_model(dense, config=config and Path(config)), "pruned": pruned}
    models = {
        label: load_model(folder, device, dtype, with_tokenizer=with_tokenizer) for label, folder in folders.items()
    }
    if compressed is None:
        console.note(f"there is no pruned model at {workspace.pruned}: the dense one alone")
    return models
