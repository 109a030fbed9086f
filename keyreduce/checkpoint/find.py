"""From what a user calls a model (a folder, a name, nothing) to a checkpoint folder."""

import atexit
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path

from keyreduce.checkpoint.folder import CONFIG_NAME, INDEX_NAME, SINGLE_NAME, open_folder
from keyreduce.checkpoint.source import METADATA_NAME, Checkpoint
from keyreduce.errors import KeyreduceError, reason
from keyreduce.outputs import dangling_link

SHIPPED = Path(__file__).parents[1] / "models" / "shipped"
DEFAULT_MODEL = "delta-net-5m"

_log = logging.getLogger(__name__)
_passed_over: set[Path] = set()
"""What was said already of unfinished steps: a command may look more than once."""
_HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py"]
_HUB_FILES += ["README.md", "LICENSE*", "NOTICE*"]


def shipped_models() -> list[str]:
    """Return the names of the models that ship with the package."""
    return sorted(path.name for path in SHIPPED.iterdir() if (path / "config.json").is_file())


def find_model(name: str | None, *, config: Path | None = None) -> Path:
    """Return the Hugging Face folder of a model, for those who load it whole.

    Args:
        name: a Hugging Face folder; a DCP folder (converted into a temporary folder for the life of the process);
            a shipped model's name; a name on the hub; or None for the default shipped model.
        config: for a DCP without one: its config.json, or a folder that holds it and the tokenizer.

    Raises KeyreduceError if there is no such model.
    """
    path = _find_folder(name)
    dcp = find_dcp(path)
    return path if dcp is None else _converted(dcp, config)


def open_model(name: str | None, *, config: Path | None = None) -> Checkpoint:
    """Open a model where it is, a DCP too: what :func:`find_model` takes.

    Raises KeyreduceError if there is no such model, or it is damaged.
    """
    path = _find_folder(name)
    dcp = find_dcp(path)
    if dcp is None:
        return open_folder(path)
    from keyreduce.checkpoint.dcp_source import DcpCheckpoint  # torch's DCP code takes a second to import

    return DcpCheckpoint(dcp, config=config)


def find_dcp(path: Path) -> Path | None:
    """Return the distributed checkpoint at ``path``, or None.

    It is the folder itself where that holds one, else its complete ``step-N`` of the highest N. DCP writes
    ``.metadata`` last: a step without it is one whose writing did not end, and is passed over with a word in the log.

    Raises KeyreduceError if there is nothing but what was not finished.
    """
    path = Path(path)
    if (path / METADATA_NAME).is_file():
        return path
    steps = [step for step in path.glob("step-*") if re.fullmatch(r"step-\d+", step.name)]
    steps.sort(key=lambda step: int(step.name.removeprefix("step-")), reverse=True)
    found = next((step for step in steps if (step / METADATA_NAME).is_file()), None)
    unfinished = steps if found is None else steps[: steps.index(found)]
    is_hf = (path / SINGLE_NAME).is_file() or (path / INDEX_NAME).is_file()
    for folder in () if is_hf or found else (path, *unfinished):
        if any(folder.glob("*.distcp")):
            raise KeyreduceError(
                f"{folder} holds .distcp files but no {METADATA_NAME}, which is written last: the checkpoint was not "
                "finished, or not all of it was copied"
            )
    if found is not None and unfinished and (passed := unfinished[0]) not in _passed_over:
        _passed_over.add(passed)
        _log.warning("%s has no %s: its writing did not end, and %s is taken", passed, METADATA_NAME, found.name)
    return found


def find_checkpoints(base: Path) -> dict[str, str]:
    """Return every checkpoint at or below a folder: its name, which may hold slashes, and its folder.

    They are Hugging Face folders, and all steps of a DCP. Hidden folders are passed over: they hold what has not been
    finished. Links are followed.

    Raises KeyreduceError if there is no such folder, or no checkpoint in it.
    """
    base = Path(base)
    if not base.is_dir():
        raise KeyreduceError(f"there is no folder {base} of checkpoints")
    found, seen = {}, set()
    for folder, subfolders, files in os.walk(base, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()  # a link to what was walked already
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        is_hf = CONFIG_NAME in files and (SINGLE_NAME in files or INDEX_NAME in files)
        if is_hf or METADATA_NAME in files:
            name = Path(folder).relative_to(base).as_posix()
            found[base.resolve().name if name == "." else name] = folder
    if not found:
        raise KeyreduceError(f"{base} holds no checkpoint: neither a Hugging Face folder with safetensors nor a DCP")
    return dict(sorted(found.items()))


def _find_folder(name: str | None) -> Path:
    found = find_local(name)
    return _from_hub(str(name)) if found is None else found


def find_local(name: str | None) -> Path | None:
    """Return the folder that a model's name stands for on this machine; None for a name on the hub.

    Raises KeyreduceError if the name stands for nothing.
    """
    name = DEFAULT_MODEL if name is None else name
    if os.path.isdir(name):
        return Path(name)
    if name in shipped_models():
        return SHIPPED / name
    if message := dangling_link(name):
        raise KeyreduceError(message)
    if not os.path.exists(name) and _HUB_NAME.fullmatch(name):
        return None
    raise KeyreduceError(
        f"there is no model {name!r}: give a checkpoint folder, a name on the hub (owner/name), "
        f"or a shipped model ({', '.join(shipped_models())})"
    )


def model_name(name: str | None) -> str:
    """Return what to call a model in records and titles: a folder by its full path, since they are read elsewhere."""
    name = DEFAULT_MODEL if name is None else name
    return os.path.realpath(name) if os.path.isdir(name) else name


def _converted(dcp: Path, config: Path | None) -> Path:
    from keyreduce.checkpoint.card import read_card, write_record
    from keyreduce.checkpoint.dcp_source import DcpCheckpoint
    from keyreduce.checkpoint.record import Record
    from keyreduce.checkpoint.rewrite import rewrite

    folder = Path(tempfile.mkdtemp(prefix="keyreduce-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    checksums = rewrite(DcpCheckpoint(dcp, config=config), folder)
    if (record := Record.read(dcp)) != Record():
        write_record(open_folder(folder), record, checksums, read_card(dcp))
    return folder


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except (OSError, ValueError) as error:
        raise KeyreduceError(
            f"there is no folder {name}, and the hub did not give a model of that name: {reason(error)}"
        ) from None
