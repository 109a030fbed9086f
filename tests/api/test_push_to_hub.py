"""``push_to_hub`` of the verbs that write a checkpoint: what lies there is uploaded, also where it lay already."""

from pathlib import Path

import huggingface_hub
import pytest

from keyreduce.api import prune, recover


@pytest.fixture
def uploads(monkeypatch) -> list[tuple[str, set[str]]]:
    """What a stand-in of the hub received: the name, and the files of each upload."""
    received = []

    class Hub:
        def create_repo(self, repo_id, exist_ok):
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            received.append((repo_id, {path.name for path in folder_path.iterdir()}))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return received


def test_what_prune_and_recover_make_is_uploaded(tiny_folder, tmp_path, uploads):
    (tmp_path / "text.md").write_text("A state that is smaller forgets more.\n" * 100)
    shared = {"work": tmp_path, "push_to_hub": "owner/small"}
    cut = prune.PruneRequest(model=str(tiny_folder("delta_net")), method="l2", **shared)
    text = {"text": (tmp_path / "text.md",), "num_batches": 1, "batch_size": 1, "seq_len": 64, "mode": "least-squares"}
    results = [prune.run(cut), prune.run(cut), recover.run(recover.RecoverRequest(**text, **shared))]
    assert [(result.made, result.pushed) for result in results] == [
        (made, "https://huggingface.co/owner/small") for made in (True, False, True)
    ]
    folders = [results[0].pruned, results[1].pruned, results[2].recovered]
    assert uploads == [("owner/small", {path.name for path in Path(folder).iterdir()}) for folder in folders]
    assert {"README.md", "keyreduce.json", "model.safetensors"} <= uploads[0][1]


def test_nothing_is_uploaded_unasked(tiny_folder, tmp_path, uploads):
    result = prune.run(prune.PruneRequest(model=str(tiny_folder("delta_net")), method="l2", work=tmp_path))
    assert uploads == [] and result.pushed is None and "pushed" not in result.to_json()
