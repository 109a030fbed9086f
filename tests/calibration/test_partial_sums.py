"""A calibration that is killed goes on from the sums that it kept, and ends with the bits of one that was not."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from keyreduce.api.calibrate import CalibrateRequest, run
from keyreduce.calibration import partial
from keyreduce.calibration.file import read_statistics
from keyreduce.outputs import write_json
from keyreduce.reporting import Reporter

REPOSITORY = Path(__file__).parents[2]

# Keeps the sums after every batch, and kills itself before the fourth is done.
KILLED = """
import contextlib, json, os, signal, sys
from keyreduce.api.calibrate import CalibrateRequest, run
from keyreduce.calibration import partial
from keyreduce.reporting import Reporter

class Deadly(Reporter):
    def progress(self, *arguments):
        seen = []
        def progress(tokens):
            seen.append(tokens)
            if len(seen) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
        return contextlib.nullcontext(progress)

partial.EVERY_SECONDS = partial._SHARE = 0
run(CalibrateRequest.of_json(json.load(open(sys.argv[1]))), Deadly())
"""


class Notes(Reporter):
    """Notes what is said and what is kept, and how many tokens are reported at once."""

    def __init__(self):
        self.notes, self.kept, self.seen = [], [], []

    def note(self, message):
        self.notes.append(message)

    def keep(self, what):
        self.kept.append(what)

    def progress(self, *arguments):
        return contextlib.nullcontext(self.seen.append)


@pytest.fixture
def request_for(tiny_folder, tmp_path):
    """A function: the request for six batches into a file, of 80 tokens each."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 30)

    def make(name="sums", model="gated_deltanet", **options):
        amount = {"num_batches": 6, "batch_size": 2, "seq_len": 40, "device": "cpu"} | options
        folder = str(tiny_folder(model))
        return CalibrateRequest(model=folder, text=(tmp_path / "text.txt",), output=tmp_path / name, **amount)

    return make


@pytest.mark.parametrize(("model", "gradients"), [("gated_deltanet", True), ("delta_net", False)])
def test_a_killed_run_goes_on_to_the_same_bits(python, request_for, tmp_path, model, gradients):
    request = request_for(model=model, gradients=gradients)
    write_json(tmp_path / "request.json", request.to_json())
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [python, "-c", KILLED, str(tmp_path / "request.json")]
    killed = subprocess.run(command, env=environment, cwd=REPOSITORY, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / ".sums.sums").exists() and not request.output.exists()
    reporter = Notes()
    run(request, reporter)
    assert "resuming after the 240 tokens of a run that was stopped" in reporter.notes
    assert reporter.seen == [240, 80, 80, 80]
    assert reporter.kept == [f"{tmp_path / '.sums.sums'}, from which the same command resumes"]
    run(whole := request_for("whole", model, gradients=gradients), Reporter())
    assert request.output.read_bytes() == whole.output.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "request.json", "sums", "whole"}


class Stopped(Exception):
    pass


def stop(request, monkeypatch):
    """Run until sums are kept for the first time."""
    real = partial.PartialSums.keep_if_due

    def keep(*arguments):
        real(*arguments)
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(partial, "EVERY_SECONDS", 0)
        patch.setattr(partial.PartialSums, "keep_if_due", keep)
        run(request, Reporter())


@pytest.mark.parametrize("change", ["seed", "gradients", "damage"])
def test_sums_of_other_inputs_are_said_not_used_and_cleared(request_for, tmp_path, monkeypatch, change):
    stop(request_for(), monkeypatch)
    kept = tmp_path / ".sums.sums"
    if change == "damage":
        kept.write_bytes(kept.read_bytes()[:-100])
    other = {"seed": {"seed": 1}, "gradients": {"gradients": True}}.get(change, {})
    reporter = Notes()
    run(request_for(**other), reporter)
    assert reporter.notes[1:] == [f"{kept} has the sums of a run from other inputs, and is not used"]
    assert reporter.seen == [80] * 6
    run(request_for("whole", **other), Reporter())
    assert (tmp_path / "sums").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not kept.exists()


def test_where_there_is_no_room_for_sums_the_run_goes_on(request_for, tmp_path, monkeypatch):
    (tmp_path / ".sums.sums").mkdir()
    monkeypatch.setattr(partial, "EVERY_SECONDS", 0)
    reporter = Notes()
    run(request_for(), reporter)
    assert reporter.notes[-1].startswith("no sums are kept on the way: ") and not reporter.kept
    assert read_statistics(tmp_path / "sums").tokens == 480
