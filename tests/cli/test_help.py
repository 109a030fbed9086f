"""``--help`` says all there is, and at once: what computes is not imported for it."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
from typer.main import get_command
from typer.models import OptionInfo

from keyreduce.cli import app
from keyreduce.cli.console import mebibytes, scaled
from keyreduce.pruning.methods import METHODS

REPOSITORY = Path(__file__).parents[2]
COMMANDS = (
    *("inspect", "calibrate", "prune", "recover", "convert-dcp", "benchmark", "eval"),
    *("rank", "sweep", "table", "compare", "methods", "families", "verify"),
)
HEAVY = ("torch", "transformers", "fla", "datasets", "numpy", "safetensors", "matplotlib", "scipy", "lm_eval", "ray")

IMPORTED = f"""
import contextlib, io, sys
from keyreduce.cli import main
for arguments in (["--help"], *([command, "--help"] for command in {COMMANDS})):
    sys.argv = ["keyreduce", *arguments]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            main()
    except SystemExit as exit_:
        assert not exit_.code
print(sorted(set({HEAVY}) & sys.modules.keys()))
"""


def words(text: str) -> str:
    """The text without its frames and line breaks."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


def test_help_imports_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED], capture_output=True, text=True, cwd=REPOSITORY, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


def test_no_option_leaves_its_name_to_a_metavar():
    """Some versions of typer then take the metavar for the name."""
    looked_at = 0
    for command in app.registered_commands:
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            for option in getattr(hint, "__metadata__", ()):
                if not isinstance(option, OptionInfo):
                    continue
                looked_at += 1
                # Beside Annotated, typer keeps the first name that is given as the default.
                is_named = option.param_decls or str(option.default).startswith("--")
                assert is_named or (option.metavar or "").lower() != name, (command.callback, name)
    assert looked_at > 100


def test_help_lists_the_commands(keyreduce):
    result = keyreduce("--help")
    assert result.code == 0
    for command in COMMANDS:
        assert re.search(rf"│ {command} ", result.out)
    assert keyreduce("-h").out == result.out


def test_help_of_prune_names_the_methods(keyreduce):
    assert f"What chooses: {', '.join(METHODS)}; keyreduce methods says more." in words(keyreduce("prune", "-h").out)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_short_and_ends_in_no_column(keyreduce, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    lines = keyreduce(command, "--help").out.splitlines()
    assert 10 <= len(lines) <= 90
    assert max(map(len, lines)) <= 80
    # A flag has no word for a value, and a panel stands around each option.
    assert not [line for line in lines if "bool" in line or "…" in line]
    assert [line.split()[1] for line in lines if line.startswith("╭")][-1] in ("Output", "Hardware")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_of_the_help_can_be_typed(keyreduce, command):
    """They are parsed; what they name need not be there."""
    examples = re.findall(r"^  \$ keyreduce (.*)$", keyreduce(command, "--help").out, re.MULTILINE)
    assert len(examples) == 2
    group = get_command(app)
    for example in examples:
        name, *arguments = shlex.split(example)
        assert name == command
        with group.make_context("keyreduce", [name, *arguments]) as context:
            _, parsed, rest = group.resolve_command(context, [name, *arguments])
            parsed.make_context(name, rest, parent=context)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("calibrate", ["[default: in --work]", "[default: the Python standard library's source]", "NUM_BATCHES"]),
        ("prune", ["0.25 with --target or --method;", "[default: auto; env:", "PRUNING_STRATEGY", "OUTPUT_DIR"]),
        ("convert-dcp", ["[SRC] [DST]", "[default: what prune or recover wrote into --work; env:", "COMPRESSED_MODEL"]),
        ("benchmark", ["[default: 1024]", "BASE_MODEL_DIR", "COMPRESSED_MODEL"]),
        ("eval", ["[default: what prune or recover wrote into --work;", "KEYREDUCE_WORK", "keyreduce-out"]),
    ],
)
def test_help_tells_defaults_and_variables(keyreduce, monkeypatch, command, told):
    monkeypatch.setenv("COLUMNS", "200")
    text = words(keyreduce(command, "--help").out)
    for words_ in told:
        assert words_ in text


@pytest.mark.parametrize(
    ("amount", "told"),
    [(0, "0"), (999, "999"), (999.9, "1k"), (12_300, "12.3k"), (1_500_000, "1.5M"), (-2e9, "-2G"), (3e15, "3000T")],
)
def test_scaled(amount, told):
    assert scaled(amount) == told


def test_mebibytes():
    assert mebibytes(3 * 2**20 / 4) == "0.75 MiB"
    assert mebibytes(2**31) == "2,048.00 MiB"
