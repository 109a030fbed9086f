"""From what a user calls a model (a folder, a name, nothing) to a checkpoint folder, and on to a loaded model."""

from __future__ import annotations

import atexit
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from keyreduce.checkpoint.dcp_folder import find_dcp
from keyreduce.checkpoint.folder import open_folder
from keyreduce.errors import KeyreduceError
from keyreduce.families import Family, family_of

if TYPE_CHECKING:
    # Only for the types: `prune` finds models too, and must not wait for transformers.
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SHIPPED = Path(__file__).parent / "shipped"
DEFAULT_MODEL = "delta-net-5m"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Errors of other libraries whose message needs no type beside it.
_TOLD_BY_MESSAGE = (AssertionError, ImportError, OSError, RuntimeError, ValueError)
_HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken"]

_log = logging.getLogger(__name__)


class LoadedModel(NamedTuple):
    """A model ready to run, with what is needed to feed it and to know its parts."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    family: Family
    folder: Path


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


def pick_device(device: str | None) -> torch.device:
    """Return the device to compute on: the one named, else a GPU where there is one, else the CPU.

    Raises:
        KeyreduceError: no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
        torch.zeros((), device=picked).item()
    except (RuntimeError, AssertionError) as error:
        raise KeyreduceError(f"device {device!r} cannot be used here: {_reason(error)}") from None
    return picked


def pick_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in: the one named, else bfloat16 on a GPU and float32 on a CPU.

    Raises:
        KeyreduceError: no such dtype.
    """
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise KeyreduceError(f"dtype {dtype!r} is unknown; take one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def prepare_backend(device: torch.device) -> None:
    """Make fla's model classes known to transformers, and make them run on ``device``.

    On a CPU that takes our PyTorch backend; on a GPU fla's own kernels are left alone.

    Raises:
        KeyreduceError: the installed fla is of a version that the backend does not fit.
    """
    if device.type == "cpu":
        import fla_torch

        try:
            fla_torch.enable()
        except fla_torch.UnsupportedVersionError as error:
            raise KeyreduceError(str(error)) from error
    import fla  # noqa: F401  (registers its models)


def load_model(folder: Path, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """Load a checkpoint folder in evaluation mode.

    Args:
        folder: a Hugging Face folder, as :func:`find_model` returns it.
        device: where to put the model.
        dtype: what to compute in; the weights are cast.

    Raises:
        KeyreduceError: no DeltaNet-family checkpoint is there, it does not load, weights are missing, or one is NaN or
            inf.
    """
    config = open_folder(folder).config
    family = family_of(config)
    family.sizes(config)
    prepare_backend(device)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as their_logging

    their_logging.disable_progress_bar()  # the commands show progress themselves
    verbosity = their_logging.get_verbosity()
    their_logging.set_verbosity_error()  # what its report of the weights says, _check_weights says in one line
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
        model = model.to(device).eval()
    except Exception as error:
        # A config that no model would have makes its constructor raise nearly anything.
        raise KeyreduceError(f"{folder} does not load: {_reason(error)}") from error
    finally:
        their_logging.set_verbosity(verbosity)
    _check_weights(folder, report)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise KeyreduceError(f"tensor {name!r} of {folder} holds NaN or inf: the checkpoint is damaged")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        # The library that parses tokenizer.json raises Exception itself.
        reason = _reason(error) if any(folder.glob("tokenizer*")) else "there is no file of one"
        raise KeyreduceError(
            f"{folder} has no tokenizer that loads ({reason}); put the tokenizer.json of the model there"
        ) from error
    return LoadedModel(model, tokenizer, family, folder)


def _check_weights(folder: Path, report: dict) -> None:
    """Refuse what transformers would fill with random numbers, and mention what it leaves out."""
    if report["mismatched_keys"]:
        name, found, expected = min(report["mismatched_keys"])
        raise KeyreduceError(
            f"tensor {name!r} of {folder} is {list(found)}, where config.json makes it {list(expected)}: "
            "they belong to different models"
        )
    if report["missing_keys"]:
        raise KeyreduceError(
            f"{folder} has no tensor {min(report['missing_keys'])!r}, which its config.json asks for; "
            "get the rest of the checkpoint"
        )
    if report["unexpected_keys"]:
        name, count = min(report["unexpected_keys"]), len(report["unexpected_keys"])
        _log.warning("%s: the model has no place for %d of its tensors, such as %r", folder, count, name)


def _reason(error: Exception) -> str:
    """The first sentence of an error of another library; with its type, where that says what the sentence does not."""
    sentence = re.split(r"\. |\n", str(error))[0].rstrip(".:")
    return sentence if sentence and isinstance(error, _TOLD_BY_MESSAGE) else f"{type(error).__name__}: {sentence}"


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
            f"there is no folder {name}, and the hub did not give a model of that name: {_reason(error)}"
        ) from None
