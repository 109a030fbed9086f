"""Valid checkpoints, damaged in 1,000 ways: each run makes a whole output, or says in one line why there is none."""

import json
import os
import pickle
import random
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from tiny_models import build, save

from keyreduce.checkpoint.find import open_model
from keyreduce.cli import errors, main

MUTATIONS = 1000
BATCHES = 10
PRUNE = ("prune", "--method", "random", "--ratio", "0.5", "--model")
OUTSIDE = "outside-of-the-source"

STRANGE = [
    *(0, -1, 1, 2, 3, 7, 10**18, -(10**18), 2**63, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *(True, False, None, "", "x", "../x", "/etc/passwd", f"../{OUTSIDE}/model.safetensors"),
    *("a\0b", "\ud800", "é" * 300),
    *([], [0], [-1], [10**10, 10**10], [[]], {}, {"a": 1}, {"dtype": "F32"}, "F32", "BF16", "I64", "delta_net_2"),
]

_opened: list[str] = []
_listening = False


def _listen(event: str, arguments: tuple) -> None:
    if _listening and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        _opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_listen)  # there is no taking it away again


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[Path]:
    """The same model whole, in shards, as a flat DCP and as a nested one."""
    folder = tmp_path_factory.mktemp("sources")
    model = build("delta_net", num_hidden_layers=1, vocab_size=257)
    save(model, folder / "whole")
    save(model, folder / "shards", max_shard_size="15KB")
    tensors = load_file(folder / "whole" / "model.safetensors")
    for name, state in (("flat", {**tensors, "optimizer": {"a": torch.zeros(3)}}), ("nested", {"model": tensors})):
        dcp.save(state, checkpoint_id=folder / name / "step-5", no_dist=True)
        shutil.copy(folder / "whole" / "config.json", folder / name / "step-5")
    for path in folder.glob("**/tokenizer*"):
        path.unlink()  # they are carried as they are
    sizes = {"key_heads": 2, "value_heads": 2, "head_k_dim": 16, "head_v_dim": 16}
    step = {"inputs": {"source": "y", "method": "l2"}, "layers": {"0": {"before": sizes, "after": sizes}}}
    record = {"dense": "x", "versions": {"keyreduce": "0.1.0"}, "steps": [step]}
    (folder / "whole" / "keyreduce.json").write_text(json.dumps(record))
    assert len(list((folder / "shards").glob("*.safetensors"))) > 2
    return [folder / name for name in ("whole", "shards", "flat", "nested")]


def mutate_bytes(path: Path, dice: random.Random) -> str:
    """Damage a file without looking at what it is."""
    data = bytearray(path.read_bytes())
    at = dice.randrange(len(data)) if dice.random() < 0.5 else dice.randrange(min(len(data), 4096))
    kind = dice.choice(["flip", "set", "cut", "append", "empty", "insert", "remove", "swap", "length"])
    if kind == "flip":
        for _ in range(dice.choice([1, 1, 8])):
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    elif kind == "set":
        data[at : at + 4] = bytes(dice.choices([0, 255, 127, 46, 47], k=4))
    elif kind == "cut":
        del data[at:]
    elif kind == "append":
        data += bytes(dice.choice([1, 8, 5000]))
    elif kind == "empty":
        data.clear()
    elif kind == "insert":
        data[at:at] = dice.randbytes(dice.choice([1, 8]))
    elif kind == "remove":
        del data[at : at + dice.choice([1, 8, 64])]
    elif kind == "swap":
        other = dice.randrange(len(data))
        data[at], data[other] = data[other], data[at]
    else:
        data[:8] = dice.choice([0, 1, 7, 2**20, 2**40, 2**63, 2**64 - 1]).to_bytes(8, "little")
    path.write_bytes(data)
    return f"{kind} at {at} of {path.name}"


def mutate_tree(content: object, dice: random.Random) -> str:
    """Change something in a tree of lists and dictionaries."""
    place, told = content, ""
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return f"{told}: nothing"
        key = dice.choice(keys)
        told += f"/{key}"
        below = place[key]
        if isinstance(below, dict | list) and below and dice.random() < 0.8:
            place = below
            continue
        kind = dice.choice(["set", "set", "set", "remove", "add"])
        value = dice.choice(STRANGE)
        if kind == "set":
            place[key] = value
        elif kind == "remove":
            del place[key]
        elif isinstance(place, dict):
            place[dice.choice(["x", "", "../x", "__metadata__", "model.norm.weight"])] = value
        else:
            place.append(value)
        return f"{kind} {told} {value!r}"


def mutate_json(path: Path, dice: random.Random) -> str:
    """Change the structure of a JSON file, or of the header of a safetensors file."""
    data, rest = path.read_bytes(), b""
    if path.suffix == ".safetensors":
        length = int.from_bytes(data[:8], "little")
        data, rest = data[8 : 8 + length], data[8 + length :]
    content = json.loads(data)
    told = " and ".join(mutate_tree(content, dice) for _ in range(dice.choice([1, 1, 2])))
    text = json.dumps(content).encode("utf-8", "replace")
    if dice.random() < 0.05:
        text, told = text[:-1] + b', "model_type": 1, "model_type": 2}', told + " and a key twice"
    if dice.random() < 0.02:
        text, told = b"[" * 100_000, "deep"
    path.write_bytes((len(text).to_bytes(8, "little") + text + rest) if path.suffix == ".safetensors" else text)
    return f"{told} in {path.name}"


