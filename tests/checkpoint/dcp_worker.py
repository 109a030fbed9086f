"""What each process of test_dcp_processes.py does: shard a model over all of them, and load or save it as trainers do.

Importing fla takes seconds a process, and the numbers are never computed with: the model is a tree of bare modules
whose parameters have the names, shapes and dtypes of the Hugging Face folder.
"""

import json
import os
import pickle
import sys
from io import BytesIO
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor


def load(folder: str, source: str, nested: bool, output: str) -> None:
    """Load a DCP into a sharded model, and save the whole of it as one safetensors file.

    Args:
        folder: the Hugging Face folder that tells names, shapes and dtypes.
        source: the DCP folder.
        nested: whether the model is under the key ``model``.
        output: the file; its metadata tells the number of processes, and the most numbers that one held.
    """
    model = _shard(_build(folder, blank=True))
    state = get_model_state_dict(model)
    dcp.load({"model": state} if nested else state, checkpoint_id=source)
    set_model_state_dict(model, state)
    held = torch.tensor(sum(parameter.to_local().numel() for parameter in model.parameters()))
    dist.all_reduce(held, dist.ReduceOp.MAX)
    whole = {name: parameter.full_tensor().detach() for name, parameter in model.named_parameters()}
    if dist.get_rank() == 0:
        save_file(whole, output, metadata={"processes": str(dist.get_world_size()), "held": str(held.item())})


def save(folder: str, target: str, nested: bool, tensor_parallel: bool = False) -> None:
    """Save the model of a Hugging Face folder, with its optimizer and training state, as torchtitan and flame do.

    Args:
        folder: the Hugging Face folder.
        target: the DCP folder.
        nested: the model under the key ``model``, as flame has it, or flat.
        tensor_parallel: whether pairs of processes share each tensor by columns or rows, before FSDP shards it.
    """
    model = _build(folder)
    if tensor_parallel:
        mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("data", "tensor"))
        _split(model, mesh["tensor"])
        _shard(model, mesh["data"])
    else:
        _shard(model)
    # A step of no length: the optimizer gets its state, and the parameters stay.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = get_model_state_dict(model)
    step = torch.tensor(3, dtype=torch.int32)
    rank = dist.get_rank()
    state = {
        "optimizer": get_optimizer_state_dict(
            model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True)
        ),
        "train_state": {"step": step, "ntokens_seen": torch.tensor(4096), "losses": BytesIO(pickle.dumps([1.0]))},
        "lr_scheduler": {"last_epoch": 3},
        "dataloader": {f"dp_rank_{rank}": pickle.dumps({"at": rank}), "world_size": dist.get_world_size()},
    }
    dcp.save(state | ({"model": tensors} if nested else tensors), checkpoint_id=target)


def save_placed(folder: str, target: str) -> None:
    """Save each tensor of a folder in the placement that its name begins with."""
    processes = dist.get_world_size()
    line, grid = init_device_mesh("cpu", (processes,)), init_device_mesh("cpu", (2, processes // 2))
    placements = {
        "rows": (line, [Shard(0)]),
        "columns": (line, [Shard(1)]),
        "copies": (line, [Replicate()]),
        "tiles": (grid, [Shard(0), Shard(1)]),
        "groups": (grid, [Replicate(), Shard(0)]),
    }
    state = _read(folder)
    for name, tensor in state.items():
        if (kind := name.split(".")[0]) != "plain":
            state[name] = distribute_tensor(tensor, *placements[kind])
    dcp.save(state, checkpoint_id=target)


def save_safetensors(folder: str, target: str, consolidated: bool) -> None:
    """Save a sharded model with torch's own writer of Hugging Face files."""
    writer = dcp.HuggingFaceStorageWriter(target, save_distributed=True, enable_consolidation=consolidated)
    dcp.save(get_model_state_dict(_shard(_build(folder))), storage_writer=writer)


def _read(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder, "model.safetensors"))


def _build(folder: str, *, blank: bool = False) -> nn.Module:
    """A tree of modules with the parameters of the folder; ``blank``: with numbers that loading must replace."""
    root = nn.Module()
    for name, tensor in _read(folder).items():
        *path, leaf = name.split(".")
        module = root
        for step in path:
            if step not in dict(module.named_children()):
                module.add_module(step, nn.Module())
            module = module.get_submodule(step)
        module.register_parameter(leaf, nn.Parameter(torch.full_like(tensor, float("nan")) if blank else tensor))
    return root


def _shard(model: nn.Module, mesh=None) -> nn.Module:
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.get_submodule("model.layers").children():
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _split(model: nn.Module, mesh) -> None:
    """Tensor parallelism: projections back into the residual stream by columns, norms copied, the others by rows."""
    for module_name, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            by_columns = module_name.endswith(("o_proj", "down_proj"))
            placement = Shard(1) if by_columns else Replicate() if "norm" in module_name else Shard(0)
            module.register_parameter(name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [placement])))


ACTIONS = {action.__name__: action for action in (load, save, save_placed, save_safetensors)}

if __name__ == "__main__":
    dist.init_process_group("gloo")
    for job in json.loads(Path(sys.argv[1]).read_text()):
        ACTIONS[job.pop("action")](**job)
    dist.barrier()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)  # taking threads of gloo and of the store apart at the end of Python aborts now and then
