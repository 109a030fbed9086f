"""A DeltaNet checkpoint of any size, with random numbers, and calibration sums to prune it with.

Imports of more than torch are in the functions: the processes whose memory is measured load this file too.
"""

import json
from pathlib import Path

import torch

SHARD_SIZE = "512MB"


def describe_model(*, hidden: int, heads: int, layers: int) -> tuple[str, dict[str, torch.Tensor]]:
    """Return the text of config.json, and the tensors on the meta device, of fla's own DeltaNet in bfloat16."""
    from fla.models import DeltaNetConfig, DeltaNetForCausalLM

    sizes = {"hidden_size": hidden, "num_heads": heads, "num_hidden_layers": layers}
    config = DeltaNetConfig(**sizes, architectures=["DeltaNetForCausalLM"], dtype="bfloat16")
    with torch.device("meta"):
        return config.to_json_string(), DeltaNetForCausalLM(config).bfloat16().state_dict()


def write_source(folder: Path, config: str, tensors: dict[str, torch.Tensor]) -> None:
    """Write the checkpoint in shards, with an index; its numbers are random and finite."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD_SIZE)
    shifts = {name: 31 * place % 4096 for place, name in enumerate(tensors)}
    largest = max(tensor.numel() for tensor in tensors.values())
    # Every tensor is a window of one block, at a place of its own: drawing them all would take minutes.
    block = torch.randn(largest + 4096, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    for file, names in split.filename_to_tensors.items():
        windows = {name: block[shifts[name] :][: tensors[name].numel()].clone() for name in names}
        shard = {name: window.view(tensors[name].shape) for name, window in windows.items()}
        save_file(shard, folder / file, metadata={"format": "pt"})
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(config)


def write_sums(source_folder: Path, path: Path, gram_LHKK: torch.Tensor | None = None) -> None:
    """Write a calibration file of that checkpoint, with gradients; its statistics are random and positive.

    Args:
        source_folder: the checkpoint.
        path: the file to write.
        gram_LHKK: the sums of the Gram matrices of q and k, of L layers and H heads; random if None.
    """
    from keyreduce.calibration.file import write_statistics
    from keyreduce.calibration.statistics import LayerStatistics, Statistics, TaylorStatistics
    from keyreduce.checkpoint.folder import open_folder
    from keyreduce.families import family_of

    source, cpu = open_folder(source_folder), torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for layer, sizes in family_of(source.config).layer_sizes(source.config).items():
        layers[layer] = LayerStatistics.zeros(source.config["hidden_size"], sizes, cpu)
        layers[layer].taylor = TaylorStatistics.zeros(sizes, cpu)
        for name, tensor in layers[layer].tensors().items():
            if gram_LHKK is not None and "gram" in name:
                tensor.copy_(gram_LHKK[layer] / 2)
            else:
                tensor.uniform_(0.5, 1.5, generator=generator)
    write_statistics(Statistics(source.identity, 1000, layers, {}), path, overwrite=True)
