"""A checkpoint folder sent to the hub."""

from pathlib import Path

from keyreduce.errors import KeyreduceError, reason


def check_name(name: str) -> None:
    """Raise KeyreduceError if the hub takes no repository of this name, before the work that is to go there."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise KeyreduceError(f"`push_to_hub` is {name!r}, which is no name on the hub: {reason(error)}") from None


def push_to_hub(folder: Path, name: str) -> str:
    """Upload a checkpoint folder, and return the address of its repository.

    The repository, ``owner/name`` or the name alone for the user who is logged in, is made where there is none, public
    or private as the hub has it for that owner. What is there already is replaced file by file. The folder's record
    holds the command lines as they were typed. Raises KeyreduceError if the hub did not take it.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        repository = api.create_repo(name, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id, folder_path=folder, commit_message="Upload a checkpoint made with keyreduce"
        )
    except Exception as error:  # its client lets through what its HTTP library raises, whichever that is
        raise KeyreduceError(f"`push_to_hub` {name}: the hub did not take {folder}: {reason(error)}") from error
    return str(repository)
