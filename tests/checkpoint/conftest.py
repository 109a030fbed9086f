"""A tiny Hugging Face folder, whole or sharded, written by the safetensors library itself."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

CONFIG = {"model_type": "delta_net", "hidden_size": 8, "transformers_version": "5.0.0"}


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.embeddings.weight": torch.randn(16, 8, generator=generator).bfloat16(),
        "model.layers.0.attn.q_proj.weight": torch.randn(6, 8, generator=generator).bfloat16(),
        "model.layers.0.attn.A_log": torch.randn(3, generator=generator),
        "model.step": torch.tensor(7),
        "model.unused": torch.empty(0, 8, dtype=torch.bfloat16),
    }


@pytest.fixture
def make_folder(tmp_path: Path):
    """A function that writes ``tensors`` into a new folder, in ``shards`` files, and returns its path."""

    def make(tensors: dict[str, torch.Tensor], *, shards: int = 1, name: str = "source") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG))
        (folder / "tokenizer.json").write_text('{"version": "1.0"}')
        (folder / "README.md").write_text("not carried")
        if shards == 1:
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            return folder
        weight_map = {}
        names = list(tensors)
        for shard in range(shards):
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            held = {name: tensors[name] for name in names[shard::shards]}
            save_file(held, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(held, file)
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return make
