"""``keyreduce recover`` on tiny models."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import FAMILIES, build, save, tensors_of

from keyreduce.checkpoint.folder import open_folder
from keyreduce.recovery import layers

WORK = Path("keyreduce-out")
FEW = ("--num-batches", 2, "--batch-size", 2, "--seq-len", 72, "--device", "cpu")


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
    (entry,) = json.loads((WORK / "recovered/keyreduce.json").read_text())["repairs"]
    assert entry["inputs"]["mode"] == "least-squares"
    assert "auto" not in Path(WORK / "recovered/README.md").read_text()
    assert (Path(result["dense"]), Path(result["pruned"])) == (dense, WORK / "pruned")
    before, after = tensors_of(WORK / "pruned"), tensors_of(WORK / "recovered")
    assert {name for name in after if not after[name].equal(before[name])} == {
        f"model.layers.{layer}.attn.o_proj.weight" for layer in (0, 1)
    }
    assert keyreduce("verify", WORK / "recovered", "--json").json()["is_whole"]
    compared = keyreduce("eval", "--compressed", WORK / "recovered", "--num-batches", 1, "--seq-len", 64, "--json")
    assert len(compared.json()["models"]) == 2

    again = keyreduce("recover", *FEW, "--json")
    assert again.json() == result | {"made": False}
    assert "is there already, from the same inputs" in again.err
    assert again.err.count("auto takes least-squares: on a CPU") == 1
    named = keyreduce("recover", "--mode", "least-squares", *FEW, "--json")
    assert named.json() == again.json() and "auto" not in named.err
    other = keyreduce("recover", *FEW, "--seed", 1)
    assert other.code == 2 and "differs in seed" in other.err


def test_commands_after_it_take_the_recovered_model(keyreduce, pruned, tiny_folder):
    pruned()
    keyreduce("recover", *FEW)
    converted = keyreduce("convert-dcp")
    assert f"from {WORK / 'recovered'}" in converted.out
    keyreduce("convert-dcp", WORK / "dcp", "back")
    recovered = tensors_of(WORK / "recovered")
    assert all(tensor.equal(recovered[name]) for name, tensor in tensors_of(Path("back")).items())
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

    # Pruned otherwise, what is there is no longer what it was recovered from.
    keyreduce("prune", "--model", tiny_folder("delta_net"), "--method", "l2", "--ratio", 0.25, "--overwrite")
    assert [entry["label"] for entry in keyreduce(*ask).json()["models"]] == ["dense", "pruned"]
    assert keyreduce("verify", "--json").json()["verified"] == str(WORK / "pruned")
    # Of a model that was pruned elsewhere, the recovered one alone is there.
    (WORK / "pruned").rename("elsewhere")
    assert [entry["label"] for entry in keyreduce(*ask).json()["models"]] == ["dense", "recovered"]


def test_a_damaged_record_of_a_recovery_is_told(keyreduce, pruned):
    pruned()
    keyreduce("recover", *FEW)
    record = json.loads((WORK / "recovered/keyreduce.json").read_text())
    (WORK / "recovered/keyreduce.json").write_text(json.dumps(record | {"repairs": [{"inputs": 3}]}))
    for command in ("eval", "convert-dcp", "verify"):
        result = keyreduce(command)
        assert result.code == 2 and "does not say what was recovered" in result.err


def test_reconstruct_says_what_it_reached(keyreduce, pruned):
    pruned()
    ask = ("recover", "--mode", "reconstruct", "--steps", 2, "--lr", 1e-3, *FEW)
    told = keyreduce(*ask)
    assert told.code == 0, told.err
    assert "wrote keyreduce-out/recovered" in told.out
    (entry,) = json.loads((WORK / "recovered" / "keyreduce.json").read_text())["repairs"]
    assert entry["inputs"]["options"]["steps"] == 2 and entry["inputs"]["algorithm"] >= 1
    assert entry["inputs"]["text"]["kind"] == "stdlib" and entry["inputs"]["text"]["split"] == "calibration"
    assert entry["inputs"]["pruned"] == open_folder(WORK / "pruned").identity
    assert entry["command"].startswith("keyreduce recover --mode reconstruct")
    names = ("missing_before", "missing_after", "missing_reconstructed", "error_first", "error_last")
    row = ["0", *(f"{entry['layers']['0'][name]:.2%}" for name in names)]
    assert row in [line.split() for line in told.out.splitlines()]
    again = keyreduce(*ask, "--json").json()
    assert again["made"] is False and again["layers"] == entry["layers"] and again["seconds"] == entry["seconds"]


def test_a_whole_block_is_fitted_in_a_process_of_its_own(keyreduce):
    """Where nothing has imported fla yet, transformers does not know its models."""
    few = ("--num-batches", "1", "--batch-size", "1", "--seq-len", "32", "--json")
    keyreduce("prune", "--model", "gated-deltanet-5m", "--method", "l2", "--ratio", 0.5, "--json").json()
    ask = ("recover", "--mode", "reconstruct", "--scope", "block", "--steps", "1", *few)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-W", "ignore", "-m", "keyreduce", *ask]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["made"]


def test_another_dense_model_is_refused_unless_it_is_meant(keyreduce, pruned, tmp_path):
    pruned()
    other = str(save(build("delta_net", seed=5), tmp_path / "other"))
    refused = keyreduce("recover", "--model", other, *FEW)
    assert refused.code == 2 and "was not made from" in refused.err and "pass --unrelated" in refused.err
    assert len(refused.err.strip().splitlines()) == 1 and not (WORK / "recovered").exists()
    meant = keyreduce("recover", "--teacher", other, "--unrelated", *FEW, "--json").json()
    assert meant["made"] and meant["dense"] == other


def test_a_flag_overrules_the_environment(keyreduce, pruned, monkeypatch, tmp_path):
    dense = pruned()
    monkeypatch.setenv("BASE_MODEL_DIR", str(tmp_path / "absent"))
    assert "absent" in keyreduce("recover", *FEW).err
    assert keyreduce("recover", "--teacher", dense, *FEW, "--json").json()["dense"] == str(dense)


def test_it_looks_where_prune_was_told_to_write(keyreduce, tiny_folder, monkeypatch):
    monkeypatch.setenv("OUTPUT_DIR", "elsewhere")
    keyreduce("prune", "--model", tiny_folder("delta_net"), "--method", "l2", "--ratio", 0.5)
    assert keyreduce("recover", *FEW, "--json").json()["pruned"] == "elsewhere"


def test_a_second_run_is_refused_before_any_work(keyreduce, python, pruned, monkeypatch):
    pruned()
    plain, meanwhile = layers.load_model, []

    def load(*given, **more):
        if not meanwhile:
            meanwhile.append(subprocess.run(
                [python, "-W", "ignore", "-m", "keyreduce", "recover", *map(str, FEW)],
                capture_output=True, text=True, timeout=300, check=False,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            ))  # fmt: skip
        return plain(*given, **more)

    monkeypatch.setattr(layers, "load_model", load)
    assert keyreduce("recover", *FEW, "--json").json()["made"]
    assert meanwhile[0].returncode == 2
    assert "another run is writing" in meanwhile[0].stderr and len(meanwhile[0].stderr.strip().splitlines()) == 1
    assert sorted(path.name for path in WORK.iterdir()) == ["pruned", "recovered"]


def test_a_run_that_is_terminated_leaves_nothing(python, pruned):
    pruned()
    command = [python, "-W", "ignore", "-m", "keyreduce", "recover", "--mode", "reconstruct"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as started:
        assert "recovering pruned" in started.stderr.readline()
        assert (WORK / ".recovered.partial").is_dir()
        started.send_signal(signal.SIGTERM)
        assert started.wait(60) == 128 + signal.SIGTERM
        assert "Traceback" not in started.stderr.read()
    assert [path.name for path in WORK.iterdir()] == ["pruned"]


def test_rows_that_repeat_are_recorded_and_matter(keyreduce, pruned):
    pruned()
    for output, share in (("plain", 0), ("half", 0.5)):
        keyreduce("recover", *FEW, "--repeats", share, "--output", output, "--json").json()
        (entry,) = json.loads(Path(output, "keyreduce.json").read_text())["repairs"]
        assert entry["inputs"]["repeats"] == share
        assert ("50.0% of the rows" in Path(output, "README.md").read_text()) == bool(share)
    plain, half = tensors_of(Path("plain")), tensors_of(Path("half"))
    assert not all(half[name].equal(plain[name]) for name in plain)


def test_what_was_recovered_can_be_pruned_and_recovered_again(keyreduce, pruned):
    dense = pruned()
    keyreduce("recover", *FEW, "--json").json()
    arguments = ("--model", WORK / "recovered", "--method", "l2", "--keep", 4, "--output", "twice")
    assert keyreduce("prune", *arguments).code == 0
    keyreduce("recover", "--compressed", "twice", "--output", "end", *FEW, "--json").json()
    record = json.loads(Path("end/keyreduce.json").read_text())
    assert [entry["after_step"] for entry in record["repairs"]] == [1, 2]
    assert Path(record["dense"]) == dense
    assert Path("end/README.md").read_text().count("## Recovery") == 1


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
        (("--mode", "magic"), "--mode is 'magic'; take one of auto, least-squares, reconstruct, lora, full"),
        (
            ("--steps", 3, "--device", "cpu"),
            "on a CPU --mode auto is least-squares, which takes no --steps; leave it out, or take --mode reconstruct",
        ),
        (("--repeats", 1), "--repeats is 1; it is a share of the rows"),
        (("--text", "same.jsonl", "--heldout", "same.jsonl"), "are the same"),
        (("--text", "absent.txt"), "absent.txt"),
        (("--model", other), "was not made from"),
        (("--output", WORK / "pruned", "--overwrite"), "is, or holds, the model itself"),
        (("--output", dense, "--overwrite"), "is, or holds, the model itself"),
        (("--compressed", dense), "name that with --model"),
        (("--num-batches", 0), "at least 1"),
        (("--model", dense, "--teacher", other), "leave out --teacher or --model"),
        (("--device", "abacus"), "abacus"),
    ):
        result = keyreduce("recover", *arguments)
        assert (result.code, result.out) == (2, ""), arguments
        assert told in result.err and len(result.err.strip().splitlines()) == 1, result.err
    assert sorted(WORK.rglob("*")) == before
