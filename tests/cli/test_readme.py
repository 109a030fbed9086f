"""Every command of the README runs, in the order in which it stands there, and so does its Python."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()

# What the README's code generates is what the model says of the whole text before each token.
WITHOUT_STATE = """
generated, length = model.generate(**tokens, max_new_tokens=16), tokens["input_ids"].shape[1]
scores = model(generated, use_cache=False).logits[0, length - 1 : -1]
assert generated.shape[1] == length + 16
assert scores.argmax(-1).tolist() == generated[0, length:].tolist()
"""


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def shell_lines() -> list[str]:
    lines = (line for block in blocks("sh") for line in block.splitlines())
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


def python(word: str, text: str = README) -> str:
    """The one block of Python that holds a word."""
    (code,) = [block for block in blocks("python", text) if word in block]
    return code


def test_commands_of_the_readme_run(keyreduce):
    Path("docs").mkdir()
    Path("docs/guide.md").write_text("A guide to the state of a linear attention layer.\n" * 60)
    Path("notes.jsonl").write_text('{"text": "keys are written, values are read"}\n' * 60)
    commands = [shlex.split(line) for line in shell_lines() if line.startswith("keyreduce ")]
    assert len(commands) >= 7
    for command in commands:
        result = keyreduce(*command[1:])
        assert result.code == 0, f"{' '.join(command)}: {result.err}"
    code = python("from_pretrained")
    subprocess.run([sys.executable, "-c", code + WITHOUT_STATE], check=True, capture_output=True, timeout=600)


def test_the_method_of_the_guide_is_found_where_another_package_registers_it(tmp_path, keyreduce):
    package = tmp_path / "site"
    (package / "your_package-1.0.dist-info").mkdir(parents=True)
    (package / "your_package-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: your_package\n")
    (entry_points,) = [block for block in blocks("toml", CONTRIBUTING) if "entry-points" in block]
    table = tomllib.loads(entry_points)["project"]["entry-points"]
    lines = [f"[{group}]\n{name} = {value}\n" for group, points in table.items() for name, value in points.items()]
    (package / "your_package-1.0.dist-info" / "entry_points.txt").write_text("\n".join(lines))
    (package / "your_package").mkdir()
    (package / "your_package" / "unit_energy.py").write_text(python("Method(", CONTRIBUTING))
    path = os.pathsep.join([str(package), str(ROOT), str(ROOT / "flash-linear-attention")])

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "keyreduce", *arguments]
        environment = os.environ | {"PYTHONPATH": path, "COLUMNS": "200"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert keyreduce("calibrate", "--num-batches", 1, "--batch-size", 1, "--seq-len", 64, "--work", "out").code == 0
    assert "unit-energy" in run("methods")
    assert "pruned with unit-energy" in run("prune", "--method", "unit-energy", "--keep", "8", "--work", "out")
    step = json.loads(Path("out/pruned/keyreduce.json").read_text())["steps"][0]
    sums = load_file("out/calibration.safetensors")
    for layer, cut in step["layers"].items():
        gram_HKK = sums[f"layers.{layer}.unit_query_gram_HKK"] + sums[f"layers.{layer}.unit_key_gram_HKK"]
        for gram_KK, kept in zip(gram_HKK, cut["key"], strict=True):
            assert kept == sorted(gram_KK.diagonal().argsort(descending=True, stable=True)[:8].tolist())
    # Where the package is not installed, the method is not there.
    result = keyreduce("prune", "--method", "unit-energy", "--keep", 8, "--work", "out", "--overwrite")
    assert result.code == 2
    assert "there is no method 'unit-energy'" in result.err


@pytest.mark.parametrize("line", [line for line in shell_lines() if line.startswith("make ")])
def test_targets_of_the_readme_exist(line):
    result = subprocess.run([*shlex.split(line), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_session_is_what_the_demo_runs():
    session = re.findall(r"^\$ (keyreduce .*)$", README, flags=re.MULTILINE)
    dry_run = subprocess.run(["make", "demo", "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert session == re.findall(r"^\S*/(keyreduce .*)$", dry_run, flags=re.MULTILINE)
