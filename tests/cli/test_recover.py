"""``keyreduce recover`` on tiny models."""

import json
from pathlib import Path

import pytest
from tiny_models import FAMILIES, tensors_of

from keyreduce.checkpoint.folder import open_folder

WORK = Path("keyreduce-out")
FEW = ("--num-batches", 2, "--batch-size", 2, "--seq-len", 72)


@pytest.fixture
def pruned(keyreduce, tiny_folder):
    """A function: prune a tiny model of a family into the work folder, and return the model's folder."""

    def prune(model_type: str = "delta_net") -> Path:
        folder = tiny_folder(model_type)
        keyreduce("prune", "--model", folder, "--method", "l2", "--ratio", 0.5, "--json").json()
        return folder

    return prune


@pytest.mark.parametrize("model_type", FAMILIES)
def test_it_finds_what_prune_wrote(keyreduce, pruned, model_type):
    dense = pruned(model_type)
    result = keyreduce("recover", *FEW, "--json").json()
    assert result["made"] and result["mode"] == "least-squares" and result["tokens"] == 2 * 2 * 72
    assert (Path(result["dense"]), Path(result["pruned"])) == (dense, WORK / "pruned")
    before, after = tensors_of(WORK / "pruned"), tensors_of(WORK / "recovered")
    assert {name for name in after if not after[name].equal(before[name])} == {
        f"model.layers.{layer}.attn.o_proj.weight" for layer in (0, 1)
    }
    assert keyreduce("verify", WORK / "recovered", "--json").json()["is_whole"]
    compared = keyreduce("eval", "--compressed", WORK / "recovered", "--num-batches", 1, "--seq-len", 64, "--json")
    assert len(compared.json()["models"]) == 2

    again = keyreduce("recover", *FEW, "--json")
    assert again.json()["made"] is False
    assert "is there already, from the same inputs" in again.err
    other = keyreduce("recover", *FEW, "--seed", 1)
    assert other.code == 2 and "differs in seed" in other.err


def test_commands_after_it_take_the_repaired_model(keyreduce, pruned, tiny_folder):
    pruned()
    keyreduce("recover", *FEW)
    converted = keyreduce("convert-dcp")
    assert f"from {WORK / 'recovered'}" in converted.out
    keyreduce("convert-dcp", WORK / "dcp", "back")
    repaired = tensors_of(WORK / "recovered")
    assert all(tensor.equal(repaired[name]) for name, tensor in tensors_of(Path("back")).items())
    timed = keyreduce("benchmark", "--rounds", 2, "--seq-len", 64, "--json").json()["models"]
    assert [(entry["label"], entry["folder"]) for entry in timed][1:] == [("recovered", str(WORK / "recovered"))]
    looked_at = keyreduce("rank", "--num-batches", 1, "--batch-size", 1, "--seq-len", 64, "--json").json()["models"]
    assert [entry["label"] for entry in looked_at] == ["dense", "recovered"]
    assert keyreduce("verify", "--json").json()["verified"] == str(WORK / "recovered")
    ask = ("eval", "--num-batches", 1, "--seq-len", 64, "--json")
    models = keyreduce(*ask).json()["models"]
    assert [entry["label"] for entry in models] == ["dense", "pruned", "recovered"]
    assert len({entry["perplexity_per_token"] for entry in models}) == 3
    alone = keyreduce(*ask, "--compressed", WORK / "recovered").json()["models"]
    assert [entry["label"] for entry in alone] == ["dense", "pruned"]
    assert alone[1]["perplexity_per_token"] == models[2]["perplexity_per_token"]

    # Pruned otherwise, it is no longer a repair of what is there.
    keyreduce("prune", "--model", tiny_folder("delta_net"), "--method", "l2", "--ratio", 0.25, "--overwrite")
    assert [entry["label"] for entry in keyreduce(*ask).json()["models"]] == ["dense", "pruned"]
    assert keyreduce("verify", "--json").json()["verified"] == str(WORK / "pruned")
    # Of a model that was pruned elsewhere, the repair alone is there.
    (WORK / "pruned").rename("elsewhere")
    assert [entry["label"] for entry in keyreduce(*ask).json()["models"]] == ["dense", "recovered"]


