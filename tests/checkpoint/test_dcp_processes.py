"""Distributed checkpoints between keyreduce, which is one process, and trainers, which are several.

The others are started by torchrun, as trainers are, all the jobs of one number of processes in one go. With
dcp_worker.py importing no fla that costs as much as torch.multiprocessing.spawn.
"""

import json
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import build, save, tensors_of
from torch.distributed.checkpoint import FileSystemReader

from keyreduce.cli import app
from keyreduce.errors import KeyreduceError

WORKER = Path(__file__).with_name("dcp_worker.py")
FAMILIES = ("delta_net", "gated_deltanet")
LAYOUTS = ("flat", "nested")
# Four processes divide neither; Gated DeltaNet's four rows of A_log they do, DeltaNet's two of b_proj are too few.
UNEVEN = {"vocab_size": 263, "intermediate_size": 30}


class Made(NamedTuple):
    """The folders of this module: of Hugging Face models, by family, and the one that everything else is in."""

    models: dict[str, Path]
    home: Path


def keyreduce(*arguments: object) -> None:
    """Run the command line in this process."""
    app([str(argument) for argument in arguments], standalone_mode=False)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    home = tmp_path_factory.mktemp("processes")
    models = {}
    for family in FAMILIES:
        model = build(family, **UNEVEN)
        if family == "gated_deltanet":
            model = model.bfloat16()
            for name, parameter in model.named_parameters():
                if name.endswith("A_log"):
                    parameter.data = parameter.data.float()
        models[family] = save(model, home / family)
        for layout in LAYOUTS:
            keyreduce("convert-dcp", models[family], home / f"{family}-{layout}", "--layout", layout)
    return Made(models, home)


