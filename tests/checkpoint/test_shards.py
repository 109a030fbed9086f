import contextlib
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from keyreduce.checkpoint.shards import ByteRange, ShardPlan, TensorSpec, make_spec, read_header, torch_dtypes
from keyreduce.checkpoint.writing import write_shard
from keyreduce.errors import KeyreduceError


def _as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random bytes seen as ``dtype``, so that NaN payloads and padding count too."""
    raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8)
    return raw > 127 if dtype == torch.bool else raw.view(dtype)


def _file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_header_points_at_the_bytes_the_library_reads(tmp_path, tensors):
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    plan, ranges = read_header(path)
    assert plan.metadata == {"format": "pt"}
    content, specs = path.read_bytes(), {spec.name: spec for spec in plan.tensors}
    for name, tensor in load_file(path).items():
        assert torch_dtypes()[specs[name].dtype] == tensor.dtype and specs[name].shape == tuple(tensor.shape)
        assert ranges[name].path == path and content[ranges[name].begin : ranges[name].end] == _as_bytes(tensor)
    begins = [ranges[name].begin for name in specs]
    assert begins == sorted(begins) and begins[0] == 8 + int.from_bytes(content[:8], "little")


@pytest.mark.parametrize("name", sorted(torch_dtypes()))
def test_every_dtype_is_written_as_the_library_writes_it(tmp_path, name):
    torch.manual_seed(0)
    tensor = _random(torch_dtypes()[name], 3, 8)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    save_file({"t": tensor}, theirs)
    spec = make_spec("t", tensor.dtype, tensor.shape)
    write_shard(ours, ShardPlan([spec], {}), {"t": tensor}.__getitem__)
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_file_from_memory_and_from_byte_ranges_loads(tmp_path, tensors):
    source = tmp_path / "source"
    save_file(tensors, source)
    plan, ranges = read_header(source)
    edited = tensors["model.embeddings.weight"].t()[:5]
    specs = [spec._replace(shape=(5, 16)) if spec.name == "model.embeddings.weight" else spec for spec in plan.tensors]
    data = {name: [place] for name, place in ranges.items()} | {"model.embeddings.weight": edited}
    target, told = tmp_path / "target", []
    write_shard(target, ShardPlan(specs, {"format": "pt"}), data.__getitem__, lambda *one: told.append(one))
    assert [spec for spec, _ in told] == specs
    assert [end for _, end in told] == [place.end for place in read_header(target)[1].values()]
    assert int.from_bytes(target.read_bytes()[:8], "little") % 8 == 0
    with safe_open(target, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert set(opened.keys()) == tensors.keys()
        for name, tensor in (tensors | {"model.embeddings.weight": edited}).items():
            assert torch.equal(opened.get_tensor(name), tensor), name


def _refuse(*arguments):
    raise OSError(18, "Invalid cross-device link")


@pytest.mark.parametrize("kernel_copy", [_refuse, lambda *arguments: 0])
def test_a_range_is_copied_without_the_kernel_too(tmp_path, monkeypatch, kernel_copy):
    monkeypatch.setattr(os, "copy_file_range", kernel_copy, raising=False)
    monkeypatch.setattr("keyreduce.checkpoint.writing._COPY_BYTES", 100)
    data = os.urandom(1234)
    (tmp_path / "source").write_bytes(b"before" + data + b"after")
    plan, ranges = ShardPlan([TensorSpec("t", "U8", (1234,))], {}), [ByteRange(tmp_path / "source", 6, 6 + 1234)]
    write_shard(tmp_path / "target", plan, lambda name: ranges)
    assert (tmp_path / "target").read_bytes().endswith(data)
    assert read_header(tmp_path / "target")[0] == plan


def test_a_source_that_shrinks_is_an_error(tmp_path):
    (tmp_path / "source").write_bytes(b"short")
    with pytest.raises(KeyreduceError, match="changed while it was read"):
        plan, ranges = ShardPlan([TensorSpec("t", "U8", (100,))], {}), [ByteRange(tmp_path / "source", 0, 100)]
        write_shard(tmp_path / "target", plan, lambda name: ranges)


def test_only_what_was_announced_is_written(tmp_path):
    spec = TensorSpec("a", "F32", (2,))
    for wrong in (torch.zeros(3), torch.zeros(2, dtype=torch.bfloat16), [ByteRange(tmp_path / "x", 0, 9)]):
        with pytest.raises(ValueError, match="announced|takes 8 bytes"):
            write_shard(tmp_path / "x", ShardPlan([spec], {}), {"a": wrong}.__getitem__)
    with pytest.raises(ValueError, match="twice"):
        write_shard(tmp_path / "y", ShardPlan([spec, spec], {}), {"a": torch.zeros(2)}.__getitem__)
    assert not (tmp_path / "y").exists()


def test_a_folder_that_is_not_there_is_a_user_error(tmp_path):
    with pytest.raises(KeyreduceError, match="cannot write"):
        write_shard(tmp_path / "missing" / "x", ShardPlan([], {}), {}.__getitem__)


def test_a_dtype_without_a_name_is_refused():
    with pytest.raises(KeyreduceError, match="'t' is torch.complex128"):
        make_spec("t", torch.complex128, (1,))


U8 = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
BAD_HEADERS = {
    "not JSON": b"{not json",
    "an array": b"[]",
    "leading space": b' {"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
    "not UTF-8": b'{"\xff":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
    "lone surrogate": b'{"\\ud800":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
    "deeply nested": b'{"a":' + b"[" * 100_000,
    "endless number": b'{"a":' + b"1" * 10_000 + b"}",
    "duplicate name": b'{"a":%b,"a":%b}' % ((json.dumps(U8).encode(),) * 2),
    "duplicate field": b'{"a":{"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
    "NaN": b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,4]}}',
    "metadata of numbers": {"__metadata__": {"a": 1}, "a": U8},
    "metadata list": {"__metadata__": ["a"], "a": U8},
    "entry is a string": {"a": "U8"},
    "no shape": {"a": {"dtype": "U8", "data_offsets": [0, 4]}},
    "unknown dtype": {"a": U8 | {"dtype": "F7"}},
    "dtype a list": {"a": U8 | {"dtype": ["U8"]}},
    "shape a number": {"a": U8 | {"shape": 4}},
    "negative shape": {"a": U8 | {"shape": [-2, -2]}},
    "boolean shape": {"a": U8 | {"shape": [4, True]}},
    "fractional shape": {"a": U8 | {"shape": [4.0]}},
    "impossible shape": {"a": U8 | {"shape": [0, 1 << 70], "data_offsets": [0, 0]}},
    "one offset": {"a": U8 | {"data_offsets": [4]}},
    "offsets swapped": {"a": U8 | {"data_offsets": [4, 0]}},
    "offsets too far apart": {"a": U8 | {"data_offsets": [0, 5]}},
    "past the end": {"a": U8 | {"shape": [5], "data_offsets": [0, 5]}},
    "out of range": {"a": U8 | {"data_offsets": [1 << 60, (1 << 60) + 4]}},
    "overlap": {"a": U8 | {"shape": [3], "data_offsets": [0, 3]}, "b": U8 | {"shape": [2], "data_offsets": [2, 4]}},
    "hole": {"a": U8 | {"shape": [1], "data_offsets": [0, 1]}, "b": U8 | {"shape": [2], "data_offsets": [2, 4]}},
    "bytes of no tensor": {"a": U8 | {"shape": [3], "data_offsets": [0, 3]}},
    "half a byte": {"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}},
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_bad_header_is_refused_in_one_line(tmp_path, case):
    path = _file(tmp_path / "bad.safetensors", BAD_HEADERS[case], b"\0" * 4)
    with pytest.raises(KeyreduceError) as caught:
        read_header(path)
    message = str(caught.value)
    assert "bad.safetensors" in message and "truncated" in message and "\n" not in message


def test_the_refusal_names_the_tensor(tmp_path):
    path = _file(tmp_path / "bad", {"model.norm": U8 | {"dtype": "F7"}}, b"\0" * 4)
    with pytest.raises(KeyreduceError, match="tensor 'model.norm' has the unknown dtype 'F7'"):
        read_header(path)


def test_a_file_cut_anywhere_is_refused(tmp_path, tensors):
    path = tmp_path / "whole"
    save_file(tensors, path)
    content = path.read_bytes()
    for size in [*range(0, 20), *range(20, len(content), 37), len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(KeyreduceError, match="truncated"):
            read_header(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(KeyreduceError):
        read_header(path)


def test_no_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(KeyreduceError, match="cannot be read"):
            read_header(path)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1))
def test_what_the_library_refuses_is_refused(tmp_path, tensors, seed):
    """Bytes of a valid header are changed at random; we may be stricter than the library, never laxer."""
    path = tmp_path / "flipped"
    save_file(tensors, path)
    content = bytearray(path.read_bytes())
    generator = torch.Generator().manual_seed(seed)
    header_size = 8 + int.from_bytes(content[:8], "little")
    for _ in range(20):
        flipped = bytearray(content)
        for place in torch.randint(0, header_size, (2,), generator=generator).tolist():
            flipped[place] ^= 1 << int(torch.randint(0, 8, (1,), generator=generator))
        path.write_bytes(flipped)
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:
            with pytest.raises(KeyreduceError):
                read_header(path)
        else:
            with contextlib.suppress(KeyreduceError):
                read_header(path)
