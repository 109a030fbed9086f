"""Every checkpoint of a folder, measured by processes: stand-ins for them here, but for one run of the real thing."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import pytest
import torch
import typer
from tiny_models import build, edit_config, edit_tensors, save

from keyreduce.checkpoint.dcp import write_dcp
from keyreduce.checkpoint.folder import open_folder
from keyreduce.cli import eval_base, options
from keyreduce.cli.console import Console
from keyreduce.data.text import FileText
from keyreduce.errors import KeyreduceError
from keyreduce.evaluation import many
from keyreduce.evaluation.many import Subject, figures_of, find_checkpoints, measure_all
from keyreduce.workspace import Workspace

SEPARATOR = 256
# Writes what `keyreduce eval` would, with a figure that depends on the model, and notes how it was called. Models whose
# config asks for it fail.
STAND_IN = """
import json, os, pathlib, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
model = pathlib.Path(sys.argv[sys.argv.index("--model") + 1])
output = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
with open(os.environ["CALLS"], "a") as calls:
    note = {"model": model.name, "arguments": sys.argv[1:], "device": os.environ.get("CUDA_VISIBLE_DEVICES")}
    calls.write(json.dumps(note | {"base": os.environ.get("COMPRESSED_BASE")}) + "\\n")
config = json.loads((model / "config.json").read_text())
if config.get("fails"):
    print("keyreduce: it is too large")
    sys.exit(2)
if not config.get("silent"):
    entry = {"label": "dense", "folder": str(model), "predictions": 9, "perplexity_per_token": config["cost"]}
    output.write_text(json.dumps({"models": [entry]}))