@pytest.fixture(scope="module")
def placed(made: Made) -> dict[str, torch.Tensor]:
    """Tensors of every placement: uneven, of fewer rows or columns than processes, of one dimension, of none."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tensors = {
        "rows.uneven": draw(7, 3, dtype=torch.bfloat16),
        "rows.few": draw(2, 5),
        "rows.vector": draw(9),
        "rows.vector.few": draw(3, dtype=torch.bfloat16),
        "rows.none": draw(0, 4),
        "rows.int": torch.arange(10),
        "columns.even": draw(3, 8, dtype=torch.bfloat16),
        "columns.uneven": draw(5, 7),
        "columns.few": draw(6, 2, dtype=torch.bfloat16),
        "columns.deep": draw(3, 5, 4),
        "copies.matrix": draw(3, 5, dtype=torch.bfloat16),
        "copies.number": torch.tensor(7),
        "tiles.uneven": draw(5, 7, dtype=torch.bfloat16),
        "tiles.few": draw(1, 9),
        "groups.uneven": draw(5, 3),
        "plain.matrix": draw(4, 2),
        "plain.number": torch.tensor(0.5, dtype=torch.bfloat16),
        "plain.flag": torch.tensor([True, False, True]),
    }
    folder = made.home / "placed"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "of_nobody"}))
    return tensors


@pytest.fixture(scope="module")
def run_processes(python: str, made: Made, placed: dict[str, torch.Tensor]) -> Callable[[int], Path]:
    """A function that lets N processes do all that they have to, once, and returns where they wrote."""

    @cache
    def run(processes: int) -> Path:
        home = made.home / f"by-{processes}"
        home.mkdir()
        jobs = [
            {
                "action": "load",
                "folder": model,
                "source": made.home / f"{family}-{layout}" / "step-0",
                "nested": layout == "nested",
                "output": home / f"{family}-{layout}.safetensors",
            }
            for family, model in made.models.items()
            for layout in LAYOUTS
        ]
        if processes == 4:
            for family, model in made.models.items():
                for layout in LAYOUTS:
                    target = home / f"saved-{family}-{layout}" / "step-3"
                    jobs.append({"action": "save", "folder": model, "target": target, "nested": layout == "nested"})
                target = home / f"parallel-{family}"
                jobs.append(
                    {"action": "save", "folder": model, "target": target, "nested": False, "tensor_parallel": True}
                )
            jobs.append({"action": "save_placed", "folder": made.home / "placed", "target": home / "placed"})
            for name in ("shards", "consolidated"):
                jobs.append(
                    {
                        "action": "save_safetensors",
                        "folder": made.models["delta_net"],
                        "target": home / name,
                        "consolidated": name == "consolidated",
                    }
                )
        (home / "jobs.json").write_text(json.dumps(jobs, default=str))
        torchrun = (python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
        done = subprocess.run(
            [*torchrun, WORKER, home / "jobs.json"], capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-5000:]
        return home

    return run


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_sharded_models_load_what_one_process_wrote(made, run_processes, family, layout, processes):
    path = run_processes(processes) / f"{family}-{layout}.safetensors"
    expected = tensors_of(made.models[family])
    assert_same(load_file(path), expected)
    with safe_open(path, "pt") as file:
        told = file.metadata()
    assert told["processes"] == str(processes)
    # Else nothing would have been sharded, and the test would prove nothing of the sort.
    count = sum(tensor.numel() for tensor in expected.values())
    assert count / processes <= int(told["held"]) < count / processes * 1.1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_process_reads_what_four_wrote(made, run_processes, family, layout, tmp_path, capsys):
    source = run_processes(4) / f"saved-{family}-{layout}"
    metadata = FileSystemReader(source / "step-3").read_metadata()
    assert any(len(saved.chunks) == 4 for key, saved in metadata.state_dict_metadata.items() if "embeddings" in key)
    keyreduce("convert-dcp", source, tmp_path / "hf", "--config", made.models[family])
    expected = tensors_of(made.models[family])
    assert_same(tensors_of(tmp_path / "hf"), expected)
    assert f"left out: {len(metadata.state_dict_metadata) - len(expected)} entries" in capsys.readouterr().out
    with pytest.raises(KeyreduceError, match="entries beside the model"):
        keyreduce("convert-dcp", source, tmp_path / "all", "--config", made.models[family], "--no-only-model")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_four_wrote_is_pruned_as_the_folder_is(made, run_processes, family, layout, tmp_path):
    source = run_processes(4) / f"saved-{family}-{layout}"
    prune = ("prune", "--method", "l2", "--ratio", 0.5, "--target", "key", "--model")
    keyreduce(*prune, source, "--config", made.models[family] / "config.json", "--output", tmp_path / "from-dcp")
    keyreduce(*prune, made.models[family], "--output", tmp_path / "from-folder")
    found = tensors_of(tmp_path / "from-dcp")
    assert_same(found, tensors_of(tmp_path / "from-folder"))
    name = "model.layers.0.attn.q_proj.weight"
    assert 2 * len(found[name]) == len(tensors_of(made.models[family])[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_one_process_reads_what_four_wrote_with_tensor_parallelism(made, run_processes, family, tmp_path):
    source = run_processes(4) / f"parallel-{family}"
    saved = FileSystemReader(source).read_metadata().state_dict_metadata["model.layers.0.attn.o_proj.weight"]
    assert {tuple(offset > 0 for offset in chunk.offsets) for chunk in saved.chunks} == {
        (False, False),
        (False, True),
        (True, False),
        (True, True),
    }
    keyreduce("convert-dcp", source, tmp_path / "hf", "--config", made.models[family])
    assert_same(tensors_of(tmp_path / "hf"), tensors_of(made.models[family]))


def test_every_placement_is_read(made, placed, run_processes, tmp_path):
    source = run_processes(4) / "placed"
    chunks = {
        name: len(saved.chunks) for name, saved in FileSystemReader(source).read_metadata().state_dict_metadata.items()
    }
    assert chunks["rows.uneven"] == chunks["columns.uneven"] == chunks["tiles.uneven"] == 4
    assert chunks["copies.matrix"] == chunks["plain.matrix"] == 1
    keyreduce("convert-dcp", source, tmp_path / "hf", "--config", made.home / "placed")
    assert_same(tensors_of(tmp_path / "hf"), placed)
    keyreduce("convert-dcp", tmp_path / "hf", tmp_path / "dcp")
    keyreduce("convert-dcp", tmp_path / "dcp", tmp_path / "back")
    assert_same(tensors_of(tmp_path / "back"), placed)


def test_what_four_wrote_as_safetensors_is_read_once_it_is_put_together(made, run_processes, tmp_path):
    model = made.models["delta_net"]
    for name in ("shards", "consolidated"):
        folder = shutil.copytree(run_processes(4) / name, tmp_path / name)
        shutil.copy(model / "config.json", folder)
    with pytest.raises(KeyreduceError, match="shards has neither model.safetensors nor"):
        keyreduce("convert-dcp", tmp_path / "shards", tmp_path / "none")
    keyreduce("convert-dcp", tmp_path / "consolidated", tmp_path / "dcp")
    keyreduce("convert-dcp", tmp_path / "dcp", tmp_path / "hf")
    assert_same(tensors_of(tmp_path / "hf"), tensors_of(model))
