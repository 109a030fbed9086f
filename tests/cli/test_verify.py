"""``keyreduce verify``: what is whole passes, and each kind of damage is found."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture
def pruned(keyreduce, tiny_folder):
    assert keyreduce("prune", "--method", "l2", "--ratio", 0.5, "--model", tiny_folder("delta_net")).code == 0
    from pathlib import Path

    return Path("keyreduce-out/pruned")


def edit(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def forget_checksums(folder) -> None:
    record = json.loads((folder / "keyreduce.json").read_text())
    del record["checksums"]
    (folder / "keyreduce.json").write_text(json.dumps(record))


def test_a_record_without_checksums_does_not_vouch_for_every_byte(keyreduce, pruned):
    whole = keyreduce("verify")
    assert "to the last byte" in whole.out
    assert keyreduce("verify", "--json").json()["checksums_compared"]
    forget_checksums(pruned)
    result = keyreduce("verify")
    assert result.code == 0 and "without checksums" in result.out and "to the last byte" not in result.out
    assert not keyreduce("verify", "--json").json()["checksums_compared"]


def test_a_pruned_checkpoint_is_what_its_record_says(keyreduce, pruned):
    found = keyreduce("verify", "--json").json()
    digest = hashlib.sha256((pruned / "model.safetensors").read_bytes()).hexdigest()
    assert found["sha256"] == {"model.safetensors": digest}
    assert found["is_whole"] and found["is_recorded"] and not found["sums_compared"]
    assert found["bytes"] == sum(t.nbytes for t in load_file(pruned / "model.safetensors").values())
    assert not (pruned / "SHA256SUMS").exists()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_value_that_is_not_finite_is_found(keyreduce, pruned, value):
    def change(tensors):
        tensors["lm_head.weight"][-1, -1] = value

    edit(pruned, change)
    (pruned / "keyreduce.json").unlink()
    result = keyreduce("verify", pruned)
    assert (result.code, result.out) == (2, "")
    assert "tensor 'lm_head.weight'" in result.err and "NaN or inf" in result.err


def test_a_change_after_writing_is_found(keyreduce, pruned):
    edit(pruned, lambda tensors: tensors["lm_head.weight"].add_(1))
    result = keyreduce("verify")
    assert result.code == 2 and "is not what its record describes" in result.err


def test_sums_find_what_else_changed(keyreduce, pruned):
    assert keyreduce("verify", "--write-sums").code == 0
    line = (pruned / "SHA256SUMS").read_text()
    assert line == f"{hashlib.sha256((pruned / 'model.safetensors').read_bytes()).hexdigest()}  model.safetensors\n"
    assert keyreduce("verify", "--json").json()["sums_compared"]
    # The same numbers in another file.
    tensors = load_file(pruned / "model.safetensors")
    save_file(tensors, pruned / "model.safetensors", metadata={"format": "pt", "note": "packed again"})
    result = keyreduce("verify")
    assert result.code == 2 and "model.safetensors is not what was written" in result.err
    forget_checksums(pruned)
    result = keyreduce("verify")
    assert result.code == 2 and "differs from SHA256SUMS" in result.err
    (pruned / "SHA256SUMS").write_text("nonsense")
    assert "not what sha256sum writes" in keyreduce("verify").err


@pytest.mark.parametrize("case", ["missing", "left over", "of another shape"])
@pytest.mark.parametrize("name", ["model.layers.1.attn.o_norm.weight", "model.norm.weight"])
def test_tensors_that_the_config_does_not_ask_for_are_listed(keyreduce, pruned, case, name):
    """Of the mixers by the table; of the rest by the library's model, if one asks for that."""
    more = name.replace("norm", "extra")

    def change(tensors):
        if case == "missing":
            del tensors[name]
        elif case == "left over":
            tensors[more] = torch.zeros(3)
        else:
            tensors[name] = torch.zeros(3)

    edit(pruned, change)
    (pruned / "keyreduce.json").unlink()
    for options in ([], ["--load"]):
        result = keyreduce("verify", *options)
        if "attn" in name or options:
            assert result.code == 2 and len(result.err.splitlines()) == 1
            assert f"{case}: {more if case == 'left over' else name}" in result.err
        else:
            assert result.code == 0 and "its mixers are those that its config.json asks for" in result.out


def test_a_dcp_and_a_folder_that_nobody_recorded(keyreduce, pruned, tiny_folder):
    assert keyreduce("convert-dcp").code == 0
    found = keyreduce("verify", "keyreduce-out/dcp", "--json").json()
    assert found["is_recorded"] and list(found["sha256"]) == ["__0_0.distcp"]
    found = keyreduce("verify", tiny_folder("delta_net"), "--json").json()
    assert found["is_whole"] and not found["is_recorded"]
    assert "there is no folder" in keyreduce("verify", pruned / "none").err or keyreduce("verify", "none").code == 2


def test_the_record_has_the_command_line(keyreduce, pruned):
    step = json.loads((pruned / "keyreduce.json").read_text())["steps"][-1]
    assert step["command"].startswith("keyreduce prune --method l2 --ratio 0.5 --model ")


def test_what_prune_wrote_elsewhere_is_found(keyreduce, tiny_folder, monkeypatch):
    monkeypatch.setenv("OUTPUT_DIR", "elsewhere")
    assert keyreduce("prune", "--method", "l2", "--ratio", 0.5, "--model", tiny_folder("delta_net")).code == 0
    assert keyreduce("verify", "--json").json()["verified"].endswith("elsewhere")
    converted = keyreduce("convert-dcp", "--json").json()
    again = keyreduce("convert-dcp", "--json").json()
    assert again == converted | {"made": False} and converted["source"].endswith("elsewhere")
