"""What every command has: version, short options, quiet, completion in shells, and errors that lead to help."""

import os
import subprocess
import sys

import pytest

from keyreduce import __version__


def completed(line: str) -> list[str]:
    """What a shell offers at the end of a line, asked in the way of bash."""
    asked = {"_KEYREDUCE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    done = subprocess.run(
        [sys.executable, "-m", "keyreduce"], env=os.environ | asked, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_version(keyreduce):
    assert keyreduce("--version") == (0, f"keyreduce {__version__}\n", "")


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("keyreduce con", ["convert-dcp"]),
        ("keyreduce recover --mode re", ["reconstruct"]),
        ("keyreduce prune --target key,v", ["key,value"]),
        ("keyreduce prune --state-r", ["--state-ratio"]),
    ],
)
def test_a_shell_completes_commands_options_and_choices(line, offered):
    assert completed(line) == offered


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prune", "--modle", "x"), "No such option: --modle; did you mean --method or --model? (see keyreduce prune"),
        (("table", "a", "b"), "(see keyreduce table --help)"),
        (("prun",), "Did you mean 'prune'? (see keyreduce --help)"),
    ],
)
def test_a_wrong_command_line_leads_to_the_help_of_that_command(keyreduce, arguments, message):
    result = keyreduce(*arguments)
    assert result.code == 2
    assert message in result.err and len(result.err.splitlines()) == 1


def test_short_options_are_the_long_ones(keyreduce, tmp_path):
    assert keyreduce("inspect", "delta-net-5m", "-v", "--json").json()["model"] == "delta-net-5m"
    common = ("--method", "l2", "--ratio", 0.5)
    short = keyreduce("prune", *common, "-m", "delta-net-5m", "-o", tmp_path / "cut", "-q")
    assert short.code == 0 and "wrote" in short.out and short.err == ""
    again = keyreduce("prune", *common, "--model", "delta-net-5m", "--output", tmp_path / "cut")
    assert "is there already, from the same inputs" in again.out


def test_quiet_leaves_the_remarks_out(keyreduce):
    small = ("calibrate", "--num-batches", 1, "--batch-size", 1, "--seq-len", 16, "--overwrite")
    assert "calibrating" in keyreduce(*small).err
    quiet = keyreduce(*small, "--quiet")
    assert quiet.code == 0 and quiet.err == "" and "16 tokens" in quiet.out
