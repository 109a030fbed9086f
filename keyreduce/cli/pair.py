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
) -> "dict[str, LoadedModel]":
    """Load the models to compare, labelled ``dense`` and ``pruned``, or the dense one alone where nothing was pruned.

    Without ``--model`` the dense model is the one that the pruned one says it was made from.

    Raises:
        KeyreduceError: one of them does not load.
    """
    from keyreduce.models.loading import find_model, load_model
    from keyreduce.workspace import RECORD_NAME, read_json

    if compressed is None and workspace.pruned.is_dir():
        compressed = str(workspace.pruned)
    folders: dict[str, Path] = {}
    if compressed is None:
        console.note(f"there is no pruned model at {workspace.pruned}: the dense one alone")
        folders["dense"] = find_model(model)
    else:
        pruned = find_model(compressed)
        record = read_json(pruned / RECORD_NAME) if (pruned / RECORD_NAME).is_file() else {}
        folders = {"dense": find_model(model or record.get("dense")), "pruned": pruned}
    return {label: load_model(folder, device, dtype) for label, folder in folders.items()}
