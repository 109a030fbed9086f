"""torch's own tools for checkpoints read what keyreduce writes, and keyreduce what they write: bit by bit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from tiny_models import tensors_of
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp

from keyreduce.cli import app
from keyreduce.errors import KeyreduceError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

LAYOUTS = ("flat", "nested")
PRUNE = ("prune", "--method", "l2", "--ratio", 0.5, "--target", "key", "--model")


def keyreduce(*arguments: object) -> None:
    """Run the command line in this process."""
    app([str(argument) for argument in arguments], standalone_mode=False)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def blank(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors to load into, of other numbers."""
    return {name: ~tensor if tensor.dtype == torch.bool else tensor + 1 for name, tensor in tensors.items()}


def in_layout(tensors: dict[str, torch.Tensor], layout: str) -> dict:
    return {"model": tensors} if layout == "nested" else dict(tensors)


def read_by_torch(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder, by torch's reader of such."""
    state = blank(tensors_of(folder))
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    return state


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder of no known model: bfloat16, integers, flags, one number, no number, fewer rows than one would think."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a.weight": torch.randn(7, 3, generator=generator).bfloat16(),
        "a.bias": torch.randn(5, generator=generator),
        "a.half": torch.randn(2, 3, 4, generator=generator).half(),
        "b.scale": torch.tensor(0.3, dtype=torch.bfloat16),
        "b.steps": torch.tensor(7),
        "b.ids": torch.arange(10),
        "b.flags": torch.tensor([True, False, True]),
        "c.none": torch.empty(0, 4),
    }
    folder = tmp_path / "mixed"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "of_nobody"}))
    return folder


