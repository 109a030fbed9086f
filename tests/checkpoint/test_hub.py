"""Uploading to the hub, against a stand-in of its API."""

import huggingface_hub
import pytest

from keyreduce.checkpoint.hub import push_to_hub
from keyreduce.errors import KeyreduceError


class Hub:
    """What HfApi does for an upload; ``repositories`` is what the hub then has."""

    def __init__(self, error: Exception | None = None):
        self.error, self.repositories = error, {}

    def create_repo(self, repo_id: str, *, exist_ok: bool = False) -> huggingface_hub.RepoUrl:
        if self.error is not None:
            raise self.error
        full = repo_id if "/" in repo_id else f"someone/{repo_id}"
        assert exist_ok or full not in self.repositories
        self.repositories.setdefault(full, {})
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{full}")

    def upload_folder(self, *, repo_id: str, folder_path, commit_message: str) -> None:
        assert "keyreduce" in commit_message
        self.repositories[repo_id] |= {path.name: path.read_bytes() for path in folder_path.iterdir()}


@pytest.fixture
def folder(tmp_path):
    for name in ("config.json", "model.safetensors", "README.md", "keyreduce.json"):
        (tmp_path / name).write_text(name)
    return tmp_path


def use(monkeypatch, hub: Hub) -> Hub:
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    return hub


@pytest.mark.parametrize("name", ["owner/small", "small"])
def test_the_hub_has_all_files_then(monkeypatch, folder, name):
    hub = use(monkeypatch, Hub())
    full = name if "/" in name else f"someone/{name}"
    for _ in range(2):  # a second time replaces what is there
        assert push_to_hub(folder, name) == f"https://huggingface.co/{full}"
    assert hub.repositories == {full: {path.name: path.read_bytes() for path in folder.iterdir()}}


def test_the_signatures_are_those_of_the_api():
    import inspect

    for name in ("create_repo", "upload_folder"):
        wanted = inspect.signature(getattr(Hub, name)).parameters
        assert wanted.keys() <= inspect.signature(getattr(huggingface_hub.HfApi, name)).parameters.keys()


@pytest.mark.parametrize("error", [
    OSError("401 Client Error. Invalid username or password."),
    ValueError("Repo id must be in the form 'repo_name' or 'namespace/repo_name'"),
    RuntimeError("no route\nto host"),
])  # fmt: skip
def test_a_refusal_is_one_line_that_names_the_setting(monkeypatch, folder, error):
    use(monkeypatch, Hub(error))
    with pytest.raises(KeyreduceError) as refused:
        push_to_hub(folder, "owner/small")
    assert refused.value.field == "push_to_hub"
    assert "\n" not in str(refused.value) and str(error).split(".")[0].split("\n")[0] in str(refused.value)


def test_no_network_is_told(monkeypatch, folder):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(KeyreduceError, match="the hub did not take"):
        push_to_hub(folder, "owner/small")