"""


@pytest.fixture
def base(tmp_path, tiny_folder) -> Path:
    """A DeltaNet of cost 8.0, a Gated DeltaNet of 4.0, a DCP of two steps, and what is none of them."""
    folder = tmp_path / "base"
    for name, model_type, cost in (("b", "delta_net", 8.0), ("deep/a", "gated_deltanet", 4.0)):
        save(build(model_type), folder / name)
        edit_config(folder / name, cost=cost)
    for step in (2, 10):
        write_dcp(open_folder(folder / "b"), folder / "run" / f"step-{step}")
    (folder / "run" / "step-11").mkdir()
    (folder / "empty").mkdir()
    (folder / "config only").mkdir()
    (folder / "config only" / "config.json").write_text("{}")
    save(build("delta_net"), folder / ".c.partial" / "c")
    return folder


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """A function that returns what the stand-ins noted since it was called last; they stand in from here on."""
    notes = tmp_path / "calls.jsonl"
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setenv("CALLS", str(notes))
    monkeypatch.setattr(
        many,
        "keyreduce_command",
        lambda command, *arguments: [sys.executable, "-S", str(tmp_path / "stand_in.py"), *map(str, arguments)],
    )

    def read() -> list[dict]:
        found = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
        notes.unlink(missing_ok=True)
        return found

    return read


def test_checkpoints_are_found(base):
    found = find_checkpoints(base)
    assert [subject.name for subject in found] == ["b", "deep/a", "run/step-10", "run/step-2"]
    assert all(Path(subject.model) == base / subject.name for subject in found)
    assert find_checkpoints(base / "b") == [Subject("b", str(base / "b"))]
    assert [name for name, _ in find_checkpoints(base / "run")] == ["step-10", "step-2"]


def test_links_are_followed_once(base, tmp_path):
    (base / "around").symlink_to(base)
    (base / "to b").symlink_to(base / "b")
    save(build("delta_net"), tmp_path / "elsewhere")
    (base / "to elsewhere").symlink_to(tmp_path / "elsewhere")
    found = find_checkpoints(base)
    assert len({os.path.realpath(subject.model) for subject in found}) == len(found) == 5
    assert "to elsewhere" in [subject.name for subject in found]


@pytest.mark.parametrize(("name", "message"), [("empty", "holds no checkpoint"), ("absent", "there is no folder")])
def test_a_folder_without_checkpoints(base, name, message):
    with pytest.raises(KeyreduceError, match=message):
        find_checkpoints(base / name)


def measure(base: Path, tmp_path: Path, **changes) -> dict[str, many.Measured]:
    subjects = [subject for subject in find_checkpoints(base) if not subject.name.startswith("run")]
    settings = {"arguments": ["--seq-len", "64"], "settings": {"text": "x"}} | changes
    return {measured.subject.name: measured for measured in measure_all(subjects, tmp_path / "eval", **settings)}


def test_what_is_done_is_kept(base, tmp_path, calls):
    ticks = []
    over = measure(base, tmp_path, progress=ticks.append)
    assert list(over) == ["deep/a", "b"]  # the best first
    assert [measured.state for measured in over.values()] == ["measured", "measured"]
    assert [measured.figures for measured in over.values()] == [
        {"perplexity_per_token": 4.0},
        {"perplexity_per_token": 8.0},
    ]
    assert ticks == [1, 1]
    for note in calls():
        output = tmp_path / "eval" / ("b.json" if note["model"] == "b" else "deep/a.json")
        model = base / ("b" if note["model"] == "b" else "deep/a")
        work = output.with_suffix(".files")
        expected = ["--model", model, "--work", work, "--output", output, "--overwrite", "--seq-len", "64"]
        assert note["arguments"] == list(map(str, expected))
    written = json.loads((tmp_path / "eval" / "deep" / "a.json").read_text())
    assert written["models"][0]["perplexity_per_token"] == 4.0
    assert written["inputs"]["identity"] == open_folder(base / "deep" / "a").identity

    again = measure(base, tmp_path)
    assert calls() == []
    assert {name: measured.state for name, measured in again.items()} == {"b": "kept", "deep/a": "kept"}
    assert [measured.figures for measured in again.values()] == [measured.figures for measured in over.values()]


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        ({"arguments": ["--seq-len", "32"]}, {"a", "b"}),
        ({"settings": {"text": "y"}}, {"a", "b"}),
        ({"again": True}, {"a", "b"}),
        ("weights", {"b"}),
        ("result", {"b"}),
        ("inputs", {"b"}),
        ("version", {"a", "b"}),
    ],
)
def test_what_changed_is_done_again(base, tmp_path, calls, monkeypatch, change, redone):
    measure(base, tmp_path)
    calls()
    result = tmp_path / "eval" / "b.json"
    if change == "weights":
        edit_tensors(base / "b", lambda tensors: tensors["lm_head.weight"].mul_(2))
    elif change == "result":
        result.write_text(result.read_text()[:-20])
    elif change == "inputs":
        content = json.loads(result.read_text())
        result.write_text(json.dumps({"models": [], "inputs": content["inputs"]}))
    elif change == "version":
        monkeypatch.setattr(many, "__version__", "99.0")
    over = measure(base, tmp_path, **(change if isinstance(change, dict) else {}))
    assert {note["model"] for note in calls()} == redone
    assert all(measured.figures for measured in over.values())


def test_one_that_fails_leaves_the_others(base, tmp_path, calls):
    for name, change in (("fails", {"fails": True}), ("silent", {"silent": True}), ("damaged", {})):
        save(build("delta_net"), base / name)
        edit_config(base / name, **change)
    (base / "damaged" / "model.safetensors").write_bytes(b"short")
    over = measure(base, tmp_path, workers=2)
    assert {name: measured.state for name, measured in over.items()} == {
        "deep/a": "measured",
        "b": "measured",
        "damaged": "failed",
        "fails": "failed",
        "silent": "failed",
    }
    assert list(over)[:2] == ["deep/a", "b"]
    assert over["fails"].message == "it is too large"
    assert "there is no file" in over["silent"].message
    assert "model.safetensors" in over["damaged"].message
    assert {note["model"] for note in calls()} == {"a", "b", "fails", "silent"}
    edit_config(base / "fails", fails=False, cost=1.0)
    assert list(measure(base, tmp_path))[0] == "fails"
    assert {note["model"] for note in calls()} == {"fails", "silent"}


def test_each_has_a_gpu(base, tmp_path, calls):
    measure(base, tmp_path, devices=["0", "1"])
    assert {note["device"] for note in calls()} == {"0", "1"}


def test_figures_of_a_result():
    task = {"task": "hellaswag", "stderr": None}
    tasks = [task | {"metric": "acc", "value": 0.25}, task | {"metric": "acc_norm", "value": 0.5}]
    tasks.append({"task": "own", "metric": "f1", "value": None, "stderr": None})
    entry = {"label": "dense", "predictions": 3, "bits_per_byte": 2.0, "perplexity_per_token": None, "tasks": tasks}
    assert figures_of({"models": [entry, {"bits_per_byte": 9.0}]}) == {"bits_per_byte": 2.0, "hellaswag acc_norm": 0.5}


@pytest.fixture
def command(base, tmp_path, monkeypatch):
    """A function that runs a command with some of eval's options, and returns its context and what was raised."""
    for name in ("COMPRESSED_BASE", "COMPRESSED_MODEL", "BASE_MODEL_DIR", "NUM_BATCHES"):
        monkeypatch.delenv(name, raising=False)
    text = tmp_path / "text.txt"
    text.write_text("x" * 100)

    def run(*words: str) -> dict:
        def body(
            context: typer.Context,
            model: options.DenseModel = None,
            compressed: options.Compressed = None,
            work: options.Work = tmp_path / "work",
            text: options.Text = None,
            num_batches: Annotated[int, typer.Option(envvar="NUM_BATCHES")] = 8,
            fast: Annotated[bool, typer.Option("--fast/--slow")] = False,
            seed: options.Seed = 0,
            device: options.Device = None,
            overwrite: options.Overwrite = False,
            json: options.Json = False,
            base: eval_base.Base = None,
            jobs: eval_base.Jobs = None,
        ) -> None:
            seen["arguments"] = eval_base.handed_on(context)
            seen["base"] = base = eval_base.chosen_base(context, base)
            if base is not None:
                eval_base.evaluate_base(
                    Console(as_json=json),
                    context,
                    base,
                    model=model,
                    text=FileText(text),
                    workspace=Workspace(work),
                    output=work / "eval.json",
                    device=device,
                    jobs=jobs,
                    again=overwrite,
                )

        seen: dict = {}
        app = typer.Typer()
        app.command()(body)
        app(list(words), standalone_mode=False)
        return seen

    return run