@pytest.fixture(params=["delta_net", "gated_deltanet", "mixed"])
def folder(request: pytest.FixtureRequest, tiny_folder: Callable[[str], Path]) -> Path:
    return request.getfixturevalue("mixed") if request.param == "mixed" else tiny_folder(request.param)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch_makes_one_file_of_our_dcp(folder, layout, tmp_path):
    keyreduce("convert-dcp", folder, tmp_path / "dcp", "--layout", layout)
    dcp_to_torch_save(tmp_path / "dcp" / "step-0", tmp_path / "all.pt")
    state = torch.load(tmp_path / "all.pt", weights_only=True)
    if layout == "nested":
        assert state.keys() == {"model"}
        state = state["model"]
    assert_same(state, tensors_of(folder))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch_loads_our_dcp(folder, layout, tmp_path):
    keyreduce("convert-dcp", folder, tmp_path / "dcp", "--layout", layout, "--step", 5)
    tensors = tensors_of(folder)
    loaded = blank(tensors)
    dcp.load(in_layout(loaded, layout), checkpoint_id=tmp_path / "dcp" / "step-5", no_dist=True)
    assert_same(loaded, tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_torch_makes_of_one_file_is_read(folder, layout, tmp_path):
    tensors = tensors_of(folder)
    # Read from one file, some share memory, which torch.save refuses.
    state = in_layout({name: tensor.clone() for name, tensor in tensors.items()}, layout)
    # Beside a model under a key of its own, a lone tensor is none of the model's.
    step = torch.tensor(3) if layout == "nested" else 3
    state |= {"optimizer": {"lr": 0.1, "moments": {"a": torch.ones(3)}}, "step": step}
    torch.save(state, tmp_path / "all.pt")
    torch_save_to_dcp(tmp_path / "all.pt", tmp_path / "dcp")
    keyreduce("convert-dcp", tmp_path / "dcp", tmp_path / "hf", "--config", folder)
    assert_same(tensors_of(tmp_path / "hf"), tensors)


def test_torch_reads_the_folders_that_we_write(folder, tmp_path):
    keyreduce("convert-dcp", folder, tmp_path / "dcp")
    keyreduce("convert-dcp", tmp_path / "dcp", tmp_path / "whole")
    keyreduce("convert-dcp", tmp_path / "dcp", tmp_path / "parts", "--max-shard-size", "100B")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    for name in ("whole", "parts"):
        assert_same(read_by_torch(tmp_path / name), tensors_of(folder))


@pytest.mark.parametrize("family", ["delta_net", "gated_deltanet"])
def test_torch_reads_the_folders_that_we_prune(tiny_folder, family, tmp_path):
    keyreduce(*PRUNE, tiny_folder(family), "--output", tmp_path / "pruned")
    tensors = tensors_of(tmp_path / "pruned")
    name = "model.layers.0.attn.q_proj.weight"
    assert 2 * len(tensors[name]) == len(tensors_of(tiny_folder(family))[name])
    assert_same(read_by_torch(tmp_path / "pruned"), tensors)
    keyreduce("convert-dcp", tmp_path / "pruned", tmp_path / "dcp")
    dcp_to_torch_save(tmp_path / "dcp" / "step-0", tmp_path / "all.pt")
    assert_same(torch.load(tmp_path / "all.pt", weights_only=True), tensors)


def in_three(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """In which of three files each tensor goes."""
    return {name: 1 + index % 3 for index, name in enumerate(tensors)}


FORMS = {
    "one file": lambda tensors: {},
    "three files": lambda tensors: {"fqn_to_index_mapping": in_three(tensors), "thread_count": 3},
    "consolidated": lambda tensors: {"save_distributed": True, "enable_consolidation": True},
    "three consolidated": lambda tensors: {
        "save_distributed": True,
        "enable_consolidation": True,
        "fqn_to_index_mapping": in_three(tensors),
    },
}


def write_by_torch(source: Path, target: Path, options: Callable[[dict], dict]) -> None:
    tensors = tensors_of(source)
    writer = dcp.HuggingFaceStorageWriter(str(target), **options(tensors))
    dcp.save(tensors, storage_writer=writer, no_dist=True)
    for file in (source / "config.json", *source.glob("tokenizer*")):
        shutil.copy(file, target)


@pytest.mark.parametrize("form", FORMS)
def test_the_folders_that_torch_writes_are_read(tiny_folder, form, tmp_path):
    source, theirs = tiny_folder("delta_net"), tmp_path / "theirs"
    write_by_torch(source, theirs, FORMS[form])
    keyreduce("convert-dcp", theirs, tmp_path / "dcp")
    keyreduce("convert-dcp", tmp_path / "dcp", tmp_path / "back")
    assert_same(tensors_of(tmp_path / "back"), tensors_of(source))
    keyreduce(*PRUNE, source, "--output", tmp_path / "expected")
    expected = tensors_of(tmp_path / "expected")
    # torch notes in each file where its tensors begin: what we write in other shards must not lead its reader astray.
    for name, options in {"as-they-are": (), "resharded": ("--max-shard-size", "20KB")}.items():
        keyreduce(*PRUNE, theirs, "--output", tmp_path / name, *options)
        assert_same(tensors_of(tmp_path / name), expected)
        assert_same(read_by_torch(tmp_path / name), expected)


def test_pieces_that_torch_has_not_put_together_are_refused(tiny_folder, tmp_path):
    write_by_torch(tiny_folder("delta_net"), tmp_path / "pieces", lambda tensors: {"save_distributed": True})
    assert [path.name for path in (tmp_path / "pieces").glob("*.safetensors")] == [
        "shard-00001-model-00001-of-00001.safetensors"
    ]
    for command in (("convert-dcp", tmp_path / "pieces", tmp_path / "out"), (*PRUNE, tmp_path / "pieces")):
        with pytest.raises(KeyreduceError, match="pieces has neither model.safetensors nor") as caught:
            keyreduce(*command)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("single", [True, False])
def test_a_dcp_of_safetensors_is_refused(tiny_folder, single, tmp_path):
    """FileSystemWriter can put safetensors into its .distcp files; torch 2.13 itself has no reader for those."""
    source, theirs = tiny_folder("delta_net"), tmp_path / "theirs"
    writer = dcp.FileSystemWriter(
        theirs, single_file_per_rank=single, serialization_format=SerializationFormat.SAFETENSORS
    )
    dcp.save(tensors_of(source), storage_writer=writer, no_dist=True)
    output = ("--output", tmp_path / "out")
    for command in (("convert-dcp", theirs, tmp_path / "out"), (*PRUNE, theirs, *output)):
        with pytest.raises(KeyreduceError, match="cannot read '.*theirs") as caught:
            keyreduce(*command, "--config", source)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
