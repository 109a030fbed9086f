"""Tasks carried out: requests as JSON in, results or one line that says what went wrong out."""

import json
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

from keyreduce.api import worker
from keyreduce.api.calibrate import CalibrateRequest, run
from keyreduce.api.request import Request, Result, option
from keyreduce.api.tasks import do_tasks, failure_of, is_done, on_this_machine, write_failure, write_task
from keyreduce.errors import KeyreduceError
from keyreduce.reporting import Reporter

SIZES = {"num_batches": 1, "batch_size": 2, "seq_len": 16, "device": "cpu"}


@pytest.fixture
def fake(monkeypatch) -> type[Request]:
    """A verb's request: what it does is said by its fields."""
    module = types.ModuleType("keyreduce.api.fake")

    @dataclass(frozen=True, kw_only=True)
    class FakeRequest(Request):
        output: Path | None = option(None, help="A folder to make.")
        share: float = option(0.5, help="At most one.", flags=("--part",), maximum=1)
        error: str | None = option(None, help="What to raise: ours or theirs.")

    @dataclass(frozen=True, kw_only=True)
    class FakeResult(Result):
        output: Path | None
        doubled: float

    def do(request: FakeRequest, reporter: Reporter) -> FakeResult:
        reporter.note("a remark")
        print("printed")
        print("warned", file=sys.stderr)
        if request.error == "ours":
            raise KeyreduceError("`share` does not suit\n`output`, nor `elsewhere`")
        if request.error == "theirs":
            raise ValueError("it broke")
        if request.error == "interrupt":
            raise KeyboardInterrupt
        if request.output is not None:
            request.output.mkdir()
            (request.output / "record.json").write_text("{}")
        return FakeResult(output=request.output, doubled=2 * request.share)

    for kind in (FakeRequest, FakeResult):
        kind.__module__ = module.__name__
    module.FakeRequest, module.run = FakeRequest, do
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return FakeRequest


def test_steps_are_carried_out_in_turn(fake, tmp_path):
    folder = tmp_path / "task"
    steps = {"one": fake(output=folder / "made"), "two": fake(share=1)}
    keep, remove = {"made/record.json": "record.json", "made/absent": "absent"}, ["made", "never made"]
    write_task(folder, steps, result={"settings": [1, 2]}, keep=keep, remove=remove)
    worker.do_folder(folder)
    result = json.loads((folder / "result.json").read_text())
    assert result["settings"] == [1, 2]
    assert list(result["steps"]) == ["one", "two"]
    one, two = result["steps"].values()
    assert (one["verb"], one["request"]) == ("fake", steps["one"].to_json())
    assert one["result"] == {"output": str(folder / "made"), "doubled": 1.0}
    assert two["result"] == {"doubled": 2.0}
    assert one["seconds"] > 0
    assert {path.name for path in folder.iterdir()} == {"task.json", "log.txt", "result.json", "record.json"}
    log = (folder / "log.txt").read_text()
    assert log.count("a remark\nprinted\nwarned\n") == 2
    assert '$ keyreduce fake {"output": ' in log
    assert is_done(folder) and failure_of(folder) is None


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"error": "ours"}, "--part does not suit --output, nor elsewhere"),
        ({"error": "theirs"}, "ValueError: it broke"),
        ({"share": 2}, "--part is 2.0; it is at most 1"),
        ({"unheard": 1}, "unheard is unknown; known are output, share, error"),
    ],
)
def test_what_goes_wrong_is_one_line_and_stops_no_other_task(fake, tmp_path, fields, told):
    wrong, right = tmp_path / "wrong", tmp_path / "right"
    write_task(wrong, {"one": fake(), "two": fake()})
    task = json.loads((wrong / "task.json").read_text())
    task["steps"]["two"]["request"] = fields
    (wrong / "task.json").write_text(json.dumps(task))
    write_task(right, {"one": fake()})
    worker.do_folders([wrong, right])
    assert failure_of(wrong) == told
    assert not is_done(wrong) and is_done(right)
    assert "Traceback" in (wrong / "log.txt").read_text()
    # A task that is written again begins anew.
    write_task(wrong, {"one": fake()})
    assert failure_of(wrong) is None
    worker.do_folder(wrong)
    assert is_done(wrong)


def test_an_interruption_is_no_failure_of_the_task(fake, tmp_path):
    write_task(tmp_path, {"one": fake(error="interrupt")})
    with pytest.raises(KeyboardInterrupt):
        worker.do_folder(tmp_path)
    assert not is_done(tmp_path) and failure_of(tmp_path) is None


def test_processes_do_what_run_does(python, tiny_folder, tmp_path, monkeypatch):
    """What the shell has set is not for the processes: all that decides is in the request."""
    model = str(tiny_folder("delta_net"))
    requests = {
        name: CalibrateRequest(model=folder, output=tmp_path / f"{name}.safetensors", **SIZES)
        for name, folder in (("good", model), ("bad", "nonsense"), ("last", model))
    }
    for name, request in requests.items():
        write_task(tmp_path / name, {"calibrate": request})
    monkeypatch.setenv("NUM_BATCHES", "3")
    monkeypatch.setenv("KEYREDUCE_NUM_BATCHES", "3")
    monkeypatch.setattr(sys, "executable", python)
    launch, workers = on_this_machine("cpu", None)
    assert workers == 1
    ended = []
    folders = [tmp_path / name for name in requests]
    failures = do_tasks(folders, tmp_path / "logs", launch, workers, together=3, progress=ended.append)
    assert list(failures) == [tmp_path / "bad"]
    assert failures[tmp_path / "bad"].startswith("there is no model 'nonsense'")
    assert sum(ended) == 3
    found = json.loads((tmp_path / "good" / "result.json").read_text())["steps"]["calibrate"]["result"]
    expected = run(CalibrateRequest(model=model, output=tmp_path / "own.safetensors", **SIZES)).to_json()
    assert found == expected | {"calibration": str(tmp_path / "good.safetensors")}
    assert (tmp_path / "good.safetensors").read_bytes() == (tmp_path / "last.safetensors").read_bytes()
    assert "calibrating delta_net on cpu" in (tmp_path / "good" / "log.txt").read_text()


def test_a_message_is_one_line(tmp_path):
    write_failure(tmp_path, "first\n  second")
    assert failure_of(tmp_path) == "first second"