def test_a_damaged_record_of_a_repair_is_told(keyreduce, pruned):
    pruned()
    keyreduce("recover", *FEW)
    record = json.loads((WORK / "recovered/keyreduce.json").read_text())
    (WORK / "recovered/keyreduce.json").write_text(json.dumps(record | {"repairs": [{"inputs": 3}]}))
    for command in ("eval", "convert-dcp", "verify"):
        result = keyreduce(command)
        assert result.code == 2 and "does not say what was repaired" in result.err


def test_reconstruct_says_what_it_did(keyreduce, pruned):
    pruned()
    told = keyreduce("recover", "--mode", "reconstruct", "--steps", 2, "--lr", 1e-3, *FEW)
    assert told.code == 0, told.err
    assert "wrote keyreduce-out/recovered" in told.out
    (entry,) = json.loads((WORK / "recovered" / "keyreduce.json").read_text())["repairs"]
    assert entry["inputs"]["options"]["steps"] == 2
    assert entry["inputs"]["text"]["kind"] == "stdlib" and entry["inputs"]["text"]["split"] == "calibration"
    assert entry["inputs"]["pruned"] == open_folder(WORK / "pruned").identity
    assert entry["command"].startswith("keyreduce recover --mode reconstruct")
    assert {"error_first", "error_last"} <= entry["layers"]["0"].keys()


def test_rows_that_repeat_are_recorded_and_matter(keyreduce, pruned):
    pruned()
    for output, share in (("plain", 0), ("half", 0.5)):
        keyreduce("recover", *FEW, "--repeats", share, "--output", output, "--json").json()
        (entry,) = json.loads(Path(output, "keyreduce.json").read_text())["repairs"]
        assert entry["inputs"]["repeats"] == share
        assert ("50.0% of the rows" in Path(output, "README.md").read_text()) == bool(share)
    plain, half = tensors_of(Path("plain")), tensors_of(Path("half"))
    assert not all(half[name].equal(plain[name]) for name in plain)


def test_what_was_repaired_can_be_pruned_and_repaired_again(keyreduce, pruned):
    dense = pruned()
    keyreduce("recover", *FEW, "--json").json()
    arguments = ("--model", WORK / "recovered", "--method", "l2", "--keep", 4, "--output", "twice")
    assert keyreduce("prune", *arguments).code == 0
    keyreduce("recover", "--compressed", "twice", "--output", "end", *FEW, "--json").json()
    record = json.loads(Path("end/keyreduce.json").read_text())
    assert [entry["after_step"] for entry in record["repairs"]] == [1, 2]
    assert Path(record["dense"]) == dense
    assert Path("end/README.md").read_text().count("## Repair") == 1


def test_held_out_text_is_measured_on_all_three(keyreduce, pruned):
    pruned()
    Path("held.txt").write_text("what nobody has seen " * 60)
    found = keyreduce("recover", "--heldout", "held.txt", *FEW, "--json").json()["perplexity"]
    assert found.keys() == {"dense", "pruned", "recovered"}
    assert all(value > 1 for value in found.values())


def test_bad_input_is_one_line_and_leaves_nothing(keyreduce, pruned, tiny_folder):
    missing = keyreduce("recover")
    assert missing.code == 2 and "run keyreduce prune" in missing.err
    dense = pruned()
    before = sorted(WORK.rglob("*"))
    Path("same.jsonl").write_text(json.dumps({"text": "x" * 60}) + "\n")
    other = tiny_folder("gated_deltanet")
    for arguments, told in (
        (("--mode", "magic"), "take one of least-squares, reconstruct"),
        (("--steps", 3), "takes no --steps"),
        (("--repeats", 1), "--repeats is 1; it is a share of the rows"),
        (("--text", "same.jsonl", "--heldout", "same.jsonl"), "are the same"),
        (("--text", "absent.txt"), "absent.txt"),
        (("--model", other), "was not pruned from"),
        (("--output", WORK / "pruned", "--overwrite"), "is, or holds, the model itself"),
        (("--output", dense, "--overwrite"), "is, or holds, the model itself"),
        (("--compressed", dense), "name that with --model"),
        (("--num-batches", 0), "at least 1"),
        (("--device", "abacus"), "abacus"),
    ):
        result = keyreduce("recover", *arguments)
        assert (result.code, result.out) == (2, ""), arguments
        assert told in result.err and len(result.err.strip().splitlines()) == 1, result.err
    assert sorted(WORK.rglob("*")) == before
