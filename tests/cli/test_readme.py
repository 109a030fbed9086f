"""Every command of the README runs, in the order in which it stands there, and so does its Python."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def shell_lines() -> list[str]:
    lines = (line for block in blocks("sh") for line in block.splitlines())
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


def test_commands_of_the_readme_run(keyreduce):
    Path("docs").mkdir()
    Path("docs/guide.md").write_text("A guide to the state of a linear attention layer.\n" * 60)
    Path("notes.jsonl").write_text('{"text": "keys are written, values are read"}\n' * 60)
    commands = [shlex.split(line) for line in shell_lines() if line.startswith("keyreduce ")]
    assert len(commands) >= 7
    for command in commands:
        result = keyreduce(*command[1:])
        assert result.code == 0, f"{' '.join(command)}: {result.err}"
    (code,) = blocks("python")
    backend = "import fla_torch; fla_torch.enable()\n"
    subprocess.run([sys.executable, "-c", backend + code], check=True, capture_output=True, timeout=300)


@pytest.mark.parametrize("line", [line for line in shell_lines() if line.startswith("make ")])
def test_targets_of_the_readme_exist(line):
    result = subprocess.run([*shlex.split(line), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_session_is_what_the_demo_runs():
    session = re.findall(r"^\$ (keyreduce .*)$", README, flags=re.MULTILINE)
    dry_run = subprocess.run(["make", "demo", "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert session == re.findall(r"^\S*/(keyreduce .*)$", dry_run, flags=re.MULTILINE)
