"""From what a user calls a model (a folder, a name, nothing) to a checkpoint folder."""

import atexit
import os
import re
import shutil
import tempfile
from pathlib import Path

from keyreduce.checkpoint.dcp_folder import find_dcp
from keyreduce.errors import KeyreduceError, reason

SHIPPED = Path(__file__).parents[1] / "models" / "shipped"
DEFAULT_MODEL = "delta-net-5m"

_HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py"]


def shipped_models() -> list[str]:
    """Return the names of the models that ship with the package."""
    return sorted(path.name for path in SHIPPED.iterdir() if (path / "config.json").is_file())


def find_model(name: str | None) -> Path:
    """Return the Hugging Face folder of a model.

    Args:
        name: a Hugging Face folder; a DCP folder (converted into a temporary folder for the life of the process);
            a shipped model's name; a name on the hub; or None for the default shipped model.

    Raises:
        KeyreduceError: there is no such model.
    """
    name = name or DEFAULT_MODEL
    path = Path(name)
    if os.path.isdir(name):
        dcp = find_dcp(path)
        return path if dcp is None else _converted(dcp)
    if name in shipped_models():
        return SHIPPED / name
    if not os.path.exists(name) and _HUB_NAME.fullmatch(name):
        return _from_hub(name)
    raise KeyreduceError(
        f"there is no model {name!r}: give a checkpoint folder, a name on the hub (owner/name), "
        f"or a shipped model ({', '.join(shipped_models())})"
    )


def model_name(name: str | None) -> str:
    """Return what to call a model in records and titles: a folder by its full path, since they are read elsewhere."""
    name = name or DEFAULT_MODEL
    return os.path.realpath(name) if os.path.isdir(name) else name


def _converted(dcp: Path) -> Path:
    from keyreduce.checkpoint.dcp import dcp_to_hf  # torch's DCP code takes a second to import

    folder = Path(tempfile.mkdtemp(prefix="keyreduce-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    dcp_to_hf(dcp, folder)
    return folder


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except (OSError, ValueError) as error:
        raise KeyreduceError(
            f"there is no folder {name}, and the hub did not give a model of that name: {reason(error)}"
        ) from None
