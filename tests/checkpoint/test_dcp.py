import json
import os
import pathlib
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from keyreduce.checkpoint.dcp import write_dcp
from keyreduce.checkpoint.dcp_source import DcpCheckpoint
from keyreduce.checkpoint.find import find_dcp
from keyreduce.checkpoint.folder import open_folder
from keyreduce.checkpoint.rewrite import rewrite
from keyreduce.checkpoint.shards import torch_dtypes
from keyreduce.errors import KeyreduceError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

CONFIG = {"model_type": "delta_net"}


@pytest.fixture
def folder_of(tmp_path):
    """A function that makes an empty folder of that name."""

    def make(name: str) -> Path:
        (tmp_path / name).mkdir()
        return tmp_path / name

    return make


@pytest.fixture
def saved(folder_of, tensors) -> Path:
    """A flat DCP, saved by torch alone, with a config beside it."""
    folder = folder_of("saved")
    dcp.save(tensors, checkpoint_id=folder, no_dist=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def dcp_to_hf(source: Path, target: Path, *, config: Path | None = None, **options) -> None:
    rewrite(DcpCheckpoint(source, config=config), target, **options)


def _load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def _as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert _as_bytes(found[name]) == _as_bytes(tensor), name


def _edit_metadata(folder: Path, edit) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_safetensors_to_dcp_and_back_is_bitwise_the_same(make_folder, folder_of, tensors):
    generator = torch.Generator().manual_seed(0)
    for name, dtype in torch_dtypes().items():
        raw = torch.randint(0, 256, (3, 8 * dtype.itemsize), dtype=torch.uint8, generator=generator)
        tensors[f"dtype.{name}"] = raw > 127 if dtype == torch.bool else raw.view(dtype)
    source = make_folder(tensors, shards=2)
    through, target = folder_of("step-0"), folder_of("back")
    saved_bytes, loaded_bytes = [], []
    write_dcp(open_folder(source), through, progress=saved_bytes.append)
    dcp_to_hf(through, target, progress=loaded_bytes.append)
    _assert_same(_load_all(target), tensors)
    converted = open_folder(target)
    for name, spec in converted.tensors.items():
        assert converted.ranges(name)[0].begin % torch_dtypes()[spec.dtype].itemsize == 0
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    assert sum(saved_bytes) == sum(loaded_bytes) == total_size
    for name in ("config.json", "tokenizer.json"):
        content = (target / name).read_text()
        assert json.loads(content) == json.loads((source / name).read_text())
    assert open_folder(target).config == open_folder(source).config


def test_torch_reads_our_dcp(make_folder, folder_of, tensors, tmp_path):
    target = folder_of("step-0")
    write_dcp(open_folder(make_folder(tensors)), target)
    dcp_to_torch_save(target, tmp_path / "all.pt")
    _assert_same(torch.load(tmp_path / "all.pt"), tensors)
    planner_data = dcp.FileSystemReader(target).read_metadata().planner_data
    assert planner_data == {name: (name,) for name in tensors}


def test_dcp_to_safetensors_and_back_is_the_same(saved, folder_of, tensors):
    through, target = folder_of("hf"), folder_of("step-1")
    dcp_to_hf(saved, through)
    write_dcp(open_folder(through), target)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    dcp.load(loaded, checkpoint_id=target, no_dist=True)
    _assert_same(loaded, tensors)
    properties = dcp.FileSystemReader(target).read_metadata().state_dict_metadata
    assert {name: properties[name].properties.dtype for name in tensors} == {n: t.dtype for n, t in tensors.items()}


@pytest.mark.parametrize("layout", ["flat", "nested", "nested deeper"])
def test_the_model_is_found_beside_the_training_state(folder_of, tensors, layout):
    state = {
        "optimizer": {"state": {name: {"exp_avg": torch.zeros(2)} for name in tensors}, "groups": [{"lr": 1e-3}]},
        "lr_scheduler": {"last_epoch": 3},
        "train_state": {"step": torch.tensor(3)},
        "dataloader": {"dp_rank_0": b"bytes"},
    }
    if layout == "flat":
        state |= tensors
    elif layout == "nested":
        state["model"] = tensors
    else:
        state["model"] = {"model": {name.removeprefix("model."): tensor for name, tensor in tensors.items()}}
    source, target = folder_of("step-3"), folder_of("hf")
    dcp.save(state, checkpoint_id=source, no_dist=True)
    (source / "config.json").write_text(json.dumps(CONFIG))
    dcp_to_hf(source, target)
    _assert_same(_load_all(target), tensors)


def test_a_tensor_in_pieces_of_several_files_is_put_together(folder_of):
    """What FSDP writes, without starting processes: two halves saved apart, then described as one tensor."""
    whole = torch.arange(24.0).reshape(4, 6)
    source, target = folder_of("step-0"), folder_of("hf")
    writer = dcp.FileSystemWriter(source, single_file_per_rank=False)
    dcp.save({"top": whole[:1].clone(), "bottom": whole[1:].clone()}, storage_writer=writer, no_dist=True)

    def join(metadata: Metadata) -> None:
        top, bottom = metadata.state_dict_metadata["top"], metadata.state_dict_metadata["bottom"]
        offsets = {"top": torch.Size([0, 0]), "bottom": torch.Size([1, 0])}
        chunks = [ChunkStorageMetadata(offsets["top"], top.size), ChunkStorageMetadata(offsets["bottom"], bottom.size)]
        metadata.state_dict_metadata = {"w": TensorStorageMetadata(top.properties, torch.Size([4, 6]), chunks)}
        metadata.storage_data = {
            MetadataIndex("w", offsets[index.fqn]): info for index, info in metadata.storage_data.items()
        }
        metadata.planner_data = {"w": ("w",)}

    _edit_metadata(source, join)
    (source / "config.json").write_text(json.dumps(CONFIG))
    theirs = {"w": torch.zeros(4, 6)}
    dcp.load(theirs, checkpoint_id=source, no_dist=True)
    assert torch.equal(theirs["w"], whole)
    dcp_to_hf(source, target)
    _assert_same(_load_all(target), {"w": whole})

    _edit_metadata(source, lambda metadata: metadata.state_dict_metadata["w"].chunks.pop())
    with pytest.raises(KeyreduceError, match="holds 6 of the 24 numbers of 'w'"):
        dcp_to_hf(source, target)


@pytest.mark.parametrize("planned", [True, False])
def test_a_dcp_saved_without_planner_data_is_flat(folder_of, tensors, planned):
    source, target = folder_of("step-0"), folder_of("hf")
    planner = dcp.DefaultSavePlanner(flatten_state_dict=planned)
    dcp.save(tensors, checkpoint_id=source, planner=planner, no_dist=True)
    (source / "config.json").write_text(json.dumps(CONFIG))
    dcp_to_hf(source, target)
    _assert_same(_load_all(target), tensors)


def test_large_models_are_split_into_shards(folder_of):
    tensors = {f"layer.{i}": torch.full((100,), float(i)) for i in range(5)}
    source, target = folder_of("step-0"), folder_of("hf")
    dcp.save(tensors, checkpoint_id=source, no_dist=True)
    (source / "config.json").write_text(json.dumps(CONFIG))
    dcp_to_hf(source, target, max_shard_size=1000)
    checkpoint = open_folder(target)
    assert list(checkpoint.shards) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert all((target / file).stat().st_size < 1000 + 1000 for file in checkpoint.shards)
    _assert_same(_load_all(target), tensors)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2000


def test_the_config_comes_from_where_one_says(saved, make_folder, folder_of, tensors, tmp_path):
    (saved / "config.json").unlink()
    with pytest.raises(KeyreduceError, match="has no config.json"):
        dcp_to_hf(saved, folder_of("none"))
    with pytest.raises(KeyreduceError, match="there is no file"):
        dcp_to_hf(saved, folder_of("missing"), config=tmp_path / "missing.json")
    lone = tmp_path / "lone.json"
    lone.write_text('{"lone": true}')
    dcp_to_hf(saved, folder_of("file"), config=lone)
    assert open_folder(tmp_path / "file").config == {"lone": True}
    assert not open_folder(tmp_path / "file").sidecars
    dcp_to_hf(saved, folder_of("folder"), config=make_folder(tensors))
    assert open_folder(tmp_path / "folder").config["hidden_size"] == 8
    assert [path.name for path in open_folder(tmp_path / "folder").sidecars] == ["tokenizer.json"]


def test_find_dcp_takes_the_folder_or_its_last_complete_step(tmp_path, folder_of):
    assert find_dcp(tmp_path / "missing") is None
    assert find_dcp(tmp_path) is None
    for name in ("step-9", "step-10", "step-11", "step-x"):
        folder_of(name)
        if name != "step-11":
            (tmp_path / name / ".metadata").write_bytes(b"")
    assert find_dcp(tmp_path) == tmp_path / "step-10"
    (tmp_path / ".metadata").write_bytes(b"")
    assert find_dcp(tmp_path) == tmp_path


def test_what_was_not_finished_is_said(tmp_path, folder_of, caplog):
    for name in ("step-9", "step-10", "step-11"):
        (folder_of(name) / "__0_0.distcp").write_bytes(b"")
    for asked, named in ((tmp_path, "step-11"), (tmp_path / "step-9", "step-9")):
        with pytest.raises(KeyreduceError, match=rf"{named} holds \.distcp files but no \.metadata, .* written last"):
            find_dcp(asked)
    (tmp_path / "step-9" / ".metadata").write_bytes(b"")
    for _ in range(2):
        assert find_dcp(tmp_path) == tmp_path / "step-9"
    (record,) = caplog.records
    told = f"{tmp_path}/step-11 has no .metadata: its writing did not end, and step-9 is taken"
    assert record.getMessage() == told


class _Call:
    """Pickles to a call of ``function``."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


# Each one makes the file "proof" in the current folder when plain pickle loads it.
ATTACKS = {
    "os.system": pickle.dumps(_Call(os.system, "touch proof")),
    "os.system in text": pickle.dumps(_Call(os.system, "touch proof"), protocol=0),
    "eval": pickle.dumps(_Call(eval, "__import__('pathlib').Path('proof').touch()")),
    "torch.save": pickle.dumps(_Call(torch.save, 0, "proof")),
    "a path's method": pickle.dumps(_Call(pathlib.Path.touch, pathlib.Path("proof"))),
    "getattr": b"cbuiltins\ngetattr\n(cpathlib\nPath\nVtouch\ntR(cpathlib\nPosixPath\n(Vproof\ntRtR.",
    "a dotted name": b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93\x8c\x0btouch proof\x85R.",
    "inside metadata": pickle.dumps(Metadata({}, planner_data=_Call(os.system, "touch proof"))),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_metadata_that_runs_code_is_refused_and_not_run(saved, folder_of, monkeypatch, tmp_path, attack):
    monkeypatch.chdir(tmp_path)
    pickle.loads(ATTACKS[attack])
    (tmp_path / "proof").unlink()
    (saved / ".metadata").write_bytes(ATTACKS[attack])
    with pytest.raises(KeyreduceError, match="is damaged, or not what DCP writes") as caught:
        dcp_to_hf(saved, folder_of("hf"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "proof").exists()


def test_metadata_of_other_pythons_is_read(saved, folder_of, tensors, monkeypatch):
    """Early 3.11 pickles an enum's member through getattr, 3.13 a path from pathlib._local, Windows its own paths."""
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", lambda self, _: (getattr, (type(self), self.name)))
    _edit_metadata(saved, lambda metadata: None)
    content = (saved / ".metadata").read_bytes()
    assert b"getattr" in content
    for module, name in ((b"pathlib._local", b"PosixPath"), (b"pathlib", b"WindowsPath")):
        old, new = (b"\x8c" + bytes([len(text)]) + text for text in (b"PosixPath", name))
        changed = content.replace(old, new)
        old, new = (b"\x8c" + bytes([len(text)]) + text for text in (b"pathlib", module))
        # Without the frame length of protocol 4, which the new names would not fit.
        at = content.index(b"\x95")
        changed = (changed[:at] + changed[at + 9 :]).replace(old, new)
        (saved / ".metadata").write_bytes(changed)
        target = folder_of(name.decode())
        dcp_to_hf(saved, target)
        _assert_same(_load_all(target), tensors)


def _shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _change(edit):
    return lambda folder: _edit_metadata(folder, edit)


def _change_storage(**fields):
    def edit(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            vars(info).update(fields)

    return _change(edit)


def _rename_all(metadata: Metadata) -> None:
    metadata.planner_data = {key: ("\ud800",) for key in metadata.state_dict_metadata}


def _enlarge(metadata: Metadata) -> None:
    for tensor in metadata.state_dict_metadata.values():
        tensor.size = tensor.chunks[0].sizes = torch.Size([1 << 40, 1 << 20])


BROKEN = {
    "no metadata": (lambda folder: (folder / ".metadata").unlink(), "cannot be read"),
    "empty metadata": (lambda folder: (folder / ".metadata").write_bytes(b""), "is damaged"),
    "text": (lambda folder: (folder / ".metadata").write_text("hello"), "is damaged"),
    "another object": (lambda folder: (folder / ".metadata").write_bytes(pickle.dumps({"a": 1})), "is damaged"),
    "cut metadata": (lambda folder: _shorten(folder / ".metadata"), "is damaged"),
    "huge memo": (lambda folder: (folder / ".metadata").write_bytes(b"\x80\x02Nr\xff\xff\xff\x7f."), "more memory"),
    "no tensors": (_change(lambda metadata: metadata.state_dict_metadata.clear()), "holds no model"),
    "no storage data": (_change(lambda metadata: metadata.storage_data.clear()), "does not describe its tensors"),
    "wrong types": (_change(lambda metadata: setattr(metadata, "storage_data", 3)), "does not describe its tensors"),
    "no distcp": (lambda folder: (folder / "__0_0.distcp").unlink(), "has no __0_0.distcp"),
    "cut distcp": (lambda folder: _shorten(folder / "__0_0.distcp"), "is too short"),
    "other file": (_change_storage(relative_path="../x"), "outside its folder"),
    "any file": (_change_storage(relative_path="/etc/passwd"), "outside its folder"),
    "names of no kind": (_change(_rename_all), "does not describe its tensors"),
    "negative offset": (_change_storage(offset=-1), "is too short"),
    "offset of no kind": (_change_storage(offset="1"), "does not describe its tensors"),
    "size past all memory": (_change(_enlarge), "is too short"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_dcp_is_refused_before_anything_is_written(saved, folder_of, case):
    damage, message = BROKEN[case]
    damage(saved)
    target = folder_of("hf")
    with pytest.raises(KeyreduceError, match=message) as caught:
        dcp_to_hf(saved, target)
    assert "\n" not in str(caught.value)
    assert not any(target.iterdir())


def test_data_that_is_not_a_tensor_is_refused(saved, folder_of):
    data = saved / "__0_0.distcp"
    data.write_bytes(b"\0" * data.stat().st_size)
    with pytest.raises(KeyreduceError, match="cannot read 'model.*may be damaged") as caught:
        dcp_to_hf(saved, folder_of("hf"))
    assert "\n" not in str(caught.value)


def test_flipped_bits_in_metadata_never_raise_anything_else(saved, tmp_path):
    content = (saved / ".metadata").read_bytes()
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for trial in range(60):
        flipped = bytearray(content)
        flipped[int(torch.randint(len(content), (1,), generator=generator))] ^= 1 << trial % 8
        (saved / ".metadata").write_bytes(flipped)
        target = tmp_path / str(trial)
        target.mkdir()
        try:
            dcp_to_hf(saved, target)
        except KeyreduceError:
            refused += 1
    assert refused > 20


def test_a_dtype_that_safetensors_has_not_is_named(folder_of):
    source = folder_of("step-0")
    dcp.save({"t": torch.zeros(2, dtype=torch.complex128)}, checkpoint_id=source, no_dist=True)
    (source / "config.json").write_text("{}")
    with pytest.raises(KeyreduceError, match="'t' is torch.complex128"):
        dcp_to_hf(source, folder_of("hf"))


def test_a_full_disk_is_a_user_error_and_an_interrupt_stays_one(make_folder, folder_of, tensors, monkeypatch):
    source = open_folder(make_folder(tensors))

    def interrupt(written):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dcp(source, folder_of("interrupted"), progress=interrupt)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(KeyreduceError, match="cannot write .*No space left on device"):
        write_dcp(source, folder_of("full"))