def test_options_are_handed_on_as_they_were_given(command, monkeypatch):
    assert command()["arguments"] == []
    monkeypatch.setenv("NUM_BATCHES", "3")
    monkeypatch.setenv("BASE_MODEL_DIR", "somewhere")
    words = ["--text", "a b", "--text", "c", "--fast", "--seed", "0", "--json", "--work", "w", "--device", "cpu"]
    given = ["--text", "a b", "--text", "c", "--num-batches", "3", "--fast", "--seed", "0"]
    assert command(*words)["arguments"] == given
    assert command("--slow")["arguments"] == ["--num-batches", "3", "--slow"]


def test_the_command_measures_a_folder(command, base, tmp_path, calls, capsys, monkeypatch):
    monkeypatch.setenv("COMPRESSED_BASE", str(base))
    monkeypatch.setenv("COLUMNS", "120")
    for step in ("step-2", "step-10"):
        (base / "run" / step / ".metadata").unlink()
    save(build("delta_net_2"), tmp_path / "dense")
    edit_config(tmp_path / "dense", cost=2.0)
    words = ("--model", str(tmp_path / "dense"), "--text", str(tmp_path / "text.txt"), "--device", "cpu")
    command(*words, "--json", "--jobs", "2")
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report == json.loads((tmp_path / "work" / "eval.json").read_text())
    assert [(entry["name"], entry["state"], entry["figures"]) for entry in report["models"]] == [
        ("dense", "measured", {"perplexity_per_token": 2.0}),
        ("deep/a", "measured", {"perplexity_per_token": 4.0, "perplexity_increase": 1.0}),
        ("b", "measured", {"perplexity_per_token": 8.0, "perplexity_increase": 3.0}),
    ]
    rows = [line.split() for line in captured.err.splitlines()]
    assert ["deep/a", "4.0000", "+100.0%", "measured"] in rows
    notes = calls()
    # Neither the variable nor the option makes a process measure a folder in turn.
    assert len(notes) == 3 and all(not note["base"] and "--base" not in note["arguments"] for note in notes)
    assert all(note["arguments"][-4:] == ["--device", "cpu", "--text", str(tmp_path / "text.txt")] for note in notes)

    command(*words)
    assert calls() == []
    (tmp_path / "text.txt").write_text("another text")
    command(*words)
    assert len(calls()) == 3
    edit_config(base / "b", fails=True)
    with pytest.raises(KeyreduceError, match="1 of 3 models could not be measured, b among them: it is too large; see"):
        command(*words, "--overwrite")
    assert len(calls()) == 3
    states = {entry["name"]: entry for entry in json.loads((tmp_path / "work" / "eval.json").read_text())["models"]}
    assert states["b"]["state"] == "failed" and states["b"]["message"] == "it is too large"
    assert states["deep/a"]["state"] == "measured"


def test_one_model_by_word_overrules_the_variable_of_a_folder(command, base, monkeypatch):
    monkeypatch.setenv("COMPRESSED_BASE", str(base))
    assert command("--compressed", "one")["base"] is None
    with pytest.raises(KeyreduceError, match="give one of the two"):
        command("--compressed", "one", "--base", str(base))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command("--compressed", "one")["base"] is None
    with pytest.raises(KeyreduceError, match="leave out torchrun"):
        command()
    monkeypatch.delenv("COMPRESSED_BASE")
    assert command()["base"] is None


def test_a_process_measures_the_model(tmp_path, monkeypatch):
    """The real command on one model, against the definition of perplexity."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, content = build("delta_net"), "the state is low-rank\n" * 20
    (tmp_path / "text.txt").write_text(content)
    subject = Subject("tiny", str(save(model, tmp_path / "tiny")))
    arguments = ["--text", str(tmp_path / "text.txt"), "--seq-len", "70", "--num-batches", "0", "--device", "cpu"]
    environment = {"COMPRESSED_BASE": "", "COMPRESSED_MODEL": "", "BASE_MODEL_DIR": "", "TASKS": ""}
    (measured,) = measure_all([subject], tmp_path / "eval", arguments, settings={}, environment=environment)
    assert (measured.state, measured.message) == ("measured", "")

    tokens = torch.tensor([SEPARATOR, *content.encode()])
    rows = tokens[: len(tokens) // 70 * 70].reshape(-1, 70)
    with torch.no_grad():
        logits = model(rows).logits.double()
    cost = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    assert measured.figures["perplexity_per_token"] == pytest.approx(cost.exp().item(), rel=1e-5)