def mutate_place(path: Path, dice: random.Random) -> str:
    """Put something else in the place of a file."""
    kind = dice.choice(["gone", "a folder", "a broken link", "a link to itself", "no permissions"])
    if kind == "no permissions":
        path.chmod(0)
        return f"{kind} for {path.name}"
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "a broken link":
        path.symlink_to("nowhere")
    elif kind == "a link to itself":
        path.symlink_to(path.name)
    return f"{kind} for {path.name}"


def mutate_metadata(path: Path, dice: random.Random) -> str:
    """Change the fields of a DCP's metadata."""
    metadata = pickle.loads(path.read_bytes())
    key = dice.choice(list(metadata.state_dict_metadata))
    saved = metadata.state_dict_metadata[key]
    index = dice.choice(list(metadata.storage_data))
    value = dice.choice(STRANGE)
    kinds = ["path", "offset", "length", "size", "dtype", "planner", "chunks", "storage", "key", "properties"]
    kind = dice.choice(kinds)
    if kind in ("path", "offset", "length"):
        setattr(metadata.storage_data[index], {"path": "relative_path"}.get(kind, kind), value)
    elif kind == "size":
        saved.size = dice.choice([torch.Size([3]), torch.Size([2**40, 2**40]), torch.Size([]), value])
    elif kind == "dtype":
        saved.properties.dtype = dice.choice([torch.float64, torch.int8, torch.complex64, torch.bits8, value])
    elif kind == "planner":
        metadata.planner_data = dice.choice([value, {key: value}, {key: ("model", value)}, {key: ()}])
    elif kind == "chunks":
        saved.chunks = dice.choice([[], value, [value], saved.chunks * 2])
    elif kind == "storage":
        metadata.storage_data = dice.choice([{}, value])
    elif kind == "key":
        metadata.state_dict_metadata[str(value)] = metadata.state_dict_metadata.pop(key)
    else:
        saved.properties = value
    path.write_bytes(pickle.dumps(metadata, protocol=dice.choice([2, 4, 5])))
    return f"{kind} of {key} {value!r}"


def mutate(folder: Path, dice: random.Random) -> str:
    """Damage one file of a checkpoint, and tell how."""
    path = dice.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    ways: list[Callable[[Path, random.Random], str]] = [mutate_bytes, mutate_place]
    if path.suffix in (".json", ".safetensors"):
        ways += [mutate_json] * 6
    if path.name == ".metadata":
        ways += [mutate_metadata] * 6
    return dice.choice(ways)(path, dice)


def state_of(folder: Path) -> dict[str, tuple]:
    """What a folder holds, and when it was changed."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.rglob("*")
    }


@pytest.mark.parametrize("batch", range(BATCHES))
def test_damaged_checkpoints_end_well(sources, tmp_path, monkeypatch, capsys, batch):
    global _listening
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    outside = tmp_path / OUTSIDE
    shutil.copytree(sources[0], outside)
    refused = 0
    for number in range(batch, MUTATIONS, BATCHES):
        dice = random.Random(number)
        origin = dice.choice(sources)
        folder, target = tmp_path / "source", tmp_path / "out" / "target"
        shutil.copytree(origin, folder)
        told = ascii(f"mutation {number} of {origin.name}: {mutate(folder, dice)}")
        before = state_of(folder)
        command = (*PRUNE, folder, "--output", target) if dice.random() < 0.6 else ("convert-dcp", folder, target)
        monkeypatch.setattr(sys, "argv", ["keyreduce", *map(str, command)])
        monkeypatch.setattr(errors, "show_tracebacks", False)
        capsys.readouterr()
        _opened.clear()
        began, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        _listening = True
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code or 0
        except BaseException as error:
            raise AssertionError(f"{told}: {command[0]} raised {error!r}") from error
        finally:
            _listening = False
        out, err = capsys.readouterr()
        assert time.monotonic() - began < 30, told
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 1_000_000, told  # KiB
        assert state_of(folder) == before, told
        assert not [path for path in _opened if OUTSIDE in path or path.startswith("/etc/passwd")], told
        assert "Traceback" not in err, told
        assert code in (0, 2), (told, code, err)
        if code == 2:
            refused += 1
            assert not out and len(err.splitlines()) == 1 and len(err) < 5000, (told, out, err)
            assert not (tmp_path / "out").exists(), told
        else:
            written = open_model(str(target))
            for name in written.tensors:
                written.read(name)
            assert not list(target.parent.glob(".*")), told
        for path in folder.rglob("*"):
            if not path.is_symlink():
                path.chmod(0o700)
        shutil.rmtree(folder)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert refused > MUTATIONS / BATCHES / 4
