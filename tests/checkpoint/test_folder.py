import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from keyreduce.checkpoint.folder import find_sidecars, open_folder
from keyreduce.checkpoint.writing import parse_size, write_folder_files
from keyreduce.errors import KeyreduceError

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_is_read_as_the_library_reads_it(make_folder, tensors, shards):
    folder = make_folder(tensors, shards=shards)
    checkpoint = open_folder(folder)
    assert checkpoint.config["hidden_size"] == 8
    assert list(checkpoint.shards) == sorted(path.name for path in folder.glob("*.safetensors"))
    assert checkpoint.tensors.keys() == tensors.keys()
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    for file, plan in checkpoint.shards.items():
        loaded = load_file(folder / file)
        assert loaded.keys() == {spec.name for spec in plan.tensors}
        for name, theirs in loaded.items():
            ours = checkpoint.read(name)
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
            assert checkpoint.tensors[name].shape == tuple(theirs.shape)
            [(path, begin, end)] = checkpoint.ranges(name)
            assert path == folder / file
            assert path.read_bytes()[begin:end] == theirs.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_a_tensor_that_is_not_there_is_named(make_folder, tensors):
    with pytest.raises(KeyreduceError, match="no tensor 'model.missing'"):
        open_folder(make_folder(tensors)).read("model.missing")


