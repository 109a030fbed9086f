"""The tokenizer of a checkpoint folder, without running code of that folder, and whether it fits the model."""

import contextlib
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from keyreduce.checkpoint.source import Checkpoint
from keyreduce.checkpoint.tied import EMBEDDINGS
from keyreduce.errors import KeyreduceError, reason
from keyreduce.outputs import read_json

# Files of a tokenizer that is no tokenizer.json -> the packages that read them.
_READERS = {
    "tokenizer.model": ("sentencepiece", "google.protobuf"),
    "spiece.model": ("sentencepiece", "google.protobuf"),
    "*tiktoken*": ("tiktoken",),
}


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a checkpoint folder.

    Raises KeyreduceError, which names the package that is missing, if none is there, or it does not load.
    """
    try:
        # False, since without it transformers asks on the terminal whether to run the folder's code.
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        # The library that parses tokenizer.json raises Exception itself.
        raise KeyreduceError(
            f"{folder} has no tokenizer that loads ({_why(folder, error)}); put the tokenizer.json of the model there"
        ) from error


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int | None, name: Path) -> None:
    """Refuse a tokenizer with ids that the model, called ``name``, has no embedding for, of which it has ``rows``.

    None is a number that is not known.
    """
    most = max(tokenizer.get_vocab().values(), default=-1)
    if rows is not None and most >= rows:
        raise KeyreduceError(
            f"the tokenizer of {name} has ids up to {most:,}, and the model embeddings of {rows:,} tokens, 0 to "
            f"{rows - 1:,}: one of the two is of another model"
        )


def embedding_rows(source: Checkpoint) -> int | None:
    """Return how many tokens a checkpoint has embeddings for; None where they have another name than is usual."""
    return next((source.shapes[name][0] for name in EMBEDDINGS if source.shapes.get(name)), None)


def _why(folder: Path, error: Exception) -> str:
    if (folder / "tokenizer.json").is_file():
        return reason(error)
    needed = [package for name, readers in _READERS.items() if any(folder.glob(name)) for package in readers]
    # On PyPI they are called by the last part of their module's name.
    missing = [package.rpartition(".")[2] for package in needed if not _is_installed(package)]
    code = None
    with contextlib.suppress(KeyreduceError):
        code = read_json(folder / "tokenizer_config.json").get("auto_map")
    if code:
        package = f", and it needs the package {missing[0]}" if missing else ""
        return f"it is code of the model's repository, which keyreduce does not run{package}"
    if missing:
        return f"the package {missing[0]} is missing: pip install {' '.join(missing)}"
    return reason(error) if needed or any(folder.glob("tokenizer*")) else "there is no file of one"


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False  # of a package inside another one that is not there
