"""``keyreduce prune --recover`` is prune and then recover; ``--engine`` refuses before the work."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tensors_of

WORK = Path("keyreduce-out")
TEXT = "A state that is smaller forgets more, unless what reads it makes up for that.\n"


@pytest.fixture
def cut(tiny_folder) -> tuple:
    """The arguments of a cut of a tiny model, and a text of 200 lines to recover it on."""
    Path("text.md").write_text(TEXT * 200)
    return ("--model", tiny_folder("delta_net"), "--method", "l2", "--ratio", 0.5, "--text", "text.md")


def test_it_is_prune_and_then_recover(keyreduce, cut):
    result = keyreduce("prune", *cut, "--recover", "least-squares", "--json").json()
    assert result["repair"]["mode"] == "least-squares" and result["pruned"] == str(WORK / "pruned")
    assert [path.name for path in WORK.iterdir()] == ["pruned"]

    assert keyreduce("prune", *cut, "--output", "apart").code == 0
    least = ("recover", "--mode", "least-squares", "--compressed", "apart", "--text", "text.md", "--output", "after")
    assert keyreduce(*least).code == 0
    once, apart, after = (tensors_of(Path(folder)) for folder in (WORK / "pruned", "apart", "after"))
    assert all(once[name].equal(after[name]) for name in after)
    assert not all(once[name].equal(apart[name]) for name in apart)
    record = json.loads((WORK / "pruned" / "keyreduce.json").read_text())
    assert len(record["steps"]) == len(record["repairs"]) == 1

    again = keyreduce("prune", *cut, "--recover", "least-squares", "--json")
    assert again.json()["made"] is False
    without = keyreduce("prune", *cut)
    assert without.code == 2 and "differs in repairs" in without.err


def test_auto_on_a_cpu_is_least_squares_and_recorded_as_that(keyreduce, cut):
    folders = {mode: Path(mode) for mode in ("auto", "least-squares")}
    runs = {
        mode: keyreduce("prune", *cut, "--device", "cpu", "--recover", mode, "--output", folder, "--json")
        for mode, folder in folders.items()
    }
    assert runs["auto"].json()["repair"]["mode"] == "least-squares"
    assert runs["auto"].err.count("auto takes least-squares") == 1 and "auto" not in runs["least-squares"].err
    auto, least = map(tensors_of, folders.values())
    assert auto.keys() == least.keys() and all(auto[name].equal(least[name]) for name in auto)
    records = [json.loads((folder / "keyreduce.json").read_text()) for folder in folders.values()]
    assert records[0]["repairs"][0]["inputs"] == records[1]["repairs"][0]["inputs"]
    # What one of the names made is what the other one would make.
    again = keyreduce("prune", *cut, "--device", "cpu", "--recover", "auto", "--output", "least-squares", "--json")
    assert again.json()["made"] is False


def test_a_run_that_is_terminated_leaves_nothing(keyreduce, python, cut):
    Path("text.md").write_text(TEXT * 2000)  # enough to be at work when it is terminated
    command = [python, "-W", "ignore", "-m", "keyreduce", "prune", *map(str, cut), "--recover", "reconstruct"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as started:
        assert "recovering" in started.stderr.readline()
        assert [path.name for path in WORK.glob(".*.partial/*")]  # the cut
        started.send_signal(signal.SIGTERM)
        assert started.wait(60) == 128 + signal.SIGTERM
        assert "Traceback" not in started.stderr.read()
    assert not WORK.exists()


def test_another_mode_is_refused_before_the_work(keyreduce, cut):
    result = keyreduce("prune", *cut, "--recover", "prayer")
    assert result.code == 2 and "--recover is 'prayer'; take one of auto, least-squares, reconstruct" in result.err
    assert not WORK.exists()


@pytest.mark.parametrize(("engine", "code"), [("fla", 0), ("llama.cpp", 2), ("steam", 2)])
def test_an_engine_refuses_sizes_that_it_does_not_run(keyreduce, cut, engine, code):
    result = keyreduce("prune", *cut, "--engine", engine)
    assert result.code == code and (WORK / "pruned").exists() == (code == 0)
    assert code == 0 or f"--engine {engine}" in result.err or "--engine is 'steam'" in result.err
