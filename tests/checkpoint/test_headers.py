"""What describes a checkpoint, read without torch, against what torch's own readers say."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from keyreduce.checkpoint.dcp_source import DcpCheckpoint
from keyreduce.checkpoint.find import open_model
from keyreduce.checkpoint.headers import read_headers
from keyreduce.errors import KeyreduceError


def described(tensors):
    return {name: (spec.dtype, spec.shape) for name, spec in tensors.items()}


def test_a_folder(tiny_folder):
    folder = tiny_folder("gated_deltanet")
    found = read_headers(str(folder))
    assert found.shapes == {name: tuple(one.shape) for name, one in load_file(folder / "model.safetensors").items()}
    assert found.config == json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("layout", ["flat", "nested"])
def test_a_dcp(tiny_folder, tmp_path, layout):
    folder = tiny_folder("delta_net")
    weights = load_file(folder / "model.safetensors")
    weights = {name: one.bfloat16() if one.ndim > 1 else one for name, one in weights.items()}
    state = {"model": weights} if layout == "nested" else dict(weights)
    # What a training run keeps besides; it is none of the model.
    state["optimizer"] = {"state": {"step": torch.tensor(3.0)}}
    dcp.save(state, checkpoint_id=tmp_path / "step-7", no_dist=True)
    (tmp_path / "step-7" / "config.json").write_text((folder / "config.json").read_text())
    found = read_headers(str(tmp_path))
    assert found.folder == tmp_path / "step-7"
    expected = DcpCheckpoint(tmp_path / "step-7")
    assert described(found.tensors) == described(expected.tensors)
    assert found.config == expected.config
    (tmp_path / "step-7" / "config.json").unlink()
    with pytest.raises(KeyreduceError, match="pass the one of the model with `config`"):
        read_headers(str(tmp_path))
    assert described(read_headers(str(tmp_path), config=folder).tensors) == described(found.tensors)


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"\x80\x02r\xff\xff\xff\x7f.", b"\x80\x04}."], ids=repr)
def test_damaged_metadata(tmp_path, content):
    (tmp_path / ".metadata").write_bytes(content)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(KeyreduceError, match="is damaged"):
        read_headers(str(tmp_path))


def test_a_pickle_calls_nothing(tmp_path):
    target = tmp_path / "called"
    command = f"touch {target}"
    payload = b"cposix\nsystem\n(V" + command.encode() + b"\ntR."
    (tmp_path / ".metadata").write_bytes(payload)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(KeyreduceError, match="is damaged"):
        read_headers(str(tmp_path))
    assert not target.exists()


def test_a_model_on_the_hub_is_not_downloaded(tiny_folder, monkeypatch):
    folder = tiny_folder("delta_net")
    weights = open_model(str(folder)).tensors
    infos = {name: SimpleNamespace(dtype=spec.dtype, shape=list(spec.shape)) for name, spec in weights.items()}
    metadata = SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=infos)})
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file: str(folder / file))
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", lambda name: metadata)
    found = read_headers("owner/model")
    assert (found.folder, described(found.tensors)) == (None, described(weights))
    # What was downloaded before is read where it is.
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: str(folder / "config.json"))
    assert read_headers("owner/model").folder == folder


def test_a_model_that_is_nowhere(monkeypatch):
    def refuse(*args):
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(KeyreduceError, match="the hub did not give a model of that name: offline"):
        read_headers("owner/model")
    with pytest.raises(KeyreduceError, match="there is no model 'nowhere'"):
        read_headers("nowhere")


def test_torch_is_not_imported(tiny_folder):
    program = "import sys; from keyreduce.checkpoint.headers import read_headers; read_headers(sys.argv[1]); "
    heavy = {"torch", "numpy", "safetensors", "transformers", "huggingface_hub"}
    program += f"print(sorted({heavy} & sys.modules.keys()))"
    command = [sys.executable, "-c", program, str(tiny_folder("delta_net"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