def test_a_dtype_that_torch_has_not_is_listed_but_not_read(make_folder, tensors):
    folder = make_folder(tensors)
    header = json.dumps({"t": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    checkpoint = open_folder(folder)
    assert checkpoint.tensors["t"].shape == (4,)
    with pytest.raises(KeyreduceError, match="cannot be read"):
        checkpoint.read("t")


def test_a_single_file_wins_over_an_index_as_in_transformers(make_folder, tensors):
    folder = make_folder(tensors, shards=2)
    save_file({"only": torch.zeros(1)}, folder / "model.safetensors")
    assert list(open_folder(folder).tensors) == ["only"]


def test_sidecars_are_what_a_loader_looks_for(make_folder, tensors, tmp_path):
    folder = make_folder(tensors, shards=2)
    carried = ["tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "chat_template.jinja"]
    carried += ["vocab.json", "merges.txt", "spiece.model", "LICENSE", "modeling_custom.py"]
    left = ["keyreduce.json", "pytorch_model.bin", "training_args.bin", "optimizer.pt", ".gitattributes"]
    for name in carried + left:
        (folder / name).write_text(name)
    (folder / "tokenizer_folder").mkdir()
    assert [path.name for path in find_sidecars(folder)] == sorted([*carried, "tokenizer.json", "README.md"])
    (folder / "keyreduce.json").unlink()
    assert [path.name for path in open_folder(folder).sidecars] == sorted([*carried, "tokenizer.json"])
    target = tmp_path / "target"
    target.mkdir()
    write_folder_files(target, {"hidden_size": 4}, find_sidecars(folder))
    assert {path.name for path in target.iterdir()} == {*carried, "tokenizer.json", "config.json"}
    assert json.loads((target / "config.json").read_text()) == {"hidden_size": 4}
    assert (target / "spiece.model").read_text() == "spiece.model"


def test_identity_stays_where_the_model_stays(make_folder, tensors, tmp_path):
    folder = make_folder(tensors, shards=2)
    identity = open_folder(folder).identity
    assert len(bytes.fromhex(identity)) == 32
    moved = shutil.copytree(folder, tmp_path / "moved")
    config = json.loads((moved / "config.json").read_text())
    config = {"_name_or_path": "elsewhere"} | dict(reversed(config.items())) | {"transformers_version": "5.9"}
    (moved / "config.json").write_text(json.dumps(config, indent=4))
    (moved / "tokenizer.json").unlink()
    assert open_folder(moved).identity == identity


@pytest.mark.parametrize("change", ["config", "name", "dtype", "first byte", "last byte"])
def test_identity_changes_with_the_model(make_folder, change):
    big = torch.zeros(1 << 20, dtype=torch.uint8)
    folder = make_folder({"a": big})
    before = open_folder(folder).identity
    if change == "config":
        (folder / "config.json").write_text('{"hidden_size": 9}')
    elif change == "name":
        save_file({"b": big}, folder / "model.safetensors", metadata={"format": "pt"})
    elif change == "dtype":
        save_file({"a": big.view(torch.int8)}, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        big[0 if change == "first byte" else -1] = 1
        save_file({"a": big}, folder / "model.safetensors", metadata={"format": "pt"})
    assert open_folder(folder).identity != before


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 8192, 64 * 4096])
def test_identity_covers_every_byte_of_a_small_file(make_folder, size):
    data = torch.zeros(size, dtype=torch.uint8)
    folder = make_folder({"a": data})
    identities = {open_folder(folder).identity}
    places = {0, size // 3, size // 2, size - 1}
    for place in places:
        changed = data.clone()
        changed[place] = 1
        save_file({"a": changed}, folder / "model.safetensors", metadata={"format": "pt"})
        identities.add(open_folder(folder).identity)
    assert len(identities) == 1 + len(places)


def _break(folder, case):
    index = json.loads((folder / INDEX).read_text())
    shard = sorted(folder.glob("model-*"))[0]
    if case == "no folder":
        shutil.rmtree(folder)
    elif case == "a file":
        shutil.rmtree(folder)
        folder.write_text("")
    elif case == "no config":
        (folder / "config.json").unlink()
    elif case == "bad config":
        (folder / "config.json").write_text("{")
    elif case == "no weights":
        (folder / INDEX).unlink()
    elif case == "bin weights":
        (folder / INDEX).unlink()
        (folder / "pytorch_model.bin").write_bytes(b"")
    elif case == "bad index":
        (folder / INDEX).write_text("[]")
    elif case == "missing shard":
        shard.unlink()
    elif case == "truncated shard":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif case == "no tensors":
        save_file({}, folder / "model.safetensors")
    else:
        name = next(iter(index["weight_map"]))
        if case == "no weight_map":
            del index["weight_map"]
        elif case == "path outside":
            index["weight_map"][name] = "../x"
        elif case == "absolute path":
            index["weight_map"][name] = "/etc/passwd"
        elif case == "path of no kind":
            index["weight_map"][name] = 3
        elif case == "tensor too few":
            del index["weight_map"][name]
        elif case == "tensor too many":
            index["weight_map"]["model.extra"] = shard.name
        (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_is_no_model_and_is_not_left_out(make_folder, tensors, name):
    """transformers adds it to the weights when it loads them, so that what is measured would not be what is cut."""
    folder = make_folder(tensors)
    (folder / name).write_text("{}")
    with pytest.raises(KeyreduceError, match=rf"{folder} holds an adapter \({name}\) beside its weights: merge"):
        open_folder(folder)
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()
    with pytest.raises(KeyreduceError, match=rf"{folder} is an adapter \({name}\), not a model: merge it into"):
        open_folder(folder)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("_orig_mod.model.norm.weight", "_orig_mod."),
        ("model.layers.0._orig_mod.attn.q_proj.weight", "_orig_mod."),
        ("module.model.norm.weight", "module."),
        ("model.layers.0._fsdp_wrapped_module.attn.q_proj.weight", "_fsdp_wrapped_module."),
        ("base_model.model.model.norm.weight", "base_model.model."),
    ],
)
def test_names_that_a_wrapper_made_are_refused_with_its_prefix(make_folder, name, prefix):
    folder = make_folder({name: torch.ones(2)})
    with pytest.raises(KeyreduceError, match=f"tensors of {folder} have the prefix '{prefix}' of .*'{name}'; ") as told:
        open_folder(folder)
    assert len(str(told.value)) < 300 + len(str(folder))


@pytest.mark.parametrize(
    "missing", ["config.json", "model.safetensors", "model-00002-of-00002.safetensors", "tokenizer.json"]
)
def test_a_link_that_leads_nowhere_is_called_that(make_folder, tensors, missing):
    """As in a cache of the hub whose blobs were cleared."""
    folder = make_folder(tensors, shards=2 if "-" in missing else 1)
    (folder / missing).unlink(missing_ok=True)
    (folder / missing).symlink_to("../blobs/0123")
    with pytest.raises(KeyreduceError, match=rf"{missing} is a link to \.\./blobs/0123, which is not there"):
        open_folder(folder)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no folder", "there is no folder"),
        ("a file", "there is no folder"),
        ("no config", "has no config.json"),
        ("bad config", "config.json is not valid JSON"),
        ("no weights", "has neither model.safetensors nor model.safetensors.index.json$"),
        ("bin weights", "convert its .bin weights to safetensors first"),
        ("bad index", "index.json holds no JSON object"),
        ("no weight_map", "has no weight_map"),
        ("missing shard", "has no model-00001-of-00002.safetensors"),
        ("truncated shard", "model-00001-of-00002.safetensors.*truncated"),
        ("no tensors", "holds no tensors"),
        ("path outside", "into '../x', not a file of its folder"),
        ("absolute path", "into '/etc/passwd', not a file of its folder"),
        ("path of no kind", "into 3, not a file of its folder"),
        ("tensor too few", "disagree about tensor 'model.embeddings.weight'"),
        ("tensor too many", "disagree about tensor 'model.extra'"),
    ],
)
def test_a_damaged_folder_is_refused(make_folder, tensors, case, message):
    folder = make_folder(tensors, shards=2)
    _break(folder, case)
    with pytest.raises(KeyreduceError, match=message) as caught:
        open_folder(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "size"), [("500MB", 500 * 10**6), ("5GB", 5 * 10**9), ("7", 7), (" 2 kb", 2000)])
def test_sizes_are_read_as_transformers_counts_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0GB", "-1", "1.5GB", "5 apples", "GB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(KeyreduceError, match="not a shard size"):
        parse_size(text)
