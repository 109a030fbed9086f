"""Checksums of whole files: they are those of the files, and tell of any byte that changed."""

import hashlib
import io
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from keyreduce.checkpoint.checksums import FileHasher, checksum
from keyreduce.checkpoint.dcp import write_dcp
from keyreduce.checkpoint.dcp_source import DcpCheckpoint
from keyreduce.checkpoint.folder import open_folder
from keyreduce.checkpoint.record import Record
from keyreduce.checkpoint.rewrite import rewrite
from keyreduce.checkpoint.verify import hash_files
from keyreduce.errors import KeyreduceError


def expected(path: Path) -> str:
    return xxhash.xxh3_128(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("shards", [1, 3])
def test_a_rewrite_returns_those_of_its_shards(make_folder, tensors, tmp_path, shards):
    target = tmp_path / "target"
    target.mkdir()
    found = rewrite(open_folder(make_folder(tensors, shards=shards)), target, dtype=torch.float32)
    assert found == {path.name: expected(path) for path in target.glob("*.safetensors")}
    assert len(found) == shards


@pytest.mark.parametrize("nested", [False, True])
def test_so_does_the_writing_of_a_dcp(make_folder, tensors, tmp_path, nested):
    target = tmp_path / "target"
    target.mkdir()
    found = write_dcp(open_folder(make_folder(tensors)), target, nested=nested)
    assert found == {path.name: expected(path) for path in target.glob("*.distcp")}
    assert hash_files(DcpCheckpoint(target), Record(checksums=found)).keys() == found.keys()


def test_files_are_followed_while_they_grow(tmp_path):
    data = torch.randint(256, (9 << 20,), dtype=torch.uint8).numpy().tobytes()  # more than two pieces
    with FileHasher() as hasher:
        for name, size in (("first", 5), ("second", len(data)), ("empty", 0)):
            with open(tmp_path / name, "wb", buffering=0) as file:
                for begin in range(0, size or 1, 1 << 20):
                    file.write(data[:size][begin : begin + (1 << 20)])
                    hasher.written(tmp_path / name, file.seek(0, io.SEEK_CUR))
    assert hasher.checksums == {name: expected(tmp_path / name) for name in ("first", "second", "empty")}
    assert checksum(tmp_path / "second") == hasher.checksums["second"]


def test_a_file_that_cannot_be_read_again_is_told_of(tmp_path):
    with pytest.raises(KeyreduceError, match="gone.* cannot be read"), FileHasher() as hasher:
        hasher.written(tmp_path / "gone", 3)


def test_an_error_of_the_writing_goes_first(tmp_path):
    with pytest.raises(ZeroDivisionError), FileHasher() as hasher:
        hasher.written(tmp_path / "gone", 3)
        raise ZeroDivisionError


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A folder of 8 MiB, of which its identity sees half."""
    folder = tmp_path_factory.mktemp("written")
    (folder / "config.json").write_text('{"model_type": "delta_net"}')
    save_file({"weight": torch.randn(1024, 2048)}, folder / "model.safetensors")
    Record(checksums={"model.safetensors": checksum(folder / "model.safetensors")}).write(folder)
    return folder


@settings(max_examples=60, deadline=None)
@given(place=st.integers(0, 8 << 20), bit=st.integers(0, 7))
def test_any_byte_that_changed_is_found(written, place, bit):
    path, record = written / "model.safetensors", Record.read(written)
    source = open_folder(written)
    with open(path, "r+b") as file:
        file.seek(place)
        (before,) = file.read(1)
        for value in (before ^ 1 << bit, before):
            file.seek(place)
            file.write(bytes([value]))
            file.flush()
            if value != before:
                with pytest.raises(KeyreduceError, match=r"model\.safetensors is not what was written"):
                    hash_files(source, record)
    assert hash_files(source, record) == {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}


def test_a_byte_between_two_samples_escapes_the_identity_alone(written):
    path, record = written / "model.safetensors", Record.read(written)
    identity, raw = open_folder(written).identity, path.read_bytes()
    # Blocks of 4 KiB are sampled every 8 KiB or so: one of two bytes that are 4 KiB apart is in none.
    found = []
    for place in (1 << 20, (1 << 20) + 4096):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        found.append(open_folder(written).identity == identity)
        with pytest.raises(KeyreduceError, match="is not what was written"):
            hash_files(open_folder(written), record)
    path.write_bytes(raw)
    assert True in found and hash_files(open_folder(written), record)


def test_another_file_is_refused_and_a_record_without_checksums_refuses_none(written):
    source = open_folder(written)
    with pytest.raises(KeyreduceError, match="is not what was written"):
        hash_files(source, Record(checksums={"other.safetensors": "00"}))
    told = []
    assert hash_files(source, Record(identity=source.identity)) == hash_files(
        source, Record.read(written), progress=told.append
    )
    assert sum(told) == (written / "model.safetensors").stat().st_size
