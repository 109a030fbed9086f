"""The examples of docs/ run as they stand there, from the first to the last, but on short rows of text."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
# What the examples take for granted: some documents to calibrate on, and others to measure on.
GIVEN = """
import sysconfig
from pathlib import Path
documents = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]
texts = [path.read_text() for path in documents]
held_out = [path.read_text() for path in sorted(Path(sysconfig.get_path("stdlib"), "email").glob("*.py"))]
"""
# Their figures are not tested: rows of the default lengths would take minutes.
SHORT_ROWS = """
import keyreduce
def shorten(name):
    def call(*arguments, **settings):
        from keyreduce.api import functions
        return getattr(functions, name)(*arguments, batch_size=1, seq_len=64, **settings)
    setattr(keyreduce, name, call)
for name in ("calibrate", "recover", "evaluate"):
    shorten(name)
"""


def run(python: str, code: str, folder: Path) -> str:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    done = subprocess.run(
        [python, "-c", SHORT_ROWS + code], capture_output=True, text=True, cwd=folder, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_examples_of_the_api_run(python, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / "python.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    printed = run(python, GIVEN + "".join(blocks), tmp_path)
    assert "head_k_dim 64" in printed
    assert "[128, 96] [128, 104]" in printed
    assert "`allocate` is 'evenly'; take one of uniform, energy allocate" in printed
    assert (tmp_path / "recovered" / "keyreduce.json").is_file()
    assert (tmp_path / "small" / "model.safetensors").is_file()


@pytest.mark.parametrize("notebook", sorted(DOCS.glob("*.ipynb")), ids=lambda path: path.name)
def test_the_notebook_runs(notebook, python, tmp_path):
    cells = json.loads(notebook.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 5
    assert any(output.get("data", {}).get("image/png") for cell in cells for output in cell.get("outputs", []))
    printed = run(python, "\n".join(code), tmp_path)
    assert "perplexity" in printed
