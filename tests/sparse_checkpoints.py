"""Checkpoints of any size that take no room on a disk: their headers are there, their numbers are a hole in a file."""

import json
import math
from pathlib import Path

from keyreduce.families.mixer_tensors import expected_tensors

# The language model of Qwen3.5-27B as far as its state and its size go.
QWEN3_5_27B = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "model_type": "qwen3_5",
    "text_config": {
        "model_type": "qwen3_5_text", "num_hidden_layers": 64, "hidden_size": 5120, "intermediate_size": 17_408,
        "linear_num_key_heads": 16, "linear_num_value_heads": 48, "num_key_value_heads": 4, "head_dim": 256,
        "vocab_size": 248_320, "mamba_ssm_dtype": "float32", "dtype": "bfloat16",
    },
}  # fmt: skip


def write_sparse(folder: Path, config: dict) -> Path:
    """Write a model of this config in bfloat16: mixers, embeddings and feed-forward layers."""
    text = config.get("text_config", config)
    shapes = {name: tensor.shape for name, tensor in expected_tensors(config).items()}
    shapes["model.embed_tokens.weight"] = (text["vocab_size"], text["hidden_size"])
    for layer in range(text["num_hidden_layers"]):
        for which in ("gate", "up", "down"):
            shapes[f"model.layers.{layer}.mlp.{which}_proj.weight"] = (text["intermediate_size"], text["hidden_size"])
    position, header = 0, {}
    for name, shape in shapes.items():
        end = position + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header).encode()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + position)
    return folder
