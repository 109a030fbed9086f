"""Does the installed torchtitan load what ``keyreduce convert-dcp`` wrote? The README here says when to ask.

    PYTHONPATH=.:flash-linear-attention python flame/check_step0.py JOB/checkpoint

The model that flame builds from the config is filled by torchtitan's own checkpoint manager, as at the first step of a
job, and every number is compared with the one in the files. Without torchtitan, or with one whose manager is not known
here, torch's ``dcp.load`` does what the manager would: the output says so, and only the layout is checked then.
"""

import argparse
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from transformers import AutoConfig, AutoModelForCausalLM

from keyreduce.checkpoint.dcp_source import DcpCheckpoint
from keyreduce.errors import KeyreduceError
from keyreduce.models.loading import prepare_backend


def build(step: Path) -> torch.nn.Module:
    """Return the model of a step's config with numbers that no checkpoint has, as flame builds it."""
    prepare_backend(torch.device("cpu"))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(step), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(-77.0)
    return model


def load_by_torchtitan(model: torch.nn.Module, folder: Path) -> str:
    """Fill the model by torchtitan's checkpoint manager; return what did it.

    Raises:
        ImportError: it is not installed, or is of another shape than 0.3.
    """
    from torchtitan.components.checkpoint import CheckpointManager

    if not hasattr(CheckpointManager, "Config"):
        raise ImportError("its checkpoint manager takes a whole job")
    config = CheckpointManager.Config(enable=True, folder=folder.name, keep_latest_k=0)
    manager = CheckpointManager(
        config,
        dataloader=None,
        model_parts=[model],
        optimizers=None,
        lr_schedulers=None,
        states={},
        sd_adapter=None,
        base_folder=str(folder.parent),
    )
    if not manager.load(step=-1):
        raise KeyreduceError(f"torchtitan finds no checkpoint in {folder}")
    try:
        return f"torchtitan {version('torchtitan')}"
    except PackageNotFoundError:
        return "torchtitan"


def load_by_torch(model: torch.nn.Module, folder: Path) -> str:
    """Fill the model as torchtitan's manager does at a job's first step; return what did it."""
    state = model.state_dict()
    dcp.load(state, checkpoint_id=str(folder / "step-0"))
    model.load_state_dict(state, strict=False)
    return f"torch {torch.__version__} alone"


def load(model: torch.nn.Module, folder: Path) -> str:
    """Fill the model from ``folder/step-0`` as well as can be done here; return what did it."""
    try:
        return load_by_torchtitan(model, folder)
    except ImportError as error:
        print(f"torchtitan is not asked: {error}", file=sys.stderr)
        return load_by_torch(model, folder)


def differing(model: torch.nn.Module, step: Path) -> list[str]:
    """Return the tensors of the model that are not those of the files."""
    source, state = DcpCheckpoint(step), model.state_dict()
    wrong = [name for name in source.tensors if name not in state]
    return wrong + [
        name for name in source.tensors if name in state and not state[name].equal(source.read(name).float())
    ]


def main(folder: Path) -> None:
    step = folder / "step-0"
    if not (step / ".metadata").is_file():
        raise KeyreduceError(f"there is no distributed checkpoint at {step}; make one with keyreduce convert-dcp")
    model = build(step)
    try:
        by = load(model, folder)
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise KeyreduceError(f"{step} is not loaded: {cause}") from None
    wrong = differing(model, step)
    if wrong:
        raise KeyreduceError(f"{by} loaded {len(wrong)} tensors wrongly, such as {wrong[0]}")
    print(f"{by} loads {step}: {len(model.state_dict())} tensors, each as it was written")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the folder that holds step-0")
    try:
        main(parser.parse_args().folder.resolve())
    except KeyreduceError as error:
        sys.exit(f"error: {error}")
