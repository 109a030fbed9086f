"""The record: what version 0.1 wrote stays readable, what is damaged is refused, a changed record is another one."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from keyreduce.checkpoint.card import model_card
from keyreduce.checkpoint.record import SCHEMA, Record
from keyreduce.errors import KeyreduceError

RECORDS = Path(__file__).parent / "records"  # written by the command line of version 0.1, with fewer layers
NAMES = sorted(path.stem for path in RECORDS.glob("*.json"))
MODEL_TYPES = {"pca": "delta_net_2", "recovered-by-prune": "gated_deltanet"}


def old_record(name: str, folder: Path) -> Record:
    shutil.copyfile(RECORDS / f"{name}.json", folder / "keyreduce.json")
    return Record.read(folder)


def test_all_kinds_are_here():
    assert len(NAMES) == 8


@pytest.mark.parametrize("name", NAMES)
def test_records_of_version_0_1_stay_readable(tmp_path, name):
    content, record = json.loads((RECORDS / f"{name}.json").read_text()), old_record(name, tmp_path)
    assert "schema" not in content and record.schema == SCHEMA
    assert (record.dense, record.identity) == (content["dense"], content["identity"])
    assert record.dense_identity == content["steps"][0]["inputs"]["source"]
    assert (record.checksums, record.dcp_layout) == (None, content.get("dcp_layout"))
    assert len(record.repairs) == len(content.get("repairs", []))
    for found, old in zip(record.steps + record.repairs, content["steps"] + content.get("repairs", []), strict=True):
        versions = {"algorithm": 1, "method_version": 1} if "method" in old["inputs"] else {"algorithm": 1}
        assert found["inputs"] == old["inputs"] | versions
        assert {key: found[key] for key in old if key != "inputs"} == {key: old[key] for key in old if key != "inputs"}
    if "converted" in content:
        assert record.converted["inputs"] == content["converted"] | {"algorithm": 1}
    record.write(tmp_path)
    assert Record.read(tmp_path) == record
    assert json.loads((tmp_path / "keyreduce.json").read_text())["schema"] == SCHEMA


@pytest.mark.parametrize("name", NAMES)
def test_records_of_version_0_1_give_a_card(tmp_path, name):
    record = old_record(name, tmp_path)
    card = model_card(record, {"model_type": MODEL_TYPES.get(name, "delta_net")})
    assert ModelCard(card).data.pipeline_tag == "text-generation"
    assert "/home" not in card and "auto" not in card.split("## How to load it")[0].replace("--method auto", "")
    commands = [entry["command"] for entry in record.steps + record.repairs]
    assert [card.count(f"- command: `{command}`") for command in commands] == [commands.count(one) for one in commands]
    assert card.count("## Recovery") == bool(record.repairs)


def test_the_method_that_ran_and_the_state_are_known_of_version_0_1(tmp_path):
    (step,) = old_record("pruned", tmp_path).steps
    assert step["ran"] == {"key": "rrqr", "value": "energy", "head": "wanda"}
    assert step["figures"] == {"state_bytes_per_sequence": [4 * 2 * 2 * 16 * 16, 4 * 2 * 12 * 12]}
    assert [step["ran"] for step in old_record("twice", tmp_path).steps][1] == {"key": "l2"}
    assert old_record("pca", tmp_path).steps[0]["ran"] == {"key": "pca"}


STEP = {"inputs": {"source": "an identity", "method": "l2"}, "layers": {}, "ran": {"key": "l2"}, "methods": {}}
NAMED = {"dense_config": None, "shipped_by": "fla", "figures": {"model_parameters": [3, 2]}}


def test_a_step_keeps_the_name_of_the_dense_model_and_forgets_the_files():
    dense = Record()
    once = dense.with_step(STEP, dense="first", command="keyreduce prune", **NAMED)
    written = dataclasses.replace(once, identity="its identity", checksums={"model.safetensors": "00"})
    twice = written.with_step(STEP | {"inputs": {"source": "its identity"}}, dense="second", **NAMED)
    assert dense == Record()
    assert (twice.dense, twice.dense_identity, len(twice.steps)) == ("first", "an identity", 2)
    assert (written.identity, written.checksums) == ("its identity", {"model.safetensors": "00"})
    assert (twice.identity, twice.checksums) == (None, None)
    assert twice.steps[0] == STEP | {"figures": {"model_parameters": [3, 2]}, "command": "keyreduce prune"}
    assert "command" not in twice.steps[1]


def test_a_recovery_and_a_conversion(tmp_path):
    once = Record().with_step(STEP, dense="first", **NAMED)
    layout = {"layout": "nested", "command": "keyreduce convert-dcp"}
    converted = once.with_conversion({"source": "x"}, **layout)
    assert (converted.dcp_layout, converted.versions) == ("nested", once.versions)
    assert converted.converted == {"inputs": {"source": "x"}, "command": layout["command"]}
    recovered = converted.with_recovery({"mode": "lora"}, {"tokens": 5}, summary="trained", shipped_by=None)
    assert recovered.repairs == ({"inputs": {"mode": "lora"}, "after_step": 1, "summary": "trained", "tokens": 5},)
    assert (recovered.converted, recovered.dcp_layout, recovered.shipped_by) == (None, "nested", "fla")
    recovered.write(tmp_path)
    assert Record.read(tmp_path) == recovered


def test_no_record_is_an_empty_one(tmp_path):
    assert Record.read(tmp_path) == Record()


@pytest.mark.parametrize("content, told", [
    ({"steps": 3}, "does not say what was pruned"),
    ({"steps": [{}]}, "does not say what was pruned"),
    ({"steps": [{"inputs": {}, "layers": {"0": {}}}]}, "is damaged"),
    ({"repairs": [{"inputs": 3}]}, "does not say what was recovered"),
    ({"converted": 3}, "is damaged"),
    ({"schema": SCHEMA, "converted": {"layout": "flat"}}, "'converted'"),
    ({"schema": "1"}, "'schema'"),
    ({"schema": SCHEMA, "checksums": {"model.safetensors": 3}}, "'checksums'"),
    ({"schema": SCHEMA, "identity": 3}, "'identity'"),
    ({"dense": 5}, "'dense'"),
    ({"versions": []}, "'versions'"),
    ({"schema": SCHEMA + 1, "steps": "of another form"}, "update keyreduce"),
])  # fmt: skip
def test_what_is_damaged_is_refused_in_one_line(tmp_path, content, told):
    (tmp_path / "keyreduce.json").write_text(json.dumps(content))
    with pytest.raises(KeyreduceError, match=told) as refused:
        Record.read(tmp_path)
    assert str(tmp_path / "keyreduce.json") in str(refused.value) and "\n" not in str(refused.value)


def test_a_step_without_layers_gives_no_card():
    damaged = Record(steps=({"inputs": {}},), dense="x")
    with pytest.raises(KeyreduceError, match=r"keyreduce\.json is damaged"):
        model_card(damaged, {"model_type": "delta_net"})
    with pytest.raises(KeyreduceError, match=r"keyreduce\.json is damaged"):
        model_card(dataclasses.replace(damaged, steps=()), {"model_type": "delta_net"})
