"""Tiny random models of all families, and how to save, damage and read them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from fla.models import DeltaNetConfig, DeltaNetForCausalLM, GatedDeltaNetConfig, GatedDeltaNetForCausalLM
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from keyreduce.checkpoint.find import DEFAULT_MODEL, SHIPPED
from keyreduce.models.delta_net_2 import DeltaNet2Config, DeltaNet2ForCausalLM
from keyreduce.models.meta import build_model

VOCABULARY = 264
# A large scale of the weights, so that what a channel holds shows in the logits.
COMMON = dict(
    hidden_size=32,
    num_heads=2,
    num_hidden_layers=2,
    intermediate_size=32,
    vocab_size=VOCABULARY,
    initializer_range=0.5,
    bos_token_id=256,
    eos_token_id=256,
)
FAMILIES = {
    "delta_net": (DeltaNetForCausalLM, DeltaNetConfig, COMMON),
    "delta_net_2": (DeltaNet2ForCausalLM, DeltaNet2Config, COMMON | dict(per_head_conv=True)),
    "gated_deltanet": (GatedDeltaNetForCausalLM, GatedDeltaNetConfig, COMMON | dict(head_dim=12, num_v_heads=4)),
}

logging.disable_progress_bar()


def build(model_type: str, *, seed: int = 0, **changes) -> PreTrainedModel:
    """Return a random model of a family, in evaluation mode; by default with two key heads of an even size."""
    model_class, config_class, sizes = FAMILIES[model_type]
    torch.manual_seed(seed)
    return model_class(config_class(**sizes | changes)).eval()


def save(model: PreTrainedModel, folder: Path, **options) -> Path:
    """Save a model with a tokenizer of bytes, and return the folder."""
    model.save_pretrained(folder, **options)
    for file in (SHIPPED / DEFAULT_MODEL).glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def edit_config(folder: Path, **changes) -> None:
    """Change fields of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Let a function change the tensors of an unsharded folder in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder, read by the safetensors library."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def file_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of all tensors that transformers would write into a checkpoint of a config."""
    model = build_model(config)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()}


def draw_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return random bytes as token ids."""
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed))
