"""The command line, run in this process."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from keyreduce.cli import errors, main

VARIABLES = (
    "BASE_MODEL_DIR",
    "COMPRESSED_BASE",
    "COMPRESSED_MODEL",
    "KEYREDUCE_WORK",
    "NUM_BATCHES",
    "OUTPUT_DIR",
    "PRUNING_RATIO",
    "PRUNING_STRATEGY",
    "TASKS",
)


class Result(NamedTuple):
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    def json(self) -> dict:
        """The one JSON object that is all of stdout; NaN and inf, which JSON has not, are refused."""
        assert self.code == 0, self.err
        assert len(self.out.splitlines()) == 1
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.fixture
def keyreduce(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> Callable[..., Result]:
    """A function that runs ``keyreduce`` with its arguments in an empty folder, without our environment variables."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("keyreduce.drawing._DPI", 30)
    # A cache so small that two copies of what is decoded are rotated.
    monkeypatch.setattr("keyreduce.benchmarking.steps.copies_past_cache", lambda size, device, at_most=64: 2)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["keyreduce", *map(str, arguments)])
        monkeypatch.setattr(errors, "show_tracebacks", False)
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        return Result(exit_.value.code or 0, *capsys.readouterr())

    return run
