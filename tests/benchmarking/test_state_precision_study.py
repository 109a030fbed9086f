"""The study of the state's precision: what it writes names no place of the machine, and its table has every format."""

import json
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    import state_precision

    return state_precision


def test_a_study_and_its_table(script, monkeypatch, tmp_path, capsys, tiny_folder):
    (tmp_path / "text.txt").write_text("some text, long enough for two rows of tokens\n" * 10)
    formats = ("bfloat16", "int8", "auto")
    study = script.Study(str(tiny_folder("gated_deltanet")), 80, 2, formats, text=(tmp_path / "text.txt",))
    monkeypatch.setattr(script, "FOLDER", tmp_path / "figures")
    monkeypatch.setattr(script, "studies", lambda model, heldout: [study])
    monkeypatch.setattr(sys, "argv", ["state_precision.py"])
    script.main()
    (file,) = (tmp_path / "figures").iterdir()
    assert file.name == "gated_deltanet-80-auto.json"
    assert str(tmp_path) not in file.read_text() and str(tiny_folder("gated_deltanet")) not in file.read_text()
    states = {state["dtype"]: state for state in json.loads(file.read_text())["states"]}
    assert list(states) == ["float32", *formats]
    told = capsys.readouterr().out
    for name, state in states.items():
        assert f"| {name} | {state['bytes_per_sequence'] / 1024:,.0f} | {state['perplexity_per_token']:.4f} |" in told
    monkeypatch.setattr(sys, "argv", ["state_precision.py", "--table"])
    script.main()
    assert capsys.readouterr().out in told


def test_committed_figures_are_those_of_the_studies(script):
    names = {study.name for study in script.studies("delta-net-21m", None)}
    files = {file.stem for file in script.FOLDER.glob("*.json")}
    assert files and files <= names
